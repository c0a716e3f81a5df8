"""The server in its process: a port that is bound before anything is loaded, a model that comes meanwhile, an end that
lets running answers finish.
"""

from __future__ import annotations

import gc
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from vl2_jax.errors import RequestError, VL2Error, shown
from vl2_jax.processing.batch import Processor
from vl2_jax.progress import Report
from vl2_jax.serving.http.app import make_app
from vl2_jax.serving.http.door import MOST_HEADER_BYTES, respond
from vl2_jax.serving.http.problems import Problem
from vl2_jax.serving.http.service import Service
from vl2_jax.serving.requests import Serves

log = logging.getLogger("vl2_jax.serving")

Load = Callable[[Report], tuple[Serves, Processor]]

_IDLE_SECONDS = 75  # of a connection between requests: longer than proxies keep theirs, so that they close first
_FIRST_SECONDS = 30.0  # until the headers of a connection's first request are here
_WAITING_CONNECTIONS = 2048


def bind(host: str, port: int) -> socket.socket:
    """The socket that a server listens on.

    Raises:
      RequestError: the port is taken or not ours to take, or there is no such host.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=_WAITING_CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"cannot listen on port {port} of {shown(host)} ({why}); choose another --port.") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def run(
    service: Service,
    listener: socket.socket,
    load: Load,
    drain_seconds: float,
    report: Report,
    when_ready: Callable[[], None],
    app: ASGIApp | None = None,
) -> None:
    """Serves until a signal says that it is enough; answers that are being written are finished first.

    Args:
      load: makes the engine and what reads for it; in a thread, while `/ready` tells how far it is.
      when_ready: called once requests are answered.
      drain_seconds: that running answers have after a signal; a second signal ends them at once.
      app: what asks the service; by default the API.

    Raises:
      VL2Error: the model cannot be loaded, or its engine failed.
      KeyboardInterrupt: a signal came before the model was there.
    """
    server = Server(service, drain_seconds, app)

    def told(phase: str, done: int, total: int) -> None:
        service.report(phase, done, total)
        report(phase, done, total)

    def begin() -> None:
        try:
            service.begin(*load(told))
            gc.collect()
            gc.freeze()  # the model lives as long as the server: looking at it again takes 0.4 s, which all wait for
            when_ready()
        except BaseException as error:  # raised again below, where the process ends
            service.fail()
            server.error = error
            server.should_exit = True

    threading.Thread(target=begin, daemon=True, name="load").start()
    try:
        server.run([listener])
    finally:
        gc.unfreeze()
        service.close()
    if server.error is not None:
        raise server.error
    if service.engine is None:
        raise KeyboardInterrupt


class Server(uvicorn.Server):
    """uvicorn's, which drains the engine before it closes connections."""

    def __init__(self, service: Service, drain_seconds: float, app: ASGIApp | None = None):
        config = uvicorn.Config(
            app or make_app(service),
            http=Protocol,
            ws="none",
            lifespan="on" if app else "off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=1 if app else 5,  # tabs of a page hold connections for as long as they are open
            callback_notify=self._check,
            timeout_notify=1,
        )
        super().__init__(config)
        self.error: BaseException | None = None
        self._service, self._drain_seconds, self._signals = service, drain_seconds, 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        engine = self._service.engine
        if engine is None or self._signals > 1:
            self.should_exit = self.force_exit = True
        else:
            threading.Thread(target=self._drain, args=(engine,), daemon=True, name="drain").start()

    def _drain(self, engine: Serves) -> None:
        log.info("draining: what is running has %g s to end", self._drain_seconds)
        try:
            engine.drain(self._drain_seconds)
        finally:
            self.should_exit = True

    async def _check(self) -> None:
        if self._service.engine is not None and self._service.stage.name == "failed":
            self.error = VL2Error("the engine has failed, and the server ends; its log says why.")
            self.should_exit = True


class Protocol(H11Protocol):
    """HTTP/1.1 with errors as OpenAI's clients read them, that does not wait for ever for a first request."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._unused = self.loop.call_later(_FIRST_SECONDS, transport.close)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self._unused.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unused.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._unused.cancel()
        problem = respond(Problem(400, "the request is no HTTP, or its headers are too long.", code="invalid_http"))
        headers = [*problem.raw_headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=bytes(problem.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event=event) or b"")
        self.transport.close()
