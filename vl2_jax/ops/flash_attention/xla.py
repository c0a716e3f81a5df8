"""Plain XLA: a row of the batch and a block of queries at a time, with all keys up to the block's end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vl2_jax.ops.flash_attention.segments import sees

_LEAST_ROWS_A_BLOCK = 128


def flash_attention(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    segments: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H V"]:
    """See `api.flash_attention`.

    What is never looked at is not computed, what is computed stays in a CPU's cache, and the backward pass computes it
    again (24 rows of 384, 6 heads, with gradients, on 2 cores: 131 ms, against 349 ms for all scores at once).
    """
    length = queries.shape[1]
    size = block_size(length, max(_LEAST_ROWS_A_BLOCK, length // 8))

    @jax.checkpoint
    def of_row(row: tuple[Array, ...]) -> Float[Array, "H T V"]:
        queries, keys, values, segments = row
        parts = []
        for end in range(size, length + 1, size):
            block = slice(end - size, end)
            scores = jnp.einsum("htk,hsk->hts", queries[:, block], keys[:, :end], preferred_element_type=jnp.float32)
            causal = jnp.arange(end - size, end)[:, None] >= jnp.arange(end)
            seen = causal & sees(segments[block, None], segments[:end])
            weights = jax.nn.softmax(jnp.where(seen, scores * scale, jnp.finfo(scores.dtype).min), axis=-1)
            parts.append(jnp.einsum("hts,hsv->htv", weights.astype(values.dtype), values[:, :end]))
        return jnp.concatenate(parts, axis=1)

    by_head = (rearrange(rows, "b t h k -> b h t k") for rows in (queries, keys, values))
    return rearrange(jax.lax.map(of_row, (*by_head, segments)), "b h t v -> b t h v")


def block_size(rows: int, most: int) -> int:
    """Equal blocks, as few as can be of at most `most` rows; all rows if they do not divide."""
    sizes = (rows // count for count in range(1, rows // 16 + 1) if rows % (16 * count) == 0)
    return next((size for size in sizes if size <= most), rows)
