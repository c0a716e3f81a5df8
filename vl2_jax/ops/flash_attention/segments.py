"""Which positions of packed rows see which, position by position and block by block.

B rows, T positions, n blocks a row.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

BRANCH = 1 << 16  # above the number of a document in its segment: which of its branches
NOTHING, SOMETHING, EVERYTHING = range(3)  # of a block of keys that a block of queries sees


def sees(queries: Int[Array, ...], keys: Int[Array, ...]) -> Bool[Array, ...]:
    """Whether a position of one segment may look at one of another: of its own branch of a document, or of branch 0.

    A segment is the number of a document + `BRANCH` * the number of a branch, 0 for what all its branches share.
    """
    return (queries == keys) | (queries % BRANCH == keys)


def kinds_of_blocks(segments: Int[Array, "B T"], size: int) -> Int[Array, "B n n"]:
    """What each block of `size` queries sees of each block of keys, causally.

    Blocks meet where the ranges of their documents do, so that of documents in order no block is computed in vain but
    those of other branches:

        documents  1 1 | 1 2 | 2 2           queries      keys 0  1  2
        block        0     1     2                 0           S
                                                   1           S  S
                                                   2              S  S
    """
    blocks = segments.reshape(segments.shape[0], -1, size)
    documents = blocks % BRANCH
    (low, high), (first, last) = ((a.min(axis=-1), a.max(axis=-1)) for a in (documents, blocks))
    meet = (low[:, :, None] <= high[:, None]) & (high[:, :, None] >= low[:, None])
    of_one_segment = first == last
    shares = (low == high)[:, :, None] & (low[:, :, None] == first[:, None])
    same = of_one_segment[:, :, None] & (first[:, :, None] == first[:, None])
    number = jnp.arange(blocks.shape[1])
    is_past, is_later = number[:, None] > number, number[:, None] < number
    all_seen = is_past & of_one_segment[:, None] & (shares | same)
    return jnp.where(meet & ~is_later, jnp.where(all_seen, EVERYTHING, SOMETHING), NOTHING)
