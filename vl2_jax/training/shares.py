"""Which samples of an order each process takes, and what is left of it, so that a run goes on with more or fewer
processes and no sample is lost or read twice.

    order                      0 1 2 3 4 5 6 7 8 9 ...
    shared by a and b          a b b a a b b a b a ...    in blocks of two, dealt by lot: an order that repeats itself,
                                                          as a mixture of sources does, would show b one source alone
    after 3 of a and 1 of b    . . 2 . . 5 6 7 8 9 ...    processes pack what they take, and one needs less of it than
                                                          another: this is left, and the next ones, however many,
                                                          share it out again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np


@dataclass(frozen=True)
class Rest:
    """The places of an order that nobody has taken: some below `begin`, in their order, and all from there on."""

    left: tuple[int, ...] = ()
    begin: int = 0

    def __getitem__(self, index: int) -> int:
        return self.left[index] if index < len(self.left) else self.begin + index - len(self.left)

    def length(self, total: int) -> int:
        """How many of them an order of `total` samples has."""
        return sum(place < total for place in self.left) + max(0, total - self.begin)

    def after(self, taken: Sequence[int]) -> Rest:
        """What is left once each process has taken so many of its share."""
        shares = len(taken)
        end = max(max(taken) * shares, len(self.left))
        left = []
        for index in range(min(taken) * shares, end):
            block, place = divmod(index, shares)
            owner = int(np.flatnonzero(_dealt(block, shares) == place)[0])
            if block >= taken[owner]:
                left.append(self[index])
        return Rest(tuple(left), self[end])


class ShareDataset(grain.MapDataset):
    """One process's share of what is left of an order, from its sample `taken` on."""

    def __init__(self, order: grain.MapDataset, rest: Rest, share: int = 0, shares: int = 1, taken: int = 0):
        super().__init__(order)
        self._rest, self._share, self._shares, self._taken = rest, share, shares, taken
        blocks, more = divmod(rest.length(len(order)), shares)
        self._length = blocks + bool(_dealt(blocks, shares)[share] < more)

    def __len__(self) -> int:
        return max(0, self._length - self._taken)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        block = self._taken + index
        return self._parent[self._rest[block * self._shares + int(_dealt(block, self._shares)[self._share])]]


def _dealt(block: int, shares: int) -> np.ndarray:
    """The place of each process in a block of as many samples."""
    return np.zeros(1, int) if shares == 1 else np.random.default_rng(block).permutation(shares)
