"""One tile a step: its rows arrive as the projection leaves them, and scores never leave vector memory.

    qkv of a tile [L, 3W]   head 0: q k v cut out of lanes   scores -> softmax -> rows      out of a tile [L, W]
                            head 1:                            scores -> softmax -> rows
                            ...                                  (a product ahead)

The compiler keeps to the order of the source, mostly, so the product of the next scores stands before the softmax of
the ones before: the MXU has work while the vector units have. All heads are written out, since heads of 72 start at
lanes that no loop could name.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from vl2_jax.ops.chips import chip_of_mesh

_VMEM = 48 << 20
_PACKED_ROWS = 16  # rows of bfloat16 in a register


def supports(qkv: Array, heads: int) -> bool:
    """Whether the kernel can do this: bfloat16, several heads of at most 128, and two tiles in the chip's memory."""
    _, length, width = qkv.shape
    tile = 2 * length * (width + width // 3)  # bytes, of which two are there at a time
    scores = 3 * 4 * length * length
    return (
        qkv.dtype == jnp.bfloat16
        and width // 3 // heads <= 128
        and width % 128 == 0
        and 2 * tile + scores <= min(_VMEM, chip_of_mesh().vmem)
    )


def vision_attention(qkv: Float[Array, "I L 3W"], heads: int) -> Float[Array, "I L W"]:
    """See `api.vision_attention`."""
    tiles, length, width = qkv.shape
    width //= 3
    return pl.pallas_call(
        functools.partial(_kernel, heads=heads, head=width // heads),
        grid=(tiles,),
        in_specs=[pl.BlockSpec((1, length, 3 * width), lambda tile: (tile, 0, 0))],
        out_specs=pl.BlockSpec((1, length, width), lambda tile: (tile, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles, length, width), qkv.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=_VMEM, dimension_semantics=("parallel",)),
        name="vision_attention",
    )(qkv)


def _kernel(qkv, out, *, heads, head):
    length, width = qkv.shape[1], heads * head
    half = -(-length // 2 // _PACKED_ROWS) * _PACKED_ROWS
    exponent = head**-0.5 * math.log2(math.e)  # softmax of scaled scores, in powers of two

    def columns(part: int, number: int) -> slice:
        begin = part * width + number * head
        return slice(begin, begin + head)

    def scores_of(number: int, rows: slice) -> Array:
        queries, keys = qkv[0, rows, columns(0, number)], qkv[0, :, columns(1, number)]
        return lax.dot_general(queries, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def finish(number: int, rows: slice, scores: Array) -> None:
        weights = jnp.exp2((scores - scores.max(axis=1, keepdims=True)) * exponent)
        total = weights.sum(axis=1, keepdims=True)
        mixed = jnp.dot(weights.astype(qkv.dtype), qkv[0, :, columns(2, number)], preferred_element_type=jnp.float32)
        out[0, rows, columns(0, number)] = (mixed / total).astype(out.dtype)

    halves = [slice(begin, min(begin + half, length)) for begin in range(0, length, half)]
    work = [(number, rows) for number in range(heads) for rows in halves]
    ahead = scores_of(*work[0])
    for this, following in zip(work, [*work[1:], None]):
        scores, ahead = ahead, ahead if following is None else scores_of(*following)
        finish(*this, scores)
