"""The training loop: batches to updates, told as they go; interrupted at any point it goes on exactly where it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from convert.checkpoint import dtype_of
from convert.from_torch import CORRECTION_BIAS
from convert.peft import read_adapters
from convert.weight_map import plan, unflatten
from vl2_jax.config import VL2Config, read_config
from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.files import local_destination
from vl2_jax.model.layers import ONE_DEVICE, Layout
from vl2_jax.model.vl2 import Params, VL2Model, init_params
from vl2_jax.processing.batch import Processor
from vl2_jax.sharding.batches import share_of_process, spread
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.mesh import make_mesh
from vl2_jax.sharding.processes import most_of_all
from vl2_jax.training.checkpoints import Checkpoints
from vl2_jax.training.data import batches
from vl2_jax.training.evaluation import Evaluation
from vl2_jax.training.log import Log
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import LoopRecipe, Recipe, build_recipe
from vl2_jax.training.step import Metrics, TrainState, all_finite, build_model, init_state, make_step, params_of

RECIPE_FILE, CHECKPOINTS = "recipe.json", "checkpoints"
_MAY_CHANGE = {
    "objective.loss_chunk", "model.remat", "model.scan", "optimizer.learning_rate", "optimizer.clip",
    "data.on_bad_sample",
}  # fmt: skip


class TrainingError(VL2Error):
    """Training that cannot go on: a loss or gradients that are not numbers, or data that ran out at once."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model that is being trained, and where it stands.

    Attributes:
      is_complete: it is at its last step, or its data has ended.
      stopped_by: number of the signal that stopped it before, or 0.
    """

    model: VL2Model
    processor: Processor
    recipe: Recipe
    state: TrainState
    is_complete: bool = False
    stopped_by: int = 0

    @property
    def params(self) -> Params:
        """Of the trained model, adapters merged."""
        return unflatten(params_of(self.recipe, self.state))


def train(
    recipe: Recipe, folder: Path, tell: Callable[[str], None], until: int | None = None, mesh: str | Mesh | None = None
) -> Run:
    """Trains to the recipe's last step, from the newest checkpoint in `folder` or from the beginning.

    Args:
      folder: holds checkpoints, logs and the recipe; made if it does not exist.
      tell: shows a line to the user.
      until: a step to stop at before the last, as a preemption would: the state is saved.
      mesh: devices to spread the model and its batches over (`sharding.mesh`); a run may go on on another one.

    Raises:
      ConfigError, CheckpointError, SampleError: see their messages.
      TrainingError: a loss or gradients are not numbers; nothing was saved since the last good checkpoint.
    """
    folder = local_destination(folder, "a run")
    run = _begin(recipe, mesh)
    layout = run.model.layout
    with layout.on_devices():
        return _train(run, recipe, folder, tell, until)


def _train(run: Run, recipe: Recipe, folder: Path, tell: Callable[[str], None], until: int | None) -> Run:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be the folder of a run ({error.strerror}); choose another --out.") from None
    state, saved = run.state, -1
    mesh = run.model.layout.mesh if isinstance(run.model.layout, MeshLayout) else None
    share = (0, 1) if mesh is None else share_of_process(mesh)
    stream = iter(batches(recipe.data, run.processor, *share))
    checkpoints = Checkpoints(folder / CHECKPOINTS, recipe.loop.keep, tell, share)
    _keep_recipe(folder, recipe, tell, is_begun=bool(checkpoints.steps()))
    found = checkpoints.restore(_changing(recipe, state))
    if found is not None:
        restored, position = found
        state = dataclasses.replace(restored, kept=state.kept | restored.kept)
        stream.set_state(position["data"])
        saved = int(state.step)
        tell(f"going on from step {saved}")
    update = make_step(run.model, recipe, None if mesh is None else state)
    place = (lambda batch: batch) if mesh is None else (lambda batch: spread(batch, mesh, *share))
    devices = list(jax.devices()[:1]) if mesh is None else list(mesh.devices.flat)
    log = Log(folder, recipe, tell, run.model.config, devices)
    evaluation = Evaluation(recipe, run.model, run.processor, folder, share, place, log)
    step, last = int(state.step), min(recipe.loop.steps, until or recipe.loop.steps)
    unchecked: Metrics | None = None
    is_complete = step >= recipe.loop.steps
    with _Interruption() as interruption, _Profile(folder / "profile", recipe.loop) as profile, checkpoints:
        while step < last and not interruption.has_come(step):
            batch = _next_batches(stream, recipe)
            if batch is None:
                tell(f"the data ended after {step} steps")
                is_complete = True
                log.left_out(stream.reports)
                break
            profile.before(step)
            state, metrics = update(state, place(batch))
            profile.after(step, state)
            _check(unchecked, step)  # one step late, so that the device never waits for the host
            unchecked = metrics
            step += 1
            is_complete = step >= recipe.loop.steps
            log.step(step, metrics, stream.skipped, stream.reports)
            if recipe.loop.checkpoint_every and step % recipe.loop.checkpoint_every == 0:
                _check(metrics, step, state)
                checkpoints.save(step, _changing(recipe, state), {"data": stream.get_state()})
                saved = step
            if evaluation.is_due(step) and not is_complete and not interruption.came:
                _check(metrics, step)
                evaluation(step, state, tell)
    _check(unchecked, step, state)
    log.flush(step, stream.skipped)
    if step == 0 and is_complete:
        raise TrainingError(f"the data holds no sample that can be trained on ({stream.skipped} were left out).")
    if saved != step:
        checkpoints.save(step, _changing(recipe, state), {"data": stream.get_state()})
    checkpoints.wait()
    if is_complete and unchecked is not None:  # after the state is saved, whatever may happen to the answers
        evaluation(step, state, tell)
    if not is_complete and interruption.came:
        tell(f"interrupted; step {step} is saved, and the same command goes on from there")
    return dataclasses.replace(run, state=state, is_complete=is_complete, stopped_by=int(interruption.came))


def _changing(recipe: Recipe, state: TrainState) -> TrainState:
    """What a checkpoint holds: parameters that never change are in the model that a run began with, if there is one."""
    if recipe.model.preset is not None:
        return state
    return dataclasses.replace(state, kept={p: leaf for p, leaf in state.kept.items() if p.endswith(CORRECTION_BIAS)})


def described_model(recipe: Recipe) -> tuple[Path, VL2Config]:
    """The directory with the small files of what is trained, and its configuration.

    Raises:
      ConfigError: neither or both of `path` and `preset`, or no tokenizer for a preset.
    """
    from vl2_jax.api import find_model

    described = recipe.model
    if (described.path is None) == (described.preset is None):
        raise ConfigError("[model] must have either a path (a model to go on from) or a preset (random weights).")
    if described.path is not None:
        directory = find_model(described.path)
        return directory, read_config(directory)
    if described.tokenizer is None:
        raise ConfigError("[model] preset needs tokenizer, a directory with tokenizer.json and its like.")
    return find_model(described.tokenizer), VL2Config.preset(described.preset or "")


def _begin(recipe: Recipe, mesh: str | Mesh | None = None) -> Run:
    """The model, its processor and its state before the first update.

    Raises:
      ConfigError, CheckpointError: see `described_model` and `load`.
      MeshError: a mesh that does not fit.
    """
    from vl2_jax.api import load, names_of

    described = recipe.model
    _, param_dtype = dtype_of(described.dtype), dtype_of(described.param_dtype)  # before minutes are spent on weights
    small_files, config = described_model(recipe)
    layout = layout_of(mesh, config, recipe.holds_states)
    adapters = None
    if described.path is not None:
        if recipe.lora.rank and described.adapters is not None:
            names = names_of(described.path, small_files, config)
            adapters = read_adapters(described.adapters, plan(config), names)
        vl2 = load(
            described.path,
            dtype=described.param_dtype,
            mesh=getattr(layout, "mesh", None),
            adapters=None if recipe.lora.rank else described.adapters,
            merge=True,
        )
        processor, params = vl2.processor, vl2.params
    else:
        processor = Processor.from_directory(small_files, config)
        params = init_params(config, jax.random.key(described.seed), param_dtype, layout)
    pixels = {"pixel_mean": processor.config.image_mean, "pixel_std": processor.config.image_std}
    model = build_model(described, config, layout, **pixels)
    return Run(model, processor, recipe, init_state(recipe, params, adapters))


def layout_of(mesh: str | Mesh | None, config: VL2Config, holds_states: bool) -> Layout:
    """The layout of a mesh, or of its description; `holds_states` as in `Recipe`.

    Raises:
      MeshError: a mesh that does not fit.
    """
    if mesh is None:
        return ONE_DEVICE
    return MeshLayout(make_mesh(mesh, config, training=holds_states) if isinstance(mesh, str) else mesh)


class _Profile:
    """jax's profiler over some steps, or those that a run comes to: TensorBoard and XProf read what it writes."""

    def __init__(self, folder: Path, recipe: LoopRecipe):
        self._folder, self._runs = folder, False
        self._steps = range(recipe.profile_from, recipe.profile_from + recipe.profile_steps)

    def __enter__(self) -> _Profile:
        return self

    def before(self, step: int) -> None:
        if step in self._steps and not self._runs:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def after(self, step: int, state: TrainState) -> None:
        if self._runs and step + 1 not in self._steps:
            jax.block_until_ready(state)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()


