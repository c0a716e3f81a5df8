"""Who computes now: one program at a time, in the order in which callers came.

Devices gain nothing from two programs at once, and on a mesh two that are sent off in different orders wait for each
other for ever. A turn is one call to the devices, not one answer, so that answers of several callers grow together.
"""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A lock that goes to whoever has waited longest. Its holder may take it again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._holder: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        with self._changed:
            if self._holder != threading.get_ident():
                ticket = object()
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(lambda: self._holder is None and self._waiting[0] is ticket)
                finally:  # also where Ctrl-C ends the waiting
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
                self._holder = threading.get_ident()
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._holder = None
                self._changed.notify_all()


DEVICES = Turns()
