"""`vision_attention`: everything between the projections of a block of the vision tower.

I tiles, L patches of a tile, W width, H heads of W / H.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl2_jax.ops.choice import Implementation, choose
from vl2_jax.ops.vision_attention import xla


def vision_attention(
    qkv: Float[Array, "I L 3W"], heads: int, *, implementation: Implementation | None = None
) -> Float[Array, "I L W"]:
    """Softmax attention of the patches of each tile to all patches of it, with float32 scores (SPEC 2.2).

    Args:
      qkv: rows as their projection leaves them: queries of all heads, then keys, then values.
      implementation: "pallas_tpu" is the kernel, "xla" products of all tiles at once. `None` is the kernel where the
        program is compiled for a TPU and the kernel takes dtype, shape and chip (`pallas_tpu.supports`), else "xla".

    Returns:
      The heads' mixed values, side by side, in the dtype of `qkv`.
    """
    if implementation is None and not _kernel_supports(qkv, heads):
        implementation = "xla"
    kernel, plain = partial(_with_gradients, heads=heads), partial(xla.vision_attention, heads=heads)
    return choose(implementation, kernel, plain)(qkv)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_gradients(qkv, heads):
    from vl2_jax.ops.vision_attention import pallas_tpu  # Pallas takes a third of a second to import

    return pallas_tpu.vision_attention(qkv, heads)


def _forward(qkv, heads):
    return _with_gradients(qkv, heads), qkv


def _backward(heads, qkv, gradient):
    """A tile at a time: its scores stay in vector memory, where those of several tiles would not."""

    def of_tile(pair):
        rows, gradient = pair
        _, pull = jax.vjp(partial(xla.vision_attention, heads=heads), rows[None])
        return pull(gradient[None])[0][0]

    return (jax.lax.map(of_tile, (qkv, gradient)),)


_with_gradients.defvjp(_forward, _backward)


def _kernel_supports(qkv, heads):
    if qkv.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.vision_attention import pallas_tpu

    return pallas_tpu.supports(qkv, heads)
