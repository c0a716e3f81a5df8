"""Streams: their events in the order of the reference, and what becomes of those that nobody reads."""

import json
import socket
import time

import pytest

from .conftest import NAME, ask, wait_until

HARD = "naïve — 漢字漢字 😀👩‍👩‍👧 \u2028next\x85line\r\n\n end"


def events(answer) -> list[dict | str]:
    """The data of a stream; every event must be one line and an empty one."""
    *found, rest = answer.content.split(b"\n\n")
    assert rest == b""
    texts = [event.removeprefix(b"data: ") for event in found if not event.startswith(b":")]
    assert all(event.startswith((b"data: ", b":")) and b"\n" not in event for event in found)
    return [text.decode() if text == b"[DONE]" else json.loads(text) for text in texts]


def test_a_stream_is_a_role_pieces_an_end_the_usage_and_done(client):
    answer = ask(client, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(answer)
    assert done == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["object"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "It is a red square."
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_a_stream_says_nothing_of_usage_unless_asked(client):
    assert not any("usage" in chunk for chunk in events(ask(client, stream=True))[:-1])


def test_a_stream_holds_what_the_whole_answer_holds(client, server):
    server.engine.script = lambda request: HARD
    whole = ask(client, logprobs=True, top_logprobs=1).json()["choices"][0]
    chunks = [chunk["choices"][0] for chunk in events(ask(client, stream=True, logprobs=True, top_logprobs=1))[:-1]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"] == HARD
    tokens = [token for chunk in chunks if chunk["logprobs"] for token in chunk["logprobs"]["content"]]
    assert tokens == whole["logprobs"]["content"]


def test_no_chunk_ends_inside_of_a_character(client, server):
    """Tokens of the small vocabulary are single bytes of these characters."""
    server.engine.script = lambda request: HARD
    chunks = events(ask(client, stream=True))[:-1]
    assert not any("\ufffd" in chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_no_event_is_broken_by_what_readers_of_lines_break_at(client, server):
    server.engine.script = lambda request: HARD
    lines = [line for line in ask(client, stream=True).content.decode().splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)


def test_what_may_become_a_stop_string_is_held_back(client):
    chunks = events(ask(client, stream=True, stop=" red square"))[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "It is a"


def test_choices_of_a_stream_are_told_apart_by_their_number(client):
    chunks = [chunk["choices"][0] for chunk in events(ask(client, stream=True, n=2))[:-1]]
    for number in (0, 1):
        own = [chunk for chunk in chunks if chunk["index"] == number]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(chunk["delta"].get("content", "") for chunk in own) == "It is a red square."
        assert own[-1]["finish_reason"] == "stop"


def test_boxes_come_with_the_end(client, server):
    from .pictures import part, question

    server.engine.script = lambda request: "<|ref|>it<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|>"
    *_, last, _ = events(ask(client, messages=question(part(), "where?"), stream=True))
    assert last["choices"][0]["delta"]["boxes"][0]["x2"] == 50


def test_completions_stream_text(client):
    *chunks, done = events(ask(client, path="/v1/completions", prompt="One", messages=..., stream=True, logprobs=0))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "It is a red square."
    offsets = [at for chunk in chunks for at in (chunk["choices"][0]["logprobs"] or {}).get("text_offset", ())]
    assert offsets == sorted(set(offsets))


def test_a_failure_in_a_stream_is_an_event_and_fails_nobody_else(client, server):
    server.engine.script = lambda r: RuntimeError("secret at 0x7f12") if r.options.max_tokens == 99 else "well"
    *_, error, done = events(ask(client, stream=True, max_tokens=99))
    assert done == "[DONE]"
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert error["error"]["code"] == "500"
    assert "0x7f" not in json.dumps(error)
    assert ask(client).json()["choices"][0]["message"]["content"] == "well"


def slow(server, seconds=0.02, words=500):
    server.engine.script, server.engine.seconds = lambda request: "word " * words, seconds


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("after", [0.0, 0.15], ids=["at once", "while it is written"])
def test_a_client_that_goes_away_cancels_what_it_asked_for(client, server, stream, after):
    slow(server)
    cancelled, gone = server.engine.cancelled, _gone(client)
    body = {"model": NAME, "messages": [{"role": "user", "content": "?"}], "stream": stream, "n": 2}
    connection = raw(server, body)
    wait_until(lambda: len(server.engine.running) == 2)
    time.sleep(after)
    connection.close()
    wait_until(lambda: server.engine.cancelled == cancelled + 2 and not server.engine.running)
    wait_until(lambda: _gone(client) == gone + 1)


def test_a_client_that_closes_after_the_last_event_did_not_leave(client, server):
    gone, server.engine.script = _gone(client), lambda request: "well"
    connection = raw(server, {"model": NAME, "messages": [{"role": "user", "content": "?"}], "stream": True})
    received = b""
    while b"[DONE]" not in received:
        received += connection.recv(4096)
    connection.close()
    time.sleep(0.2)
    assert _gone(client) == gone


def test_a_client_that_leaves_before_its_pictures_are_read_asks_for_nothing(client, server, monkeypatch):
    import asyncio

    async def for_ever(*_):
        await asyncio.sleep(60)

    monkeypatch.setattr(server.service.decoders, "encode", for_ever)
    from .pictures import part, question

    asked, gone = len(server.engine.requests), _gone(client)
    connection = raw(server, {"model": NAME, "messages": question(part(), "?")})
    time.sleep(0.1)
    connection.close()
    wait_until(lambda: _gone(client) == gone + 1)
    assert len(server.engine.requests) == asked


def test_a_client_that_reads_too_slowly_is_not_waited_for(make_server):
    """Its buffers are small and it reads nothing: writing stops, and the answer is cancelled."""
    with make_server(lambda request: "word " * 200_000, send_seconds=0.3) as running:
        running.engine.context = 10**6
        body = {"model": NAME, "messages": [{"role": "user", "content": "?"}], "stream": True, "n": 8}
        connection = raw(running, body, receive_buffer=2048)
        wait_until(lambda: running.engine.cancelled == 8, seconds=30)
        connection.close()


def raw(server, body: dict, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    host, port = server.address.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def _gone(client) -> float:
    name = "vllm:http_requests_client_disconnected_total"
    (line,) = (line for line in client.get("/metrics").text.splitlines() if line.startswith(name))
    return float(line.split()[-1])
