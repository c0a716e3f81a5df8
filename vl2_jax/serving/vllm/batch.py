"""Questions about many pictures, answered by an engine on every host of a Ray cluster (Ray Data).

    Parquet or JSON lines  -->  rows not yet answered  -->  an engine a host, so many rows at once  -->  a Parquet file

A file of answers is whole or not there, and which rows it answers is noted beside it, so a job that was ended goes on
where it stopped: Ray Data's checkpoints. What is wrong with a row is told in its row, and ends nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow.fs import FileSystem, FileType

from vl2_jax.config import read_config
from vl2_jax.errors import ConversationError, ImageError, RequestError, one_line, shown
from vl2_jax.evaluation.samples import PICTURES, QUESTIONS
from vl2_jax.files import is_remote, path_of, read_file
from vl2_jax.processing.batch import Processor
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.processing.messages import given, pictures_of
from vl2_jax.processing.sources import in_folder
from vl2_jax.serving.http.decoding import PictureLimits
from vl2_jax.serving.vllm import launch

_BOX = {name: pa.int64() for name in ("x1", "y1", "x2", "y2", "picture")} | {
    "label": pa.string(), "raw": pa.list_(pa.float64()),
}  # fmt: skip
ANSWERED = {  # columns, beside the one that names the row
    "question": pa.string(),
    "answer": pa.string(),
    "boxes": pa.list_(pa.struct(_BOX)),
    "token_ids": pa.list_(pa.int32()),
    "finish_reason": pa.string(),
    "error": pa.string(),
}
_CHECKPOINTS, _JOB_FILE = ".answered", ".job.json"  # beside the answers
_MAY_CHANGE = {"devices", "images", "max_num_seqs", "loading", "verify"}  # of a job, while its answers are written
_JSON_LINES = re.compile(r"\.jsonl?(\.gz)?$")
_AT_ONCE = 2  # batches in an engine: while the last answers of one are written, the next is read
_LONGEST_ERROR = 200
# libtpu of a host waits for all hosts of its slice, unless it is told that it is alone. Ray says so to a part of a
# host only.
_ALONE = {"TPU_HOST_BOUNDS": "1,1,1"}


@dataclass(frozen=True)
class Job:
    """How rows are answered.

    Attributes:
      model: as `api.load` takes it, on every host.
      devices: of an engine.
      id: the column that names a row.
      images: where relative paths of pictures begin.
      context: positions of a prompt and its answer, at most; `None` is the model's.
      loading: `settings.Settings` beside the model.
    """

    model: str
    devices: int
    id: str
    images: str
    max_tokens: int
    max_num_seqs: int
    context: int | None = None
    dtype: str | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """What the engine on this host is told.

        Raises:
          VL2Error: there is no such model, or it does not take so many devices.
        """
        from vl2_jax.api import find_model

        directory = find_model(self.model)
        told = launch.options(
            directory,
            read_config(directory),
            devices=self.devices,
            dtype=self.dtype,
            context=self.context,
            plugin=self.loading,
        )
        return told | {"max_num_seqs": self.max_num_seqs, "limit_mm_per_prompt": {"image": PictureLimits.most}}


class Answers:
    """vLLM's engine in an actor: tables of rows to tables of `ANSWERED`."""

    def __init__(self, job: Job):
        from vl2_jax.serving.vllm import theirs

        options = job.options()
        self.job, self.theirs = job, theirs
        self.processor = Processor.from_directory(options["model"])
        self.engine = theirs.AsyncLLMEngine.from_engine_args(theirs.AsyncEngineArgs(**options))
        self.sampling = theirs.SamplingParams(temperature=0, max_tokens=job.max_tokens, detokenize=False)
        self.room = asyncio.Semaphore(2 * job.max_num_seqs)  # of pictures in memory

    async def __call__(self, rows: pa.Table) -> AsyncIterator[pa.Table]:
        answers = await asyncio.gather(*map(self._row, rows.to_pylist()))
        columns = {name: pa.array([row.get(name) for row in answers], kind) for name, kind in ANSWERED.items()}
        yield pa.table({self.job.id: rows[self.job.id], **columns})

    async def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        question = given(row, *QUESTIONS)
        told = {"question": question if isinstance(question, str) else None}
        async with self.room:
            try:
                pictures = await asyncio.to_thread(read_pictures, row, path_of(self.job.images))
                return told | await self._answer(question_of(row, pictures), pictures)
            except (ValueError, self.theirs.VLLMClientError) as error:
                return told | {"error": one_line(error, _LONGEST_ERROR)}

    async def _answer(self, messages: list[dict[str, Any]], pictures: Sequence[Image.Image]) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": self.processor.prompt_ids(messages)}
        if pictures:
            prompt["multi_modal_data"] = {"image": list(pictures)}
        async for output in self.engine.generate(prompt, self.sampling, uuid.uuid4().hex):
            (answer,) = output.outputs
        return answer_of(self.processor, answer.token_ids, pictures) | {"finish_reason": answer.finish_reason}


