"""From a request to the events of its answers: between the engine's thread and the loop of the server.

    engine's thread: listener --call_soon_threadsafe--> queue --> `async for choice, event in answers`

A client that goes away cancels what it asked for, wherever it waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from vl2_jax.errors import ClosedError
from vl2_jax.inference.answers import Answer
from vl2_jax.serving.requests import Event, Failed, Finished, Piece, Request, Serves, Started, Submission, Token

Kind = TypeVar("Kind")
Watch = Callable[[int, Event, float], None]  # the choice, what happened, and when by `time.perf_counter`


class ClientGone(Exception):
    """Whoever asked does not wait for the answer any more."""


class Answers:
    """Submitted requests, one for each choice; all of them, or none.

    Raises:
      OverloadedError, ClosedError, VL2Error: see `Serves.submit`.
    """

    def __init__(self, engine: Serves, requests: Sequence[Request], watch: Watch):
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event, float]] = asyncio.Queue()
        self._watch, self._open = watch, len(requests)
        self.submissions: list[Submission] = []
        try:
            for choice, request in enumerate(requests):
                self.submissions.append(engine.submit(request, self._listener(choice)))
        except BaseException:
            self.cancel()
            raise

    @property
    def ended(self) -> bool:
        """Whether the last event of every choice was read."""
        return not self._open

    def cancel(self) -> None:
        """Ends all that has not ended, and frees what it holds."""
        for submission in self.submissions:
            submission.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all choices as they come, until each has had its last.

        Raises:
          Exception: why one of them failed; the others are cancelled.
        """
        try:
            while self._open:
                choice, event, when = await self._events.get()
                self._watch(choice, event, when)
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    if event.answer.finish_reason == "cancelled":
                        raise ClosedError("the server is shutting down; ask again.")
                    self._open -= 1
                yield choice, event
        finally:
            if self._open:
                self.cancel()

    def _listener(self, choice: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event, time.perf_counter()))

        return listen


@dataclass
class Choice:
    """A whole answer."""

    tokens: list[Token] = field(default_factory=list)
    reused: int = 0
    answer: Answer | None = None

    @property
    def finished(self) -> Answer:
        if self.answer is None:
            raise RuntimeError("an answer ended without its last event")
        return self.answer


async def collected(answers: Answers, choices: int) -> list[Choice]:
    found = [Choice() for _ in range(choices)]
    async for number, event in answers:
        if isinstance(event, Started):
            found[number].reused = event.reused_tokens
        elif isinstance(event, Piece):
            found[number].tokens += event.tokens
        elif isinstance(event, Finished):
            found[number].answer = event.answer
    return found


async def while_connected(request: HttpRequest, work: Awaitable[Kind]) -> Kind:
    """The result of `work`, which is cancelled as soon as the client closes its connection.

    Raises:
      ClientGone: it did.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
