"""Plain XLA: the new rows are written, then blocks of pages are attended to, as many as are filled."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vl2_jax.ops.paging.pages import PAGE, AnyLatentPages, LatentPages, pages_a_sequence
from vl2_jax.ops.paging.xla import attend_to_filled, read_pages, write_rows


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
    sequences = positions.shape[0]
    pages = write_rows(pages, (new_latents, new_rotated), table, positions)

    def block(begin: Array, size: int, only: Array | None) -> LatentPages:
        return read_pages(pages, table, sequences, begin // PAGE, size // PAGE, only).floats()

    def score(q_latent: Array, q_rotated: Array, block: LatentPages) -> Array:
        # Both parts as they lie in the pages, and rows before heads: what XLA:CPU then puts in order are the scores.
        latents = rearrange(block.latents, "b n s r -> b (n s) r")
        rotated = rearrange(block.rotated, "b n i (half p) -> b (n i half) p", half=2)
        scores = jnp.einsum("bsr,bhtr->bsht", latents, q_latent, preferred_element_type=jnp.float32)
        beside = jnp.einsum("bsp,bhtp->bsht", rotated, q_rotated, preferred_element_type=jnp.float32)
        scores += rearrange(beside, "b (n i half) h t -> b (n half i) h t", half=2, i=PAGE // 2)
        return rearrange(scores, "b s h t -> b h t s")

    def mix(weights: Array, block: LatentPages) -> Array:
        latents = rearrange(block.latents, "b n s r -> b (n s) r")
        weights = weights.astype(latents.dtype)
        return jnp.einsum("bhts,bsr->bhtr", weights, latents, preferred_element_type=jnp.float32)

    by_head = (rearrange(q.astype(pages.dtype), "b t h r -> b h t r") for q in (q_latent, q_rotated))
    slots = pages_a_sequence(pages, table, sequences) * PAGE
    out = attend_to_filled(tuple(by_head), block, score, mix, slots, positions, scale)
    return rearrange(out, "b h t r -> b t h r").astype(q_latent.dtype), pages
