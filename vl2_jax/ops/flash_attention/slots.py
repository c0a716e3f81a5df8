"""A chunk of queries over the slots of one sequence's cache that are in vector memory, for Pallas kernels on TPUs.

T queries, S slots, K key width, V value width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from vl2_jax.ops.flash_attention.online import LANES, MASKED, OnlineSoftmax, dot

KEYS = 512  # slots of a block


def attend_to_slots(
    queries_of: Callable[[Any], Any], keys: Any, values: Any, out: Any, online: OnlineSoftmax, first: Any, filled: Any,
    scale: float,
) -> None:  # fmt: skip
    """Writes `out` `[T, V]`: query t sees the slots 0 to `first + t`.

    Blocks past a block's last query are not computed; only those past its first one are masked.

    Args:
      queries_of: `[rows, K]` of queries, by a slice of them.
      keys: `[S, K]`; those past `filled` hold anything.
      values: `[S, V]`; those past `filled` are numbers, to the end of a block.
      filled: slots that some query sees; queries past the last slot are padding.
    """
    size = online.largest.shape[0]
    blocks = pl.cdiv(filled, KEYS)

    def attend_block(number, _):
        begin = number * size
        online.clear()

        def attend(masked, block, _):
            at = rows_of(block, KEYS)

            def scores_of(rows):
                here = pl.ds(pl.multiple_of(begin + rows.start, LANES), rows.stop - rows.start)
                scores = dot(queries_of(here), keys[at], 1, 1)
                if not masked:
                    return scores
                query, slot = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in range(2))
                ahead = first + begin + rows.start - block * KEYS
                return jnp.where(query + ahead >= slot, scores, MASKED)

            online.attend(scores_of, values[at], scale)
            return 0

        last = jnp.minimum(pl.cdiv(first + begin + size, KEYS), blocks)
        whole = jnp.minimum((first + begin + 1) // KEYS, last)
        lax.fori_loop(0, whole, functools.partial(attend, False), 0)
        lax.fori_loop(whole, last, functools.partial(attend, True), 0)
        out[rows_of(number, size)] = online.result().astype(out.dtype)
        return 0

    lax.fori_loop(0, out.shape[0] // size, attend_block, 0)


def rows_of(number: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(number * size, size), size)
