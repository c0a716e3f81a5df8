"""The obvious version: all scores at once. For tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.flash_attention.segments import sees


def flash_attention(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    segments: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H V"]:
    length = segments.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool)) & sees(segments[:, :, None], segments[:, None])
    scores = jnp.einsum("bthk,bshk->bhts", queries, keys, preferred_element_type=jnp.float32) * scale
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights.astype(values.dtype), values)
