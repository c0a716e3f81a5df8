"""Answers as OpenAI's API gives them: objects of `/v1/chat/completions`, `/v1/completions` and their chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vl2_jax.inference.answers import Answer
from vl2_jax.processing.batch import Encoded
from vl2_jax.processing.grounding import Box
from vl2_jax.processing.tokenizer import Tokenizer
from vl2_jax.serving.http.answering import Choice
from vl2_jax.serving.requests import Token

_VERY_UNLIKELY = -9999.0  # OpenAI's smallest log-probability


@dataclass(frozen=True)
class Head:
    """What every object of one answer shares."""

    model: str
    fingerprint: str
    prefix: str  # of the id
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: secrets.token_hex(16))

    def object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.key}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.fingerprint,
            **more,
        }


def usage(prompts: Sequence[Encoded], new_tokens: int, cached: int) -> dict[str, Any]:
    """Tokens of prompts, each counted once whatever the number of its answers, and of answers."""
    whole = sum(map(len, prompts))
    pictures = sum(prompt.picture_tokens for prompt in prompts)
    return {
        "prompt_tokens": whole,
        "completion_tokens": new_tokens,
        "total_tokens": whole + new_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached,
            "image_tokens": pictures,
            "text_tokens": whole - pictures,
        },
    }


class Replies(ABC):
    """Answers in one of the two forms.

    Args:
      alternatives: that are told for each token; `None` is nothing about tokens.
    """

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, tokenizer: Tokenizer, alternatives: int | None):
        self._tokenizer, self._alternatives = tokenizer, alternatives

    def told(self, tokens: Sequence[Token]) -> list[Token]:
        """The tokens that are told about: those of text, where any are wanted."""
        control = self._tokenizer.control_ids
        return [] if self._alternatives is None else [token for token in tokens if token.id not in control]

    @abstractmethod
    def choice(self, number: int, choice: Choice) -> dict[str, Any]:
        """A whole answer."""

    @abstractmethod
    def opening(self, number: int) -> dict[str, Any] | None:
        """What a stream begins with."""

    @abstractmethod
    def piece(self, number: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """New text of a stream, and the tokens that are told about."""

    @abstractmethod
    def closing(self, number: int, answer: Answer) -> dict[str, Any]:
        """What ends an answer of a stream."""


class ChatReplies(Replies):
    """`/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, number: int, choice: Choice) -> dict[str, Any]:
        answer = choice.finished
        message = {"role": "assistant", "content": answer.text, "refusal": None} | _boxes(answer.boxes)
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(self.told(choice.tokens)),
            "finish_reason": answer.finish_reason,
        }

    def opening(self, number: int) -> dict[str, Any] | None:
        return self._chunk(number, {"role": "assistant", "content": ""})

    def piece(self, number: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._chunk(number, {"content": text}, self._logprobs(tokens))

    def closing(self, number: int, answer: Answer) -> dict[str, Any]:
        return self._chunk(number, _boxes(answer.boxes), finish=answer.finish_reason)

    def _chunk(
        self, number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        content = [
            self._told(token.id, token.logprob)
            | {"top_logprobs": [self._told(*one) for one in token.alternatives[: self._alternatives]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _told(self, id_: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.bytes_of(id_)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


class TextReplies(Replies):
    """`/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, alternatives: int | None):
        super().__init__(tokenizer, alternatives)
        self._offsets: dict[int, int] = {}

    def choice(self, number: int, choice: Choice) -> dict[str, Any]:
        answer = choice.finished
        return self._choice(number, answer.text, self.told(choice.tokens), answer.finish_reason)

    def opening(self, number: int) -> dict[str, Any] | None:
        return None

    def piece(self, number: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._choice(number, text, tokens)

    def closing(self, number: int, answer: Answer) -> dict[str, Any]:
        return self._choice(number, "", (), answer.finish_reason)

    def _choice(self, number: int, text: str, tokens: Sequence[Token], finish: str | None = None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": self._logprobs(number, tokens), "finish_reason": finish}

    def _logprobs(self, number: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        words = [self._text_of(token.id) for token in tokens]
        offset, offsets = self._offsets.get(number, 0), []
        for word in words:
            offsets.append(offset)
            offset += len(word)
        self._offsets[number] = offset
        return {
            "tokens": words,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._most_likely(token) for token in tokens] if self._alternatives else None,
            "text_offset": offsets,
        }

    def _most_likely(self, token: Token) -> dict[str, float]:
        """By their text; of tokens of one text, which are parts of characters, the likelier."""
        told = {self._text_of(id_): _finite(logprob) for id_, logprob in reversed(token.alternatives)}
        return dict(reversed(told.items()))

    def _text_of(self, id_: int) -> str:
        return self._tokenizer.bytes_of(id_).decode("utf-8", "replace")


def _boxes(boxes: Sequence[Box]) -> dict[str, Any]:
    """What an answer points at; pictures are counted from 1, as `boxes_on` counts them."""
    return {"boxes": [asdict(box) | {"picture": box.picture + 1} for box in boxes]} if boxes else {}


def _finite(logprob: float) -> float:
    return max(float(logprob), _VERY_UNLIKELY)
