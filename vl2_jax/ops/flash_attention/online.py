"""Softmax over blocks of keys that come one after another, for Pallas kernels on TPUs.

Sums are rescaled as the largest score grows (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135).
Largest scores and sums are kept repeated along the 128 lanes of a register, where they are used; a sum is a partial one
in each lane until the end, so that only the largest is ever reduced across lanes.

M queries, S keys of a block, K width of keys, V of values, each of whole lanes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
LOG2_E = math.log2(math.e)
MASKED = -1e30  # finite: a query that sees nothing of a block must not become NaN, and forgets it at its first key
_QUERIES = (512, 256, 128)  # of a block
ROWS_AT_ONCE = 256  # of the queries: while these are exponentiated, the MXU makes the scores of the next


def block_of_queries(length: int) -> int:
    """The rows of a block, of a multiple of 128 queries."""
    return next(size for size in _QUERIES if length % size == 0)


class OnlineSoftmax(NamedTuple):
    """What is known of M queries so far, in vector memory."""

    largest: Any  # float32 [M, 128], of the scores before scaling, repeated
    total: Any  # float32 [M, 128], partial sums of exponentials
    mixed: Any  # float32 [M, V], values in these proportions

    @staticmethod
    def scratch(rows: int, value_width: int) -> list[Any]:
        return [pltpu.VMEM((rows, width), jnp.float32) for width in (LANES, LANES, value_width)]

    def clear(self) -> None:
        self.largest[...] = jnp.full_like(self.largest, MASKED)
        self.total[...] = jnp.zeros_like(self.total)
        self.mixed[...] = jnp.zeros_like(self.mixed)

    def attend(self, scores_of: Callable[[slice], Any], values: Any, scale: float) -> None:
        """Adds a block of keys: `scores_of(rows)` are float32 `[rows, S]` before scaling, `values` `[S, V]`."""
        rows, step = self.largest.shape[0], min(ROWS_AT_ONCE, self.largest.shape[0])
        scores = scores_of(slice(0, step))
        for begin in range(0, rows, step):
            end = begin + step
            following = scores_of(slice(end, end + step)) if end < rows else None
            self._add(slice(begin, end), scores, values, scale * LOG2_E)
            scores = following

    def _add(self, rows: slice, scores: Any, values: Any, scale: float) -> None:
        before = self.largest[rows]
        now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2((scores - along_lanes(now, scores.shape[1])) * scale)
        keep = jnp.exp2((before - now) * scale)
        parts = (weights[:, i : i + LANES] for i in range(0, scores.shape[1], LANES))
        self.largest[rows] = now
        self.total[rows] = self.total[rows] * keep + functools.reduce(jnp.add, parts)
        new = dot(weights.astype(values.dtype), values, 1, 0)
        self.mixed[rows] = self.mixed[rows] * along_lanes(keep, new.shape[1]) + new

    def result(self) -> Any:
        """float32 [M, V]."""
        return self.mixed[...] / self.total[...].sum(axis=1, keepdims=True)

    def logarithms(self, scale: float) -> Any:
        """Of the sums of exponentials of scaled scores, float32 [M, 128], repeated."""
        return self.largest[...] * scale + jnp.log(self.total[...].sum(axis=1, keepdims=True))


def dot(left: Any, right: Any, left_axis: int, right_axis: int) -> Any:
    """A product along one axis of each, summed in float32."""
    dimensions = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def along_lanes(repeated: Any, width: int) -> Any:
    """Numbers that are repeated along 128 lanes, along `width`."""
    return jnp.concatenate([repeated] * (width // LANES), axis=1)
