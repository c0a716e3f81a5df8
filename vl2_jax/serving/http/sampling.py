"""How an answer is chosen, from the fields of a request: OpenAI's defaults where nothing is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vl2_jax.errors import RequestError, shown
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.serving.http.bodies import Body, ChatBody

_WITHOUT_WORDS = {  # what a request that says nothing asks for
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "min_p": 0.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": False,
}  # fmt: skip
_ANY_LENGTH = 1 << 31  # tokens, more than any context: how many there may be is known with the request
_ALSO = ("stop", "stop_token_ids", "logit_bias", "seed")


@dataclass(frozen=True)
class Defaults:
    """What a request that says nothing asks for.

    Attributes:
      options: of sampling.
      max_tokens: of an answer; `None` is as much as the context holds.
    """

    options: Mapping[str, Any]
    max_tokens: int | None = None

    @classmethod
    def read(cls, text: str | None) -> Defaults:
        """OpenAI's, with those of a JSON object (`--override-generation-config`).

        Raises:
          RequestError: it is no JSON object, or one of its values is none that a request may have.
        """
        try:
            given = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise RequestError(f"--override-generation-config is {shown(text)}; expected a JSON object.")
        longest = given.pop("max_new_tokens", given.pop("max_tokens", None))
        if unknown := given.keys() - _WITHOUT_WORDS.keys():
            known = ", ".join(("max_new_tokens", *_WITHOUT_WORDS))
            raise RequestError(
                f"--override-generation-config has {shown(min(unknown))}, which is no option; there are {known}."
            )
        options = {**_WITHOUT_WORDS, **given}
        SamplingOptions.of({**options, "max_tokens": _ANY_LENGTH if longest is None else longest})
        return cls(options, longest)


OPENAI = Defaults(_WITHOUT_WORDS)


def sampling_of(body: Body, defaults: Defaults, room: int, longest: int | None = None) -> SamplingOptions:
    """The options of a request whose answer may have `room` tokens, and `longest` where it does not say.

    Raises:
      RequestError: see `SamplingOptions`; or more tokens are the least than are the most.
    """
    said = {name: getattr(body, name) for name in (*defaults.options, *_ALSO)}
    given = {**defaults.options, **{name: value for name, value in said.items() if value is not None}}
    asked = (body.max_completion_tokens if isinstance(body, ChatBody) else None) or body.max_tokens
    wanted = asked or defaults.max_tokens or longest or room
    given["max_tokens"] = max(1, min(wanted, room))
    given["top_k"] = max(0, given["top_k"])
    if given["min_tokens"] > wanted:
        raise RequestError(f"min_tokens is {given['min_tokens']}; expected at most max_tokens, which is {wanted}.")
    if "logit_bias" in given:
        given["logit_bias"] = {int(id_): bias for id_, bias in given["logit_bias"].items()}
    return SamplingOptions.of(given)
