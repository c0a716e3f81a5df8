"""Products with weights as they are stored: arrays as ever, and narrow kinds, which are widened where they are used.

    one row       sums of few stored rows at a time: a stored row is read once, widened in registers, and never written
    more rows     blocks of columns widened to float32, as large as stays near, and multiplied as any array
    by head       rows of every head with its own columns, a head at a time: nothing is turned so that heads come first
    gradients     of the rows, with the matrix widened again: nothing wide is kept, and a narrow matrix has no gradient

What they take is in `docs/quantisation.md`. N rows, D and F widths of the matrix, E experts, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from vl2_jax.ops.narrow.kinds import Bits, Narrow

_TOGETHER = 8  # stored rows that one trip adds up
_SUMS = 1 << 15  # numbers that a trip adds to
_BLOCK = 1 << 20  # numbers of a block: 4 MB


def product(
    x: Float[Array, "N D"], kernel: Float[Array, "... D F"] | Narrow, expert: Int[Array, ""] | None = None
) -> Float[Array, "N F"]:
    """`x @ kernel`, or `x @ kernel[expert]`, in the dtype of `x`; what is narrow adds up in float32."""
    if not isinstance(kernel, Narrow):
        return x @ (kernel if expert is None else kernel[expert])
    return _product(x, kernel, expert)


def transposed_product(
    y: Float[Array, "N F"], kernel: Narrow, expert: Int[Array, ""] | None = None
) -> Float[Array, "N D"]:
    """`y @ kernel.T`, or `y @ kernel[expert].T`: the gradient of `product` in `x`, from that of its result."""
    return lax.platform_dependent(y, kernel, expert, cpu=_transposed_on_cpu, default=_whole_transposed)


def product_by_head(
    x: Float[Array, "N H D"], kernel: Float[Array, "D H*F"] | Narrow, begin: int, width: int
) -> Float[Array, "N H {width}"]:
    """Each head's rows times `width` of its F columns, from `begin` on."""
    x = kernel.to_stored_order(x) if isinstance(kernel, Narrow) else x
    return _by_head(lambda rows, columns: rows @ columns, x, kernel, begin, width)


def transposed_product_by_head(
    y: Float[Array, "N H w"], kernel: Float[Array, "D H*F"] | Narrow, begin: int
) -> Float[Array, "N H D"]:
    """Each head's rows times w of its F columns, from `begin` on, transposed."""
    out = _by_head(lambda rows, columns: rows @ columns.T, y, kernel, begin, y.shape[-1])
    return kernel.from_stored_order(out) if isinstance(kernel, Narrow) else out


def in_dtype(kernel: Any, dtype: Any) -> Any:
    """An array in another dtype; what is narrow stays as it is."""
    return kernel if isinstance(kernel, Narrow) else kernel.astype(dtype)


def widened(kernel: Any, dtype: Any) -> Float[Array, ...]:
    """All of a parameter as an array."""
    return kernel.widened(dtype) if isinstance(kernel, Narrow) else kernel.astype(dtype)


def rows_of(table: Any, ids: Int[Array, ...]) -> Float[Array, "... F"]:
    """Rows of a table of embeddings."""
    return table.taken(ids) if isinstance(table, Bits) else jnp.take(table, ids, axis=0)


@jax.custom_vjp
def _product(x: Array, kernel: Narrow, expert: Array | None) -> Array:
    return lax.platform_dependent(x, kernel, expert, cpu=_on_cpu, default=_whole)


def _forward(x: Array, kernel: Narrow, expert: Array | None) -> tuple[Array, Any]:
    return _product(x, kernel, expert), (kernel, expert)


def _backward(saved: tuple[Narrow, Array | None], dout: Array) -> tuple[Array, None, None]:
    return transposed_product(dout, *saved), None, None


_product.defvjp(_forward, _backward)


def _whole(x: Array, kernel: Narrow, expert: Array | None) -> Array:
    return x @ kernel.at(expert).widened(x.dtype)


def _whole_transposed(y: Array, kernel: Narrow, expert: Array | None) -> Array:
    # Else XLA finds that the forward pass has widened the same matrix, and keeps that one until it is needed here.
    y, narrow = lax.optimization_barrier((y, kernel.at(expert)))
    return y @ narrow.widened(y.dtype).T


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
    width, (block, columns) = kernel.shape[-1], _blocks_of(kernel, expert)
    x = kernel.to_stored_order(x)
    if block == width:
        return x @ columns(0)

    def trip(number: Array, out: Array) -> Array:
        begin = number * block
        return lax.dynamic_update_slice_in_dim(out, x @ columns(begin), begin, axis=1)

    # Every column is overwritten. Zeros wait for nothing, so XLA would make those of all layers at once: 0.8 GB a tile.
    room = jnp.broadcast_to(x[:, :1], (x.shape[0], width))
    return lax.fori_loop(0, width // block, trip, room)


def _transposed_on_cpu(y: Float[Array, "N F"], kernel: Narrow, expert: Array | None) -> Float[Array, "N D"]:
    block, columns = _blocks_of(kernel, jnp.int32(0) if expert is None else expert)
    (depth, width), wide = kernel.shape[-2:], y.astype(jnp.float32)
    if block == width:
        return kernel.from_stored_order(wide @ columns(0).T).astype(y.dtype)

    def trip(number: Array, total: Array) -> Array:
        begin = number * block
        part = lax.dynamic_slice_in_dim(wide, begin, block, axis=1) @ columns(begin).T
        return jnp.where(number == 0, part, total + part)

    room = jnp.broadcast_to(wide[:, :1], (y.shape[0], depth))  # as in `_rows`
    return kernel.from_stored_order(lax.fori_loop(0, width // block, trip, room)).astype(y.dtype)


def _by_head(
    multiply: Callable[[Array, Array], Array],
    rows: Float[Array, "N H _"],
    kernel: Float[Array, "D H*F"] | Narrow,
    begin: int,
    width: int,
) -> Float[Array, "N H _"]:
    heads = rows.shape[1]
    of_each = kernel.shape[-1] // heads

    def of_head(head: tuple[Array, Array]) -> Array:
        number, mine = head
        return multiply(mine, _columns(kernel, number * of_each + begin, width).astype(rows.dtype))

    return jnp.swapaxes(lax.map(of_head, (jnp.arange(heads), jnp.swapaxes(rows, 0, 1))), 0, 1)


def _blocks_of(kernel: Narrow, expert: Array) -> tuple[int, Callable[[Array | int], Float[Array, "D block"]]]:
    """How many columns a block has, and the block that begins at one, as `_columns`."""
    depth, width = kernel.shape[-2:]
    most = max(1, _BLOCK // depth)
    block = next(n for n in range(min(width, most), 0, -1) if width % n == 0)
    return block, lambda begin: _columns(kernel, begin, block, expert)


def _columns(
    kernel: Array | Narrow, begin: Array | int, width: int, expert: Array | int = 0
) -> Float[Array, "D {width}"]:
    """Columns of a matrix, or of one of those of all experts; what is narrow is widened to float32, in stored order."""

    def take(part: Array) -> Array:
        stacked = part[None] if kernel.ndim == 2 else part
        begins = (expert, *[0] * (stacked.ndim - 2), begin)
        return lax.dynamic_slice(stacked, begins, (1, *stacked.shape[1:-1], width))[0]

    taken = jax.tree.map(take, kernel)
    return taken.widened_in_stored_order(jnp.float32) if isinstance(taken, Narrow) else taken
