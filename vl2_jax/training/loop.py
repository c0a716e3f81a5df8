"""The training loop: batches to updates, told as they go; interrupted at any point it goes on exactly where it was."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import dtype_of
from vl2_jax.config import VL2Config
from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.model.vl2 import Params, VL2Model, init_params
from vl2_jax.processing.batch import Processor
from vl2_jax.training.checkpoints import Checkpoints
from vl2_jax.training.data import PackedBatch, batches
from vl2_jax.training.optimizer import schedule_of
from vl2_jax.training.recipe import ModelRecipe, Recipe
from vl2_jax.training.step import Metrics, TrainState, init_state, make_step

LOG_FILE = "log.jsonl"
_RECIPE_FILE = "recipe.json"


class TrainingError(VL2Error):
    """Training that cannot go on: a loss or gradients that are not numbers, or data that ran out at once."""


@dataclasses.dataclass
class Run:
    """A model that is being trained, and where it stands."""

    model: VL2Model
    processor: Processor
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
    folder.mkdir(parents=True, exist_ok=True)
    _check_recipe(folder, recipe)
    model, processor, params = start(recipe.model)
    state = init_state(recipe, params)
    stream = iter(batches(recipe.data, processor, jax.process_index(), jax.process_count()))
    checkpoints = Checkpoints(folder / "checkpoints", recipe.loop.keep, tell)
    found = checkpoints.restore(state)
    if found is not None:
        state, run = found
        stream.set_state(run["data"])
        tell(f"going on from step {int(state.step)}")
    log = Log(folder, recipe, tell)
    update = make_step(model, recipe)
    last = min(recipe.loop.steps, until or recipe.loop.steps)
    step = int(state.step)
    saved = step if found is not None else -1
    with _Interruption() as interruption:
        waiting: Metrics | None = None
        while step < last and not interruption.came:
            batch = _next_batches(stream, recipe.optimizer.accumulate)
            if batch is None:
                if waiting is None and saved < 0:
                    raise TrainingError("the data holds no sample that can be trained on.")
                tell(f"the data ended at step {step}")
                break
            state, metrics = update(state, batch)
            step += 1
            _check(waiting, step - 1)
            waiting = metrics
            log.step(step, metrics, getattr(stream, "skipped", 0))
            if recipe.loop.checkpoint_every and step % recipe.loop.checkpoint_every == 0:
                _check(metrics, step)
                checkpoints.save(step, state, {"data": stream.get_state()})
                saved = step
        _check(waiting, step)
        if saved != step:
            checkpoints.save(step, state, {"data": stream.get_state()})
        checkpoints.wait()
        if interruption.came:
            tell(f"interrupted; step {step} is saved, the same command goes on from there")
    return Run(model, processor, state)


def start(recipe: ModelRecipe) -> tuple[VL2Model, Processor, Params]:
    """The model, its processor and its parameters before the first update.

    Raises:
      ConfigError: neither or both of `path` and `preset`, or no tokenizer for a preset.
    """
    from vl2_jax.api import find_model, load

    dtype, param_dtype = dtype_of(recipe.dtype), dtype_of(recipe.param_dtype)
    if (recipe.path is None) == (recipe.preset is None):
        raise ConfigError("[model] must have either a path (a model to go on from) or a preset (random weights).")
    if recipe.path is not None:
        vl2 = load(recipe.path, dtype=recipe.param_dtype)
        config, processor, params = vl2.config, vl2.processor, vl2.params
    else:
        if recipe.tokenizer is None:
            raise ConfigError(
                "[model] preset needs tokenizer = DIRECTORY, with tokenizer.json and processor_config.json."
            )
        config = VL2Config.preset(recipe.preset or "")
        processor = Processor.from_directory(find_model(recipe.tokenizer), config)
        params = init_params(config, jax.random.key(recipe.seed), param_dtype)
    model = VL2Model(
        config,
        jnp.dtype(dtype),
        jnp.dtype(param_dtype),
        pixel_mean=processor.config.image_mean,
        pixel_std=processor.config.image_std,
    )
    return model, processor, params


class Log:
    """Metrics to the terminal, to `log.jsonl` and to TensorBoard. Reads them late, so that the device never waits."""

    def __init__(self, folder: Path, recipe: Recipe, tell: Callable[[str], None]):
        self._every, self._steps, self._tell = recipe.loop.log_every, recipe.loop.steps, tell
        self._rate = schedule_of(recipe.optimizer, recipe.loop.steps)
        self._file = folder / LOG_FILE
        self._board = _tensorboard(folder)
        self._held: list[Metrics] = []
        self._begun = time.perf_counter()

    def step(self, step: int, metrics: Metrics, skipped: int) -> None:
        self._held.append(metrics)
        if not self._every or step % self._every:
            return
        told = jax.device_get(self._held)
        seconds = (time.perf_counter() - self._begun) / len(told)
        self._held, self._begun = [], time.perf_counter()
        row: dict[str, Any] = {"step": step}
        row |= {name: float(np.mean([getattr(m, name) for m in told])) for name in ("loss", "balance", "gradient_norm")}
        row["busiest_expert"] = float(np.max([m.busiest_expert for m in told]))
        row["learning_rate"] = float(self._rate(step - 1))
        row["tokens_per_second"] = float(np.mean([m.positions for m in told])) / seconds
        row |= {"seconds_per_step": seconds, "skipped_samples": skipped}
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if self._board is not None and name != "step":
                self._board.add_scalar(name, value, step)
        self._tell(
            f"step {step}/{self._steps}  loss {row['loss']:.4f}  gradient {row['gradient_norm']:.2f}  "
            f"busiest expert {row['busiest_expert']:.1f} x  {row['tokens_per_second']:.0f} tokens/s  "
            f"{seconds:.2f} s/step"
        )


class _Interruption:
    """SIGTERM (preemption) and Ctrl-C end the loop after the update that is under way."""

    def __enter__(self) -> _Interruption:
        self.came = False
        self._old = {}
        for kind in (signal.SIGTERM, signal.SIGINT):
            try:
                self._old[kind] = signal.signal(kind, self._note)
            except ValueError:  # not the main thread: somebody else's signals
                continue
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
            f"{float(metrics.gradient_norm)}); nothing was saved since. Lower optimizer.learning_rate or look at the data, "
            "then run the same command: it goes on from the last good checkpoint."
        )


def _check_recipe(folder: Path, recipe: Recipe) -> None:
    """A run goes on with the recipe it was begun with; only its end and its habits may change."""
    path = folder / _RECIPE_FILE
    data = {name: dataclasses.asdict(getattr(recipe, name)) for name in ("model", "data", "objective", "optimizer")}
    body = json.loads(json.dumps(data))
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{table}.{key}" for table in body for key in body[table] if old.get(table, {}).get(key) != body[table][key]
        ]
        allowed = {"data.workers", "objective.loss_chunk", "objective.rematerialise"}
        if set(changed) - allowed:
            raise ConfigError(
                f"{folder} holds a run with another recipe ({', '.join(sorted(set(changed) - allowed))} differ); "
                "choose another --out, or the old values."
            )
    path.write_text(json.dumps(body, indent=2), encoding="utf-8")


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
