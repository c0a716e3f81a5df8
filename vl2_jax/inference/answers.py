"""What comes back: an answer, what it took, and the writer that turns ids into text and knows where it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from vl2_jax.inference.options import SamplingOptions
from vl2_jax.processing.grounding import Box
from vl2_jax.processing.tokenizer import AnswerStream, Tokenizer


@dataclass
class Timings:
    """Seconds that a batch took, and what they were spent on."""

    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    compile_seconds: float = 0.0  # until the decoder is compiled, or read from its file, and there is a first token
    decode_seconds: float = 0.0  # of all tokens after the first
    tiles: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    waited_seconds: float = 0.0  # for a server that answers others


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    Attributes:
      text: without control tokens; grounding tags are kept.
      token_ids: as generated, the end-of-sentence id included.
      logprobs: log-probability of each id under the model's own distribution.
      boxes: what the text points at, and its beginning if the caller gave one, in pixels of one of the conversation's
        pictures.
      finish_reason: "stop" (end of sentence or a stop string) or "length".
      prompt_tokens: length of the prompt.
      timings: of the batch that it was computed in.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    boxes: list[Box]
    finish_reason: str
    prompt_tokens: int
    timings: Timings = field(default_factory=Timings, compare=False)


class AnswerWriter:
    """Turns the ids of one row into text, and knows where the answer ends."""

    def __init__(self, tokenizer: Tokenizer, options: SamplingOptions, limit: int):
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.limit = limit
        self.finish_reason = ""
        self._stream: AnswerStream = tokenizer.stream()
        self._ends = {*options.stop_token_ids, *(() if options.ignore_eos else (tokenizer.eos_id,))}
        self._stop = options.stops
        self._unsent = ""
        self._closed = False
        self._was_cut = False

    @property
    def finished(self) -> bool:
        return bool(self.finish_reason)

    def push(self, id_: int, logprob: float) -> str:
        """Text that can be shown now: it cannot be the beginning of a stop string any more."""
        if self.finished:
            return ""
        self.ids.append(id_)
        self.logprobs.append(logprob)
        self._unsent += self._stream.push(id_)
        if id_ in self._ends or self._cut_at_stop():
            self.finish_reason = "stop"
        elif len(self.ids) == self.limit:
            self.finish_reason = "length"
        return "" if self.finished else self._send(len(self._unsent) - self._held_back())

    def close(self) -> str:
        """What was held back; nothing the second time."""
        if self._closed:
            return ""
        self._closed = True
        if not self._was_cut:
            self._unsent += self._stream.finish()
            self._cut_at_stop()
        return self._send(len(self._unsent))

    def _cut_at_stop(self) -> bool:
        places = [place for stop in self._stop if (place := self._unsent.find(stop)) >= 0]
        if places:
            self._unsent, self._was_cut = self._unsent[: min(places)], True
        return bool(places)

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if self._unsent.endswith(stop[:n]))
        return max(lengths, default=0)

    def _send(self, length: int) -> str:
        text, self._unsent = self._unsent[:length], self._unsent[length:]
        self.text += text
        return text
