"""Plain XLA: rows cut into blocks of one group each, a loop over the blocks that exist.

    rows of each group   0 0 | 1 | 2 2 2 2
    blocks of 2 rows     0 0 | 1 . | 2 2 | 2 2       4 trips of the loop

Cost grows with the rows and the groups that have any, never with the number of groups. The number of trips is a value,
not a shape: nothing recompiles and nothing is dropped, however the rows fall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.ops.narrow.product import product, transposed_product

_LARGEST_BLOCK = 512


class Blocks(NamedTuple):
    """How rows that are ordered by group fall into blocks of one group each."""

    group: Int[Array, " blocks"]
    start: Int[Array, " blocks"]  # the block's first row
    stop: Int[Array, " blocks"]  # where the rows of its group end
    existing: Int[Array, ""]  # number of blocks that hold a row


def cut_into_blocks(group_sizes: Int[Array, " G"], rows: int, block: int) -> Blocks:
    groups = group_sizes.shape[0]
    ends, blocks_of = jnp.cumsum(group_sizes), -(-group_sizes // block)
    block_ends = jnp.cumsum(blocks_of)
    number = jnp.arange(min(rows, rows // block + groups))
    group = jnp.minimum(jnp.searchsorted(block_ends, number, side="right"), groups - 1)
    within = number - (block_ends - blocks_of)[group]
    return Blocks(group, (ends - group_sizes)[group] + within * block, ends[group], block_ends[-1])


def block_rows(rows: int, groups: int) -> int:
    """Rows in a block: a group's mean share and two deviations, so that one block does for nearly every group.

    Measured on 2 cores (512 x 352, 64 experts, top-6, useful GF/s): 384 tokens 54 with 32 rows, 82 with 48, 63 with 64;
    1087 tokens 92 with 64, 106 with 128; 9216 tokens (192 x 96, 8 experts, top-2): 81 ms with 128, 32 with 512. A block
    costs as much whether it is full or not.
    """
    share = rows / groups
    size = math.ceil(share + 2 * share**0.5) if share > 1 else 1
    return min(_LARGEST_BLOCK, -(-size // 16) * 16 if size > 8 else 1 << (size - 1).bit_length())


def grouped_matmul(
    lhs: Float[Array, "N K"], rhs: Float[Array, "G K M"] | Narrow, group_sizes: Int[Array, " G"]
) -> Float[Array, "N M"]:
    return _by_blocks(lhs, rhs, group_sizes, product, rhs.shape[2])


def grouped_matmul_with_transposes(
    lhs: Float[Array, "N M"], rhs: Narrow, group_sizes: Int[Array, " G"]
) -> Float[Array, "N K"]:
    """`lhs[n] @ rhs[g].T` of matrices `[G, K, M]`, of which no more than one is widened at a time."""
    return _by_blocks(lhs, rhs, group_sizes, transposed_product, rhs.shape[1])


def _by_blocks(
    lhs: Array, rhs: Any, group_sizes: Int[Array, " G"], multiply: Callable[..., Array], width: int
) -> Float[Array, "N {width}"]:
    rows, groups = lhs.shape[0], rhs.shape[0]
    block = block_rows(rows, groups)
    blocks = cut_into_blocks(group_sizes, rows, block)
    padded = jnp.pad(lhs, ((0, block), (0, 0)))  # a block may reach past the last row; what it writes there is cut off

    def body(number, out):
        start = blocks.start[number]
        result = multiply(jax.lax.dynamic_slice_in_dim(padded, start, block), rhs, blocks.group[number])
        valid = start + jnp.arange(block) < blocks.stop[number]
        old = jax.lax.dynamic_slice_in_dim(out, start, block)
        return jax.lax.dynamic_update_slice_in_dim(out, jnp.where(valid[:, None], result, old), start, 0)

    out = jnp.zeros((rows + block, width), lhs.dtype)
    return jax.lax.fori_loop(0, blocks.existing, body, out)[:rows]


def grouped_transposed_matmul(
    lhs: Float[Array, "N K"], rhs: Float[Array, "N M"], group_sizes: Int[Array, " G"]
) -> Float[Array, "G K M"]:
    rows, groups = lhs.shape[0], group_sizes.shape[0]
    block = block_rows(rows, groups)
    blocks = cut_into_blocks(group_sizes, rows, block)
    lhs, rhs = (jnp.pad(a, ((0, block), (0, 0))) for a in (lhs, rhs))

    def body(number, out):
        start, group = blocks.start[number], blocks.group[number]
        valid = start + jnp.arange(block) < blocks.stop[number]
        left = jnp.where(valid[:, None], jax.lax.dynamic_slice_in_dim(lhs, start, block), 0)
        right = jax.lax.dynamic_slice_in_dim(rhs, start, block)
        return out.at[group].add(jnp.matmul(left.T, right, preferred_element_type=jnp.float32))

    out = jnp.zeros((groups, lhs.shape[1], rhs.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, blocks.existing, body, out).astype(lhs.dtype)
