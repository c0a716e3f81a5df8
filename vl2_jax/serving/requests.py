"""What callers and the engine say to each other: a request goes in, events come out, one of them is the last.

    Request --submit--> engine --Started, Piece, Piece, ...--> Finished | Failed

Callers never touch the device, and the engine never touches a network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vl2_jax.inference.answers import Answer
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.processing.batch import Encoded


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
      prompt: an encoded conversation that ends where the answer begins.
      options: how tokens are chosen and where the answer ends.
      top_logprobs: alternatives to be told for each token, at most `MOST_ALTERNATIVES`.
      salt: only requests of one salt share computed prompts, so that none learns from time what others asked.
      boxes_on: the picture of the conversation that boxes belong to, counted as lists are.
    """

    prompt: Encoded
    options: SamplingOptions
    top_logprobs: int = 0
    salt: str = ""
    boxes_on: int = -1


MOST_ALTERNATIVES = 20


@dataclass(frozen=True)
class Token:
    """A token of an answer, with its log-probability and the likeliest ones at its place, `(id, log-probability)`."""

    id: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """The first token is computed; so many positions of the prompt were known from earlier requests."""

    reused_tokens: int


@dataclass(frozen=True)
class Piece:
    """New tokens, and the text that can be shown now, which may be of fewer or of earlier ones."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Finished:
    """The last event of an answer that came to its end; a cancelled one has the `finish_reason` "cancelled"."""

    answer: Answer


@dataclass(frozen=True)
class Failed:
    """The last event of a request that failed, and alone it. A `VL2Error` says what the caller can do."""

    error: Exception


Event = Started | Piece | Finished | Failed
Listener = Callable[[Event], None]  # called in the engine's thread: it must neither wait nor raise


class Submission(Protocol):
    """A request in the engine."""

    def cancel(self) -> None:
        """Ends it after the step that is running, which frees what it holds; nothing if it has ended."""


@dataclass(frozen=True)
class Stage:
    """Where an engine stands: "loading", "compiling", "ready", "draining", "failed" or "closed"."""

    name: str
    phase: str = ""  # what is being loaded or compiled
    share: float = 0.0  # of it, from 0 to 1

    @property
    def is_coming(self) -> bool:
        """Whether it is not ready yet, and will be."""
        return self.name in ("loading", "compiling")


@dataclass(frozen=True)
class Load:
    """What an engine is doing, and has done since it began."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    pages: int = 0
    pages_used: int = 0  # by running requests; others may hold prompts that are known
    preemptions: int = 0
    prefix_queries: int = 0  # positions of prompts that were looked up
    prefix_hits: int = 0
    compilations: int = 0  # of this process, since it was ready
    steps: int = 0
    tiles_encoded: int = 0


@dataclass(frozen=True)
class Limits:
    """How much an engine takes on.

    Attributes:
      max_running: requests that are decoded at once.
      max_waiting: requests that wait; a further one is refused.
      max_waiting_tokens: positions of prompts that wait, likewise; `None` is no limit.
      context: positions that a prompt and its answer may have together; `None` is the model's.
      pages: of the cache; `None` is as many as `max_running` requests of the whole context need, or as memory allows.
      prefix_cache: prompts that begin alike share what was computed.
    """

    max_running: int = 16
    max_waiting: int = 256
    max_waiting_tokens: int | None = None
    context: int | None = None
    pages: int | None = None
    prefix_cache: bool = True


class Serves(Protocol):
    """An engine as callers see it. All of it may be called from any thread."""

    def submit(self, request: Request, listener: Listener) -> Submission:
        """Takes a request on, before anything is computed.

        Raises:
          OverloadedError: too much waits.
          ContextLengthError, RequestError: it can never be answered.
          ClosedError: nothing is taken on any more.
        """

    def check(self, request: Request) -> None:
        """Raises what `submit` would raise for this request alone."""

    @property
    def stage(self) -> Stage: ...

    @property
    def load(self) -> Load: ...

    @property
    def context(self) -> int:
        """Positions that a prompt and its answer may have together."""

    def drain(self, seconds: float) -> None:
        """Takes nothing on any more and waits for what is running; cancels what is left after so many seconds."""

    def close(self) -> None: ...
