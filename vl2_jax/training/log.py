"""What training tells: lines for the terminal, `log.jsonl`, TensorBoard, and the samples that were left out.

Metrics are read every few steps, all at once, so that the device never waits for the host.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl2_jax.config import VL2Config
from vl2_jax.ops.chips import peak_flops
from vl2_jax.training.data import BadSample
from vl2_jax.training.flops import training_costs
from vl2_jax.training.folder import keep_rows, rows_of, write
from vl2_jax.training.length import Length
from vl2_jax.training.recipe import Recipe
from vl2_jax.training.step import Metrics

LOG_FILE, EVALUATION_FILE, SKIPPED_FILE = "log.jsonl", "evaluation.jsonl", "skipped.jsonl"
EVALUATED = "evaluation/"  # what TensorBoard calls an evaluation's numbers
_BOARD = "tensorboard"
_MEANS = ("loss", "balance", "gradient_norm")
_MOST_TOLD = 5  # bad samples that are shown; all of them are in the file


class Log:
    """What one run tells; of many processes the first one writes, and tells of its own share of the samples.

    What an earlier process wrote of steps after `step`, or left half written, is dropped: these steps are made again.

    Args:
      step: that the run goes on from, or 0.
      devices: that it runs on; a share of their peak is told where that is known.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        tell: Callable[[str], None],
        config: VL2Config,
        devices: Sequence[jax.Device],
        step: int = 0,
    ):
        self._folder, self._tell, self._loop, self._begin = folder, tell, recipe.loop, step
        self._length = Length.of(recipe)
        self._flops = training_costs(config, recipe).of
        peak = peak_flops(devices[0].device_kind)
        self._peak = None if peak is None else peak * len(devices)
        self._writes = jax.process_index() == 0
        self._held: list[Metrics] = []
        self._rate, self._total = 0.0, math.inf
        if self._writes:
            for name in (LOG_FILE, EVALUATION_FILE, SKIPPED_FILE):
                keep_rows(folder / name, step)
            drawn = _keep_events(folder / _BOARD, step)
            if drawn is not None:
                self._mend_board(drawn)
        self._left_out = {str(row.get("where")) for row in rows_of(folder / SKIPPED_FILE)}
        self._begun = time.perf_counter()

    @cached_property
    def board(self) -> Any:
        """TensorBoard's writer, made where there is something to write; None without it, or in other processes."""
        return _tensorboard(self._folder / _BOARD, self._begin) if self._writes else None

    def close(self) -> None:
        """What TensorBoard has not been told is written."""
        if self.__dict__.get("board") is not None:
            self.board.close()

    def step(
        self, step: int, metrics: Metrics, rate: float, total: float, skipped: int, reports: list[BadSample]
    ) -> None:
        """After every update, with its learning rate and how long the run will be; `reports` is emptied."""
        self.left_out(reports)
        self._rate, self._total = rate, total
        if self._loop.log_every:
            self._held.append(metrics)
            if step % self._loop.log_every == 0:
                self.flush(step, skipped)

    def leave_out(self, seconds: float) -> None:
        """Time in which nothing was trained: no step took it."""
        self._begun += seconds

    def flush(self, step: int, skipped: int) -> None:
        """A row of the updates since the last one, if there are any: a run may end between two."""
        if not self._held:
            return
        held, self._held = jax.device_get(self._held), []
        now = time.perf_counter()
        seconds, self._begun = (now - self._begun) / len(held), now
        row: dict[str, Any] = {"step": step}
        row |= {name: float(np.mean([getattr(metrics, name) for metrics in held])) for name in _MEANS}
        row["busiest_expert"] = float(np.max([metrics.busiest_expert for metrics in held]))
        row["learning_rate"] = self._rate
        counts = ("positions", "attended", "tiles")
        positions, attended, tiles = (float(np.mean([getattr(m, name) for m in held])) for name in counts)
        row |= {"tokens_per_second": positions / seconds, "tiles_per_second": tiles / seconds}
        row["flops_per_second"] = self._flops(positions, attended, tiles) / seconds
        if self._peak is not None:
            row["mfu"] = row["flops_per_second"] / self._peak
        row |= {"seconds_per_step": seconds, "skipped_samples": skipped}
        self.record(LOG_FILE, row)
        shown = self._length.shown(step, self._total)
        self._tell(
            f"step {shown}  loss {row['loss']:.4f}  gradient {row['gradient_norm']:.2f}  "
            f"busiest expert {row['busiest_expert']:.1f} x  {row['tokens_per_second']:.0f} tokens/s  "
            f"{seconds:.2f} s/step" + (f"  MFU {100 * row['mfu']:.1f} %" if "mfu" in row else "")
        )

    def record(self, file: str, row: dict[str, Any], prefix: str = "") -> None:
        """A row of numbers to a file of the run and to TensorBoard."""
        if self._writes:
            _append(self._folder / file, row)
        if self.board is not None:
            self._draw(row, prefix)

    def left_out(self, reports: list[BadSample]) -> None:
        """Samples that cannot be used; `reports` is emptied."""
        while reports:
            sample = reports.pop(0)
            if sample.where not in self._left_out:  # once, however often the data is read
                self._left_out.add(sample.where)
                self._tell_of(sample)

    def _draw(self, row: dict[str, Any], prefix: str) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                self.board.add_scalar(prefix + name, value, row["step"])

    def _mend_board(self, drawn: set[tuple[str, int]]) -> None:
        """Draws what files hold and TensorBoard's do not: it writes late, and the run may have ended before."""
        for file, prefix in ((LOG_FILE, ""), (EVALUATION_FILE, EVALUATED)):
            for row in rows_of(self._folder / file):
                if (prefix + "loss", row.get("step")) not in drawn and self.board is not None:
                    self._draw(row, prefix)

    def _tell_of(self, sample: BadSample) -> None:
        if self._writes:
            _append(self._folder / SKIPPED_FILE, {"where": sample.where, "reason": sample.reason})
        if len(self._left_out) <= _MOST_TOLD:
            self._tell(f"left out: {sample.where}: {sample.reason}")
        elif len(self._left_out) == _MOST_TOLD + 1:
            self._tell(f"more samples that are left out are listed in {self._folder / SKIPPED_FILE} only")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        numbers = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        stream.write(json.dumps(numbers) + "\n")  # JSON has no NaN


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    # A TensorBoard that runs already forgets what it has read of the steps that are made again.
    return SummaryWriter(str(folder), flush_secs=10, purge_step=step + 1)


def _keep_events(folder: Path, last: int) -> set[tuple[str, int]] | None:
    """Drops what TensorBoard's files hold of steps after `last`, and a record that was never finished.

    A record is its length (8 bytes), a checksum of that (4), an event, and a checksum of it (4).

    Returns:
      (name, step) of every number that is left; `None` where there are no such files.
    """
    files = sorted(folder.glob("events.out.tfevents.*"))
    try:
        from google.protobuf.message import DecodeError
        from tensorboardX.proto.event_pb2 import Event
    except ImportError:
        return None
    left: set[tuple[str, int]] = set()
    for path in files:
        content, kept, begin = path.read_bytes(), [], 0
        while len(content) - begin >= 12:
            end = begin + 16 + int.from_bytes(content[begin : begin + 8], "little")
            try:
                event = Event.FromString(content[begin + 12 : end - 4])
            except DecodeError:
                break
            if end > len(content):
                break
            if event.step <= last:
                kept.append(content[begin:end])
                left |= {(value.tag, event.step) for value in event.summary.value}
            begin = end
        if sum(map(len, kept)) < len(content):
            write(path, b"".join(kept))
    return left if files else None
