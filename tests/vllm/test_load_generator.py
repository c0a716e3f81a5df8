"""A load generator that knows nothing of us, `vllm bench serve`, against `vl2 serve` with its own engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vl2_jax.api import SHIPPED, find_model

REQUESTS, TOKENS = 48, 24


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-m", "vl2_jax.cli", "serve", SHIPPED, "--port", "0"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            told = next((line for line in process.stderr if "is ready at" in line), "")
            assert told, "the server ended before it was ready"
            yield told.split("is ready at")[1].strip().removesuffix("/v1")
        finally:
            process.terminate()


def test_every_request_with_a_picture_is_answered(address, tmp_path):
    """16 at once over the streaming chat API; every answer has as many tokens as were asked for."""
    command = [Path(sys.executable).with_name("vllm"), "bench", "serve", "--base-url", address]
    command += ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--model", SHIPPED]
    command += ["--tokenizer", find_model(SHIPPED), "--dataset-name", "random-mm", "--ignore-eos"]
    command += ["--num-prompts", REQUESTS, "--max-concurrency", 16, "--random-input-len", 40]
    command += ["--random-output-len", TOKENS, "--random-mm-base-items-per-request", 1]
    command += ["--random-mm-limit-mm-per-prompt", '{"image": 2, "video": 0}']
    command += ["--random-mm-bucket-config", "{(160, 120, 1): 1.0}"]
    command += ["--save-result", "--result-dir", tmp_path, "--result-filename", "told.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["completed"], told.get("failed", 0)) == (REQUESTS, 0)
    assert told["total_output_tokens"] == REQUESTS * TOKENS
    print({name: told[name] for name in ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms")})
