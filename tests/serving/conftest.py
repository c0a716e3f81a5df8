"""A server on a loopback port whose engine follows a script; tests are of everything around the model."""

import contextlib
import threading
import time

import httpx
import pytest
from starlette.types import ASGIApp

from vl2_jax.api import SHIPPED, find_model
from vl2_jax.processing.batch import Processor
from vl2_jax.serving.http.server import Server, bind
from vl2_jax.serving.http.service import Service, Settings

from ..cli.conftest import typed
from .scripted import ScriptedEngine

__all__ = ["typed"]  # a fixture

NAME = "vl2-nano"


@pytest.fixture(scope="session")
def processor() -> Processor:
    return Processor.from_directory(find_model(SHIPPED))


class Running:
    """A server in a thread, and the engine behind it."""

    def __init__(self, service: Service, engine: ScriptedEngine, app: ASGIApp | None = None):
        self.service, self.engine = service, engine
        self._listener = bind("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.server = Server(service, drain_seconds=5, app=app)
        self._thread = threading.Thread(target=self.server.run, args=([self._listener],), daemon=True)
        self._thread.start()

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **options)

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(10)
        self.service.close()


@pytest.fixture(scope="session")
def make_server(processor):
    """`make_server(script, **settings)` serves until the block ends; `app(service)` is what, by default the API."""

    @contextlib.contextmanager
    def make(script=None, *, seconds=0.0, limits=None, fetcher=None, engine=None, app=None, is_ready=True, **settings):
        settings = Settings(names=(NAME,), **({"limits": limits} if limits else {}), **settings)
        service = Service(settings)
        engine = engine or ScriptedEngine(processor, seconds=seconds, limits=settings.limits)
        if script is not None:
            engine.script = script
        if is_ready:
            service.begin(engine, processor)
        if fetcher is not None:
            service.fetcher = fetcher
        running = Running(service, engine, app and app(service))
        try:
            yield running
        finally:
            running.close()

    return make


@pytest.fixture(scope="module")
def server(make_server):
    """One that all tests of a module share, without keys."""
    with make_server() as running:
        yield running


@pytest.fixture
def client(server):
    server.engine.script = lambda request: "It is a red square."
    server.engine.seconds = 0.0
    with server.client() as client:
        yield client


def ask(client, text="What is it?", path="/v1/chat/completions", **fields):
    body = {"model": NAME, "messages": [{"role": "user", "content": text}]} | fields
    return client.post(path, json={name: value for name, value in body.items() if value is not ...})


def wait_until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
