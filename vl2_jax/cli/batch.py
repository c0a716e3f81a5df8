"""`vl2 batch`: questions about many pictures, to an engine of vLLM on every host of a cluster."""

from __future__ import annotations

import os

from vl2_jax.cli.flags import Model, Repeated
from vl2_jax.cli.serve_vllm import loading_of, refuse_what_is_not_handed_on
from vl2_jax.cli.terminal import tell
from vl2_jax.errors import RequestError
from vl2_jax.files import path_of


def batch(
    model: Model,
    out: str,
    data: Repeated = (),
    engines: int | None = None,
    devices: int = 1,
    id: str = "id",
    images: str | None = None,
    max_tokens: int = 512,
    max_model_len: int | None = None,
    max_num_seqs: int = 64,
    batch_size: int = 256,
) -> None:
    """Answer questions about many pictures on the hosts of a Ray cluster, with vLLM's engine and this model.

    Example: vl2 batch --model vl2-nano --data rows.parquet --out answers

    Args:
        out: Folder of answers, here or on a bucket. Rows that are answered there already are left out.
        data: A file or a folder of Parquet, or a file of JSON lines (.jsonl), here or on a bucket; may be given several
          times. Columns are question, image (bytes, base64, a path, an address on a bucket, a list of them) and --id.
        engines: Engines in the cluster; by default as many as it has chips for.
        devices: Chips of each engine.
        id: Column whose value no two rows share.
        images: Where relative paths of pictures begin; by default the folder of the first file.
        max_tokens: Longest answer.
        max_model_len: Tokens that a prompt and its answer may have together; by default the model's context.
        max_num_seqs: Answers that an engine writes at once.
        batch_size: Rows that an engine is given at once, and that are a file of answers.
    """
    from vl2_jax.serving.vllm import launch
    from vl2_jax.serving.vllm.batch import Job, absolute, answer_all

    launch.check_versions()
    refuse_what_is_not_handed_on(model)
    counts = {"engines": engines, "devices": devices, "max-tokens": max_tokens, "max-model-len": max_model_len,
              "max-num-seqs": max_num_seqs, "batch-size": batch_size}  # fmt: skip
    for name, value in counts.items():
        if value is not None and value < 1:
            raise RequestError(f"--{name} is {value}; expected at least 1.")
    if not data:
        raise RequestError("no rows are given; name a file of Parquet or JSON lines with --data.")
    first, loading = path_of(data[0]), loading_of(model)
    if "adapters" in loading:
        loading["adapters"] = absolute(loading["adapters"])
    job = Job(
        model=absolute(model.model) if os.path.isdir(model.model) else model.model,
        devices=devices,
        id=id,
        images=absolute(images or str(first.parent if first.suffix else first)),
        max_tokens=max_tokens,
        max_num_seqs=max_num_seqs,
        context=max_model_len,
        dtype=model.dtype,
        loading=loading,
    )
    job.options()  # what is wrong is told before engines start
    answer_all(job, data, out, engines, batch_size)
    tell(f"answers are in {out}")
