"""One test for each way in which servers of models were attacked that applies here; docs/security.md has the table.

Rows 1 and 2 are test_addresses.py, 4 and 5 test_decoding.py, 6 test_special_tokens.py, 13 test_http_errors.py.
"""

import ast
import json
import logging
import re
from importlib import metadata
from pathlib import Path

import pytest

import convert
import vl2_jax
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.serving.http.door import OPEN

from .conftest import NAME, ask
from .pictures import address, part, png, question
from .test_http_errors import HI, told

PACKAGE = Path(vl2_jax.__file__).parent
SOURCES = [path for folder in (PACKAGE, Path(convert.__file__).parent) for path in folder.rglob("*.py")]


@pytest.fixture(scope="module")
def locked(make_server):
    with make_server(keys=("first-key", "second-key")) as running:
        yield running


@pytest.fixture
def stranger(locked):
    with locked.client() as client:
        yield client


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "file:///etc/passwd", "file:/etc/passwd", "../../etc/passwd", "C:\\x.png"]
)
@pytest.mark.parametrize("form", ["url", "string", "image", "path", "bytes", "images", "source", "no type", "alone"])
def test_row_3_no_form_of_a_picture_opens_a_file_of_the_server(client, monkeypatch, target, form):
    opened = []
    monkeypatch.setattr("vl2_jax.processing.sources._of_path", lambda path: opened.append(path))
    parts = {
        "url": {"type": "image_url", "image_url": {"url": target}},
        "string": {"type": "image_url", "image_url": target},
        "image": {"type": "image", "image": target},
        "path": {"type": "image", "path": target},
        "bytes": {"type": "image", "bytes": {"path": target}},
        "source": {"type": "image", "source": {"type": "base64", "data": target}},
        "no type": {"path": target, "text": None},
    }
    if form == "images":
        answer = ask(client, messages=[{"role": "user", "content": "<image>", "images": [target], "image": target}])
        assert answer.status_code == 200  # fields of other tools are not read: the text is text
    else:
        messages = question(parts[form], "?") if form in parts else [{"role": "user", "content": {"path": target}}]
        answer = ask(client, messages=messages)
        told(answer, answer.status_code)
        assert answer.status_code in (400, 422)
    assert opened == []


def test_row_4_data_of_pictures_is_not_in_logs(client, caplog):
    caplog.set_level(logging.DEBUG, "vl2_jax")
    text = address(png((300, 300), "green"))
    ask(client, messages=question({"type": "image_url", "image_url": {"url": text}}, "a private question"))
    ask(client, messages=question({"type": "image_url", "image_url": {"url": text[:-600]}}, "a private question"))
    ours = " ".join(record.getMessage() for record in caplog.records if record.name.startswith("vl2_jax"))
    assert "POST /v1/chat/completions 200" in ours
    assert text[30:80] not in ours
    assert "private" not in ours


@pytest.mark.parametrize("field", ["chat_template", "documents"])
def test_row_7_no_template_comes_with_a_request(client, field):
    told(ask(client, **{field: "{% for x in range(10**9) %}{% endfor %}"}), 400)


def test_row_7_arguments_of_templates_reach_none(client, server):
    plain = ask(client).json()["usage"]["prompt_tokens"]
    other = ask(client, chat_template_kwargs={"x": "{{ 7 * 7 }}"}).json()["usage"]["prompt_tokens"]
    assert plain == other


@pytest.mark.parametrize("field", ["prompt_embeds", "prompt_token_embeds"])
def test_row_8_no_arrays_come_with_a_request(client, field):
    answer = ask(client, path="/v1/completions", prompt="x", messages=..., **{field: "gASVAAAA"})
    assert answer.status_code in (200, 400)  # what nobody knows is not read
    assert answer.status_code == 400 or field == "prompt_token_embeds"


def test_rows_8_and_9_nothing_is_unpickled_evaluated_or_imported_from_models():
    names = {"eval", "exec", "compile", "__import__"}
    modules = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle", "msgpack", "yaml"}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                found.append((path.name, node.func.id))
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [(path.name, name) for name in imported if name.split(".")[0] in modules]
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                found += [(path.name, node.arg)] if getattr(node.value, "value", True) is not False else []
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "os.system"):
                found.append((path.name, ast.unparse(node)))
    assert found == []


def test_row_9_no_check_of_a_server_is_an_assertion_that_python_may_leave_out():
    """Assertions here tell the type checker what is true already."""
    for path in (PACKAGE / "serving" / "http").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assert):
                assert re.match(r"isinstance\(|self\.\w+ is not None", ast.unparse(node.test)), path


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('x')", "[[0,0,9,9],__import__('os')]", "[[0, 0, 9, 9]] + [[1]]", "[[1e999,0,0,0]]",
    "[" * 9999,
     "[[0,0,99999999999999999999,1]]", "[[0x1,0,1,1]]", "[[١,٢,٣,٤]]", "[[0,0,1,1]].__class__"],
)  # fmt: skip
def test_row_10_what_a_model_writes_is_not_executed(client, server, text):
    server.engine.script = lambda request: f"<|ref|>it<|/ref|><|det|>{text}<|/det|>"
    message = ask(client, messages=question(part(), "?"), max_tokens=500).json()["choices"][0]["message"]
    for box in message.get("boxes", ()):
        assert all(isinstance(box[name], int) for name in ("x1", "y1", "x2", "y2"))
    assert all(len(box.raw) == 4 for box in parse_boxes(f"<|det|>{text}<|/det|>", 10, 10))


