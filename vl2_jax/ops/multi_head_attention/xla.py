"""Plain XLA: the new rows are written, then blocks of pages are attended to, as many as are filled."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vl2_jax.ops.paging.pages import PAGE, AnyHeadPages, pages_a_sequence
from vl2_jax.ops.paging.xla import attend_to_filled, read_rows, write_rows


def multi_head_attention(
    queries: Float[Array, "B T H K"],
    new_keys: Float[Array, "B T H K"],
    new_values: Float[Array, "B T H K"],
    pages: AnyHeadPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    *,
    scale: float,
) -> tuple[Float[Array, "B T H K"], AnyHeadPages]:
    sequences = positions.shape[0]
    by_head, *new = (rearrange(rows, "b t h k -> b h t k") for rows in (queries, new_keys, new_values))
    pages = write_rows(pages, tuple(new), table, positions)

    def block(begin: Array, size: int, only: Array | None) -> tuple[Array, Array]:
        return read_rows(pages, table, sequences, begin, size, only)

    def score(queries: Array, block: tuple[Array, Array]) -> Array:
        return jnp.einsum("bhtk,bhsk->bhts", queries, block[0], preferred_element_type=jnp.float32)

    def mix(weights: Array, block: tuple[Array, Array]) -> Array:
        values = block[1]
        return jnp.einsum("bhts,bhsk->bhtk", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    slots = pages_a_sequence(pages, table, sequences) * PAGE
    out = attend_to_filled((by_head.astype(pages.dtype),), block, score, mix, slots, positions, scale)
    return rearrange(out, "b h t k -> b t h k").astype(queries.dtype), pages
