"""`vl2 batch`: Ray Data over rows with pictures, an engine an actor."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import vl2_jax
from tests.vllm.conftest import ENVIRONMENT, ON_CPU
from vl2_jax.errors import RequestError
from vl2_jax.scenes import scene_conversation
from vl2_jax.serving.vllm import batch

TOKENS = 24
SECONDS = 540
SCENES = 12
QUESTION = "<|grounding|>What do you see? <image> is text."


def scene(number):
    """A question about a drawn scene, or about two, and the files of the pictures; every third asks for boxes."""
    asked = scene_conversation(number)["messages"][0]
    files = []
    for image in asked["images"]:
        image.save(file := io.BytesIO(), "PNG")
        files.append(file.getvalue())
    question = QUESTION if number % 3 == 0 else asked["content"].replace("<image>\n", "")
    return {"id": f"row {number}", "question": question, "images": files}


def run(*arguments):
    """The script in a process of its own, which starts a Ray of its own."""
    paths = os.pathsep.join([str(ON_CPU), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]  # each engine has a process beside its actor
    command = [sys.executable, "-m", "vl2_jax.cli", "batch", "--model", "vl2-nano", "--dtype", "float32"]
    command += ["--max-tokens", str(TOKENS), "--max-num-seqs", "4", "--batch-size", "4", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def answers_in(folder):
    rows = [row for file in folder.glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    answers = {row["id"]: row for row in rows}
    assert len(answers) == len(rows)
    return answers


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A job over Parquet on two engines, and another one over JSON lines that have what is answered and two rows more:
    (rows, answers of the first, answers of both)."""
    folder = tmp_path_factory.mktemp("batch")
    rows = {row["id"]: row for row in map(scene, range(SCENES))}
    rows["row 3"]["images"] = [b"\x89PNG\r\n\x1a\n and no more"]
    rows["row 4"]["question"] = " "
    rows["row 5"]["question"] = "Where is it? " * 2000
    rows["row 7"]["images"] = []
    pq.write_table(pa.Table.from_pylist(list(rows.values())), folder / "rows.parquet")
    run("--data", folder / "rows.parquet", "--out", folder / "answers", "--engines", 2)
    first = answers_in(folder / "answers")
    more = [scene(SCENES), scene(SCENES + 1)]
    rows |= {row["id"]: row for row in more}
    (folder / "one.png").write_bytes(more[0]["images"][0])
    with (folder / "rows.jsonl").open("w") as lines:
        for number, row in enumerate(rows.values()):
            images = ["one.png"] if number == SCENES else [base64.b64encode(image).decode() for image in row["images"]]
            lines.write(json.dumps(row | {"images": images}) + "\n")
    run("--data", folder / "rows.jsonl", "--out", folder / "answers")
    return rows, first, answers_in(folder / "answers")


def test_a_job_goes_on_where_an_engine_failed(tmp_path, monkeypatch):
    """With an actor in place of the engine, which fails in the last of four batches once others are written.

    The first of these tests: Ray forks this process, which JAX must not have been used in before.
    """
    out, asked, mended, count = tmp_path / "answers", tmp_path / "asked", tmp_path / "mended", 8

    class Failing:
        def __init__(self, job):
            pass

        async def __call__(self, rows):
            names = rows["id"].to_pylist()
            with asked.open("a") as lines:
                lines.writelines(f"{name}\n" for name in names)
            while count - 1 in names and not mended.exists():
                if [file for file in out.glob("*/*.parquet") if "pending" not in file.name]:
                    raise RuntimeError("EngineCore encountered an issue")
                await asyncio.sleep(0.1)
            yield rows.select(["id"])

    pq.write_table(pa.table({"id": range(count), "question": ["What?"] * count}), tmp_path / "rows.parquet")
    monkeypatch.setattr(batch, "Answers", Failing)
    job = batch.Job("x", devices=1, id="id", images=".", max_tokens=TOKENS, max_num_seqs=4)
    try:
        data = [str(tmp_path / "rows.parquet")]
        with pytest.raises(RequestError, match=r"there is no data .*nothing\.parquet; correct --data"):
            batch.answer_all(job, [str(tmp_path / "nothing.parquet")], str(out), None, 2)
        with pytest.raises(RequestError, match=r"one kind"):
            batch.answer_all(job, [*data, "rows.jsonl"], str(out), None, 2)
        with pytest.raises(RequestError, match=r"no column 'key' among 'id, question'; name one with --id"):
            batch.answer_all(replace(job, id="key"), data, str(out), None, 2)
        with pytest.raises(Exception, match="EngineCore"):
            batch.answer_all(job, data, str(out), None, 2)
        first = answers_in(out)
        assert 0 < len(first) < count
        with pytest.raises(RequestError, match=r"answers of another model \('x', now 'y'\); choose another --out"):
            batch.answer_all(replace(job, model="y"), data, str(out), None, 2)
        asked.unlink()
        mended.touch()
        batch.answer_all(replace(job, devices=2, max_num_seqs=8), data, str(out), None, 2)
    finally:
        ray.shutdown()
    assert answers_in(out).keys() == set(range(count))
    assert sorted(map(int, asked.read_text().split())) == sorted(set(range(count)) - first.keys())


def test_every_row_has_the_answer_of_generate(answered):
    rows, first, both = answered
    vl2 = vl2_jax.load("vl2-nano", dtype="float32")
    assert first.keys() == {f"row {number}" for number in range(SCENES)}
    assert both.keys() == rows.keys()
    boxes = 0
    for name in sorted(rows.keys() - {"row 3", "row 4", "row 5", "row 7"}):
        row, told = rows[name], both[name]
        text = "<image>\n" * len(row["images"]) + row["question"].replace("<image>", "\\<image>")
        (alone,) = vl2.generate([{"role": "user", "content": text, "images": row["images"]}], max_tokens=TOKENS)
        assert told["error"] is None
        assert told["token_ids"] == alone.token_ids
        assert (told["answer"], told["finish_reason"]) == (alone.text, alone.finish_reason)
        assert [(box["label"], box["x1"], box["y2"], tuple(box["raw"]), box["picture"]) for box in told["boxes"]] == [
            (box.label, box.x1, box.y2, box.raw, box.picture) for box in alone.boxes
        ]
        boxes += len(alone.boxes)
    assert boxes


def test_what_is_wrong_with_a_row_is_told_there(answered):
    _, first, _ = answered
    told = {name: row["error"] for name, row in first.items() if row["error"] is not None}
    assert told.keys() == {"row 3", "row 4", "row 5", "row 7"}
    assert "damaged PNG" in told["row 3"]
    assert "the question is ' '" in told["row 4"]
    assert "1024" in told["row 5"]
    assert "no picture" in told["row 7"]
    assert all(first[name]["answer"] is None for name in told)


def test_what_is_answered_is_not_asked_again(answered):
    _, first, both = answered
    assert {name: both[name] for name in first} == first
