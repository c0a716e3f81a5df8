"""Who may come in, before any route: keys, hosts, an id for each request, and a line in the log for each answer."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sse_starlette.sse import SendTimeoutError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vl2_jax.errors import shown
from vl2_jax.serving.http.problems import Problem, problem_of
from vl2_jax.serving.http.service import Service

log = logging.getLogger("vl2_jax.serving")

MOST_HEADER_BYTES = 16 << 10
LOOPBACK = "127.0.0.1"
OPEN = ("/health", "/ping", "/ready")  # what load balancers ask, without a key
_ASKED_OFTEN = (*OPEN, "/metrics")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Door:
    """Wraps an application: what has no key, or comes to a name that is not ours, does not reach it."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service
        self._keys = [key.encode() for key in service.settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        id_ = given.decode() if _ID.fullmatch(given) else secrets.token_hex(12)
        begun, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", id_.encode())]
            await send(message)

        try:
            caller, problem = self._let_in(scope["path"], headers)
            scope.setdefault("state", {})["caller"] = caller
            if problem is not None:
                await respond(problem)(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        except SendTimeoutError:
            self._service.metrics.client_left()
            log.warning("%s: the client reads too slowly; its answer was cancelled", id_)
        except Exception as error:
            log.exception("%s: %s %s failed", id_, scope["method"], shown(scope["path"]))
            if not status:
                await respond(problem_of(error))(scope, receive, answer)
        finally:
            handler = getattr(scope.get("route"), "path", "none")
            self._service.metrics.answered(handler, scope["method"], status)
            level = logging.DEBUG if handler in _ASKED_OFTEN else logging.INFO
            log.log(level, "%s: %s %s %d, %.3f s", id_, scope["method"], handler, status, time.perf_counter() - begun)

    def _let_in(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, Problem | None]:
        """The number of the caller's key, or why it is not let in."""
        if sum(len(name) + len(value) for name, value in headers.items()) > MOST_HEADER_BYTES:
            told = f"the headers of the request hold more than {MOST_HEADER_BYTES:,} bytes; send fewer."
            return 0, Problem(400, told, code="invalid_http")
        hosts = self._service.settings.hosts
        if hosts is not None and host_of(headers) not in hosts:
            told = "this server answers to its own names alone; call it as localhost, or start it with --api-key."
            return 0, Problem(400, told, code="invalid_host")
        if not self._keys or path in OPEN:
            return 0, None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # All are compared, each in the time that its length takes, whatever was found before.
        found = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(found):
            told = "the request shows no key that this server knows; send it as Authorization: Bearer KEY."
            return 0, Problem(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found.index(True), None


def respond(problem: Problem, extra: dict[str, Any] | None = None) -> JSONResponse:
    return JSONResponse(problem.body | (extra or {}), problem.status, problem.headers)


def host_of(headers: Mapping[bytes, bytes]) -> str:
    """The name that a request came to, without the port, in small letters."""
    return re.sub(rb":\d*$", b"", headers.get(b"host", b"")).decode("latin-1").lower()


def names_of_loopback(host: str = LOOPBACK) -> Sequence[str]:
    """What a server on this host alone is called: pages of the web that resolve to it come with names of their own."""
    return ("localhost", LOOPBACK, "[::1]", "::1", host.lower())
