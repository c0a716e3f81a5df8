"""Bodies of requests: JSON of bounded size and depth, every number within bounds, what cannot be honoured refused.

Fields that nobody knows are accepted, as by other servers, and logged once; those that would change the answer if they
were left out are refused in a sentence.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from vl2_jax.errors import shown
from vl2_jax.inference.options import MOST_BIASES, MOST_STOP_IDS
from vl2_jax.serving.http.problems import Problem, refused
from vl2_jax.serving.requests import MOST_ALTERNATIVES

log = logging.getLogger("vl2_jax.serving")

_MOST_VALUES = 1_000_000  # more commas and brackets than this take more memory than their bytes
_DEEPEST = 32  # objects in objects; messages with parts have 5
_MOST_LOGGED = 100  # names of unknown fields
_unknown: set[str] = set()

Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Text = Annotated[str, StringConstraints(max_length=2**24)]

# Fields whose meaning this server does not have, and their values that ask for nothing.
_NOT_HONOURED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "response_format": ({"type": "text"},),
    **dict.fromkeys(("structured_outputs", "structural_tag"), ({},)),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding"), ()),
    **dict.fromkeys(("grammar", "json_schema", "regex", "ebnf"), ("",)),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "web_search_options", "prompt_embeds", "suffix"), ("",)),
    **dict.fromkeys(("chat_template", "documents"), ("", [])),
    "mm_processor_kwargs": ({},),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "best_of"), ()),
    **dict.fromkeys(("bad_words", "allowed_token_ids", "logits_processors"), ([],)),
    **dict.fromkeys(("use_beam_search", "include_stop_str_in_output", "return_tokens_as_token_ids", "echo"), (False,)),
}
_HARMLESS = {  # known, and without meaning here
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "prediction", "safety_identifier",
    "prompt_cache_key", "skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt",
    "continue_final_message", "chat_template_kwargs", "priority", "request_id", *_NOT_HONOURED,
}  # fmt: skip


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = None


class Body(BaseModel, ABC):
    """What both kinds of requests may hold."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None  # -1 and 0 are no limit
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MOST_STOP_IDS)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    logit_bias: Annotated[dict[TokenName, Bias], Field(max_length=MOST_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, StringConstraints(max_length=1000)] | None = None
    boxes_on: Count | None = None  # the picture that boxes are pixels of, from 1; by default the last

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """Likeliest tokens that are told for each token; None where not even its own log-probability is wanted."""

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Body):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else prompt


Kind = TypeVar("Kind", bound=Body)


def read_body(kind: type[Kind], data: bytes) -> Kind:
    """A request, checked.

    Raises:
      Problem: status 400; it is no JSON, goes too deep, lacks something, is out of bounds or cannot be honoured.
    """
    return checked(kind, _json(data))


def checked(kind: type[Kind], given: dict[str, Any]) -> Kind:
    """A request of fields in hand.

    Raises:
      Problem: status 400; it lacks something, is out of bounds or cannot be honoured.
    """
    try:
        body = kind.model_validate(given)
    except ValidationError as error:
        _refuse(error)
    _check_extras(body, given)
    return body


def _json(data: bytes) -> dict[str, Any]:
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES:
        raise Problem(400, f"the body of a request holds more than {_MOST_VALUES:,} values; send less.")
    try:
        found = json.loads(data, parse_constant=_not_a_number)
    except Problem:
        raise
    except (ValueError, RecursionError):
        raise Problem(400, f"the body of a request must be JSON, got {shown(data[:60].decode('latin-1'))}.") from None
    if not isinstance(found, dict):
        raise Problem(400, f"the body of a request must be a JSON object, got {shown(found)}.")
    _check_depth(found)
    return found


def _not_a_number(name: str) -> NoReturn:
    raise Problem(400, f"the body of a request holds {name}, which is no number of JSON.")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        inner = (list(outer.values() if isinstance(outer, dict) else outer) for outer in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise Problem(400, f"the body of a request has objects in objects deeper than {_DEEPEST}; flatten it.")


def _refuse(error: ValidationError) -> NoReturn:
    """The first thing that is wrong; of alternatives, the one that got furthest."""
    wrong = error.errors(include_url=False, include_context=False)
    first = max(wrong, key=lambda one: len(one["loc"]) if one["loc"][0] == wrong[0]["loc"][0] else 0)
    field = str(first["loc"][0])
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or str(part).isidentifier())
    if first["type"] == "missing":
        raise Problem(400, f"{where} is missing; give it.", param=field, code="missing_required_parameter")
    told = first["msg"][0].lower() + first["msg"][1:]
    raise Problem(400, f"{shown(where)[1:-1]} is {shown(first['input'])}: {told}.", param=field, code="invalid_value")


def _check_extras(body: Body, given: dict[str, Any]) -> None:
    """Refuses what cannot be honoured, and logs once what is not known."""
    for name, harmless in _NOT_HONOURED.items():
        value = given.get(name)
        if value is None or any(value == one and type(value) is type(one) for one in harmless):
            continue
        if name == "best_of" and value == (body.n or 1):
            continue
        raise refused(name, f"{name} is {shown(value)}, which this server cannot honour; leave it out.")
    if body.stream_options is not None and not body.stream:
        raise Problem(400, "stream_options is given, but stream is not true; leave it out.", param="stream_options")
    if isinstance(body, ChatBody) and body.top_logprobs and not body.logprobs:
        raise Problem(400, "top_logprobs is given, but logprobs is not true; add it.", param="top_logprobs")
    new = (body.model_extra or {}).keys() - _HARMLESS - _unknown
    for name in sorted(new)[: max(0, _MOST_LOGGED - len(_unknown))]:
        _unknown.add(name)
        log.warning("requests have the field %s, which means nothing here", shown(name))
