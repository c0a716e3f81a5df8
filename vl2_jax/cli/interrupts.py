"""Ctrl-C in a process whose compiler has threads and callbacks of its own."""

from __future__ import annotations

import _thread
import contextlib
import os
import sys
import threading
from typing import Any, NoReturn

INTERRUPTED = 130  # as a shell tells of Ctrl-C
_SECONDS_UNTIL_AGAIN = 0.02  # the callback that swallowed it has returned by then


def raise_lost_interrupts() -> None:
    """Ctrl-C that falls into a callback, such as JAX's at a garbage collection, is raised again after it.

    Python can only report what a callback raises; the interrupt would be printed as ignored, and lost.
    """
    report = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            report(lost)
            return
        again = threading.Timer(_SECONDS_UNTIL_AGAIN, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook


def leave_at_once() -> NoReturn:
    """Ends the process without taking it apart: the compiler's threads, which go on, would use what is freed."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):  # its reader has left
                stream.flush()
    os._exit(INTERRUPTED)
