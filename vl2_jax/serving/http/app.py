"""The routes of OpenAI's API, and those that operators ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vl2_jax import __version__
from vl2_jax.errors import OverloadedError, VL2Error
from vl2_jax.processing.batch import Encoded
from vl2_jax.serving.http.answering import Answers, ClientGone, collected, while_connected
from vl2_jax.serving.http.bodies import Body, ChatBody, CompletionBody, Kind, read_body
from vl2_jax.serving.http.door import Door, respond
from vl2_jax.serving.http.problems import MISSING, Problem, as_event, problem_of
from vl2_jax.serving.http.replies import ChatReplies, Head, Replies, TextReplies, usage
from vl2_jax.serving.http.service import Service, unknown_model
from vl2_jax.serving.requests import Finished, Piece, Started

log = logging.getLogger("vl2_jax.serving")

_BODY_SECONDS = 120.0  # that a client may take to send its request
_BODIES_AT_ONCE = 16  # of the largest size: what is being read and decoded takes no more memory than these
_PING_SECONDS = 15  # a comment in a stream that says nothing, so that proxies keep it open
_DONE = b"data: [DONE]\n\n"
_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
_NOBODY = 499  # the status in the log where nobody reads the answer


def make_app(service: Service) -> ASGIApp:
    """The whole server as an ASGI application."""
    api = FastAPI(title="vl2-jax", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    intake = Intake(service.settings.most_body)

    async def complete(request: Request, kind: type[Kind], replies: type[Replies]) -> Response:
        arrived = time.perf_counter()
        async with intake.body(request) as data:
            service.check_room()
            body = read_body(kind, data)
            wanted = await while_connected(request, service.requests(body, request.state.caller))
            reply = replies(service.ready()[1].tokenizer, body.alternatives)
            prompts = [one.prompt for one in wanted[:: body.n or 1]]
            is_stream, includes_usage = body.stream, body.includes_usage
            del body, data  # megabytes of pictures, which nobody needs while the answer is written
        answers = Answers(service.ready()[0], wanted, service.metrics.watch(wanted, arrived))
        head = Head(service.settings.names[0], service.fingerprint, replies.prefix)
        if is_stream:
            content = events(answers, len(wanted), head, reply, prompts if includes_usage else None)
            return _Stream(answers, content, service)
        try:
            choices = await while_connected(request, collected(answers, len(wanted)))
        finally:
            answers.cancel()
        told = usage(prompts, sum(len(c.finished.token_ids) for c in choices), choices[0].reused)
        return JSONResponse(head.object(reply.kind, [reply.choice(n, c) for n, c in enumerate(choices)], usage=told))

    @api.post("/v1/chat/completions", openapi_extra=_described(ChatBody))
    async def chat(request: Request) -> Response:
        return await complete(request, ChatBody, ChatReplies)

    @api.post("/v1/completions", openapi_extra=_described(CompletionBody))
    async def text(request: Request) -> Response:
        return await complete(request, CompletionBody, TextReplies)

    @api.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.settings.names]})

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in service.settings.names:
            raise unknown_model(name, service.settings.names)
        return JSONResponse(_model(service, name))

    @api.get("/health")
    @api.get("/ping")
    async def health() -> Response:
        return Response(status_code=503 if service.stage.name in ("failed", "closed") else 200)

    @api.get("/ready")
    async def ready() -> Response:
        stage = service.stage
        told = {"stage": stage.name, "phase": stage.phase, "share": round(stage.share, 3)}
        try:
            service.ready()
            if service.is_full():
                raise Problem(503, "as many requests wait as this server lets wait.", "server_error", code="overloaded")
        except Problem as problem:
            return respond(Problem(503, problem.message, "server_error", code="not_ready"), told)
        return JSONResponse(told)

    @api.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.read(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.exception_handler(Problem)
    @api.exception_handler(VL2Error)
    async def told(_: Request, error: Exception) -> Response:
        return respond(problem_of(error))

    @api.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        path = f"{request.method} {request.url.path}"[:100]
        said = "exists only for other methods" if error.status_code == 405 else "does not exist"
        return respond(Problem(error.status_code, f"{path} {said}.", MISSING, headers=dict(error.headers or {})))

    @api.exception_handler(ClientGone)
    @api.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: Exception) -> Response:
        service.metrics.client_left()
        return Response(status_code=_NOBODY)

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return respond(problem_of(error))

    return Door(api, service)


async def events(
    answers: Answers, choices: int, head: Head, reply: Replies, prompts: list[Encoded] | None
) -> AsyncIterator[bytes]:
    """Server-sent events of a stream: openings, pieces, endings, the usage and `[DONE]`.

    Args:
      prompts: whose tokens the usage counts; `None` where it is not wanted.
    """
    usage_of_chunks: dict[str, Any] = {} if prompts is None else {"usage": None}

    def chunk(choice: dict[str, Any]) -> bytes:
        return _event(head.object(reply.chunk_kind, [choice], **usage_of_chunks))

    new_tokens = cached = 0
    try:
        for number in range(choices):
            if opening := reply.opening(number):
                yield chunk(opening)
        async for number, event in answers:
            if isinstance(event, Started) and number == 0:
                cached = event.reused_tokens
            elif isinstance(event, Piece) and (event.text or reply.told(event.tokens)):
                yield chunk(reply.piece(number, event.text, reply.told(event.tokens)))
            elif isinstance(event, Finished):
                new_tokens += len(event.answer.token_ids)
                yield chunk(reply.closing(number, event.answer))
        if prompts is not None:
            told = usage(prompts, new_tokens, cached)
            yield _event(head.object(reply.chunk_kind, [], usage=told))
    except Exception as error:  # the status was sent: the stream tells it
        problem = problem_of(error)
        if problem.status >= 500:
            log.error("a stream failed", exc_info=error)
        yield _event(as_event(problem))
    yield _DONE


class _Stream(EventSourceResponse):
    """A stream that ends what it tells of, whether it was begun, finished, left by its client or read too slowly."""

    def __init__(self, answers: Answers, content: AsyncIterator[bytes], service: Service):
        seconds = service.settings.send_seconds
        super().__init__(
            content, sep="\n", ping=_PING_SECONDS, send_timeout=seconds, client_close_handler_callable=self._left
        )
        self._answers, self._metrics = answers, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()

    async def _left(self, _: Message) -> None:
        if not self._answers.ended:  # else it has all, and closes the connection
            self._metrics.client_left()


class Intake:
    """Bodies of requests, of which only so many bytes are here at once."""

    def __init__(self, most: int):
        self._most, self._held = most, 0

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, as long as it is needed.

        Raises:
          Problem: it is no JSON by its type (a web page cannot send that type elsewhere without being asked), too
            large, or comes too slowly.
          OverloadedError: other bodies take the room.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise Problem(400, "the Content-Type of a request must be application/json.", code="invalid_content_type")
        too_large = Problem(
            413, f"the body of a request holds more than {self._most:,} bytes; send less.", code="body_too_large"
        )
        length = request.headers.get("content-length", "0")
        if len(length) > 12 or int(length) > self._most:
            raise too_large
        held, data, deadline = 0, bytearray(), asyncio.timeout(_BODY_SECONDS)
        try:
            with contextlib.suppress(TimeoutError):
                async with deadline:
                    async for piece in request.stream():
                        held += len(piece)
                        self._held += len(piece)
                        if held > self._most:
                            raise too_large
                        if self._held > _BODIES_AT_ONCE * self._most:
                            raise OverloadedError("other requests take all room for bodies; try again.", 1.0)
                        data += piece
            if deadline.expired():
                raise Problem(408, "the body of the request came too slowly; send it again.", code="timeout")
            yield bytes(data)
        finally:
            self._held -= held


def _event(value: dict[str, Any]) -> bytes:
    """On one line for every reader: JSON escapes what ASCII breaks lines with, and here what Unicode does."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.translate(_BREAKS).encode() + b"\n\n"


def _model(service: Service, name: str) -> dict[str, Any]:
    context = service.engine.context if service.engine else service.settings.limits.context
    permission = {
        "id": f"modelperm-{name}", "object": "model_permission", "created": service.created, "organization": "*",
        "group": None, "is_blocking": False, "allow_create_engine": False, "allow_sampling": True,
        "allow_logprobs": True, "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
    }  # fmt: skip
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "vl2-jax",
        "root": service.settings.names[0], "parent": None, "max_model_len": context, "permission": [permission],
    }  # fmt: skip


def _described(kind: type[Body]) -> dict[str, Any]:
    """What `/openapi.json` says of a body, which the routes read themselves."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
