"""Grouped products as Pallas kernels for TPUs: a grid over the pairs of row tile and group that meet.

    rows       0 0 0 0 0 1 | 1 1 1 1 1 1 | 1 2 2 2 2 2        row tiles of 6
    visits     (tile 0, group 0) (0, 1)  (1, 1)  (2, 1) (2, 2)

A tile at a border is visited once for each group it holds, and the rows of others are masked. The grid is as long as
the worst routing needs; visits that do not exist name the blocks of the last one, so that nothing is copied for them.
bfloat16 in and out, float32 sums.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_TALL, _LOW = 128, 64  # rows of a tile: many rows a group, few rows a group. Tiles at borders count twice.
_BLOCK_BYTES = 6 << 20  # of the largest block: two of each are in vector memory, which is 64 MiB on the smallest chip
_VMEM = 60 << 20


def supports(lhs: Array, *widths: int) -> bool:
    """Whether the kernels can do this: bfloat16, and widths that fill lanes."""
    return lhs.dtype == jnp.bfloat16 and all(width % 128 == 0 for width in widths)


class Visits(NamedTuple):
    """In scalar memory, one entry a step of the grid."""

    tile: Int[Array, " visits"]
    group: Int[Array, " visits"]
    begin: Int[Array, " visits"]  # rows of the group
    end: Int[Array, " visits"]
    existing: Int[Array, " 1"]


def plan_visits(group_sizes: Int[Array, " G"], rows: int, height: int, *, every_group: bool) -> Visits:
    """Which tiles meet which groups, in order.

    Args:
      every_group: visit groups without rows too, once each, so that their result is written.
    """
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    begins = ends - group_sizes
    tiles = jnp.where(group_sizes > 0, (ends - 1) // height - begins // height + 1, int(every_group))
    visit_ends = jnp.cumsum(tiles)
    number = jnp.minimum(jnp.arange(-(-rows // height) + groups), jnp.maximum(visit_ends[-1] - 1, 0))
    group = jnp.minimum((visit_ends[None, :] <= number[:, None]).sum(axis=1, dtype=jnp.int32), groups - 1)
    tile = begins[group] // height + number - (visit_ends - tiles)[group]
    last = -(-rows // height) - 1
    as_int = functools.partial(jnp.asarray, dtype=jnp.int32)
    return Visits(
        as_int(jnp.minimum(tile, last)), group, as_int(begins[group]), as_int(ends[group]), as_int(visit_ends[-1:])
    )


def grouped_matmul(
    lhs: Float[Array, "N K"],
    rhs: Float[Array, "G K M"],
    group_sizes: Int[Array, " G"],
    *,
    transpose_rhs: bool = False,
) -> Float[Array, "N M"]:
    """See `api.grouped_matmul`. With `transpose_rhs`, rhs is `[G, M, K]`."""
    (rows, depth), groups = lhs.shape, rhs.shape[0]
    width = rhs.shape[1] if transpose_rhs else rhs.shape[2]
    height, _, columns, _ = blocks_of_product(rows, groups, depth, width)
    visits = plan_visits(group_sizes, rows, height, every_group=False)

    def kernel(tile, group, begin, end, existing, lhs_block, rhs_block, out_block):
        visit = pl.program_id(1)

        @pl.when(visit < existing[0])
        def _():
            contract = ((1,), (1 if transpose_rhs else 0,))
            product = lax.dot_general(
                lhs_block[...], rhs_block[0], (contract, ((), ())), preferred_element_type=jnp.float32
            )
            row = tile[visit] * height + lax.broadcasted_iota(jnp.int32, (height, columns), 0)
            mine = (row >= begin[visit]) & (row < end[visit])
            is_first = (visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != tile[visit])
            others = jnp.where(is_first, 0.0, out_block[...].astype(jnp.float32))
            out_block[...] = jnp.where(mine, product, others).astype(out_block.dtype)

    rhs_shape = (1, columns, depth) if transpose_rhs else (1, depth, columns)
    rhs_index = (lambda c, v, t, g, *_: (g[v], c, 0)) if transpose_rhs else (lambda c, v, t, g, *_: (g[v], 0, c))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(width // columns, visits.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((height, depth), lambda c, v, t, *_: (t[v], 0)),
                pl.BlockSpec(rhs_shape, rhs_index),
            ],
            out_specs=pl.BlockSpec((height, columns), lambda c, v, t, *_: (t[v], c)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, width), lhs.dtype),
        compiler_params=_parameters(),
        name="grouped_matmul",
    )(*visits, lhs, rhs)


def grouped_transposed_matmul(
    lhs: Float[Array, "N K"], rhs: Float[Array, "N M"], group_sizes: Int[Array, " G"]
) -> Float[Array, "G K M"]:
    """See `api.grouped_transposed_matmul`."""
    (rows, depth), width, groups = lhs.shape, rhs.shape[1], group_sizes.shape[0]
    height, lines, columns, _ = blocks_of_transposed(rows, groups, depth, width)
    visits = plan_visits(group_sizes, rows, height, every_group=True)

    def kernel(tile, group, begin, end, existing, lhs_block, rhs_block, out_block, total):
        visit = pl.program_id(2)
        last = existing[0] - 1

        @pl.when((visit == 0) | (group[jnp.maximum(visit - 1, 0)] != group[visit]))
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(visit <= last)
        def _():
            # Both sides are masked: what stands in rows of other groups, or past the last row, may be anything.
            row = tile[visit] * height + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
            mine = (row >= begin[visit]) & (row < end[visit])
            left, right = (
                jnp.where(mine, block[...].astype(jnp.float32), 0.0).astype(block.dtype)
                for block in (lhs_block, rhs_block)
            )
            total[...] += lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        @pl.when((visit == last) | (group[jnp.minimum(visit + 1, last)] != group[visit]))
        def _():
            out_block[0] = total[...].astype(out_block.dtype)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(depth // lines, width // columns, visits.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((height, lines), lambda k, c, v, t, *_: (t[v], k)),
                pl.BlockSpec((height, columns), lambda k, c, v, t, *_: (t[v], c)),
            ],
            out_specs=pl.BlockSpec((1, lines, columns), lambda k, c, v, t, g, *_: (g[v], k, c)),
            scratch_shapes=[pltpu.VMEM((lines, columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((groups, depth, width), lhs.dtype),
        compiler_params=_parameters(),
        name="grouped_transposed_matmul",
    )(*visits, lhs, rhs)


class Blocks(NamedTuple):
    """Sizes of the blocks of one step of the grid, and the vector memory they take, two of each."""

    height: int
    depth: int
    columns: int
    vmem: int


def blocks_of_product(rows: int, groups: int, depth: int, width: int) -> Blocks:
    height, columns = _height(rows, groups), _columns(width, depth * 2)
    return Blocks(height, depth, columns, 4 * (height * depth + depth * columns + height * columns))


def blocks_of_transposed(rows: int, groups: int, depth: int, width: int) -> Blocks:
    """The block of a group's result for which the rows are read least often: both widths count, 1408 is 11 x 128."""
    height = _height(rows, groups)
    pairs = [(lines, columns) for lines in _divisors(depth) for columns in _divisors(width)]
    fitting = [(lines, columns) for lines, columns in pairs if lines * columns * 4 <= _BLOCK_BYTES]
    lines, columns = min(fitting, key=lambda pair: depth * (width // pair[1]) + width * (depth // pair[0]))
    return Blocks(height, lines, columns, 4 * (height * (lines + columns) + 2 * lines * columns))


def _height(rows: int, groups: int) -> int:
    return _TALL if rows >= groups * _TALL // 2 else _LOW


def _columns(width: int, bytes_a_column: int) -> int:
    """The widest block whose width divides `width` and is a multiple of 128."""
    return max(size for size in _divisors(width) if size == 128 or size * bytes_a_column <= _BLOCK_BYTES)


def _divisors(width: int) -> list[int]:
    return [size for size in range(128, width + 1, 128) if width % size == 0]


def _parameters() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(vmem_limit_bytes=_VMEM)
