"""Memory that nothing uses any more goes back to the system.

The C library of Linux keeps what was freed in small pieces, for itself. After weights were read and after a program was
compiled that is much: up to 0.7 GB beside the weights of Small, just when a program asks for its own memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import jax

from vl2_jax.compilation import COMPILED

_LONG_ENOUGH = 0.1  # seconds of compiling; shorter ones leave nothing worth a look


def give_back() -> None:
    """What the process holds and does not use; takes milliseconds. Only glibc has a function for it."""
    if trim := _trim():
        trim(0)


@functools.cache
def give_back_after_compiling() -> None:
    """From now on, `give_back` whenever a program was compiled or read from its file; once a process is enough."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and duration_secs > _LONG_ENOUGH:
            give_back()

    jax.monitoring.register_event_duration_secs_listener(listen)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # a system without a C library of that kind
        return None
