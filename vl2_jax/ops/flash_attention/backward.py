"""Gradients of `flash_attention` as one Pallas kernel for TPUs: weights are computed again, once for all gradients.

    a row's heads, one by one     queries and gradients of the result in vector memory; blocks of keys pass by
    a block of keys               blocks of queries that see some of them; scores lie as [keys, queries]:

        weights = exp(keys queries^T - sums)           dvalues  += weights dout
        dweights = values dout^T                       dscores   = weights * (dweights - delta)
        dkeys += dscores queries                       dqueries^T += keys^T dscores

With keys first, the sums and deltas of queries are rows along the lanes, and no product needs a transposed [keys,
queries]. Gradients of queries are summed over blocks of keys in float32, transposed, and leave at the head's end.

B batch, T positions, H heads, K key width, V value width; delta = sum over V of out * dout (arXiv 2205.14135, B.2).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.chips import chip_of_mesh
from vl2_jax.ops.flash_attention.online import LANES, LOG2_E, MASKED, block_of_queries, dot
from vl2_jax.ops.flash_attention.pallas_tpu import are_seen, as_column, block_at, columns_of_heads, specs
from vl2_jax.ops.flash_attention.segments import EVERYTHING, SOMETHING, kinds_of_blocks

_MIB = 1 << 20


@functools.partial(jax.jit, static_argnames=("scale", "size"))
def backward(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    segments: Int[Array, "B T"],
    out: Float[Array, "B T H V"],
    sums: Float[Array, "B H 1 T"],
    dout: Float[Array, "B T H V"],
    scale: float,
    size: int | None = None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"], Float[Array, "B T H V"]]:
    """Gradients of queries, keys and values, from what `pallas_tpu.forward` gave and the gradient of its result."""
    batch, length, heads, value_width = values.shape
    size = size or block_of_queries(length)
    delta = jnp.einsum("bthv,bthv->bht", out, dout, preferred_element_type=jnp.float32)[:, :, None]
    key_width = keys.shape[-1]
    queries, keys, values, dout = (columns_of_heads(a) for a in (queries, keys, values, dout))
    width = keys.shape[-1] // heads
    a_block, a_head, a_row = specs(length, size)
    of_queries = pl.BlockSpec((None, None, 1, length), lambda b, h, i, _: (b, h, 0, 0))
    gradients = pl.pallas_call(
        functools.partial(_kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, length // size),
            in_specs=[
                *(a_head(width), a_block(width), a_block(value_width), a_head(value_width)),
                *(of_queries, of_queries, a_row),
            ],
            out_specs=[a_head(width), a_block(width), a_block(value_width)],
            scratch_shapes=[
                pltpu.VMEM((size, LANES), jnp.int32),
                pltpu.VMEM((width, size), keys.dtype),
                pltpu.VMEM((width, length), jnp.float32),
                pltpu.VMEM((size, width), jnp.float32),
                pltpu.VMEM((size, value_width), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (queries, keys, values)],
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=chip_of_mesh().vmem - 2 * _MIB,
            dimension_semantics=("parallel", "parallel", "arbitrary"),  # both cores of a v5p, heads are apart
        ),
        name="flash_attention_gradients",
    )(kinds_of_blocks(segments, size).ravel(), queries, keys, values, dout, sums, delta, segments[:, None])
    by_head = (a.reshape(batch, length, heads, -1) for a in gradients)
    return tuple(a[..., :w] for a, w in zip(by_head, (key_width, key_width, value_width)))


def _kernel(
    kinds, queries, keys, values, dout, sums, delta, segments, dqueries, dkeys, dvalues,
    own, turned_keys, dqueries_sum, dkeys_sum, dvalues_sum, *, scale,
):  # fmt: skip
    """All blocks of queries that see one block of keys."""
    size, _ = keys.shape
    row, number, blocks = pl.program_id(0), pl.program_id(2), pl.num_programs(2)
    own[...] = as_column(segments[:, block_at(number, size)])
    turned_keys[...] = jnp.transpose(keys[...].astype(jnp.float32)).astype(keys.dtype)
    dkeys_sum[...] = jnp.zeros_like(dkeys_sum)
    dvalues_sum[...] = jnp.zeros_like(dvalues_sum)

    @pl.when(number == 0)
    def clear():
        dqueries_sum[...] = jnp.zeros_like(dqueries_sum)

    def attend(block, masked):
        at = block_at(block, size)
        scores = dot(keys[...], queries[at], 1, 1)
        if masked:
            seen = are_seen(segments[:, at], own[:, :1], (block - number) * size, 1)
            scores = jnp.where(seen, scores, MASKED)
        weights = jnp.exp2(scores * (scale * LOG2_E) - sums[:, at] * LOG2_E)
        dweights = dot(values[...], dout[at], 1, 1)
        dvalues_sum[...] += dot(weights.astype(dout.dtype), dout[at], 1, 0)
        dscores = (weights * (dweights - delta[:, at]) * scale).astype(keys.dtype)
        dkeys_sum[...] += dot(dscores, queries[at], 1, 0)
        dqueries_sum[:, at] += dot(turned_keys[...], dscores, 1, 0)

    def step(block, _):
        kind = kinds[(row * blocks + block) * blocks + number]
        pl.when(kind == EVERYTHING)(lambda: attend(block, False))
        pl.when(kind == SOMETHING)(lambda: attend(block, True))
        return 0

    lax.fori_loop(number, blocks, step, 0)
    dkeys[...] = dkeys_sum[...].astype(dkeys.dtype)
    dvalues[...] = dvalues_sum[...].astype(dvalues.dtype)

    @pl.when(number == blocks - 1)
    def leave():
        def turn(block, _):
            at = block_at(block, size)
            dqueries[at] = jnp.transpose(dqueries_sum[:, at]).astype(dqueries.dtype)
            return 0

        lax.fori_loop(0, blocks, turn, 0)
