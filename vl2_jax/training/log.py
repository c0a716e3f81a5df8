"""What training tells: lines for the terminal, `log.jsonl`, TensorBoard, and the samples that were left out.

Metrics are read every few steps, all at once, so that the device never waits for the host.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl2_jax.training.data import BadSample
from vl2_jax.training.optimizer import schedule_of
from vl2_jax.training.recipe import Recipe
from vl2_jax.training.step import Metrics

LOG_FILE, SKIPPED_FILE = "log.jsonl", "skipped.jsonl"
_MEANS = ("loss", "balance", "gradient_norm")
_MOST_TOLD = 5  # bad samples that are shown; all of them are in the file


class Log:
    def __init__(self, folder: Path, recipe: Recipe, tell: Callable[[str], None]):
        self._folder, self._tell, self._loop = folder, tell, recipe.loop
        self._rate = schedule_of(recipe.optimizer, recipe.loop.steps)
        self._board = _tensorboard(folder)
        self._held: list[Metrics] = []
        self._told = 0
        self._begun = time.perf_counter()

    def step(self, step: int, metrics: Metrics, skipped: int, reports: list[BadSample]) -> None:
        """After every update; `reports` is emptied."""
        self._held.append(metrics)
        while reports:
            self._tell_of(reports.pop(0))
        if not self._loop.log_every or step % self._loop.log_every:
            return
        held, self._held = jax.device_get(self._held), []
        now = time.perf_counter()
        seconds, self._begun = (now - self._begun) / len(held), now
        row: dict[str, Any] = {"step": step}
        row |= {name: float(np.mean([getattr(metrics, name) for metrics in held])) for name in _MEANS}
        row["busiest_expert"] = float(np.max([metrics.busiest_expert for metrics in held]))
        row["learning_rate"] = float(self._rate(step - 1))
        row["tokens_per_second"] = float(np.mean([metrics.positions for metrics in held])) / seconds
        row |= {"seconds_per_step": seconds, "skipped_samples": skipped}
        _append(self._folder / LOG_FILE, row)
        for name in row.keys() - {"step"} if self._board is not None else ():
            self._board.add_scalar(name, row[name], step)
        self._tell(
            f"step {step}/{self._loop.steps}  loss {row['loss']:.4f}  gradient {row['gradient_norm']:.2f}  "
            f"busiest expert {row['busiest_expert']:.1f} x  {row['tokens_per_second']:.0f} tokens/s  "
            f"{seconds:.2f} s/step"
        )

    def _tell_of(self, sample: BadSample) -> None:
        _append(self._folder / SKIPPED_FILE, {"where": sample.where, "reason": sample.reason})
        self._told += 1
        if self._told <= _MOST_TOLD:
            self._tell(f"left out: {sample.where}: {sample.reason}")
        if self._told == _MOST_TOLD:
            self._tell(f"more samples that are left out are listed in {self._folder / SKIPPED_FILE} only")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
