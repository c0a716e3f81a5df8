"""Attention of packed rows as a Pallas kernel for TPUs: scores are made once and never leave vector memory.

    a row's heads, one by one     keys [T, K], values [T, V] of a head in vector memory; blocks of its queries pass by
    a block of queries            blocks of keys that some of them see:  scores -> online softmax -> sums += p values
    what is seen of a block       nothing: skipped;  everything: no mask;  something: segments and order compared

Arrays are read as `[B, T, H K]`, a head's columns at a time, as the projections leave them: no transposed copies.

B batch, T positions, H heads, K key width, V value width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.chips import Chip, chip_of_mesh
from vl2_jax.ops.flash_attention.online import LANES, MASKED, OnlineSoftmax, block_of_queries, dot
from vl2_jax.ops.flash_attention.segments import BRANCH, EVERYTHING, SOMETHING, kinds_of_blocks

_MIB = 1 << 20


def supports(queries: Array, values: Array, chip: Chip | None = None) -> bool:
    """Whether the kernels can do this: bfloat16, whole blocks, what they keep of a head in vector memory."""
    length, width, value_width = *queries.shape[1::2], values.shape[-1]
    if queries.dtype != jnp.bfloat16 or values.dtype != jnp.bfloat16 or length % LANES or value_width % LANES:
        return False
    # The backward kernel keeps most: queries, their gradients and those of the result twice, and float32 sums.
    return length * (12 * _whole(width) + 4 * value_width) <= (chip or chip_of_mesh()).vmem // 2


@functools.partial(jax.jit, static_argnames=("scale", "size"))  # lowered once, however many layers
def forward(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    segments: Int[Array, "B T"],
    scale: float,
    size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H 1 T"]]:
    """See `api.flash_attention`; and the logarithm of each query's sum of exponentials, for the gradients.

    Args:
      size: of blocks, by default the largest of a few that divides T.
    """
    batch, length, heads, value_width = values.shape
    size = size or block_of_queries(length)
    queries, keys, values = (columns_of_heads(a) for a in (queries, keys, values))
    width = keys.shape[-1] // heads
    a_block, a_head, a_row = specs(length, size)
    out, sums = pl.pallas_call(
        functools.partial(_forward_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // size),
            in_specs=[a_block(width), a_head(width), a_head(value_width), a_row],
            out_specs=[a_block(value_width), pl.BlockSpec((None, None, 1, size), lambda b, h, i, _: (b, h, 0, i))],
            scratch_shapes=[pltpu.VMEM((size, LANES), jnp.int32), *OnlineSoftmax.scratch(size, value_width)],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, length, heads * value_width), values.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=chip_of_mesh().vmem - 2 * _MIB,
            dimension_semantics=("parallel", "parallel", "arbitrary"),  # both cores of a v5p, heads are apart
        ),
        name="flash_attention",
    )(kinds_of_blocks(segments, size).ravel(), queries, keys, values, segments[:, None])
    return out.reshape(batch, length, heads, value_width), sums


def _forward_kernel(kinds, queries, keys, values, segments, out, sums, own, *online, scale):
    """All blocks of keys that one block of queries sees."""
    online, (size, _) = OnlineSoftmax(*online), queries.shape
    row, number, blocks = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    own[...] = as_column(segments[:, block_at(number, size)])
    online.clear()

    def attend(block, masked):
        at = block_at(block, size)

        def scores_of(rows):
            scores = dot(queries[rows], keys[at], 1, 1)
            if not masked:
                return scores
            seen = are_seen(own[rows, :1], segments[:, at], (number - block) * size + rows.start, 0)
            return jnp.where(seen, scores, MASKED)

        online.attend(scores_of, values[at], scale)

    def step(block, _):
        kind = kinds[(row * blocks + number) * blocks + block]
        pl.when(kind == EVERYTHING)(lambda: attend(block, False))
        pl.when(kind == SOMETHING)(lambda: attend(block, True))
        return 0

    lax.fori_loop(0, number + 1, step, 0)
    out[...] = online.result().astype(out.dtype)
    sums[...] = jnp.transpose(online.logarithms(scale))[:1]


def are_seen(ours, theirs, ahead, query_axis):
    """`segments.sees` and the order of positions, of a block whose first query is `ahead` of its first key."""
    shape = jnp.broadcast_shapes(ours.shape, theirs.shape)
    places = [lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (query_axis, 1 - query_axis)]
    of_segment = (ours == theirs) | ((ours & (BRANCH - 1)) == theirs)
    return of_segment & (places[0] + ahead >= places[1])


def specs(length, size):
    """Of a block of a head and of all of it, by their widths, and of a row of segments."""

    def a_block(width):
        return pl.BlockSpec((None, size, width), lambda b, h, i, _: (b, i, h))

    def a_head(width):
        return pl.BlockSpec((None, length, width), lambda b, h, i, _: (b, 0, h))

    return a_block, a_head, pl.BlockSpec((None, 1, length), lambda b, h, i, _: (b, 0, 0))


def as_column(row):
    """[1, M] as [M, 128], repeated along the lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def block_at(number, size):
    return pl.ds(pl.multiple_of(number * size, LANES), size)


def columns_of_heads(rows: Float[Array, "B T H K"]) -> Float[Array, "B T H*W"]:
    """Heads side by side, each of whole lanes: what is added are zeros."""
    batch, length, _, width = rows.shape
    return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, _whole(width) - width))).reshape(batch, length, -1)


def _whole(width: int) -> int:
    return -(-width // LANES) * LANES
