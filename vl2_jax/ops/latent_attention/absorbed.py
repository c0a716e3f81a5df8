"""The absorbed form: the key projection moves to the queries, the value projection to what was mixed of latents.

B sequences, T new rows of each, H heads, R latent rank, P rotated width, n and V widths of a head's key and value, A
rank of an adapter, N pages.

Heads are multiplied one at a time on a CPU, from `kv_b` as it is stored, and by kernels on TPUs (`projections`).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.latent_attention.api import latent_attention
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.ops.narrow.product import product_by_head, transposed_product_by_head, widened
from vl2_jax.ops.paging.pages import AnyLatentPages


def absorbed_attention(
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
    """`latent_attention` between the projections of its queries and of its results.

    Args:
      kv_b: latents to keys and values of every head.
      narrow, wide: low-rank factors of an adapter, added to `kv_b`.
      pages, table, positions, scale: see `latent_attention`.
    """
    q_latent = to_latents(q_nope, kv_b, narrow, wide)
    mixed, pages = latent_attention(q_latent, q_rotated, new_latents, new_rotated, pages, table, positions, scale=scale)
    return to_values(mixed, kv_b, q_nope.shape[-1], narrow, wide), pages


def by_head(columns: Float[Array, "R H*k"], heads: int) -> Float[Array, "R H k"]:
    return columns.reshape(len(columns), heads, -1)


def to_latents(
    q_nope: Float[Array, "B T H n"],
    kv_b: Float[Array, "R H*(n+V)"] | Narrow,
    narrow: Float[Array, "R A"] | None = None,
    wide: Float[Array, "A H*(n+V)"] | None = None,
) -> Float[Array, "B T H R"]:
    """Queries whose products with latents are those with the keys that the latents stand for."""
    heads, width = q_nope.shape[2:]

    def plain(q_nope: Array, kv_b: Array) -> Array:
        return jnp.einsum("bthn,rhn->bthr", q_nope, by_head(kv_b, heads)[..., :width])

    def on_cpu(q_nope: Array, kv_b: Array | Narrow) -> Array:
        return transposed_product_by_head(q_nope.reshape(-1, heads, width), kv_b, 0).reshape(*q_nope.shape[:3], -1)

    out = _chosen("to_latents", plain, on_cpu, q_nope, kv_b, width)
    if narrow is not None and wide is not None:
        beside = jnp.einsum("bthn,ahn->btha", q_nope, by_head(wide, heads)[..., :width])
        out += jnp.einsum("btha,ra->bthr", beside, narrow)
    return out


def to_values(
    mixed: Float[Array, "B T H R"],
    kv_b: Float[Array, "R H*(n+V)"] | Narrow,
    values_from: int,
    narrow: Float[Array, "R A"] | None = None,
    wide: Float[Array, "A H*(n+V)"] | None = None,
) -> Float[Array, "B T H V"]:
    """The values that mixed latents stand for; those of a head begin at `values_from`."""
    heads, rank = mixed.shape[2:]
    width = kv_b.shape[1] // heads - values_from

    def plain(mixed: Array, kv_b: Array) -> Array:
        return jnp.einsum("bthr,rhv->bthv", mixed, by_head(kv_b, heads)[..., values_from:])

    def on_cpu(mixed: Array, kv_b: Array | Narrow) -> Array:
        rows = mixed.reshape(-1, heads, rank)
        return product_by_head(rows, kv_b, values_from, width).reshape(*mixed.shape[:3], width)

    out = _chosen("to_values", plain, on_cpu, mixed, kv_b, values_from)
    if narrow is not None and wide is not None:
        out += jnp.einsum("btha,ahv->bthv", mixed @ narrow, by_head(wide, heads)[..., values_from:])
    return out


def _chosen(
    name: str,
    plain: Callable[[Array, Array], Array],
    on_cpu: Callable[[Array, Array | Narrow], Array],
    rows: Array,
    kv_b: Array | Narrow,
    values_from: int,
) -> Array:
    """`on_cpu` there, on TPUs the kernel of this name if it takes dtype and shape, else `plain`."""
    wide = widened(kv_b, rows.dtype)
    forms = {"cpu": lambda rows, _, kv_b: on_cpu(rows, kv_b), "default": lambda rows, wide, _: plain(rows, wide)}
    if rows.dtype == jnp.bfloat16:
        from vl2_jax.ops.latent_attention import projections  # Pallas takes a third of a second to import

        if projections.supports(rows, wide, values_from):
            kernels = {"to_latents": projections.to_latents, "to_values": projections.to_values}
            forms["tpu"] = lambda rows, wide, _: kernels[name](rows, wide)
    return jax.lax.platform_dependent(rows, wide, kv_b, **forms)
