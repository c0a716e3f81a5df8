"""The products of the absorbed form as kernels for TPUs, which read `kv_b` as it lies.

    kv_b [R, H (n + V)]     | keys of head 0 | values of head 0 | keys of head 1 | ...        128 lanes each

XLA multiplies head by head only what has heads first, so it copies `kv_b` before each product: 4 MB of it a layer and
token (modelled for v5e: 291 us of a step of Small). Here every head's columns are a block that is fetched from where
they are.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

_LANES = 128
_MOST_ROWS = 512  # of a head; with more, reading the weights is no longer what takes time
_HEADS_A_STEP = 4


def supports(rows: Array, kv_b: Array, values_from: int) -> bool:
    """Whether the kernels can do this: bfloat16, few rows, keys and values of 128 each, latents that fill lanes."""
    heads = rows.shape[2]
    rank, both = kv_b.shape[0], kv_b.shape[1] // heads
    return (
        rows.dtype == kv_b.dtype == jnp.bfloat16
        and rows.shape[0] * rows.shape[1] <= _MOST_ROWS
        and values_from == both - values_from == _LANES
        and rank % _LANES == 0
    )


def to_latents(q_nope: Float[Array, "B T H n"], kv_b: Float[Array, "R H*(n+V)"]) -> Float[Array, "B T H R"]:
    """See `absorbed.to_latents`."""
    return _by_head(q_nope, kv_b, kv_b.shape[0], which=0, contract=1)


def to_values(mixed: Float[Array, "B T H R"], kv_b: Float[Array, "R H*(n+V)"]) -> Float[Array, "B T H V"]:
    """See `absorbed.to_values`."""
    return _by_head(mixed, kv_b, _LANES, which=1, contract=0)


@partial(jax.jit, static_argnames=("width", "which", "contract"))  # lowered once, however many layers
def _by_head(
    rows: Float[Array, "B T H W"], kv_b: Float[Array, "R H*256"], width: int, *, which: int, contract: int
) -> Float[Array, "B T H {width}"]:
    """Each head's rows times its keys' (0) or values' (1) columns, over lanes (1) or lines (0) of them."""
    batch, length, heads, depth = rows.shape
    rank, count = kv_b.shape[0], batch * length
    together = next(n for n in range(_HEADS_A_STEP, 0, -1) if heads % n == 0)

    def kernel(rows, *rest):
        *columns, out = rest
        for head, block in enumerate(columns):
            mine = rows[:, head * depth : (head + 1) * depth]
            product = lax.dot_general(
                mine, block[...], (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32
            )
            out[:, head * width : (head + 1) * width] = product.astype(out.dtype)

    def columns_of(head: int) -> pl.BlockSpec:
        return pl.BlockSpec((rank, _LANES), lambda step: (0, 2 * (step * together + head) + which))

    out = pl.pallas_call(
        kernel,
        grid=(heads // together,),
        in_specs=[
            pl.BlockSpec((count, together * depth), lambda step: (0, step)),
            *(columns_of(head) for head in range(together)),
        ],
        out_specs=pl.BlockSpec((count, together * width), lambda step: (0, step)),
        out_shape=jax.ShapeDtypeStruct((count, heads * width), rows.dtype),
        name="keys_by_head" if which == 0 else "values_by_head",
    )(rows.reshape(count, -1), *[kv_b] * together)
    return out.reshape(batch, length, heads, width)
