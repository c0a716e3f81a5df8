"""Documents laid one after another into rows of a fixed length.

    row 0   | document 1 ........ | document 2 ..... | document 3 ... | . |     segments 1 1 1 2 2 2 3 3 0
    row 1   | document 1 .................. | document 2 ........ | . . . |     positions start again in each

Documents of a row never see each other, and each has the loss it has alone. So has each of several questions apart
about the same pictures, which are computed once:

    document 1 | pictures ....... | question, answer | question, answer |            branches 0 0 0 0 1 1 1 2 2 2
                 0 1 2 3 4 5 6 7    8 9 10 11 12       8 9 10 11 12                  positions

A batch holds a fixed number of positions and of tiles, so that nothing recompiles; tiles are laid evenly over devices,
whatever row they belong to.

B rows, T positions, I tiles, S pixels along a tile's side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from vl2_jax.ops.flash_attention.segments import BRANCH
from vl2_jax.processing.batch import IGNORED, TEXT, Encoded
from vl2_jax.processing.tiling import after_tiles


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedBatch:
    """Packed rows. Padding positions have segment 0, label IGNORED, visual row TEXT."""

    input_ids: np.ndarray  # int32 [B, T]
    labels: np.ndarray  # int32 [B, T]; IGNORED at the first position of every document and branch
    segments: np.ndarray  # int32 [B, T], document from 1 + BRANCH * branch; 0 is padding
    positions: np.ndarray  # int32 [B, T], from 0 in every document, on from its pictures in every branch
    visual_index: np.ndarray  # int32 [B, T], row of the batch's visual table
    tiles: np.ndarray  # uint8 [I, S, S, 3]


def pack(
    rows: Sequence[Sequence[Encoded]], length: int, tiles: int, pad_id: int, tile_size: int, first_tile: int = 0
) -> PackedBatch:
    """A batch of `length` positions a row and `tiles` tiles.

    Args:
      rows: documents of every row; the caller has seen to it that they fit.
      first_tile: where these tiles begin in the table of the whole batch, of which other hosts make a part each.
    """
    shape = (len(rows), length)
    ids, labels = np.full(shape, pad_id, np.int32), np.full(shape, IGNORED, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    visual = np.full(shape, TEXT, np.int32)
    table = np.zeros((tiles, tile_size, tile_size, 3), np.uint8)
    used = 0
    for row, documents in enumerate(rows):
        begin = 0
        for number, document in enumerate(documents, 1):
            part = slice(begin, begin + len(document))
            ids[row, part], labels[row, part] = document.input_ids, document.labels
            branches, begins, positions[row, part] = _branches_of(document)
            labels[row, begin + begins] = IGNORED  # what stands before must not be asked to predict it
            segments[row, part] = number + BRANCH * branches
            visual[row, part] = after_tiles(document.visual_index, (first_tile + used) * document.tokens_per_tile)
            table[used : used + len(document.tiles)] = document.tiles
            used += len(document.tiles)
            begin += len(document)
    return PackedBatch(ids, labels, segments, positions, visual, table)


def _branches_of(document: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Branch of every position, where branches begin, and positions, which in every branch go on from branch 0."""
    branches = np.zeros(len(document), np.int32) if document.branches is None else document.branches
    begins = np.flatnonzero(np.diff(branches, prepend=-1))
    shared, places = int((branches == 0).sum()), np.arange(len(document))
    from_begin = places - np.repeat(begins, np.diff(begins, append=len(document)))
    return branches, begins, np.where(branches == 0, places, shared + from_begin)
