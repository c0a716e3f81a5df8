"""What a server serves: a model that is loading or there, how requests become prompts, and what is counted."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vl2_jax import __version__
from vl2_jax.errors import ContextLengthError, OverloadedError, RequestError, shown
from vl2_jax.inference.generate import room_for
from vl2_jax.processing.batch import TEXT, Encoded, Processor
from vl2_jax.processing.messages import ESCAPED_TAG, IMAGE_TAG
from vl2_jax.serving.http import MOST_BODY_BYTES
from vl2_jax.serving.http.bodies import Body, ChatBody, CompletionBody
from vl2_jax.serving.http.conversations import read_conversation
from vl2_jax.serving.http.decoding import Decoders, PictureLimits
from vl2_jax.serving.http.fetching import Fetcher
from vl2_jax.serving.http.metrics import Metrics
from vl2_jax.serving.http.problems import Problem, not_ready
from vl2_jax.serving.http.sampling import OPENAI, Defaults, sampling_of
from vl2_jax.serving.requests import Limits, Load, Request, Serves, Stage

_MOST_CHOICES = 128  # answers of one request
_COMPLETION_TOKENS = 16  # of an answer of /v1/completions that does not say, as OpenAI has it
_TEXTS_AT_ONCE = 2
_SECONDS_UNTIL_FREE = 1.0


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Attributes:
      names: what the model is called; answers give the first.
      keys: one of which a caller has to show; none where everybody may ask.
      limits: of the engine; what waits beyond them is refused before its pictures are looked at.
      pictures: what is decoded.
      media_domains: hosts whose pictures are fetched; none are fetched by default.
      defaults: of sampling.
      honor_detail: pictures of detail "low" are seen as one tile.
      hosts: names in the Host header that are answered; `None` is any.
      most_body: bytes of a request.
      send_seconds: that a client may take to read a piece of a stream.
    """

    names: tuple[str, ...]
    keys: tuple[str, ...] = ()
    limits: Limits = Limits()
    pictures: PictureLimits = PictureLimits()
    media_domains: frozenset[str] = frozenset()
    defaults: Defaults = OPENAI
    honor_detail: bool = False
    hosts: frozenset[str] | None = None
    most_body: int = MOST_BODY_BYTES
    send_seconds: float = 30.0