class _Interruption:
    """SIGTERM (preemption) and Ctrl-C end the loop after the update that is under way; a second one ends it at once.

    Of many processes each gets its signal at another moment: jax's runtime agrees on the step at which all stop.
    """

    def __enter__(self) -> _Interruption:
        self.came = 0  # number of the signal
        self._many = jax.process_count() > 1
        self._old: dict[signal.Signals, Any] = {}
        for kind in () if self._many else (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[kind] = signal.signal(kind, self._note)
            except ValueError:  # not in the main thread: signals are somebody else's
                break
        return self

    def has_come(self, step: int) -> bool:
        if self._many:
            self.came = signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return bool(self.came)

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._old.items():
            signal.signal(kind, handler)

    def _note(self, number: int, _: object) -> None:
        self.came = number
        os.write(2, b"stopping after this step; the same signal again stops at once\n")
        signal.signal(number, self._old[signal.Signals(number)])


def _next_batches(stream: Any, recipe: Recipe) -> PackedBatch | None:
    """The batches of an update stacked along a new first axis, or None where the data of all processes has ended.

    A process whose share ends before goes on with empty ones, and so does an update for which too few are left.
    """
    parts = list(itertools.islice(stream, recipe.optimizer.accumulate))
    if recipe.data.epochs is not None and not most_of_all(len(parts)):
        return None
    parts += [stream.empty()] * (recipe.optimizer.accumulate - len(parts))
    return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)


