"""The training loop: batches to updates, told as they go; interrupted at any point it goes on exactly where it was."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import dtype_of
from convert.to_torch import write_released
from convert.weight_map import plan
from vl2_jax.config import VL2Config
from vl2_jax.errors import CheckpointError, ConfigError, VL2Error
from vl2_jax.model.vl2 import VL2Model, init_params
from vl2_jax.processing.batch import Processor
from vl2_jax.training.checkpoints import Checkpoints
from vl2_jax.training.data import batches
from vl2_jax.training.log import Log
from vl2_jax.training.optimizer import CORRECTION_BIAS
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import Recipe, build_recipe
from vl2_jax.training.step import Metrics, TrainState, init_state, make_step

_RECIPE_FILE, _CHECKPOINTS = "recipe.json", "checkpoints"
_MAY_CHANGE = {"data.workers", "objective.loss_chunk"}


class TrainingError(VL2Error):
    """Training that cannot go on: a loss or gradients that are not numbers, or data that ran out at once."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model that is being trained, and where it stands."""

    model: VL2Model
    processor: Processor
    small_files: Path  # directory of its configuration, processor and tokenizer files
    state: TrainState


def train(recipe: Recipe, folder: Path, tell: Callable[[str], None], until: int | None = None) -> Run:
    """Trains to the recipe's last step, from the newest checkpoint in `folder` or from the beginning.

    Args:
      folder: holds checkpoints, logs and the recipe; made if it does not exist.
      tell: shows a line to the user.
      until: a step to stop at before the last, as a preemption would: the state is saved.

    Raises:
      ConfigError, CheckpointError, SampleError: see their messages.
      TrainingError: a loss or gradients are not numbers; nothing was saved since the last good checkpoint.
    """
    run = _begin(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    _keep_recipe(folder, recipe)
    state, saved = run.state, -1
    stream = iter(batches(recipe.data, run.processor, jax.process_index(), jax.process_count()))
    checkpoints = Checkpoints(folder / _CHECKPOINTS, recipe.loop.keep, tell)
    found = checkpoints.restore(state)
    if found is not None:
        state, kept = found
        stream.set_state(kept["data"])
        saved = int(state.step)
        tell(f"going on from step {saved}")
    update, log = make_step(run.model, recipe), Log(folder, recipe, tell)
    step, last = int(state.step), min(recipe.loop.steps, until or recipe.loop.steps)
    unchecked: Metrics | None = None
    with _Interruption() as interruption:
        while step < last and not interruption.came:
            batch = _next_batches(stream, recipe.optimizer.accumulate)
            if batch is None:
                tell(f"the data ended after {step} steps")
                break
            state, metrics = update(state, batch)
            _check(unchecked, step)  # one step late, so that the device never waits for the host
            unchecked = metrics
            step += 1
            log.step(step, metrics, stream.skipped, stream.reports)
            if recipe.loop.checkpoint_every and step % recipe.loop.checkpoint_every == 0:
                _check(metrics, step)
                checkpoints.save(step, state, {"data": stream.get_state()})
                saved = step
    _check(unchecked, step)
    if step == 0:
        raise TrainingError(f"the data holds no sample that can be trained on ({stream.skipped} were left out).")
    if saved != step:
        checkpoints.save(step, state, {"data": stream.get_state()})
    checkpoints.wait()
    if interruption.came:
        tell(f"interrupted; step {step} is saved, and the same command goes on from there")
    return dataclasses.replace(run, state=state)


def export_run(folder: Path, destination: Path, tell: Callable[[str], None], dtype: str | None = None) -> int:
    """The newest checkpoint of a run in the released layout.

    Args:
      dtype: of the weights on disk; `None` is that of the model's configuration.

    Returns:
      The step it was saved at.

    Raises:
      CheckpointError: there is no run, or no checkpoint that can be read.
    """
    path = folder / _RECIPE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {_RECIPE_FILE}; give the --out folder of `vl2 train`.")
    recipe = build_recipe(json.loads(path.read_text(encoding="utf-8")))
    run = _begin(recipe)
    found = Checkpoints(folder / _CHECKPOINTS, recipe.loop.keep, tell).restore(run.state)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet.")
    state, config = found[0], run.model.config
    leaves = plan(config)
    wide, narrow = np.dtype(np.float32), dtype_of(dtype or config.torch_dtype)
    dtypes = {leaf.path: wide if leaf.path.endswith(CORRECTION_BIAS) else narrow for leaf in leaves}
    write_released(run.small_files, destination, leaves, dtypes, [jax.device_get({**state.trained, **state.kept})])
    return int(state.step)


def _begin(recipe: Recipe) -> Run:
    """The model, its processor and its state before the first update.

    Raises:
      ConfigError: neither or both of `path` and `preset`, or no tokenizer for a preset.
    """
    from vl2_jax.api import find_model, load

    described = recipe.model
    dtype, param_dtype = dtype_of(described.dtype), dtype_of(described.param_dtype)
    if (described.path is None) == (described.preset is None):
        raise ConfigError("[model] must have either a path (a model to go on from) or a preset (random weights).")
    if described.path is not None:
        vl2 = load(described.path, dtype=described.param_dtype)
        config, processor, params, small_files = vl2.config, vl2.processor, vl2.params, find_model(described.path)
    else:
        if described.tokenizer is None:
            raise ConfigError("[model] preset needs tokenizer, a directory with tokenizer.json and its like.")
        small_files = find_model(described.tokenizer)
        config = VL2Config.preset(described.preset or "")
        processor = Processor.from_directory(small_files, config)
        params = init_params(config, jax.random.key(described.seed), param_dtype)
    mean, std = processor.config.image_mean, processor.config.image_std
    model = VL2Model(config, jnp.dtype(dtype), jnp.dtype(param_dtype), pixel_mean=mean, pixel_std=std)
    return Run(model, processor, small_files, init_state(recipe, params))


class _Interruption:
    """SIGTERM (preemption) and Ctrl-C end the loop after the update that is under way."""

    def __enter__(self) -> _Interruption:
        self.came = False
        self._old: dict[signal.Signals, Any] = {}
        for kind in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[kind] = signal.signal(kind, self._note)
            except ValueError:  # not in the main thread: signals are somebody else's
                break
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._old.items():
            signal.signal(kind, handler)

    def _note(self, *_: object) -> None:
        self.came = True


def _next_batches(stream: Any, count: int) -> PackedBatch | None:
    """`count` batches stacked along a new first axis, or None where the data ends."""
    parts = []
    for _ in range(count):
        try:
            parts.append(next(stream))
        except StopIteration:
            return None
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


def _check(metrics: Metrics | None, step: int) -> None:
    if metrics is not None and not bool(metrics.is_finite):
        raise TrainingError(
            f"the loss or the gradients of step {step} are not numbers (loss {float(metrics.loss)}, gradient norm "
            f"{float(metrics.gradient_norm)}); nothing was saved since. Lower optimizer.learning_rate or look at the "
            "data, then run the same command: it goes on from the last good checkpoint."
        )


def _keep_recipe(folder: Path, recipe: Recipe) -> None:
    """Writes the recipe down; a run goes on with the one it was begun with, but for its length and its habits."""
    path = folder / _RECIPE_FILE
    new = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        tables = [table for table in new if table != "loop"]
        changed = {f"{t}.{key}" for t in tables for key in new[t] if old.get(t, {}).get(key) != new[t][key]}
        if changed - _MAY_CHANGE:
            raise ConfigError(
                f"{folder} holds a run with another recipe ({', '.join(sorted(changed - _MAY_CHANGE))}); "
                "choose another --out, or the old values."
            )
    path.write_text(json.dumps(new, indent=2), encoding="utf-8")
