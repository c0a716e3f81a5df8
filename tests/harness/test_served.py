"""Public harnesses, as they are, against `vl2 serve`: they count what `vl2 eval` counts."""

import base64
import io
import json
import os
import re
import subprocess
import sys

import httpx
import pytest
from PIL import Image

from tests.evaluation.drawn import questions, write_parquet
from vl2_jax.evaluation import metrics
from vl2_jax.evaluation.metrics import said
from vl2_jax.evaluation.samples import Samples

COUNT = 8  # scenes, with about 27 questions
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
TASK = """
task: drawn
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.of
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 64, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
"""
PICTURES = """
import io
from PIL import Image

def of(doc):
    return [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")]
"""


@pytest.fixture(scope="module")
def address():
    """Of vl2-nano, served by a process of its own on a free port."""
    command = [sys.executable, "-m", "vl2_jax.cli", "serve", "vl2-nano", "--port", "0"]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as server:
        for line in server.stderr:
            if found := re.search(r"is ready at (http://\S+)/v1", line):
                break
        else:
            pytest.fail("the server ended before it was ready")
        yield found[1]
        server.terminate()
        server.communicate(timeout=60)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("data") / "drawn.parquet", questions(COUNT))


def test_lmms_eval_counts_what_vl2_eval_counts(address, data, tmp_path):
    (tmp_path / "drawn.yaml").write_text(TASK.format(file=data))
    (tmp_path / "pictures.py").write_text(PICTURES)
    where = f"model=vl2-nano,base_url={address}/v1,api_key=none"
    command = [sys.executable, "-m", "lmms_eval", "--model", "openai", "--model_args", where, "--tasks", "drawn"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "theirs"), "--log_samples"]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300)
    (theirs,) = (tmp_path / "theirs").rglob("*_results.json")
    score = json.loads(theirs.read_text())["results"]["drawn"]["exact_match,none"]
    command = [sys.executable, "-m", "vl2_jax.cli", "eval", "--model", "vl2-nano", "--data", str(data), "--json"]
    command += ["--benchmark", "exact", "--out", str(tmp_path / "ours")]
    ours = subprocess.run(command, env=ENVIRONMENT, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    assert json.loads(ours.stdout)["score"] == pytest.approx(100 * score)
    assert score >= 0.85  # of drawn scenes that vl2-nano has not seen


def asked_by_vlmevalkit(address, picture, question, detail="low"):
    """What `OpenAIWrapper` of vlmeval/api/gpt.py posts: JPEG of at most 512 pixels a side, of little detail."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((512, 512))
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url, "detail": detail}},
        {"type": "text", "text": question},
    ]
    payload = {"model": "vl2-nano", "messages": [{"role": "user", "content": parts}], "n": 1}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-none"}
    body = json.dumps(payload | {"temperature": 0, "max_tokens": 2048})
    with httpx.Client(trust_env=False, timeout=60) as client:
        return client.post(f"{address}/v1/chat/completions", headers=headers, content=body).json()


def test_vlmevalkits_protocol_is_answered_with_all_tiles(address, data):
    samples = [sample for row in range(len(questions(COUNT))) for sample in Samples([data])[row]]
    right = 0.0
    for sample in samples:
        answer = asked_by_vlmevalkit(address, sample.images[0]["bytes"], sample.question)
        right += metrics.exact(sample, said(answer["choices"][0]["message"]["content"].strip()))
    assert right / len(samples) >= 0.85
    picture, question = samples[0].images[0]["bytes"], samples[0].question
    tokens = [
        asked_by_vlmevalkit(address, picture, question, detail)["usage"]["prompt_tokens"] for detail in ("low", "high")
    ]
    assert tokens[0] == tokens[1]
