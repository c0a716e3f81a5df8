"""Plain XLA: products of all tiles and heads at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def vision_attention(qkv: Float[Array, "I L 3W"], heads: int) -> Float[Array, "I L W"]:
    queries, keys, values = rearrange(qkv, "i l (s h k) -> s i l h k", s=3, h=heads)
    scale = queries.shape[-1] ** -0.5
    scores = jnp.einsum("ithk,ishk->ihts", queries, keys, preferred_element_type=jnp.float32) * scale
    mixed = jnp.einsum("ihts,ishk->ithk", jax.nn.softmax(scores, axis=-1).astype(values.dtype), values)
    return rearrange(mixed, "i l h k -> i l (h k)")
