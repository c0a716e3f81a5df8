"""`vl2 serve --engine vllm` as a process, asked with OpenAI's client."""

import base64
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

import vl2_jax
from tests.vllm.conftest import ENVIRONMENT, ON_CPU
from vl2_jax.api import SHIPPED

SCENE = Path(__file__).parents[2] / "assets" / "scene.png"
SECONDS_TO_START = 420
KEY = "a-key-of-the-test"


@pytest.fixture(scope="module")
def vl2():
    return vl2_jax.load(SHIPPED, dtype="float32")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    paths = os.pathsep.join([str(ON_CPU), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "vl2_jax.cli", "serve", SHIPPED, "--engine", "vllm", "--port", str(port)]
    command += ["--dtype", "float32", "--max-num-seqs", "4"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths, "VL2_API_KEY": KEY}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # the engine has a process of its own
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        end = time.monotonic() + SECONDS_TO_START
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0)
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < end, log.read_text()[-4000:]
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            time.sleep(2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def client(address):
    return openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)


def shown(text):
    data = base64.b64encode(SCENE.read_bytes()).decode()
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


def alone(vl2, text):
    conversation = [{"role": "user", "content": "<image>\n" + text.replace("<image>", "\\<image>"), "images": [SCENE]}]
    (answer,) = vl2.generate(conversation, max_tokens=48)
    return answer.text


QUESTIONS = (
    "What is written here?",
    "How many shapes are there?",
    "<|grounding|>What do you see?",
    "What is <image> or <|User|> here?",
)


def test_answers_with_pictures_are_those_of_the_model_alone(vl2, client):
    """Four at once, one of them a stream; grounding tags stay in answers, control tokens of users stay text."""

    def ask(text):
        given = {"model": SHIPPED, "messages": shown(text), "temperature": 0, "max_tokens": 48}
        if text != QUESTIONS[0]:
            return client.chat.completions.create(**given).choices[0].message.content
        parts = client.chat.completions.create(**given, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    with ThreadPoolExecutor(len(QUESTIONS)) as callers:
        answers = list(callers.map(ask, QUESTIONS))
    assert answers == [alone(vl2, text) for text in QUESTIONS]
    assert "WOOD" in answers[0]
    assert "<|det|>" in answers[2]


def test_a_bare_text_is_continued_as_it_is(vl2, client):
    text = "<|User|>: Hello"
    answer = client.completions.create(model=SHIPPED, prompt=text, temperature=0, max_tokens=8, echo=False)
    assert answer.usage.prompt_tokens == len(vl2.processor.encode_text(text))


def test_what_cannot_be_is_told_with_a_status(address, client):
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="another", max_retries=0).chat.completions.create(
            model=SHIPPED, messages=shown("x")
        )
    elsewhere = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}
    for content, told in (([elsewhere], "not fetched"), ([{"type": "text", "text": "a " * 3000}], "1024")):
        with pytest.raises(openai.BadRequestError, match=told):
            client.chat.completions.create(model=SHIPPED, messages=[{"role": "user", "content": content}])
