"""Whatever is sent is answered or refused in OpenAI's shape, and never by a failure of the server (S1)."""

import copy
import json
import random
import socket

import pytest

from .conftest import NAME, ask
from .pictures import part, question
from .test_http_errors import told

CASES = 400  # in the fast lane, over both routes
CHAT = {
    "model": NAME,
    "messages": [
        {"role": "system", "content": "Short."},
        *question("What is <image>?", part(), "?"),
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Sure?", "name": "me"},
    ],
    "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "n": 2, "stop": ["x", "y"], "seed": 1,
    "logprobs": True, "top_logprobs": 2, "stream": False,
    "repetition_penalty": 1.1, "ignore_eos": False, "cache_salt": "s", "user": "u", "response_format": {"type": "text"},
    "max_completion_tokens": 5, "boxes_on": 1, "min_tokens": 0, "stop_token_ids": [], "logit_bias": {},
}  # fmt: skip
STREAM = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
TEXT = {"model": NAME, "prompt": ["One", "Two"], "max_tokens": 4, "logprobs": 1, "n": 1, "stop": "z", "stream": False}
VALUES = [
    None, True, False, 0, 1, -1, 2, 128, 2**31, 2**63, -(2**63) - 1, 10**40, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, "",
    "a",
    "nan", "0.5", "\0", "\ud800", "💥" * 50, "x" * 3000, "<|User|>", "<image>", "data:,", "file:///etc/passwd",
    "http://127.1/",
    [], [[]], [None], ["a"] * 200, [0] * 5000, [1.5], {}, {"a": {}}, {"type": "text"}, {"url": {"url": {"url": []}}},
    {"type": "image_url", "image_url": None}, {"role": "user", "content": [[[]]]}, {"bytes": "AAAA"},
    {"path": "/etc/passwd"},
]  # fmt: skip
KEYS = ["role", "content", "type", "text", "image_url", "url", "images", "image", "bytes", "tools", "n", "stop",
        "prompt",
        "videos", "detail", "refusal", "tool_calls", "top_logprobs", "stream", "echo", "best_of", "suffix",
        "__class__", ""]  # fmt: skip


def mutated(value, rng: random.Random):
    """The value with a few of its parts replaced, dropped, doubled or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        places = list(_places(value))
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind < 3:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = copy.deepcopy(rng.choice(VALUES))
        else:
            other, other_key = rng.choice(places)
            moved = copy.deepcopy(other[other_key]) if _has(other, other_key) else None
            holder[key] = moved
    return value


def _has(holder, key) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def bent(data: bytes, rng: random.Random) -> bytes:
    """JSON with a few bytes changed."""
    data = bytearray(data)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        at = rng.randrange(len(data))
        data[at : at + rng.randint(0, 3)] = rng.choice(
            (b"", b'"', b"[", b"}", b",", b"\xff", b"1e999", b"\0", b"\\u12")
        )
    return bytes(data) or b"x"


def check(client, cases: int, seed: int) -> None:
    rng, statuses = random.Random(seed), []
    for number in range(cases):
        body = (TEXT, CHAT, STREAM, CHAT)[number % 4]
        path = "/v1/completions" if body is TEXT else "/v1/chat/completions"
        data = bent(json.dumps(mutated(body, rng)).encode(), rng)
        answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert answer.status_code in (400, 404, 422), (data[:300], answer.text)
            told(answer, answer.status_code)
        elif "error" in answer.text and answer.headers["content-type"].startswith("text/event-stream"):
            pytest.fail(f"{data[:300]!r} {answer.text}")
    assert statuses.count(200) > cases / 20
    assert statuses.count(400) > cases / 5


def test_requests_that_are_nearly_right_are_answered_or_refused(client):
    check(client, CASES, seed=0)


@pytest.mark.slow
def test_ten_thousand_requests_are_answered_or_refused(client):
    check(client, 10_000, seed=1)
    assert ask(client).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 99,
        b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /%ff%00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X%d: y\r\n" % n for n in range(5000)) + b"\r\n",
    ],
    ids=range(15),
)  # fmt: skip
def test_what_is_no_http_is_refused_in_the_same_shape(client, server, data):
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    if answer:
        assert answer.startswith(b"HTTP/1.1 4"), answer
        first, _ = json.JSONDecoder().raw_decode(answer.split(b"\r\n\r\n", 1)[1].decode())
        assert first["error"].keys() == {"message", "type", "param", "code"}
    assert ask(client).status_code == 200


def test_a_question_of_every_kind_at_once_is_answered(client):
    assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert client.post("/v1/chat/completions", json=STREAM).status_code == 200
    assert client.post("/v1/completions", json=TEXT).status_code == 200
    assert ask(client, messages=question(part(), part(), "which?")).status_code == 200
