"""Attention over pages in vLLM's layouts, in plain XLA: its kernels have no path for a CPU.

T rows of all sequences one after another, n sequences, H heads, K width of a row, N pages of s slots, L slots of a
sequence's table.

    tables [n * L/s]      pages of every sequence          lengths [n]     positions of each, the new ones among them
    starts [n + 1]        first row of each sequence       counts [3]      the last one is how many sequences there are
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_LANES = 128


def attend_to_latents(
    q_latent: Float[Array, "T H R"],
    q_rotated: Float[Array, "T H P"],
    latents: Float[Array, "T R"],
    rotated: Float[Array, "T P"],
    cache: Float[Array, "N s/32 32 W"],
    *places: Int[Array, " _"],
    scale: float,
) -> tuple[Float[Array, "T H R"], Array]:
    """Mixed latents. A row of the cache holds a latent and its rotated part, each filled up to whole lanes."""

    def row_of(latent: Array, rotated: Array) -> Array:
        return jnp.concatenate([_filled(latent), _filled(rotated)], axis=-1)

    heads, rank = q_latent.shape[1:]

    def read(rows: Float[Array, "L W"]) -> tuple[Array, Array]:
        of_heads = jnp.broadcast_to(rows[:, None], (len(rows), heads, rows.shape[1]))
        return of_heads, of_heads[..., :rank]

    slots = cache.reshape(-1, cache.shape[-1])
    new = row_of(latents, rotated)
    out, slots = _attend(row_of(q_latent, q_rotated), new, slots, cache.shape[1] * cache.shape[2], read, scale, *places)
    return out, slots.reshape(cache.shape)


def attend_to_heads(
    queries: Float[Array, "T H K"],
    keys: Float[Array, "T H K"],
    values: Float[Array, "T H K"],
    cache: Float[Array, "N s 2*H/p p W"],
    *places: Int[Array, " _"],
    scale: float,
) -> tuple[Float[Array, "T H K"], Array]:
    """Mixed values. A row of the cache holds a key and a value of every head in turn, filled up to whole lanes."""
    width = queries.shape[-1]

    def read(rows: Float[Array, "L 2*H W"]) -> tuple[Array, Array]:
        return rows[:, 0::2], rows[:, 1::2, :width]

    new = jnp.stack([_filled(keys), _filled(values)], axis=2).reshape(len(keys), -1, cache.shape[-1])
    slots = cache.reshape(-1, *new.shape[1:])
    out, slots = _attend(_filled(queries), new, slots, cache.shape[1], read, scale, *places)
    return out, slots.reshape(cache.shape)


def _attend(
    queries: Float[Array, "T H W"],
    new: Float[Array, "T ..."],
    slots: Float[Array, "N*s ..."],
    page: int,
    read: Callable[[Array], tuple[Array, Array]],
    scale: float,
    lengths: Int[Array, " n"],
    tables: Int[Array, " n*L/s"],
    starts: Int[Array, " n+1"],
    counts: Int[Array, " 3"],
) -> tuple[Float[Array, "T H V"], Float[Array, "N*s ..."]]:
    """The new rows written, then every query over the slots of its sequence up to itself.

    Args:
      read: rows of slots to keys `[L, H, W]` and values `[L, H, V]`.
    """
    per_sequence = (tables.reshape(len(lengths), -1, 1) * page + jnp.arange(page)).reshape(len(lengths), -1)
    row = jnp.arange(len(queries))
    owner = jnp.minimum(jnp.searchsorted(starts[1:], row, side="right"), len(lengths) - 1)
    position = jnp.clip(lengths[owner] - starts[owner + 1] + row, 0, per_sequence.shape[1] - 1)
    exists = row < starts[counts[-1]]
    slot = jnp.where(exists, per_sequence[owner, position], len(slots))  # past the end: dropped
    slots = slots.at[slot].set(new.astype(slots.dtype), mode="drop")

    def of_row(given: tuple[Array, Array, Array]) -> Float[Array, "H V"]:
        query, owner, position = given
        keys, values = read(slots[per_sequence[owner]])
        scores = jnp.einsum("hw,lhw->hl", query, keys, preferred_element_type=jnp.float32) * scale
        weights = jax.nn.softmax(jnp.where(jnp.arange(scores.shape[1]) <= position, scores, -jnp.inf))
        return jnp.einsum("hl,lhv->hv", weights.astype(values.dtype), values)

    return jax.lax.map(of_row, (queries, owner, position)), slots


def _filled(rows: Float[Array, "... K"]) -> Float[Array, "... W"]:
    """Rows with zeros up to whole lanes."""
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % _LANES)])
