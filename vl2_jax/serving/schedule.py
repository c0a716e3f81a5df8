"""Who is read, who is decoded and who waits: all on the host, one decision a step.

    waiting  --a slot, pages-->  reading  --last chunk-->  running  --end-->  gone
       ^                            |                         |
       +-------- no pages are left: the newest goes back -----+

One prompt is read at a time, the oldest; those that run are decoded beside it. Whoever goes back keeps what was said:
its prompt and answer are read again as one prompt.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from vl2_jax.inference.answers import AnswerWriter, Timings
from vl2_jax.inference.sampling import Sampler
from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.serving.pages import Beginnings, PagePool
from vl2_jax.serving.requests import Listener, Request


@dataclass(eq=False)
class Sequence:
    """A request on its way: what is known of it, and what of that is in the cache.

    Attributes:
      ids: of the prompt and of the answer so far.
      computed: positions whose rows are in the cache.
      is_suspect: a step failed while this was in it; it is computed alone, so that no other fails with it.
    """

    request: Request
    listener: Listener
    writer: AnswerWriter
    sampler: Sampler
    tiles: list[bytes]
    beginnings: Beginnings
    ids: list[int]
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    slot: int = -1
    is_suspect: bool = False
    is_cancelled: bool = False
    has_started: bool = False
    reused: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    timings: Timings = field(default_factory=Timings)

    @property
    def unread(self) -> int:
        """Positions that are not in the cache yet. Of a sequence that runs it is one: its newest token."""
        return len(self.ids) - self.computed


class Schedule:
    """The sequences of an engine, and the slots and pages that they have."""

    def __init__(self, pool: PagePool, slots: int, prefix_cache: bool):
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.reading: Sequence | None = None
        self.running: list[Sequence] = []  # in the order in which they were taken on
        self.preemptions = self.prefix_queries = self.prefix_hits = 0
        self._slots = slots
        self._prefix_cache = prefix_cache

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.running, *([self.reading] if self.reading else []), *self.waiting]

    def next_to_read(self) -> Sequence | None:
        """The prompt that is being read, or the oldest that waits if there is a slot and are pages for it."""
        if self.reading is None and self.waiting and self._may_begin(self.waiting[0]):
            self.reading = self.waiting.popleft()
            self.reading.begun = self.reading.begun or time.perf_counter()
        return self.reading

    def _may_begin(self, sequence: Sequence) -> bool:
        in_trouble = sequence.is_suspect or any(other.is_suspect for other in self.running)
        if (in_trouble and self.running) or len(self.running) >= self._slots:
            return False
        length = len(sequence.ids)
        # The last position is always computed, for its hidden row.
        digests = sequence.beginnings.reach(sequence.ids, (length - 1) // PAGE) if self._prefix_cache else []
        known = self.pool.known(digests)
        new = self.pool.take(-(-length // PAGE) - len(known))
        if new is None:
            self.pool.give_back(known)
            return False
        sequence.pages, sequence.computed = [*known, *new], len(known) * PAGE
        sequence.slot = min(set(range(self._slots)) - {other.slot for other in self.running})
        if not sequence.has_started:
            sequence.reused = sequence.computed
            self.prefix_queries += length
            self.prefix_hits += sequence.computed
        return True

    def has_read(self) -> None:
        """The prompt is read: its sequence runs."""
        assert self.reading is not None
        self.running.append(self.reading)
        self.reading = None

    def give_room(self, steps: int) -> None:
        """Pages for so many more tokens of everyone who runs; where there are none, the newest go back to wait."""
        for sequence in list(self.running):
            if sequence.slot < 0:  # it went back for one before it
                continue
            needed = -(-(len(sequence.ids) + steps - 1) // PAGE) - len(sequence.pages)
            while needed > 0 and (new := self.pool.take(needed)) is None:
                newest = self.reading or self.running[-1]
                self.send_back(newest)
                if newest is sequence:
                    break
            else:
                if needed > 0:
                    sequence.pages += new or []

    def send_back(self, sequence: Sequence) -> None:
        """To the front of those that wait, with nothing in the cache."""
        self._leave(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def end(self, sequence: Sequence) -> None:
        """It is over: its slot and pages are free."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)

    def remember(self, sequence: Sequence) -> None:
        """Its pages that are full may be shared from now on."""
        full = sequence.computed // PAGE
        if self._prefix_cache:
            for page, digest in zip(sequence.pages, sequence.beginnings.reach(sequence.ids, full)):
                self.pool.remember(page, digest)

    def _leave(self, sequence: Sequence) -> None:
        if sequence is self.reading:
            self.reading = None
        else:
            self.running.remove(sequence)
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.computed, sequence.slot = [], 0, -1