def read_pictures(row: Mapping[str, Any], folder: Path) -> list[Image.Image]:
    """The pictures of a row, in a column of `PICTURES`: bytes of a file, base64, `{"bytes", "path"}`, a path, an
    address on a bucket, or a list of them.

    Args:
      folder: where relative paths begin, here or on a bucket.

    Raises:
      VL2Error: one of them cannot be read, or the column is empty.
    """
    found = [in_folder(picture, folder) for picture in pictures_of(given(row, *PICTURES) or [])]
    if not found and any(name in row for name in PICTURES):
        raise ImageError("the row has no picture.")
    return [load_image(_content(picture)) for picture in found]


def _content(picture: Any) -> Any:
    """The bytes of what lies on a bucket; anything else as it is."""
    return read_file(path_of(picture)) if isinstance(picture, str) and is_remote(picture) else picture


def question_of(row: Mapping[str, Any], pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation of a row: pictures first, a line each, and an answer to be written. `<image>` in it is text.

    Raises:
      ConversationError: nothing is asked.
    """
    question = given(row, *QUESTIONS)
    if not isinstance(question, str) or not question.strip():
        raise ConversationError(f"the question is {shown(question)}; expected text in a column {QUESTIONS[0]!r}.")
    parts = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": ""}]


def answer_of(processor: Processor, ids: Sequence[int], pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Text, and boxes in pixels of the last picture, as `VL2.generate` tells them."""
    text = processor.tokenizer.decode_answer(ids)
    boxes = parse_boxes(text, *pictures[-1].size, picture=len(pictures) - 1) if pictures else []
    return {"answer": text, "boxes": [asdict(box) for box in boxes], "token_ids": list(ids)}


def answer_all(job: Job, data: Sequence[str], out: str, engines: int | None, batch_size: int) -> None:
    """Answers what is not answered yet, on the cluster that this process belongs to, or else on this machine.

    Args:
      data: files or folders of Parquet, or files of JSON lines.
      out: a folder, here or on a bucket, that all hosts see.
      engines: `None` is as many as the cluster has chips for.
      batch_size: rows that an engine is given at once, and that are a file of answers.

    Raises:
      RequestError: more engines than the cluster has chips for, files of two kinds or none, no column that names a
        row, or a folder with answers of another model or of other options.
    """
    import ray
    from ray.data.checkpoint import CheckpointConfig

    ray.init(ignore_reinit_error=True)
    chips = int(ray.cluster_resources().get("TPU", 0))
    engines = engines or max(1, chips // job.devices)
    if chips and engines * job.devices > chips:
        raise RequestError(
            f"{engines} engine(s) of {job.devices} chip(s) are asked for, and the cluster has {chips}; start Ray on "
            "more hosts, or ask for fewer."
        )
    (rows, names), folder = _read(data), absolute(out)
    if job.id not in names:
        raise RequestError(f"there is no column {job.id!r} among {shown(', '.join(names))}; name one with --id.")
    _begin(job, folder)
    rows.context.checkpoint_config = CheckpointConfig(
        job.id, f"{folder}/{_CHECKPOINTS}", delete_checkpoint_on_success=False
    )
    rows.repartition(target_num_rows_per_block=batch_size).map_batches(
        Answers,
        fn_constructor_args=(job,),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=engines, max_concurrent_calls_per_actor=_AT_ONCE),
        num_cpus=0,  # those are for reading and writing
        resources={"TPU": job.devices} if chips else None,
        runtime_env={"env_vars": {**launch.WISHED, **launch.REQUIRED, **_ALONE}},
    ).write_parquet(folder)


def _read(data: Sequence[str]) -> tuple[Any, list[str]]:
    """Ray's rows of files, and the names of their columns."""
    import ray

    kinds = {_JSON_LINES.search(name) is not None for name in data}
    if len(kinds) != 1:
        raise RequestError("--data takes files of one kind, Parquet or JSON lines (.jsonl).")
    try:
        rows = (ray.data.read_json if kinds == {True} else ray.data.read_parquet)(list(data))
        schema = rows.schema()
    except FileNotFoundError as error:
        raise RequestError(f"there is no data {one_line(error)}; correct --data.") from None
    return rows, schema.names if schema else []


def _begin(job: Job, folder: str) -> None:
    """Notes what answers in this folder depend on, or compares it with what is noted."""
    store, path = FileSystem.from_uri(folder)
    file = f"{path}/{_JOB_FILE}"
    now = {name: value for name, value in {**asdict(job), **job.loading}.items() if name not in _MAY_CHANGE}
    if store.get_file_info(file).type == FileType.NotFound:
        store.create_dir(path)
        with store.open_output_stream(file) as stream:
            stream.write(json.dumps(now, indent=2).encode())
        return
    with store.open_input_stream(file) as stream:
        old = json.loads(stream.read())
    if changed := sorted(name for name in {*old, *now} if old.get(name) != now.get(name)):
        before, after = (shown(told.get(changed[0])) for told in (old, now))
        raise RequestError(
            f"{shown(folder)} holds answers of another {changed[0]} ({before}, now {after}); choose another --out."
        )


def absolute(path: str) -> str:
    """The same place in every process."""
    return path if is_remote(path) else os.path.abspath(path)
