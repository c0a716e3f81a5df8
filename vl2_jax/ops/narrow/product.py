"""Products with weights as they are stored: arrays as ever, and narrow kinds, which are widened where they are used.

    one row       sums of few stored rows at a time: a stored row is read once, widened in registers, and never written
    more rows     blocks of the matrix widened to float32, as large as stays near, and multiplied as any array

Measured on 2 cores, 1280 x 896 of 64 experts: see `docs/quantisation.md`. N rows, D and F widths, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vl2_jax.ops.narrow.kinds import Bits, Narrow

_TOGETHER = 16  # stored rows that one trip adds up
_SUMS = 1 << 14  # numbers that a trip adds to
_BLOCK = 1 << 21  # numbers of a block: 8 MB


def product(
    x: Float[Array, "N D"], kernel: Float[Array, "... D F"] | Narrow, expert: Int[Array, ""] | None = None
) -> Float[Array, "N F"]:
    """`x @ kernel`, or `x @ kernel[expert]`, in the dtype of `x`; what is narrow adds up in float32."""
    if not isinstance(kernel, Narrow):
        return x @ (kernel if expert is None else kernel[expert])
    return lax.platform_dependent(x, kernel, expert, cpu=_on_cpu, default=_whole)


def in_dtype(kernel: Any, dtype: Any) -> Any:
    """An array in another dtype; what is narrow stays as it is."""
    return kernel if isinstance(kernel, Narrow) else kernel.astype(dtype)


def widened(kernel: Any, dtype: Any) -> Float[Array, ...]:
    """All of a parameter as an array."""
    return kernel.widened(dtype) if isinstance(kernel, Narrow) else kernel.astype(dtype)


def rows_of(table: Any, ids: Int[Array, ...]) -> Float[Array, "... F"]:
    """Rows of a table of embeddings."""
    return table.taken(ids) if isinstance(table, Bits) else jnp.take(table, ids, axis=0)


def _whole(x: Array, kernel: Narrow, expert: Array | None) -> Array:
    return x @ kernel.widened(x.dtype, expert)


def _on_cpu(x: Array, kernel: Narrow, expert: Array | None) -> Array:
    multiply = _one_row if x.shape[0] == 1 else _rows
    return multiply(x.astype(jnp.float32), kernel, jnp.int32(0) if expert is None else expert).astype(x.dtype)


def _one_row(x: Float[Array, "1 D"], kernel: Narrow, expert: Array) -> Float[Array, "1 F"]:
    """R segments of the matrix at the same time, so that a trip is long enough where rows are short."""
    size, width = kernel.stored.shape[-2:]
    alike, most = kernel.alike, max(1, _SUMS // width)
    groups = size if alike == size else size // alike  # a segment does not begin inside of one
    segments = next(n for n in range(min(groups, most), 0, -1) if groups % n == 0)
    length = size // segments
    together = math.gcd(_TOGETHER, math.gcd(length, alike))
    stacked = kernel.stored.reshape(-1, segments, length, width)
    factors = kernel.by_stored(x[0]).reshape(segments, length, -1)

    def trip(number: Array, sums: Array) -> Array:
        part = jnp.zeros_like(sums)
        for row in range(together):
            at = number * together + row
            rows = lax.dynamic_slice(stacked, (expert, 0, at, 0), (1, segments, 1, width))[0, :, 0]
            mine = lax.dynamic_slice_in_dim(factors, at, 1, axis=1)[:, 0]
            for n, wide in enumerate(kernel.in_stored(rows)):
                part += mine[:, n : n + 1] * wide
        return sums + (part if alike == size else kernel.scaled(part, expert, number * together))

    sums = lax.fori_loop(0, length // together, trip, jnp.zeros((segments, width), jnp.float32))
    total = sums.sum(axis=0, keepdims=True)
    return kernel.scaled(total, expert, 0) if alike == size else total


def _rows(x: Float[Array, "N D"], kernel: Narrow, expert: Array) -> Float[Array, "N F"]:
    depth, width = kernel.shape[-2:]
    most = max(1, _BLOCK // width)
    group = 1 if kernel.alike == kernel.stored.shape[-2] else depth * kernel.alike // kernel.stored.shape[-2]
    block = group * next(n for n in range(max(1, min(depth, most) // group), 0, -1) if depth // group % n == 0)
    if block == depth:
        return x @ kernel.block(expert, 0, depth)

    def trip(number: Array, sums: Array) -> Array:
        mine = lax.dynamic_slice_in_dim(x, number * block, block, axis=1)
        return sums + mine @ kernel.block(expert, number * block, block)

    return lax.fori_loop(0, depth // block, trip, jnp.zeros((x.shape[0], width), jnp.float32))
