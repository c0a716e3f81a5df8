"""The expanded form: keys and values of every head are computed from latent rows, for many queries at once.

B sequences, T new rows of each, S rows, H heads, R latent rank, P rotated width, n and V widths of a head's key and
value, A rank of an adapter, N pages.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vl2_jax.ops.latent_attention.absorbed import by_head
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.ops.narrow.product import product, widened
from vl2_jax.ops.paging.pages import PAGE, AnyLatentPages, pages_a_sequence
from vl2_jax.ops.paging.xla import attend_to_filled, read_rows, write_rows


def expand(
    latents: Float[Array, "B S R"],
    rotated: Float[Array, "B S P"],
    kv_b: Float[Array, "R H*(n+V)"] | Narrow,
    heads: int,
    values_from: int,
    narrow: Float[Array, "R A"] | None = None,
    wide: Float[Array, "A H*(n+V)"] | None = None,
) -> tuple[Float[Array, "B H S n+P"], Float[Array, "B H S V"]]:
    """Keys and values of rows (SPEC 5.2).

    Args:
      values_from: n, where a head's values begin.
      narrow, wide: low-rank factors of an adapter, added to `kv_b`.
    """
    if isinstance(kv_b, Narrow):  # as a product, which widens a block at a time
        rows = product(latents.reshape(-1, latents.shape[-1]), kv_b)
        expanded = rearrange(rows, "(b s) (h k) -> b h s k", b=len(latents), h=heads)
    else:
        expanded = jnp.einsum("bsr,rhk->bhsk", latents, by_head(kv_b, heads))
    if narrow is not None and wide is not None:
        expanded += jnp.einsum("bsa,ahk->bhsk", latents @ narrow, by_head(wide, heads))
    shared = jnp.broadcast_to(rotated[:, None], (*expanded.shape[:3], rotated.shape[-1]))
    return jnp.concatenate([expanded[..., :values_from], shared], axis=-1), expanded[..., values_from:]


def expanded_attention(
    q_nope: Float[Array, "B T H n"],
    q_rotated: Float[Array, "B T H P"],
    new_latents: Float[Array, "B T R"],
    new_rotated: Float[Array, "B T P"],
    kv_b: Float[Array, "R H*(n+V)"] | Narrow,
    narrow: Float[Array, "R A"] | None = None,
    wide: Float[Array, "A H*(n+V)"] | None = None,
    *,
    pages: AnyLatentPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    scale: float,
) -> tuple[Float[Array, "B T H V"], AnyLatentPages]:
    """What `absorbed_attention` gives, with the fewest operations where there are many queries.

    Args:
      kv_b, narrow, wide: see `expand`.
      pages, table, positions, scale: see `latent_attention`.
    """
    heads, sequences = q_nope.shape[2], positions.shape[0]
    whole = widened(kv_b, q_nope.dtype)
    pages = write_rows(pages, (new_latents, new_rotated), table, positions)

    # A narrow matrix is widened block by block here: what waits for nothing, XLA makes ahead, of all layers at once.
    def plain(q_nope: Array, q_rotated: Array, kv_b: Array | Narrow, _: Array) -> Array:
        return _over_blocks(q_nope, q_rotated, kv_b, pages, table, positions, scale=scale, factors=(narrow, wide))

    def kernel(q_nope: Array, q_rotated: Array, _: Array | Narrow, whole: Array) -> Array:
        from vl2_jax.ops.latent_attention import prefill

        if narrow is not None and wide is not None:
            whole += narrow @ wide
        begins = jnp.maximum(positions, 0)  # of a sequence that does nothing, nobody looks at the result
        return prefill.latent_prefill(q_nope, q_rotated, by_head(whole, heads), pages, table, begins, scale)

    slots = pages_a_sequence(pages, table, sequences) * PAGE
    arguments = (q_nope, q_rotated, kv_b, whole)
    if not _kernel_supports(q_nope, q_rotated, by_head(whole, heads), pages, slots):
        return plain(*arguments), pages
    return jax.lax.platform_dependent(*arguments, tpu=kernel, default=plain), pages


def _kernel_supports(q_nope: Array, q_rotated: Array, kv_b: Array, pages: AnyLatentPages, slots: int) -> bool:
    if q_nope.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.latent_attention import prefill  # Pallas takes a third of a second to import

    return prefill.supports(q_nope, q_rotated, kv_b, pages, slots)


def _over_blocks(
    q_nope: Array,
    q_rotated: Array,
    kv_b: Array | Narrow,
    pages: AnyLatentPages,
    table: Array | None,
    positions: Array,
    *,
    scale: float,
    factors: tuple[Array | None, Array | None],
) -> Float[Array, "B T H V"]:
    """Plain XLA: the keys and values of a block of rows at a time."""
    heads, values_from = q_nope.shape[2:]
    sequences = positions.shape[0]

    def block(begin: Array, size: int, only: Array | None) -> tuple[Array, Array]:
        rows = read_rows(pages, table, sequences, begin, size, only)
        return expand(*rows, kv_b, heads, values_from, *factors)

    def score(queries: Array, block: tuple[Array, Array]) -> Array:
        return jnp.einsum("bhtk,bhsk->bhts", queries, block[0], preferred_element_type=jnp.float32)

    def mix(weights: Array, block: tuple[Array, Array]) -> Array:
        values = block[1]
        return jnp.einsum("bhts,bhsv->bhtv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    queries = rearrange(jnp.concatenate([q_nope, q_rotated], axis=-1), "b t h k -> b h t k")
    slots = pages_a_sequence(pages, table, sequences) * PAGE
    out = attend_to_filled((queries,), block, score, mix, slots, positions, scale)
    return rearrange(out, "b h t v -> b t h v").astype(q_nope.dtype)
