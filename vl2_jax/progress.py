"""What long work tells while it goes on: a phase, how much of it is done, and a sign of life every few seconds.

Work reports to a `Report`, and knows nothing of terminals. `Display` shows reports: as a bar where someone watches, as
a line every few seconds where the output goes to a file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

Report = Callable[[str, int, int], None]  # phase ("" once it is over), done, total (0 if nobody knows)

_SECONDS_OF_SILENCE = 4.0


def silent(phase: str, done: int, total: int) -> None:
    """No progress report."""


class Display:
    """Shows reports on a `rich` console until it is closed.

    with Display(console) as report:
        convert(source, destination, report=report)
    """

    def __init__(self, console: Any):
        self._console = console
        self._phase, self._done, self._total = "", 0, 0
        self._phase_begun = self._last_line = time.monotonic()
        self._ended = threading.Event()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._bar.start()
        else:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._ended.is_set():
            return
        if phase != self._phase:
            self._phase_begun = time.monotonic()
            if self._bar is not None:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(phase, total=None) if phase else None
        self._phase, self._done, self._total = phase, done, total
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=total or None)

    def close(self) -> None:
        """Takes the bar away, so that other things can be written; later reports show nothing."""
        if not self._ended.is_set():
            self._ended.set()
            if self._bar is not None:
                self._bar.stop()

    def _print_lines(self) -> None:
        while not self._ended.wait(_SECONDS_OF_SILENCE):
            if self._phase:
                share = f" {100 * self._done // self._total} %" if self._total else ""
                seconds = time.monotonic() - self._phase_begun
                self._console.print(f"{self._phase}{share} ({seconds:.0f} s)", markup=False, emoji=False)
