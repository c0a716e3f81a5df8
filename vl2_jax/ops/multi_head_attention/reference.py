"""The obvious version: every slot of a sequence side by side, one softmax in float32. For tests."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vl2_jax.ops.paging.pages import AnyHeadPages
from vl2_jax.ops.paging.reference import attended, put_rows


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
    new = (rearrange(rows, "b t h k -> b h t k") for rows in (new_keys, new_values))
    pages, rows = put_rows(pages, tuple(new), table, positions)
    queries32, keys, values = (a.astype(jnp.float32) for a in (queries, *rows))
    scores = jnp.einsum("bthk,bhsk->bhts", queries32, keys) * scale
    weights = jax.nn.softmax(jnp.where(attended(positions, scores.shape), scores, -1e30), axis=-1)
    out = jnp.einsum("bhts,bhsk->bthk", weights, values).astype(queries.dtype)
    return jnp.where((positions < 0)[:, None, None, None], 0, out), pages
