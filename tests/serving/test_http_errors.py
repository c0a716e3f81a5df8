"""What is wrong with a request is told in OpenAI's shape, under the status that its clients act on."""

import json

import pytest

from vl2_jax.errors import OverloadedError
from vl2_jax.serving.requests import Limits, Stage

from .conftest import NAME, ask, wait_until
from .pictures import address, part, png, question

HI = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}


def told(answer, status: int) -> dict:
    """The error of an answer, whose shape is checked."""
    assert answer.status_code == status, answer.text
    assert answer.json().keys() >= {"error"}
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert all(error[name] is None or isinstance(error[name], str) for name in ("type", "param", "code"))
    assert len(error["message"]) < 400
    assert "\n" not in error["message"]
    return error


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}, "messages"),
        ({"messages": question({"type": "image_url", "image_url": {"url": "cat.png"}})}, "messages"),
        ({"messages": question({"type": "image_url"})}, "messages"),
        ({"messages": question(part(detail="huge"))}, "detail"),
        ({"messages": question(*[part()] * 17)}, "messages"),
        ({"messages": question(part()), "boxes_on": 2}, "boxes_on"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 500_000}]}, "messages"),
        ({"model": ...}, "model"),
        ({"model": 3}, "model"),
    ],
    ids=lambda value: json.dumps(value, default=str)[:50] if isinstance(value, dict) else None,
)
def test_what_is_out_of_bounds_is_named(client, server, changes, param):
    asked = len(server.engine.requests)
    body = {name: value for name, value in (HI | changes).items() if value is not ...}
    assert told(client.post("/v1/chat/completions", json=body), 400)["param"] == param
    assert len(server.engine.requests) == asked


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"functions": [{"name": "f"}]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"guided_json": {}},
        {"structured_outputs": {"regex": "a"}},
        {"modalities": ["text", "audio"]},
        {"chat_template": "{{ messages }}"},
        {"mm_processor_kwargs": {"max_pixels": 9}},
        {"best_of": 2},
        {"use_beam_search": True},
        {"prompt_logprobs": 1},
        {"bad_words": ["a"]},
        {"include_stop_str_in_output": True},
        {"echo": True},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, HI["messages"][0]]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_would_change_the_answer_silently_is_refused(client, changes):
    error = told(client.post("/v1/chat/completions", json=HI | changes), 400)
    assert error["code"] == "unsupported_parameter"


def test_what_asks_for_nothing_is_accepted(client):
    nothing = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "best_of": 1,
        "echo": False, "user": "me", "metadata": {"a": "b"}, "store": False,
        "chat_template_kwargs": {"thinking": False},
        "skip_special_tokens": True, "presence_penalty": None, "frequency_penalty": 0, "logit_bias": {},
        "min_tokens": 0,
        "stop": None, "stop_token_ids": [], "seed": None, "top_logprobs": 0, "stream_options": None,
    }  # fmt: skip
    assert ask(client, **nothing).status_code == 200


def test_unknown_fields_are_accepted_and_logged_once(client, caplog):
    for _ in range(2):
        assert ask(client, field_that_nobody_knows=1).status_code == 200
    assert [record for record in caplog.records if "field_that_nobody_knows" in record.getMessage()][1:] == []
    assert "field_that_nobody_knows" in caplog.text


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"model": NaN}', b'{"a": Infinity}', b"[" * 5000, b"[" * 900_000,
     b'{"a":' * 200 + b"1" + b"}" * 200, b"[" + b"0," * 1_000_001 + b"0]", b'{"a": 1' + b"0" * 5000 + b"}",
     b'"\\ud800"'],
    ids=lambda data: repr(data[:16]),
)  # fmt: skip
def test_what_is_no_object_of_json_is_refused(client, data):
    told(client.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_web_pages_can_send_without_being_asked_is_refused(client, kind):
    """A page may post these types to any address, this machine's too, but JSON only where the server allows it."""
    answer = client.post("/v1/chat/completions", content=json.dumps(HI), headers={"Content-Type": kind})
    assert told(answer, 400)["code"] == "invalid_content_type"


@pytest.mark.parametrize("name", ["gpt-4", "", "x" * 900, "vl2-nano "])
def test_a_model_that_is_not_here_is_not_found(client, name):
    status = 404 if name else 400
    told(client.post("/v1/chat/completions", json=HI | {"model": name}), status)
    if name:
        told(client.get(f"/v1/models/{name.strip()}x"), 404)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("POST", "/v1", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405),
     ("OPTIONS", "/v1/chat/completions", 405), ("GET", "/v1/chat/completions/", 404), ("GET", "/../etc/passwd", 404),
     ("POST", "/invocations", 404), ("POST", "/pause", 404), ("GET", "/docs", 404)],
)  # fmt: skip
def test_other_routes_and_methods_are_told_in_the_same_shape(client, method, path, status):
    told(client.request(method, path), status)


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(make_server):
    with make_server(most_body=5000) as running, running.client() as client:
        large = HI | {"messages": [{"role": "user", "content": "x" * 6000}]}
        told(client.post("/v1/chat/completions", json=large), 413)
        chunks = (json.dumps(large).encode() for _ in range(1))
        headers = {"Content-Type": "application/json"}
        told(client.post("/v1/chat/completions", content=chunks, headers=headers), 413)
        assert ask(client).status_code == 200


