"""The training loop: batches to updates, told as they go; interrupted at any point it goes on exactly where it was."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.checkpoint import dtype_of
from convert.from_torch import CORRECTION_BIAS
from convert.peft import read_adapters
from convert.weight_map import plan, unflatten
from vl2_jax.compilation import keep_compiled_programs
from vl2_jax.config import VL2Config, read_config
from vl2_jax.errors import ConfigError, VL2Error, shown
from vl2_jax.files import local_destination
from vl2_jax.model.layers import ONE_DEVICE, Layout
from vl2_jax.model.vl2 import Params, VL2Model, init_params
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.processing.batch import Processor
from vl2_jax.progress import Report, silent
from vl2_jax.sharding.batches import share_of_process, spread
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.mesh import make_mesh
from vl2_jax.sharding.processes import of_all, wait_for_all
from vl2_jax.training.checkpoints import Checkpoints
from vl2_jax.training.data import batches
from vl2_jax.training.evaluation import Evaluation, best_step
from vl2_jax.training.folder import CHECKPOINTS, check_run, keep_recipe
from vl2_jax.training.folder import RECIPE_FILE as RECIPE_FILE
from vl2_jax.training.interruption import Interrupted, Interruption
from vl2_jax.training.length import Length
from vl2_jax.training.log import Log
from vl2_jax.training.optimizer import learning_rate
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import LoopRecipe, Recipe
from vl2_jax.training.step import (
    Metrics,
    TrainState,
    all_finite,
    build_model,
    init_state,
    make_step,
    model_params,
    params_of,
)
from vl2_jax.weights import kinds_of

_SECONDS_OF_GROUP = 2.0  # in which a signal to a group of processes reaches all of them


class TrainingError(VL2Error):
    """Training that cannot go on: a loss or gradients that are not numbers, or data that ran out at once."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A model that is being trained, and where it stands.

    Attributes:
      is_complete: it is at its end, and was evaluated there.
      ended_by: what ended it, as a sentence, once it is complete.
      stopped_by: number of the signal that stopped it before, or 0.
    """

    model: VL2Model
    processor: Processor
    recipe: Recipe
    state: TrainState
    is_complete: bool = False
    ended_by: str = ""
    stopped_by: int = 0

    @property
    def is_quantised(self) -> bool:
        """Whether matrices are kept in fewer bits, beside which adapters stay."""
        return any(isinstance(leaf, Narrow) for leaf in self.state.kept.values())

    @property
    def params(self) -> Params:
        """Of the trained model: adapters merged, or beside quantised matrices."""
        if self.is_quantised:
            return model_params(self.recipe, self.state.trained, self.state.kept)
        return unflatten(params_of(self.recipe, self.state))


def train(
    recipe: Recipe,
    folder: Path,
    tell: Callable[[str], None],
    until: int | None = None,
    mesh: str | Mesh | None = None,
    report: Report = silent,
) -> Run:
    """Trains to the recipe's end, from the newest checkpoint in `folder` or from the beginning.

    Args:
      folder: holds checkpoints, logs and the recipe; made if it does not exist.
      tell: shows a line to the user.
      until: a step to stop at before the end, as a preemption would: the state is saved.
      mesh: devices to spread the model and its batches over (`sharding.mesh`); a run may go on on another one.
      report: called with (phase, done, total) while something other than updates goes on.

    Raises:
      ConfigError, CheckpointError, SampleError: see their messages.
      TrainingError: a loss or gradients are not numbers; nothing was saved since the last good checkpoint.
    """
    keep_compiled_programs()
    folder = local_destination(folder, "a run")
    length = Length.of(recipe)
    report("looking at the data", 0, 0)
    is_begun = bool(Checkpoints(folder / CHECKPOINTS, recipe.loop.keep, tell).steps())
    files = check_run(folder, recipe, is_begun, tell)  # before minutes are spent on weights
    run = _begin(recipe, mesh, report)
    layout = run.model.layout
    with layout.on_devices():
        _warn_of_lost_updates(run.state, tell)
        keep_recipe(folder, recipe, files)
        training = _Training(run, folder, tell, report, layout.mesh if isinstance(layout, MeshLayout) else None)
        del run  # and with it a state that a checkpoint's has taken the place of
        return training.to_end(length, until or math.inf)


class _Training:
    """One process's part of a run, from what it finds in the folder to what ends it.

    Attributes:
      step, state, place, read: updates that are done, what came of them, and how far the data was read for them.
      saved: the step of the newest checkpoint.
    """

    def __init__(self, run: Run, folder: Path, tell: Callable[[str], None], report: Report, mesh: Mesh | None):
        recipe = run.recipe
        self.run, self.recipe, self.folder, self.tell, self.report = run, recipe, folder, tell, report
        self.mesh, self.share = mesh, (0, 1) if mesh is None else share_of_process(mesh)
        report("preparing the data", 0, 0)
        self.stream = batches(recipe.data, run.processor, *self.share)
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, recipe.loop.keep, tell, self.share)
        self.state = run.state
        self._go_on()
        self.step, self.place, self.read = int(self.state.step), self.stream.get_state(), self._read_by_all()[0]
        self.run, self.saved = dataclasses.replace(run, state=self.state), self.step
        self.unchecked: Metrics | None = None
        devices = list(jax.devices()[:1]) if mesh is None else list(mesh.devices.flat)
        self.log = Log(folder, recipe, tell, run.model.config, devices, self.step)
        wait_for_all("what was told before is in order")
        report("preparing the evaluation", 0, 0)
        self.evaluation = Evaluation(recipe, run.model, run.processor, folder, self.share, self._lay_out, self.log)
        kept = self.checkpoints.steps() if recipe.loop.keep_best else ()
        self.best, self.checkpoints.best = best_step(folder, kept)

    def to_end(self, length: Length, until: float) -> Run:
        """Updates, until the run's length, `until` or a signal ends them; what is complete is evaluated."""
        self.tell(length.plan(self.stream.records))
        with closing(self.stream), closing(self.log), Interruption() as interruption, self.checkpoints:
            is_over = self._update_until(length, until, interruption)
            if is_over and not self.step:
                left_out = self.stream.skipped
                raise TrainingError(f"the data holds no sample that can be trained on ({left_out} were left out).")
            self._save()
            self.log.flush(self.step, self.stream.skipped)
            self.report("saving", 0, 0)
            self.checkpoints.wait()
            if is_over and self.evaluation.is_missing(self.step):  # after the state is saved, whatever may happen
                self._evaluate(interruption)
        self.report("", 0, 0)
        is_complete = is_over and not interruption.came
        ended_by = length.end(self.step, self.read) if is_complete else ""
        if is_complete:
            self.tell(f"complete after {self.step} steps: {ended_by}")
        elif interruption.came:
            saved = f"step {self.step} is saved, and" if self.step else "there was no step yet;"
            self.tell(f"interrupted; {saved} the same command goes on from there")
        run = dataclasses.replace(self.run, state=self.state, is_complete=is_complete, ended_by=ended_by)
        return dataclasses.replace(run, stopped_by=int(interruption.came))

    def _go_on(self) -> None:
        """From the newest checkpoint, if there is one."""
        self.report("looking for checkpoints", 0, 0)
        found = self.checkpoints.restore(_changing(self.recipe, self.state))
        if found is not None:
            restored, runs = found
            self.state = dataclasses.replace(restored, kept=self.state.kept | restored.kept)
            self.stream.set_state(*[run["data"] for run in runs])
            self.tell(f"going on from step {int(self.state.step)}")

    def _update_until(self, length: Length, until: float, interruption: Interruption) -> bool:
        """Whether the run is over, by its steps or by its data."""
        update: Any = None
        with _Profile(self.folder / "profile", self.recipe.loop) as profile:
            while not interruption.has_come():
                if length.is_over(self.step):
                    return True
                if self.evaluation.is_due(self.step):
                    self._evaluate(interruption)
                    continue
                if self.step >= until:
                    return False
                with interruption.at_rest(self._save_at_once):
                    batch = self._next_batches(interruption)
                    if batch is not None and update is None:
                        update = self._compile(batch)
                if interruption.came:
                    return False
                if batch is None:
                    self.log.left_out(self.stream.reports)
                    return True
                profile.before(self.step)
                self._update(update, batch, length)
                profile.after(self.step, self.state)
        return False

    def _update(self, update: Any, batch: PackedBatch, length: Length) -> None:
        total = length.total(self.step + 1, self.read)
        rate = learning_rate(self.recipe.optimizer, self.step, total)
        self.state, metrics = update(self.state, self._lay_out(batch), np.float32(rate))
        _check(self.unchecked, self.step)  # one step late, so that the device never waits for the host
        if self.unchecked is None:
            self.report("the first step", 0, 0)
            jax.block_until_ready(metrics)
            self.report("", 0, 0)
        self.unchecked, self.step, self.place = metrics, self.step + 1, self.stream.get_state()
        self.log.step(self.step, metrics, rate, total, self.stream.skipped, self.stream.reports)
        every = self.recipe.loop.checkpoint_every
        if every and self.step % every == 0:
            self._save()

    def _evaluate(self, interruption: Interruption) -> None:
        """Interrupted, it is done again when the run goes on."""
        _check(self.unchecked, self.step)
        begun = time.perf_counter()
        with interruption.at_rest(self._save_at_once):
            try:
                loss = self.evaluation(self.step, self.state, self.tell, interruption.check, self.report)
            except Interrupted:
                return
        self.report("", 0, 0)
        self.log.leave_out(time.perf_counter() - begun)
        if self.recipe.loop.keep_best and loss < self.best:
            self.best, self.checkpoints.best = loss, self.step
            self._save()

    def _save(self) -> None:
        if self.saved != self.step:
            self.report("saving", 0, 0)
            _check(self.unchecked, self.step, self.state)
            self.checkpoints.save(self.step, _changing(self.recipe, self.state), {"data": self.place})
            self.saved = self.step
            self.report("", 0, 0)

    def _save_at_once(self) -> None:
        self._save()
        self.checkpoints.wait()

    def _compile(self, batch: PackedBatch) -> Any:
        self.report("compiling the update", 0, 0)
        begun = time.perf_counter()
        step = make_step(self.run.model, self.recipe, None if self.mesh is None else self.state)
        compiled = step.lower(self.state, self._lay_out(batch), np.float32(0)).compile()
        seconds = time.perf_counter() - begun
        self.log.leave_out(seconds)
        self.tell(f"compiled the update in {seconds:.0f} s")
        self.report("", 0, 0)
        return compiled

    def _lay_out(self, batch: PackedBatch) -> PackedBatch:
        """A process's share of stacked batches on the devices of all."""
        return batch if self.mesh is None else spread(batch, self.mesh, *self.share)

    def _next_batches(self, interruption: Interruption) -> PackedBatch | None:
        """The batches of an update stacked along a new first axis; None where the data of all has ended, or a signal.

        A process whose share ends before goes on with empty ones, and so does an update for which too few are left.
        """
        self.report("reading data" if self.unchecked is None else "", 0, 0)
        wanted = self.recipe.optimizer.accumulate
        try:
            parts = list(itertools.islice(self.stream, wanted))
        except RuntimeError as error:  # Grain's, of a process that has ended
            if interruption.comes_within(_SECONDS_OF_GROUP):  # what ends the run has ended that process already
                return None
            raise TrainingError(
                f"a process that reads data has ended ({shown(str(error))}); if memory ran out, lower data.workers."
            ) from error
        self.read, most = self._read_by_all(len(parts))
        if not most:
            return None
        parts += [self.stream.empty()] * (wanted - len(parts))
        return jax.tree.map(lambda *arrays: np.stack(arrays), *parts)

    def _read_by_all(self, batches: int = 0) -> tuple[float, int]:
        """The share of the data that all processes have read, and the most batches that one of them has."""
        if self.stream.records is None:
            return 0.0, batches
        numbers = of_all([self.share[0], self.stream.taken, batches]).tolist()
        taken = {share: taken for share, taken, _ in numbers}  # processes may have a share in common
        return self.stream.share_read(sum(taken.values())), max(most for _, _, most in numbers)


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