class Service:
    """A model behind the API. It is there once `begin` was called; until then requests are told how far it is."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics(settings.names[0], lambda: self.engine.load if self.engine else Load())
        self.fetcher = Fetcher(settings.media_domains)
        self.engine: Serves | None = None
        self.processor: Processor | None = None
        self.decoders: Decoders | None = None
        self._texts = ThreadPoolExecutor(_TEXTS_AT_ONCE, "encode")
        self._being_read = 0  # answers whose prompts are not with the engine yet
        self._stage = Stage("loading")

    def begin(self, engine: Serves, processor: Processor) -> None:
        """From here on requests are answered."""
        self.processor = processor.replace(max_pixels=self.settings.pictures.pixels)
        self.decoders = Decoders(self.processor, self.settings.pictures)
        self.decoders.wait_until_started()
        _ = processor.tokenizer.longest_token  # looked for in the whole vocabulary, once
        self.engine = engine

    def report(self, phase: str, done: int, total: int) -> None:
        """Tells callers how far the model is; a `progress.Report`."""
        if phase:
            name = "compiling" if phase.startswith("compil") else "loading"
            self._stage = Stage(name, phase, done / total if total else 0.0)

    def fail(self) -> None:
        """The model cannot be loaded."""
        self._stage = Stage("failed")

    def close(self) -> None:
        self._texts.shutdown(wait=False, cancel_futures=True)
        if self.decoders is not None:
            self.decoders.close()
        if self.engine is not None:
            self.engine.close()

    @property
    def stage(self) -> Stage:
        return self._stage if self.engine is None else self.engine.stage

    def is_full(self, choices: int = 1) -> bool:
        """Whether so much waits, or is still being read, that so many answers more are refused."""
        limits, load = self.settings.limits, self.engine.load if self.engine else Load()
        would_wait = load.running + load.waiting + self._being_read + choices - limits.max_running
        most_tokens = limits.max_waiting_tokens
        is_long = most_tokens is not None and load.waiting_tokens >= most_tokens
        return would_wait > limits.max_waiting or (would_wait > 0 and is_long)

    @property
    def context(self) -> int:
        engine, _ = self.ready()
        return engine.context

    @property
    def fingerprint(self) -> str:
        """Of what decides the answers: equal seeds give equal answers where it is equal."""
        told = f"{__version__} {self.settings.names[0]}"
        return "fp_" + hashlib.sha256(told.encode()).hexdigest()[:10]

    def ready(self) -> tuple[Serves, Processor]:
        """The engine, and what reads for it.

        Raises:
          Problem: status 503 or 500; the model is not there, not yet or not any more.
        """
        stage = self.stage
        if self.engine is not None and self.processor is not None and stage.name == "ready":
            return self.engine, self.processor
        if stage.name == "failed":
            raise Problem(500, "the engine has failed; the server has to be started again.", "server_error")
        if stage.name in ("draining", "closed"):
            raise not_ready("the server is shutting down and takes no requests any more; ask again.")
        share = f", {100 * stage.share:.0f} %" if stage.share else ""
        raise not_ready(f"the model is {stage.name}{stage.phase and f' ({stage.phase}{share})'}; try again later.")

    def check_room(self, choices: int = 1) -> None:
        """Refuses a request before pictures and texts are read that would be refused after it.

        Raises:
          Problem, OverloadedError: the model is not there, or too much waits.
        """
        self.ready()
        if self.is_full(choices):
            raise OverloadedError("as many requests wait as this server lets wait; try again.", _SECONDS_UNTIL_FREE)

    async def requests(self, body: Body, caller: int = 0) -> list[Request]:
        """What a body asks the engine for: of each prompt `n` requests, which stand together.

        Args:
          caller: the number of the key that was shown. Callers of different keys share no computed prompts.

        Raises:
          Problem, VL2Error: it cannot be answered, or not now.
        """
        engine, processor = self.ready()
        if body.model not in self.settings.names:
            raise unknown_model(body.model, self.settings.names)
        choices = body.n or 1
        texts = body.prompts if isinstance(body, CompletionBody) else []
        answers = choices * max(1, len(texts))
        if answers > _MOST_CHOICES:
            raise RequestError(f"n is {choices} for {len(texts)} prompts; together at most {_MOST_CHOICES} answers.")
        self.check_room(answers)
        self._being_read += answers
        try:
            prompts = await (self._conversation(body) if isinstance(body, ChatBody) else self._texts_of(texts))
        finally:
            self._being_read -= answers
        salt = f"{caller} {body.cache_salt or ''}" if len(self.settings.keys) > 1 else body.cache_salt or ""
        longest = None if isinstance(body, ChatBody) else _COMPLETION_TOKENS
        vocabulary = len(processor.tokenizer)
        for id_ in (*(body.stop_token_ids or ()), *map(int, body.logit_bias or ())):
            _check_id(id_, vocabulary)
        made = []
        for prompt in prompts:
            options = sampling_of(body, self.settings.defaults, room_for(prompt, self.context), longest)
            boxes_on = _boxes_on(body, len(prompt.image_sizes))
            for choice in range(choices):
                seed = None if body.seed is None else _wrapped(body.seed + choice)
                request = Request(prompt, replace(options, seed=seed), body.alternatives or 0, salt, boxes_on)
                engine.check(request)
                made.append(request)
        return made

    async def _conversation(self, body: ChatBody) -> list[Encoded]:
        _, processor = self.ready()
        asked = read_conversation(body.messages, self.settings.pictures.most, self.settings.honor_detail)
        self._check_length(sum(len(message["content"]) for message in asked.messages))
        if not asked.pictures:
            return [await self._in_thread(processor.encode, asked.messages)]
        files = await self.fetcher.files(asked.pictures)
        assert self.decoders is not None
        low = [sent.is_low for sent in asked.pictures]
        return [await self.decoders.encode(asked.messages, files, low)]

    async def _texts_of(self, prompts: Sequence[str | list[int]]) -> list[Encoded]:
        _, processor = self.ready()
        self._check_length(max((len(prompt) for prompt in prompts if isinstance(prompt, str)), default=0))
        return [await self._in_thread(_bare_prompt, processor, prompt) for prompt in prompts]

    async def _in_thread(self, work: Callable[..., Encoded], *arguments: Any) -> Encoded:
        return await asyncio.get_running_loop().run_in_executor(self._texts, work, *arguments)

    def _check_length(self, characters: int) -> None:
        """Refuses what is too long however it is cut into tokens, before it is cut."""
        _, processor = self.ready()
        least = characters // processor.tokenizer.longest_token
        if least > self.context:
            raise ContextLengthError(
                f"the text has {characters:,} characters, which are more than {self.context:,} tokens; shorten it."
            )


def unknown_model(name: str, names: Sequence[str]) -> Problem:
    return Problem(
        404,
        f"there is no model {shown(name)} here; there is {', '.join(names)}.",
        "not_found_error",
        param="model",
        code="model_not_found",
    )


def _bare_prompt(processor: Processor, prompt: str | list[int]) -> Encoded:
    """A text as it is, after the token that begins one; or ids as they are."""
    tokenizer = processor.tokenizer
    if isinstance(prompt, str):
        return processor.encode_text(prompt.replace(IMAGE_TAG, ESCAPED_TAG))
    for id_ in prompt:
        _check_id(id_, len(tokenizer))
    if tokenizer.image_id in prompt:
        raise RequestError(f"prompt holds {tokenizer.image_id}, which stands for pictures; use /v1/chat/completions.")
    ids = np.asarray(prompt, np.int32)
    nothing = np.full_like(ids, TEXT)
    size = processor.config.tile_size
    tiles, crops = np.zeros((0, size, size, 3), np.uint8), np.zeros((0, 2), np.int32)
    return Encoded(ids, ids, nothing, tiles, crops, (), processor.config.token_grid**2, "")


def _check_id(id_: int, vocabulary: int) -> None:
    if id_ >= vocabulary:
        raise RequestError(f"{id_} is no token; the vocabulary has {vocabulary:,}, from 0 to {vocabulary - 1}.")


def _boxes_on(body: Body, pictures: int) -> int:
    if body.boxes_on is None:
        return -1
    if body.boxes_on > pictures:
        raise RequestError(f"boxes_on is {body.boxes_on}; the messages hold {pictures} picture(s), counted from 1.")
    return body.boxes_on - 1


def _wrapped(seed: int) -> int:
    """A seed that stays in 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
