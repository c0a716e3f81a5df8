"""`vl2 export`: a converted checkpoint, or what a run has learned, to the released layout."""

from __future__ import annotations

from typing import Annotated

import tyro

from vl2_jax.cli.flags import Destination, Source
from vl2_jax.cli.terminal import messages, tell
from vl2_jax.cli.train import training
from vl2_jax.errors import CheckpointError, RequestError, shown
from vl2_jax.files import is_remote
from vl2_jax.progress import Display


def export(
    source: Source,
    destination: Destination,
    dtype: str | None = None,
    adapters: bool = False,
    step: Annotated[str | None, tyro.conf.arg(metavar="N|best")] = None,
) -> None:
    """Converted checkpoint, or a training run, to the released Hugging Face layout.

    Example: vl2 export runs/sft tuned --step best

    Args:
        source: A converted checkpoint, or the folder of a training run, whose newest checkpoint is taken.
        destination: A directory that does not exist yet.
        dtype: Of a training run's weights: bfloat16 or float32; by default that of its configuration.
        adapters: Of a training run with [lora]: the adapters alone, in PEFT's layout.
        step: Of a training run: the checkpoint of this step, or best of those that were evaluated.
    """
    if not is_remote(source) and (source / "checkpoints").is_dir():
        wanted = int(step) if step is not None and step.isdecimal() else step
        if isinstance(wanted, str) and wanted != "best":
            raise RequestError(f"--step is {shown(step)}; expected the number of a step, or best.")
        taken = training("export").export_run(source, destination, tell, dtype, adapters, wanted)
        tell(f"exported step {taken} of {source} to {destination}")
        return
    if dtype is not None or adapters or step is not None:
        raise CheckpointError(
            f"{shown(str(source))} is not the folder of a training run, which --dtype, --adapters and --step are for; "
            "a converted checkpoint stays as it is."
        )
    from convert.to_torch import export as run

    with Display(messages) as report:
        run(source, destination, report)
    tell(f"exported {source} to {destination}")
