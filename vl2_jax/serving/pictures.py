"""Tokens of tiles that were looked at, in one table on the device, so that a picture is looked at once.

A tile is what its pixels are (SHA-256). Tiles that are encoded together, one a device, lie in one group of rows; groups
are given away in the order in which they were used last, but not those of the prompt that is being read.

M tokens of a tile.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from vl2_jax.processing.batch import Encoded
from vl2_jax.processing.tiling import FIRST_TOKEN_ROW


class TileTable:
    """Which tile lies in which row of a table of `groups` x `devices` rows."""

    def __init__(self, groups: int, devices: int):
        self.devices = devices
        self._row: dict[bytes, int] = {}
        self._tiles: OrderedDict[int, tuple[bytes, ...]] = OrderedDict((group, ()) for group in range(groups))

    @property
    def rows(self) -> int:
        return len(self._tiles) * self.devices

    def missing(self, wanted: Sequence[bytes]) -> list[bytes]:
        """Those of the wanted tiles that are not there, each once; what is there counts as used now."""
        for digest in wanted:
            if digest in self._row:
                self._tiles.move_to_end(self._row[digest] // self.devices)
        return [digest for digest in dict.fromkeys(wanted) if digest not in self._row]

    def place(self, new: Sequence[bytes]) -> int:
        """The first row for some tiles, at most one a device, in place of those that were used longest ago."""
        group, old = self._tiles.popitem(last=False)
        for digest in old:
            del self._row[digest]
        self._tiles[group] = tuple(new)
        for number, digest in enumerate(new):
            self._row[digest] = group * self.devices + number
        return group * self.devices

    def rows_of(self, prompt: Encoded, digests: Sequence[bytes]) -> np.ndarray:
        """`visual_index` of a prompt for this table; positions of tiles that are not there show none."""
        return renumbered(prompt, {number: self._row[d] for number, d in enumerate(digests) if d in self._row})

    def forget(self) -> None:
        self._row.clear()
        for group in self._tiles:
            self._tiles[group] = ()


def renumbered(prompt: Encoded, rows: Mapping[int, int]) -> np.ndarray:
    """`visual_index` where tile t of the prompt lies in row `rows[t]` of a table, int32 `[T]`."""
    index = prompt.visual_index.copy()
    shows = np.flatnonzero(index >= FIRST_TOKEN_ROW)
    tile, token = np.divmod(index[shows] - FIRST_TOKEN_ROW, prompt.tokens_per_tile)
    row = np.asarray([rows.get(number, 0) for number in range(len(prompt.tiles))], np.int64)
    index[shows] = FIRST_TOKEN_ROW + row[tile] * prompt.tokens_per_tile + token
    return index.astype(np.int32)


def tiles_shown(prompt: Encoded, begin: int) -> list[int]:
    """Tiles that positions from `begin` on look at."""
    index = prompt.visual_index[begin:]
    return np.unique((index[index >= FIRST_TOKEN_ROW] - FIRST_TOKEN_ROW) // prompt.tokens_per_tile).tolist()
