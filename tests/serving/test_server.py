"""The process: what is wrong is told before anything is loaded, and its end lets answers finish."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from vl2_jax.cli import main
from vl2_jax.errors import RequestError, VL2Error
from vl2_jax.progress import silent
from vl2_jax.serving.http.server import Server, bind, is_loopback, run
from vl2_jax.serving.http.service import Service, Settings
from vl2_jax.serving.requests import Limits, Stage

from .conftest import NAME, ask, wait_until
from .pictures import png
from .scripted import ScriptedEngine

SERVED = """
import sys, time, types
sys.path.insert(0, {root!r})
from tests.serving.scripted import ScriptedEngine

class Engine(ScriptedEngine):
    def __init__(self, vl2, limits, report):
        for done in range(3):
            report("compiling the decoder", done, 3)
            time.sleep({seconds})
        if {fails}:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        super().__init__(vl2.processor, script=lambda request: "word " * 40, seconds=0.03, limits=limits)

sys.modules["vl2_jax.serving.engine"] = types.SimpleNamespace(Engine=Engine)
import vl2_jax.api
from vl2_jax.processing.batch import Processor

processor = Processor.from_directory(vl2_jax.api.find_model("vl2-nano"))
vl2_jax.api.load = lambda *_, report, **options: types.SimpleNamespace(processor=processor)
sys.argv = ["vl2", "serve", "vl2-nano", "--port", "0", *{flags!r}]
from vl2_jax.cli import main
main()
"""


class Process:
    """`vl2 serve` with a scripted engine, in a process of its own."""

    def __init__(self, *flags: str, seconds: float = 0.0, fails: bool = False):
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        code = SERVED.format(root=root, seconds=seconds, fails=fails, flags=list(flags))
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        self.process = subprocess.Popen([sys.executable, "-c", listen + code], cwd=root, text=True, **pipes)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: self.process.poll() is not None or any("is loading" in line for line in self.lines), 60)
        found = [word for line in self.lines for word in line.split() if word.startswith("http://")]
        self.address = found[0].split("/ready")[0] if found else ""

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_until_ready(self):
        wait_until(lambda: httpx.get(f"{self.address}/ready", trust_env=False).status_code == 200, 60)

    def end(self, sig) -> int:
        self.process.send_signal(sig)
        return self.process.wait(30)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_lets_running_answers_finish_and_refuses_new_ones(sig):
    serving = Process(seconds=0.3)
    try:
        answer = httpx.get(f"{serving.address}/ready", trust_env=False)
        assert answer.status_code == 503
        assert answer.json()["stage"] in ("loading", "compiling")
        assert httpx.get(f"{serving.address}/health", trust_env=False).status_code == 200
        serving.wait_until_ready()
        with (
            httpx.Client(base_url=serving.address, trust_env=False, timeout=30) as client,
            httpx.Client(base_url=serving.address, trust_env=False) as other,
        ):
            body = {"model": NAME, "messages": [{"role": "user", "content": "?"}], "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                other.get("/health")  # a connection that is open before the signal
                serving.process.send_signal(sig)
                wait_until(lambda: other.get("/ready").status_code == 503)
                assert ask(other).status_code == 503
                rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest.pop() == "[DONE]"
        said = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in rest)
        assert said == "word " * 40
        assert serving.process.wait(20) == 0
    finally:
        serving.process.kill()


def test_a_server_that_says_that_it_is_ready_answers_at_once():
    serving = Process()
    try:
        wait_until(lambda: any("is ready at" in line for line in serving.lines), 60)
        with httpx.Client(base_url=serving.address, trust_env=False) as client:
            assert ask(client, max_tokens=1).status_code == 200
    finally:
        serving.process.kill()


def test_a_model_that_cannot_be_loaded_ends_the_process():
    serving = Process(fails=True)
    try:
        assert serving.process.wait(60) != 0
        wait_until(lambda: any("RESOURCE_EXHAUSTED" in line for line in serving.lines))
    finally:
        serving.process.kill()


def test_a_signal_while_a_model_is_loading_ends_the_process():
    serving = Process(seconds=30)
    try:
        assert httpx.get(f"{serving.address}/ready", trust_env=False).status_code == 503
        assert serving.end(signal.SIGTERM) == 130
    finally:
        serving.process.kill()


def test_an_engine_that_failed_ends_the_process(make_server):
    with make_server() as running, running.client() as client:
        running.engine.stage = Stage("failed")
        assert client.get("/health").status_code == 503
        wait_until(lambda: running.server.should_exit)
        assert "failed" in str(running.server.error)


def test_a_signal_without_a_model_ends_at_once():
    server = Server(Service(Settings(names=(NAME,))), 5)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit


def test_a_port_that_is_taken_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RequestError, match="choose another --port"):
            bind("127.0.0.1", port)
        with pytest.raises(SystemExit):
            main(["serve", "vl2-nano", "--port", str(port)])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "serve needs a model, once"),
        ("vl2-nano --model vl2-nano", "serve needs a model, once"),
        ("nowhere", "there is no directory 'nowhere'"),
        ("vl2-nano --port 70000", "--port is 70000"),
        ("vl2-nano --host no.such.host.invalid", "cannot listen on port 8000 of 'no.such.host.invalid'"),
        ("vl2-nano --host 192.0.2.1", "cannot listen on port 8000 of '192.0.2.1'"),
        ("vl2-nano --api-key-file /nowhere", "--api-key-file '/nowhere' cannot be read"),
        ("vl2-nano --api-key-file {empty}", "holds no key"),
        ("vl2-nano --api-key=", "a key is empty"),
        ("vl2-nano --max-model-len 999999", "the model's context holds 1024"),
        ("vl2-nano --max-model-len 0", "--max-model-len is 0"),
        ("vl2-nano --max-num-seqs 0", "--max-num-seqs is 0"),
        ("vl2-nano --max-num-queued-reqs -1", "--max-num-queued-reqs is -1"),
        ("vl2-nano --max-body-bytes 1", "--max-body-bytes is 1"),
        ("vl2-nano --drain-seconds inf", "--drain-seconds is inf"),
        ("vl2-nano --limit-mm-per-prompt 3", "--limit-mm-per-prompt is '3'"),
        ("vl2-nano --override-generation-config {{", "--override-generation-config is '{{'"),
        ("vl2-nano --allowed-media-domains https://x.org", "--allowed-media-domains is 'https://x.org'"),
        ("vl2-nano --merge --no-merge", "choose one of them"),
    ],
)
def test_a_mistake_gets_one_sentence_before_anything_is_loaded(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("vl2_jax.serving.http.server.run", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(SystemExit) as caught:
        main(["serve", *flags.replace("{empty}", str(tmp_path / "empty")).replace("{{", "{").split()])
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert message.replace("{{", "{") in error
    assert error.count("\n") == 1


def test_flags_become_settings(tmp_path, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr("vl2_jax.serving.http.server.run", lambda service, *_: given.update(vars(service.settings)))
    (tmp_path / "keys").write_text("one\n\n two \n")
    monkeypatch.setenv("VL2_API_KEY", "ignored")
    flags = (
        f"--port 0 --host 0.0.0.0 --api-key zero --api-key-file {tmp_path}/keys --served-model-name a "
        "--served-model-name b --max-model-len 512 --max-num-seqs 3 --max-num-queued-reqs 4 --max-num-queued-tokens 5 "
        "--num-pages 6 --honor-detail --no-enable-prefix-caching --allowed-media-domains X.org "
        '--limit-mm-per-prompt {"image":2} --max-body-bytes 2048'
    )
    main(["serve", "vl2-nano", *flags.split()])
    assert given["keys"] == ("zero", "one", "two")
    assert given["names"] == ("a", "b")
    limits = given["limits"]
    assert (limits.max_running, limits.max_waiting, limits.max_waiting_tokens, limits.pages) == (3, 4, 5, 6)
    assert not limits.prefix_cache
    assert (limits.context, given["pictures"].most, given["most_body"]) == (512, 2, 2048)
    assert given["honor_detail"]
    assert given["media_domains"] == {"x.org"}
    assert given["hosts"] is None


def test_the_environments_key_is_asked_for_and_a_server_of_this_machine_answers_to_its_names(monkeypatch, capsys):
    given = []
    monkeypatch.setattr("vl2_jax.serving.http.server.run", lambda service, *_: given.append(service.settings))
    main(["serve", "vl2-nano", "--port", "0"])
    monkeypatch.setenv("VL2_API_KEY", "secret")
    main(["serve", "vl2-nano", "--port", "0"])
    main(["serve", "vl2-nano", "--port", "0", "--host", "0.0.0.0"])
    assert [settings.keys for settings in given] == [(), ("secret",), ("secret",)]
    assert "localhost" in given[0].hosts
    assert given[1].hosts is None
    assert "secret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_whether_others_can_reach_a_host(host, local):
    assert is_loopback(host) is local


def test_a_server_that_everybody_may_ask_is_told_of(monkeypatch, capsys):
    monkeypatch.setattr("vl2_jax.serving.http.server.run", lambda *_: None)
    monkeypatch.delenv("VL2_API_KEY", raising=False)
    for flags, is_told in (("--host 0.0.0.0", True), ("--host 0.0.0.0 --api-key a", False), ("", False)):
        main(["serve", "vl2-nano", "--port", "0", *flags.split()])
        assert ("may ask; --api-key limits that" in capsys.readouterr().err) == is_told


def test_more_than_memory_holds_is_told_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("vl2_jax.serving.http.server.run", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr("vl2_jax.serving.room.usable_memory", lambda: 100_000_000)
    with pytest.raises(SystemExit):
        main(["serve", "vl2-nano", "--port", "0", "--num-pages", "10000"])
    assert "10000 pages do not fit into the memory beside the weights" in capsys.readouterr().err


def test_a_context_that_was_shortened_is_kept_to(make_server):
    with make_server(limits=Limits(context=40)) as running, running.client() as client:
        ask(client)
        request = running.engine.requests[-1]
        assert request.options.max_tokens == 40 - len(request.prompt) + 1
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 40
        answer = ask(client, "word " * 60)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_a_chat_in_the_terminal_asks_a_server(server, typed, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "a.png").write_bytes(png())
    server.engine.script = lambda request: f"{len(request.prompt.image_sizes)} picture(s), {request.options.max_tokens}"
    typed(f"/image {tmp_path}/a.png", "what?", "and \\<image>?", "/quit")
    main(["chat", "--server", server.address, "--max-tokens", "77", "--system", "Short."])
    assert capsys.readouterr().out == "1 picture(s), 77\n1 picture(s), 77\n"
    first, second = server.engine.requests[-2:]
    assert second.prompt.input_ids[: len(first.prompt)].tolist() == first.prompt.input_ids.tolist()
    assert (first.options.temperature, first.options.penalty) == (0.0, 1.0)


def test_a_chat_says_what_a_server_refuses(make_server, server, typed, capsys, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    typed("what?", "/quit")
    main(["chat", "--server", server.address + "/v1", "--model", "other"])
    assert "there is no model 'other' here; there is vl2-nano." in capsys.readouterr().err
    with make_server(keys=("good",)) as locked:
        with pytest.raises(SystemExit):
            main(["chat", "--server", locked.address])
        assert "shows no key" in capsys.readouterr().err
        typed("what?", "/quit")
        main(["chat", "--server", locked.address, "--api-key", "good"])
        assert "It is a red square." in capsys.readouterr().out


def test_a_first_request_is_not_waited_for_for_ever(make_server, monkeypatch):
    monkeypatch.setattr("vl2_jax.serving.http.server._FIRST_SECONDS", 0.2)
    with make_server() as running:
        host, port = running.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET / HTT")
            begun = time.monotonic()
            assert connection.recv(100) == b""
            assert time.monotonic() - begun < 5


def test_a_body_that_comes_too_slowly_is_not_waited_for(make_server, monkeypatch):
    monkeypatch.setattr("vl2_jax.serving.http.app._BODY_SECONDS", 0.2)
    with make_server() as running:
        host, port = running.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_what_lives_as_long_as_the_server_is_kept_from_the_garbage_collector(processor):
    frozen = []

    def when_ready():
        frozen.append(gc.get_freeze_count())
        raise VL2Error("enough")

    service = Service(Settings(names=(NAME,)))
    with pytest.raises(VL2Error, match="enough"):
        run(service, bind("127.0.0.1", 0), lambda _: (ScriptedEngine(processor), processor), 1, silent, when_ready)
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0