def test_bodies_together_take_no_more_than_their_room(make_server, monkeypatch):
    monkeypatch.setattr("vl2_jax.serving.http.app._BODIES_AT_ONCE", 0)
    with make_server() as running, running.client() as client:
        assert told(ask(client), 429)["code"] == "overloaded"


@pytest.mark.parametrize(
    "data",
    [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, png()[:-40], png()[:30], b"GIF89a", b"<svg/>", b"%PDF-1.7"],
    ids=["empty", "text", "zeros", "cut", "header", "gif", "svg", "pdf"],
)
def test_what_cannot_be_decoded_is_unprocessable(client, data):
    error = told(ask(client, messages=question(part(data))), 422)
    assert error["code"] == "invalid_image"


@pytest.mark.parametrize("text", ["data:image/png;base64,%%%%", "data:,", "data:image/png;base64,", "data:image/png"])
def test_an_address_of_data_that_holds_nothing_is_unprocessable(client, text):
    told(ask(client, messages=question({"type": "image_url", "image_url": {"url": text}})), 422)


def test_overload_is_told_with_the_time_to_wait(client, server, monkeypatch):
    def full(*_):
        raise OverloadedError("256 requests wait; try again.", 2.5)

    monkeypatch.setattr(server.engine, "submit", full)
    answer = ask(client)
    assert told(answer, 429)["code"] == "overloaded"
    assert answer.headers["retry-after"] == "3"


def test_a_full_queue_refuses_before_pictures_are_read_and_is_not_ready(make_server):
    with make_server(lambda r: "word " * 300, seconds=0.02, limits=Limits(1, 1)) as running, running.client() as client:
        from .test_http_streams import raw

        open_ = [raw(running, HI | {"stream": True})]
        wait_until(lambda: len(running.engine.running) == 1)
        open_.append(raw(running, HI | {"stream": True}))
        wait_until(lambda: len(running.engine.waiting) == 1)
        damaged = question(part(b"not read"))
        assert told(ask(client, messages=damaged), 429)["type"] == "rate_limit_error"
        told(client.get("/ready"), 503)
        assert client.get("/health").status_code == 200
        for connection in open_:
            connection.close()
        wait_until(lambda: client.get("/ready").status_code == 200)


def test_all_choices_are_taken_on_or_none(make_server):
    with make_server(lambda r: "word " * 300, seconds=0.02, limits=Limits(1, 2)) as running, running.client() as client:
        told(ask(client, n=6), 429)
        wait_until(lambda: not running.engine.running and not running.engine.waiting)


def test_an_exception_of_the_engine_fails_one_request_and_nothing_of_it_is_told(client, server):
    server.engine.script = lambda r: OSError("secret /etc/x") if r.options.max_tokens == 99 else "well"
    error = told(ask(client, max_tokens=99), 500)
    assert "secret" not in json.dumps(error)
    assert ask(client).json()["choices"][0]["message"]["content"] == "well"


def test_an_error_of_a_route_is_told_in_the_same_shape(client, server, monkeypatch):
    def broken(*_):
        raise KeyError("secret")

    monkeypatch.setattr(server.service.metrics, "watch", broken)
    assert "secret" not in json.dumps(told(ask(client), 500))


@pytest.mark.parametrize(
    ("stage", "ready", "health"),
    [
        (Stage("loading", "reading weights", 0.25), 503, 200),
        (Stage("compiling", "compiling the decoder", 0.5), 503, 200),
        (Stage("draining"), 503, 200),
        (Stage("failed"), 503, 503),
    ],
    ids=lambda value: value.name if isinstance(value, Stage) else None,
)
def test_how_far_a_model_is_can_be_asked(client, server, monkeypatch, stage, ready, health):
    monkeypatch.setattr(server.engine, "stage", stage)
    answer = client.get("/ready")
    told(answer, ready)
    said = {name: answer.json()[name] for name in ("stage", "phase", "share")}
    assert said == {"stage": stage.name, "phase": stage.phase, "share": stage.share}
    assert client.get("/health").status_code == health
    refused = ask(client)
    told(refused, 500 if stage.name == "failed" else 503)
    assert stage.name == "failed" or refused.headers["retry-after"]


def test_addresses_are_not_fetched_unless_the_operator_allows_it(client):
    url = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    assert told(ask(client, messages=question(url)), 400)["code"] == "invalid_image_url"


def test_messages_hold_nothing_long_of_the_callers(client):
    text = address(b"x" * 100_000)
    for messages in (question({"type": "image_url", "image_url": {"url": text}}), [{"role": text, "content": "x"}]):
        answer = ask(client, messages=messages)
        assert len(answer.text) < 600


def test_a_body_of_thirty_megabytes_is_answered(client, server):
    """Harnesses send pictures as they are, base64 in one body."""
    large = png((3000, 2500), kind="BMP")
    answer = ask(client, messages=question(part(large), "?"))
    assert answer.status_code == 200, answer.text
    assert server.engine.requests[-1].prompt.image_sizes == ((3000, 2500),)
