"""Clients that we did not write, as they are: openai-python, curl, and what evaluation harnesses send."""

import asyncio
import json
import subprocess

import openai
import pytest

from vl2_jax.errors import OverloadedError
from vl2_jax.serving.requests import Limits

from .conftest import NAME, wait_until
from .pictures import address, part, png, question

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def openai_client(client, server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", timeout=30) as made:
        yield made


def test_an_answer(openai_client):
    answer = openai_client.chat.completions.create(model=NAME, messages=question(part(), "What?"), max_tokens=20)
    assert answer.choices[0].message.content == "It is a red square."
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.prompt_tokens_details.model_dump()["image_tokens"] > 0
    assert answer.system_fingerprint.startswith("fp_")


def test_a_stream_with_its_usage(openai_client):
    chunks = list(
        openai_client.chat.completions.create(
            model=NAME, messages=HI, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "It is a red square."
    assert chunks[-1].usage.completion_tokens > 0


def test_the_helper_of_streams(openai_client):
    with openai_client.chat.completions.stream(model=NAME, messages=HI) as stream:
        answer = stream.get_final_completion()
    assert answer.choices[0].message.content == "It is a red square."


def test_log_probabilities_and_stop(openai_client):
    answer = openai_client.chat.completions.create(
        model=NAME, messages=HI, logprobs=True, top_logprobs=3, stop=[" square"], extra_body={"top_k": 5}
    )
    assert answer.choices[0].message.content == "It is a red"
    assert {len(token.top_logprobs) for token in answer.choices[0].logprobs.content} == {3}


def test_boxes_are_an_extra_field(openai_client, server):
    server.engine.script = lambda request: "<|ref|>it<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|>"
    answer = openai_client.chat.completions.create(model=NAME, messages=question(part(), "where?"))
    assert answer.choices[0].message.model_extra["boxes"][0]["label"] == "it"


def test_completions_and_models(openai_client):
    answer = openai_client.completions.create(model=NAME, prompt=["One", "Two"], max_tokens=4, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.top_logprobs[0]) == 2
    assert [model.id for model in openai_client.models.list()] == [NAME]
    assert openai_client.models.retrieve(NAME).id == NAME


def test_the_asynchronous_client_asks_many_at_once(client, server):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="any") as made:

            async def ask(number):
                stream = await made.chat.completions.create(
                    model=NAME, messages=[{"role": "user", "content": str(number)}], stream=number % 2 == 0
                )
                if number % 2:
                    return stream.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(number) for number in range(40)))

    server.engine.script = lambda request: "It is a red square."
    assert set(asyncio.run(ask_all())) == {"It is a red square."}


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (openai.BadRequestError, {"temperature": 3}),
        (openai.NotFoundError, {"model": "gpt-4"}),
        (openai.UnprocessableEntityError, {"messages": question(part(b"no picture"))}),
        (openai.BadRequestError, {"extra_body": {"tools": [{}]}}),
    ],
)
def test_errors_are_the_classes_of_the_client(openai_client, error, change):
    with pytest.raises(error) as caught:
        openai_client.chat.completions.create(**{"model": NAME, "messages": HI} | change)
    assert caught.value.request_id
    assert caught.value.body["message"]


def test_a_failure_in_a_stream_is_raised(openai_client, server):
    server.engine.script = lambda request: RuntimeError("x")
    with pytest.raises(openai.APIError, match="the server failed"):
        list(openai_client.chat.completions.create(model=NAME, messages=HI, stream=True))


def test_a_refused_client_asks_again(openai_client, server, monkeypatch):
    submit, refusals = server.engine.submit, iter([True, True])

    def full_twice(request, listener):
        if next(refusals, False):
            raise OverloadedError("full", 0.01)
        return submit(request, listener)

    monkeypatch.setattr(server.engine, "submit", full_twice)
    answer = openai_client.chat.completions.create(model=NAME, messages=HI)
    assert answer.choices[0].message.content == "It is a red square."


def test_a_client_that_does_not_ask_again_is_told_when_to(make_server):
    with (
        make_server(lambda r: "word " * 400, seconds=0.02, limits=Limits(1, 1)) as running,
        openai.OpenAI(base_url=f"{running.address}/v1", api_key="any", max_retries=0) as made,
    ):
        streams = [made.chat.completions.create(model=NAME, messages=HI, stream=True)]
        wait_until(lambda: running.engine.running)
        streams.append(made.chat.completions.create(model=NAME, messages=HI, stream=True))
        wait_until(lambda: running.engine.waiting)
        with pytest.raises(openai.RateLimitError) as caught:
            made.chat.completions.create(model=NAME, messages=HI)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()
        wait_until(lambda: not running.engine.running)


def test_a_key_is_asked_for(make_server):
    with make_server(keys=("good",)) as running:
        with openai.OpenAI(base_url=f"{running.address}/v1", api_key="good") as made:
            assert made.chat.completions.create(model=NAME, messages=HI).choices
        with (
            openai.OpenAI(base_url=f"{running.address}/v1", api_key="bad") as made,
            pytest.raises(openai.AuthenticationError),
        ):
            made.chat.completions.create(model=NAME, messages=HI)


def test_curl(client, server):
    body = json.dumps({"model": NAME, "messages": HI, "stream": True})
    url = f"{server.address}/v1/chat/completions"
    command = ["curl", "-sSN", "--noproxy", "*", url, "-H", "Content-Type: application/json", "-d", body]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert shown.endswith("data: [DONE]\n\n")
    assert shown.startswith('data: {"id":"chatcmpl-')


def test_what_vlmevalkit_sends(client):
    """`GPT4V` of vlmeval/api/gpt.py: pictures as JPEG of little detail, and what it reads of the answer."""
    content = [
        {"type": "text", "text": "Which?"},
        {"type": "image_url", "image_url": {"url": address(png(kind="JPEG"), "jpeg"), "detail": "low"}},
    ]
    payload = {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 2048, "n": 1}
    answer = client.post(
        "/v1/chat/completions",
        headers={"Content-Type": "application/json", "Authorization": "Bearer x"},
        content=json.dumps(payload | {"temperature": 0, "timeout": 300}),
    )
    assert answer.json()["choices"][0]["message"]["content"].strip() == "It is a red square."


def test_what_lmms_eval_sends(client):
    """Its `openai` model: PNG without detail, 32 requests at once, no temperature at 0 for some models."""
    payload = {
        "model": NAME,
        "messages": question(part(png((640, 480))), "Which?"),
        "max_tokens": 1024,
        "temperature": 0,
    }
    assert client.post("/v1/chat/completions", json=payload).status_code == 200


def test_what_langchain_sends(client):
    """`ChatOpenAI`: nulls are left out, parts hold extra keys, answers before are parts too."""
    messages = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, part() | {"id": "x"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "user", "content": "What is it?"},
    ]
    payload = {"model": NAME, "messages": messages, "stream": True, "stream_options": {"include_usage": True}, "n": 1}
    assert client.post("/v1/chat/completions", json=payload).status_code == 200
