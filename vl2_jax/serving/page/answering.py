"""From an open question to its answer: the page asks the service as the routes of the API do, within its limits."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from vl2_jax.errors import VL2Error
from vl2_jax.inference.generate import picture_at
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.serving.http.answering import Answers
from vl2_jax.serving.http.bodies import ChatBody, checked
from vl2_jax.serving.http.problems import Problem, problem_of
from vl2_jax.serving.http.service import Service
from vl2_jax.serving.page.gallery import Gallery
from vl2_jax.serving.page.talk import Talk, Turn, Usage
from vl2_jax.serving.requests import Event, Finished, Piece, Request, Stage, Started

log = logging.getLogger("vl2_jax.serving")

_LOOKS = 0.2  # seconds between updates of a question that waits for its model


async def answer(service: Service, gallery: Gallery, talk: Talk, wishes: Mapping[str, Any]) -> AsyncIterator[None]:
    """Fills the open turn of a conversation, and yields whenever there is something new to show.

    Whatever goes wrong stands in the turn as a sentence. Who leaves the iterator cancels the answer.

    Args:
      wishes: arguments of `Talk.body` beside the model.
    """
    turn, salt, begun = talk.turns[-1], talk.salt, time.perf_counter()
    try:
        while (stage := service.stage).is_coming and not turn.is_stopped:
            turn.phase, turn.share = phase_of(stage), stage.share
            yield
            await asyncio.sleep(_LOOKS)
        async with contextlib.aclosing(_filled(service, gallery, talk, wishes, begun, turn)) as updates:
            async for _ in updates:
                yield
    except (VL2Error, Problem) as error:
        if not turn.is_stopped:
            turn.problem = problem_of(error).message
    except Exception:  # of the engine, or a defect: it is this question's, and the page goes on
        log.exception("an answer of the page failed")
        turn.problem = "this question failed in the engine; the terminal of `vl2 demo` says why. Ask again."
    finally:
        turn.phase = ""
        turn.ending = turn.ending or "stopped"
        if talk.salt != salt:  # the conversation was cleared meanwhile, perhaps before its last file was made
            gallery.forget(salt)
    yield


def phase_of(stage: Stage) -> str:
    """What a model that is not ready does, in words for people."""
    named = {"loading": "loading the model", "compiling": "compiling its programs"}.get(stage.name, stage.name)
    return named if stage.phase in ("", stage.name) else f"{named}: {stage.phase}"


async def _filled(
    service: Service, gallery: Gallery, talk: Talk, wishes: Mapping[str, Any], begun: float, turn: Turn
) -> AsyncGenerator[None, None]:
    """From the question on, once the model is there. Whoever stops the answer may clear its conversation, too, and ask
    something else in it: what is needed of the conversation is read before anything is waited for.
    """
    if turn.is_stopped:
        return
    turns, pictures, salt = talk.turns, talk.pictures, talk.salt
    body = checked(ChatBody, talk.body(service.settings.names[0], **wishes))
    turn.phase, turn.share = "looking at the pictures" if pictures else "reading", 0.0
    yield
    (request,) = await service.requests(body)
    if turn.is_stopped:
        return
    await asyncio.to_thread(gallery.add, pictures, request.prompt, salt)
    await asyncio.to_thread(gallery.tidy, turns, salt)
    turn.boxes_on = picture_at(request.prompt, request.boxes_on) if pictures else -1
    size = pictures[turn.boxes_on].size if pictures else None
    turn.phase, turn.usage = "thinking", Usage(len(request.prompt), request.prompt.picture_tokens)
    yield
    async with contextlib.aclosing(_written(service, turn, request, size, begun)) as updates:
        async for _ in updates:
            yield
    if turn.boxes and not turn.is_stopped:
        turn.saved = await asyncio.to_thread(gallery.draw, pictures[turn.boxes_on], turn.boxes, salt)


async def _written(
    service: Service, turn: Turn, request: Request, size: tuple[int, int] | None, begun: float
) -> AsyncGenerator[None, None]:
    if turn.is_stopped:
        return
    engine, _ = service.ready()
    turn.running = answers = Answers(engine, [request], service.metrics.watch([request], begun))
    first = 0.0
    try:
        async for _, event in answers:
            now = time.perf_counter()
            first = first or now
            _take(turn, event, size, now - first, first - begun)
            yield
    finally:
        answers.cancel()


def _take(turn: Turn, event: Event, size: tuple[int, int] | None, seconds: float, first_seconds: float) -> None:
    """What an event tells, into the turn; `size` is that of the picture that boxes are on."""
    assert turn.usage is not None
    if isinstance(event, Started):
        turn.usage = dataclasses.replace(turn.usage, reused_tokens=event.reused_tokens)
    elif isinstance(event, Piece):
        turn.phase = ""
        turn.answer += event.text
        new = turn.usage.new_tokens + len(event.tokens)
        turn.usage = dataclasses.replace(turn.usage, new_tokens=new, first_seconds=first_seconds, seconds=seconds)
        if size is not None:
            turn.boxes = parse_boxes(turn.answer, *size, picture=turn.boxes_on)
    elif isinstance(event, Finished):
        turn.ending = event.answer.finish_reason
