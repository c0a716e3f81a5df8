"""Batches of rows through vLLM's engine, with a fake of it; `make vllm` runs them with Ray in the real one."""

import asyncio
import base64
import sys

import pyarrow as pa
import pytest
import tyro

from tests.conftest import GOLDENS
from tests.serving import their_fakes
from vl2_jax.cli.batch import batch as command
from vl2_jax.errors import VL2Error
from vl2_jax.evaluation.prompts import plain
from vl2_jax.evaluation.samples import Sample
from vl2_jax.processing.batch import Processor
from vl2_jax.serving.vllm import batch, launch

PICTURE = (GOLDENS / "images" / "wide.png").read_bytes()
SAID = "<|ref|>a circle<|/ref|><|det|>[[0, 0, 500, 999]]<|/det|>"


@pytest.fixture
def answers(monkeypatch):
    """An actor, over a fake of vLLM."""
    their_fakes.install(monkeypatch)
    from vl2_jax.serving.vllm import batch

    images = str(GOLDENS / "images")
    yield batch.Answers(batch.Job("vl2-nano", 1, "id", images, max_tokens=512, max_num_seqs=64, dtype="float32"))
    for name in [name for name in sys.modules if name.startswith("vl2_jax.serving.vllm.")]:
        del sys.modules[name]  # they know the fakes


def answered(answers, *rows):
    table = pa.Table.from_pylist([{"id": number} | row for number, row in enumerate(rows)])

    async def only():
        (found,) = [found async for found in answers(table)]
        return found

    return asyncio.run(only())


@pytest.mark.parametrize(
    "image",
    [PICTURE, base64.b64encode(PICTURE).decode(), {"bytes": PICTURE, "path": None}, "wide.png", [PICTURE, PICTURE]],
    ids=["bytes", "base64", "of Hugging Face", "path", "two"],
)
def test_a_row_is_asked_as_vl2_eval_asks_it(answers, image):
    processor: Processor = answers.processor
    answers.engine.said = processor.tokenizer.encode(SAID)
    question = "What is <image> here? <|User|>"
    (row,) = answered(answers, {"question": question, "image": image}).to_pylist()
    (prompt,) = answers.engine.prompts
    images = (PICTURE,) * len(prompt["multi_modal_data"]["image"])
    assert len(images) == (2 if isinstance(image, list) else 1)
    assert prompt["prompt_token_ids"] == processor.prompt_ids(plain(Sample((0, 0), "", "", question, images)).messages)
    assert (row["answer"], row["finish_reason"], row["error"]) == (SAID, "length", None)
    ((box,), (width, height)) = row["boxes"], prompt["multi_modal_data"]["image"][-1].size
    assert (box["label"], box["x2"], box["y2"]) == ("a circle", int(500 / 999 * width), height)
    assert box["picture"] == len(images) - 1


def test_what_is_wrong_with_a_row_ends_nothing(answers):
    """Tables of errors alone have the columns of others, so that their files can be read together."""
    answers.engine.said = their_fakes.ClientError("the prompt is too long")
    rows = [
        {"question": "What?", "image": b"no picture"},
        {"question": " ", "image": PICTURE},
        {"question": None, "image": PICTURE},
        {"question": "What?", "image": None},
        {"question": "What?", "image": PICTURE},
    ]
    table = answered(answers, *rows)
    told = ["accepted formats", "the question is ' '", "the question is None", "has no picture", "is too long"]
    assert all(part in error for part, error in zip(told, table["error"].to_pylist(), strict=True))
    answers.engine.said = answers.processor.tokenizer.encode("Yes.")
    assert answered(answers, rows[-1]).schema == table.schema


def test_an_engine_that_fails_ends_the_job(answers):
    """Its rows are not answered: a job that goes on later asks them again."""
    answers.engine.said = RuntimeError("EngineCore encountered an issue")
    with pytest.raises(RuntimeError, match="EngineCore"):
        answered(answers, {"question": "What?", "image": PICTURE})


def test_the_engine_is_told_what_the_server_is_told(answers):
    told = vars(answers.engine.arguments)
    assert told["additional_config"]["vl2"] == {"model": told["model"]}
    assert (told["tokenizer_mode"], told["block_size"] % 32, told["async_scheduling"]) == ("vl2", 0, False)
    assert told["disable_chunked_mm_input"]


@pytest.fixture
def asked(monkeypatch):
    """Runs the command and returns what it asks Ray for."""
    calls = []
    monkeypatch.setattr(launch, "check_versions", lambda: None)
    monkeypatch.setattr(batch, "answer_all", lambda *call: calls.append(call))

    def run(*arguments):
        tyro.cli(command, args=["--model", "vl2-nano", "--out", "answers", *arguments])
        return calls.pop()

    return run


def test_flags_become_a_job(asked, monkeypatch, tmp_path):
    """Its paths are the same in processes that start in other folders."""
    monkeypatch.chdir(tmp_path)
    job, data, out, engines, batch_size = asked(
        "--data", "rows/a.parquet", "--data", "b.parquet", "--devices", "3", "--dtype", "float32", "--weights", "int8",
        "--adapters", "lora", "--max-model-len", "512", "--engines", "2", "--batch-size", "7", "--id", "key",
    )  # fmt: skip
    assert (data, out, engines, batch_size) == (("rows/a.parquet", "b.parquet"), "answers", 2, 7)
    assert (job.model, job.devices, job.context, job.dtype, job.id) == ("vl2-nano", 3, 512, "float32", "key")
    assert job.images == str(tmp_path / "rows")
    assert job.loading == {"weights": "int8", "adapters": str(tmp_path / "lora"), "verify": True}
    assert asked("--data", "gs://bucket/rows")[0].images == "gs://bucket/rows"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "no rows are given"),
        (["--data", "a", "--cache", "int8"], "knows no --cache"),
        (["--data", "a", "--devices", "4"], "divide the 6 heads of this model, not 4"),
        (["--data", "a", "--max-model-len", "4096"], "context holds 1024"),
        (["--data", "a", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(asked, flags, told):
    with pytest.raises(VL2Error, match=told):
        asked(*flags)