def kinds_of_base(recipe: Recipe, directory: Path, config: VL2Config) -> tuple[str | None, str | None]:
    """The kind of weights that the model in `directory`, which a run begins with, holds, and the kind that is trained
    beside; `None` is of floats.

    Raises:
      CheckpointError: see `weights.kinds_of`.
    """
    return (None, None) if recipe.model.path is None else kinds_of(directory, plan(config), recipe.model.weights)


def _begin(recipe: Recipe, mesh: str | Mesh | None, report: Report) -> Run:
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
        if (kind := kinds_of_base(recipe, small_files, config)[1]) and not recipe.lora.rank:
            raise ConfigError(
                f"the weights of {small_files} are {kind}, which gradients cannot change; train adapters (lora.rank), "
                "or give the model in bfloat16 or float32 that they are of."
            )
        if recipe.lora.rank and described.adapters is not None:
            names = names_of(described.path, small_files, config)
            adapters = read_adapters(described.adapters, plan(config), names)
        weights: Any = described.weights  # which the recipe has checked
        vl2 = load(
            described.path,
            dtype=described.param_dtype,
            weights=weights,
            mesh=getattr(layout, "mesh", None),
            adapters=None if recipe.lora.rank else described.adapters,
            merge=True,
            arrays=True,
            report=report,
        )
        processor, params = vl2.processor, vl2.params
    else:
        processor = Processor.from_directory(small_files, config)
        report("drawing random weights", 0, 0)
        params = init_params(config, jax.random.key(described.seed), param_dtype, layout)
    pixels = {"pixel_mean": processor.config.image_mean, "pixel_std": processor.config.image_std}
    model = build_model(described, config, layout, **pixels)
    report("preparing the optimiser's states", 0, 0)
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
        """Before the update after `step` of them."""
        if step in self._steps and not self._runs:
            jax.profiler.start_trace(str(self._folder))
            self._runs = True

    def after(self, step: int, state: TrainState) -> None:
        """After the update that makes it `step`."""
        if self._runs and step not in self._steps:
            jax.block_until_ready(state)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()


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


def _warn_of_lost_updates(state: TrainState, tell: Callable[[str], None]) -> None:
    narrow = sum(leaf.size for leaf in state.trained.values() if leaf.dtype == jnp.bfloat16)
    if narrow:
        tell(
            f"warning: {narrow:,} weights are trained in bfloat16, which loses every update below a 256th of one; set "
            'model.param_dtype = "float32" (model.dtype = "bfloat16" stays as fast), or train adapters (lora.rank).'
        )
