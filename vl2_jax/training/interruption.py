"""SIGTERM (preemption) and Ctrl-C: the state of the last whole step is saved within about a step, whatever is going on.

Between updates the state is at rest: it waits for data, is evaluated, or the update is being compiled. A signal that
comes then finds the main thread busy, often outside of Python, where its handler has to wait for minutes. So a thread
of its own reads signals as they come, saves what is at rest, and, where SIGTERM would have ended the process anyway and
the main thread does not come back, ends it. During an update the state is the device's, and is saved after it.

Of many processes each gets its signal at another moment: jax's runtime agrees on the point at which all stop.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax.experimental import multihost_utils

from vl2_jax.errors import VL2Error

_PATIENCE = 5.0  # seconds that the main thread has to come back once all is saved
_KINDS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """Work that is done again when the run goes on ends here, since a signal has come."""


class Interruption:
    """A context in which signals ask for an end; a second one ends the process at once.

    Attributes:
      came: number of the signal, or 0.
    """

    def __enter__(self) -> Interruption:
        self.came = 0
        self._asked = self._times = 0
        self._save: Callable[[], None] | None = None
        self._saving = threading.Lock()
        self._old: dict[int, Any] = {}
        self._many = jax.process_count() > 1
        if self._many or threading.current_thread() is not threading.main_thread():
            return self  # signals are jax's, or somebody else's
        self._old = {kind: signal.signal(kind, self._note) for kind in _KINDS}
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._old_writer = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._old:
            signal.set_wakeup_fd(self._old_writer)
            self._written.close()
            self._thread.join()
            self._read.close()
        for kind, handler in self._old.items():
            signal.signal(kind, handler)

    def has_come(self) -> bool:
        """Whether to stop here: of many processes all ask at the same points, and get the same answer."""
        if self._many and not self.came:
            self._asked += 1
            if multihost_utils.reached_preemption_sync_point(self._asked):
                self.came = signal.SIGTERM
        return bool(self.came)

    def check(self) -> None:
        """Raises Interrupted where `has_come`."""
        if self.has_come():
            raise Interrupted

    def comes_within(self, seconds: float) -> bool:
        """Whether there is a signal, or will be soon: one to a whole group ends workers a little before."""
        end = time.monotonic() + seconds
        while not self.came and time.monotonic() < end:
            time.sleep(0.05)
        return bool(self.came)

    @contextmanager
    def at_rest(self, save: Callable[[], None]) -> Iterator[None]:
        """A part of the run that leaves the state alone; `save` may be called from another thread until its end."""
        self._save = save
        if self.came and self._old:
            self._written.send(b"\0")  # the other thread may have looked before there was something to save
        try:
            yield
        finally:
            with self._saving:
                self._save = None

    def _note(self, number: int, frame: object) -> None:
        self.came = number
        signal.signal(number, self._old[number])
        if self._times > 1 and callable(self._old[number]):  # the second came while this thread was busy
            self._old[number](number, frame)

    def _watch(self) -> None:
        end = 0.0
        while True:
            if select.select([self._read], [], [], 0.1 if end else None)[0]:
                told = self._read.recv(1)
                if not told:
                    return
                if (number := told[0]) in self._old:
                    self._times += 1
                    if self._times == 1:
                        self.came = number
                        os.write(2, b"stopping after this step; the same signal again stops at once\n")
                    else:
                        self._end_process("stopped at once")
            if self._times and not end and self._save_at_rest():
                end = time.monotonic() + _PATIENCE
            if end and self._save is not None and time.monotonic() > end:
                self._end_process("stopped; what there is to save is saved, and the same command goes on from there")

    def _save_at_rest(self) -> bool:
        """Saves, if the state is at rest, which it stays meanwhile."""
        with self._saving:
            if self._save is None:
                return False
            with suppress(VL2Error):  # the main thread meets it too, and tells
                self._save()
            return True

    def _end_process(self, why: str) -> None:
        """Where the signal would have done so, had nobody listened to it: a program of somebody else's goes on."""
        if self._old[self.came] is signal.SIG_DFL:
            os.write(2, f"{why}\n".encode())
            os._exit(128 + self.came)