def test_row_13_headers_are_bounded(client):
    answer = client.get("/health", headers={"x-long": "y" * 100_000})
    told(answer, 400)


def test_row_13_a_thousand_wishes_are_one_sentence(client):
    told(ask(client, n=10**9, stop=["x" * 10**5] * 100, logit_bias={str(n): 9 for n in range(10**4)}), 400)


def test_row_14_callers_of_different_keys_share_no_prompts(locked):
    with locked.client() as client:
        for key in ("first-key", "second-key", "first-key"):
            client.post("/v1/chat/completions", json=HI, headers={"Authorization": f"Bearer {key}"}).raise_for_status()
    first, second, again = (request.salt for request in locked.engine.requests[-3:])
    assert first == again != second


def test_row_14_a_salt_is_the_callers(client, server):
    for salt in ("a", "b", None):
        ask(client, cache_salt=salt)
    assert len({request.salt for request in server.engine.requests[-3:]}) == 3


def test_row_15_errors_hold_no_traces_names_of_files_or_addresses_of_memory(client, server):
    server.engine.script = lambda request: OSError(2, "No such file", "/secret/0x7fffdeadbeef")
    answers = [ask(client), ask(client, stream=True), ask(client, messages=question(part(b"\x89PNG\r\n\x1a\nxx")))]
    for answer in answers:
        assert not re.search(r"0x[0-9a-f]{5}|Traceback|/secret|\.py|site-packages", answer.text)
        assert answer.headers["x-request-id"]


ROUTES = ["/v1/models", f"/v1/models/{NAME}", "/version", "/metrics", "/openapi.json", "/", "/nowhere", "/v1",
          "/health/",
          "//health", "/HEALTH", "/health/../v1/models", "/v1/models?x=/health", "/%68ealth/x", "/docs",
          "/redoc"]  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_row_16_every_route_asks_for_a_key(stranger, path, method):
    assert told(stranger.request(method, path), 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_row_16_nothing_is_read_of_those_without_a_key(stranger, locked, path):
    asked = len(locked.engine.requests)
    told(stranger.post(path, content=b"x" * 10**6, headers={"Content-Type": "application/json"}), 401)
    assert len(locked.engine.requests) == asked


@pytest.mark.parametrize(
    "header",
    ["Bearer", "Bearer first-ke", "Bearer first-key2", "bearer  FIRST-KEY", "Basic first-key", "first-key",
     "Bearer first-key second-key", "Bearer \xff", "Bearer first-key,second-key", "Token first-key"],
)  # fmt: skip
def test_row_16_what_is_no_key_is_none(stranger, header):
    answer = stranger.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
    assert told(answer, 401)["code"] == "invalid_api_key"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_row_16_each_key_opens(stranger, key):
    assert stranger.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def test_row_16_only_what_load_balancers_ask_is_open(stranger):
    assert OPEN == ("/health", "/ping", "/ready")
    assert [stranger.get(path).status_code for path in OPEN] == [200, 200, 200]
    assert stranger.get("/ready").json().keys() == {"stage", "phase", "share"}


def test_row_16_keys_are_compared_in_constant_time(stranger, monkeypatch):
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda given, known: compared.append(known) or given == known)
    stranger.get("/v1/models", headers={"Authorization": "Bearer first-key"})
    assert compared == [b"first-key", b"second-key"]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_row_16_no_other_origin_is_allowed(client, method):
    headers = {"Origin": "https://evil.org", "Access-Control-Request-Method": "POST"}
    answer = client.request(method, "/v1/chat/completions", headers=headers)
    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("host", ["evil.org", "evil.org:8000", "localhost.evil.org", "127.0.0.1.evil.org", ""])
def test_row_16_a_page_whose_name_leads_to_this_machine_is_not_answered(make_server, host):
    from vl2_jax.serving.http.door import names_of_loopback

    with make_server(hosts=frozenset(names_of_loopback("127.0.0.1"))) as running, running.client() as client:
        assert told(client.get("/v1/models", headers={"Host": host}), 400)["code"] == "invalid_host"
        for name in ("localhost:8000", "127.0.0.1", "[::1]:80", "LOCALHOST"):
            assert client.get("/v1/models", headers={"Host": name}).status_code == 200


def test_row_16_there_are_no_routes_but_these(server):
    from vl2_jax.serving.http.app import make_app

    paths = {getattr(route, "path", "") for route in make_app(server.service)._app.routes}
    open_ai = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{name:path}"}
    assert paths == open_ai | {"/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json"}


def test_row_20_serving_needs_few_packages():
    needed = [line for line in metadata.requires("vl2-jax") if re.search(r"extra == .serve.$", line)]
    names = {re.match(r"[\w-]+", line)[0] for line in needed}
    assert names == {"fastapi", "uvicorn", "sse-starlette", "prometheus-client", "httpcore"}


def test_the_server_does_not_say_what_it_is_made_of(client):
    assert "server" not in client.get("/health").headers
    assert json.loads(client.get("/version").text).keys() == {"version"}
