"""The obvious version: every slot of a sequence side by side, one softmax in float32. For tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.paging.pages import AnyLatentPages
from vl2_jax.ops.paging.reference import attended, put_rows


def latent_attention(
    q_latent: Float[Array, "B T H R"],
    q_rotated: Float[Array, "B T H P"],
    new_latents: Float[Array, "B T R"],
    new_rotated: Float[Array, "B T P"],
    pages: AnyLatentPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T H R"], AnyLatentPages]:
    queries = jnp.concatenate([q_latent, q_rotated], axis=-1).astype(jnp.float32)
    pages, (latents, rotated) = put_rows(pages, (new_latents, new_rotated), table, positions)
    rows = jnp.concatenate([latents, rotated], axis=-1).astype(jnp.float32)
    scores = jnp.einsum("bthw,bsw->bhts", queries, rows) * scale
    weights = jax.nn.softmax(jnp.where(attended(positions, scores.shape), scores, -1e30), axis=-1)
    out = jnp.einsum("bhts,bsr->bthr", weights, latents.astype(jnp.float32)).astype(q_latent.dtype)
    return jnp.where((positions < 0)[:, None, None, None], 0, out), pages