def _check(metrics: Metrics | None, step: int, state: TrainState | None = None) -> None:
    """Raises TrainingError for a step whose loss or gradients, or with `state` whose result, are not numbers."""
    what = ""
    if metrics is not None and not bool(metrics.is_finite):
        what = f"the loss or the gradients (loss {float(metrics.loss)}, gradient norm {float(metrics.gradient_norm)})"
    elif state is not None and not bool(all_finite(state)):
        what = "the parameters or the optimiser's states"
    if what:
        raise TrainingError(
            f"{what} of step {step} are not numbers; nothing was saved since. Lower optimizer.learning_rate or look at "
            "the data, then run the command again: it goes on from the last good checkpoint."
        )


def _keep_recipe(folder: Path, recipe: Recipe, tell: Callable[[str], None], is_begun: bool) -> None:
    """Writes the recipe down; a run goes on with the one it was begun with, but for its length and its habits."""
    path = folder / RECIPE_FILE
    new = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if is_begun and path.is_file():
        stored = build_recipe(json.loads(path.read_text(encoding="utf-8")))  # with keys that are newer than the run
        old = json.loads(json.dumps(dataclasses.asdict(stored)))
        tables = [table for table in new if table not in ("loop", "evaluation")]
        changed = {f"{t}.{key}" for t in tables for key in new[t] if old.get(t, {}).get(key) != new[t][key]}
        if changed - _MAY_CHANGE:
            raise ConfigError(
                f"{folder} holds a run with another recipe ({', '.join(sorted(changed - _MAY_CHANGE))}); "
                "choose another --out, or the old values."
            )
        if changed:
            tell(f"going on with other values of {', '.join(sorted(changed))}")
    if jax.process_index() == 0:
        written = path.with_suffix(".new")
        written.write_text(json.dumps(new, indent=2), encoding="utf-8")
        written.replace(path)  # at once: other processes may be reading it
