"""`vl2 train`: a run, from its recipe to the model it leaves."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from vl2_jax.cli.flags import ONE_DEVICE, OnDevices, Place, Repeated, in_all_processes
from vl2_jax.cli.terminal import messages, tell
from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.files import is_remote
from vl2_jax.installation import install_line
from vl2_jax.progress import Display


@in_all_processes
def train(
    recipe: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RECIPE")],
    out: Place,
    set: Repeated = (),
    devices: OnDevices = ONE_DEVICE,
) -> None:
    """Train a model; run the same command again to go on after an interruption.

    Example: vl2 train sft-nano --out runs/try --set data.epochs=3

    Args:
        recipe: A TOML file, or the name of one of configs/training/, such as lora-tiny.
        out: Folder of the run: checkpoints, logs (TensorBoard too), and at the end the trained model in OUT/model, or
            in OUT/adapters the adapters that were trained beside quantised weights.
        set: Change a value of the recipe: --set optimizer.learning_rate=1e-4; may be given several times.
    """
    import jax

    from vl2_jax.training.recipe import read_recipe

    loop = training("loop")
    for result in (out / "model", out / "adapters"):
        if not is_remote(out) and result.exists() and not (out / loop.RECIPE_FILE).exists():
            raise ConfigError(
                f"{result} exists and is not of a run in {out}, which writes there; choose another --out."
            )
    with Display(messages) as report:
        run = loop.train(read_recipe(recipe, set), out, tell, mesh=devices.mesh, report=report)
    if jax.process_count() > 1:
        if run.is_complete:
            tell(f"vl2 export {out} DIRECTORY makes a model of it")
        return
    if not run.is_complete:
        sys.exit(128 + run.stopped_by)  # as a shell tells of a signal: `vl2 train ... && ...` does not go on
    result = out / ("adapters" if run.is_quantised else "model")
    new = result.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    training("export").export_run(out, new, tell, adapters=run.is_quantised)
    shutil.rmtree(result, ignore_errors=True)
    new.rename(result)
    if run.is_quantised:
        base = run.recipe.model
        kind = f" --weights {base.weights}" if base.weights else ""
        tell(f"the adapters are in {result}: vl2 generate --model {base.path}{kind} --adapters {result} ...")
    else:
        tell(f"the trained model is in {result}: vl2 generate --model {result} ...")


def training(part: str) -> Any:
    """A module of the part of the project that needs more packages."""
    try:
        return importlib.import_module(f"vl2_jax.training.{part}")
    except ModuleNotFoundError as error:
        raise VL2Error(f"training needs {error.name!r}: {install_line('train')}") from None
