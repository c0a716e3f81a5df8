"""Self-attention of the decoder: latent (MLA) and multi-head (MHA), with and without a cache (SPEC 5.2, 5.3).

B batch, T query positions, S cache positions, D model width, H heads, K head width, R latent rank, P rope width.
A cache holds position s of every sequence in slot s, so that a mask needs nothing but positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.config import LanguageConfig
from vl2_jax.model.layers import ONE_DEVICE, Dtype, Layout, Linear, RMSNorm, adapter_of, attend, declare, softmax
from vl2_jax.model.rope import rotate, softmax_scale
from vl2_jax.ops.flash_attention.api import flash_attention
from vl2_jax.ops.flash_attention.xla import block_size

_MOST_ROWS_A_BLOCK = 512
_LATENT_NORM_EPS = 1e-6  # the class default of the released code, whatever rms_norm_eps says (SPEC 5.1)

LayerCache = tuple[Array, ...]


class Placement(NamedTuple):
    """Where the rows of one pass stand in their sequences and what they may see: the same for every layer."""

    positions: Int[Array, "B T"]
    mask: Bool[Array, "B T S"]
    tables: tuple[Float[Array, "B T P/2"], Float[Array, "B T P/2"]]  # of the rotation, see `rope`
    documents: Int[Array, "B T"] | None = None  # of a packed batch without a cache: see `ops.flash_attention`


class LatentAttention(nn.Module):
    """Keys and values of all heads come from one latent row a token, which is all that the cache holds.

    One weight set, two forms. Expanded: keys and values of every head are computed from the latents. Absorbed: the
    key projection moves to the queries and the value projection to the output, so that heads attend to the latents
    themselves. They are equal up to rounding; `absorbed=None` takes the one with fewer operations.
    """

    config: LanguageConfig
    dtype: Dtype
    param_dtype: Dtype
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        placement: Placement,
        cache: LayerCache | None = None,
        absorbed: bool | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        config, (positions, mask, tables, documents) = self.config, placement
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        rank, value_dim = config.kv_lora_rank, config.v_head_dim
        assert rank is not None
        init = nn.initializers.normal(config.initializer_range)

        def linear(features: int, axes: tuple[str | None, str | None], name: str) -> Linear:
            return Linear(features, axes, self.dtype, self.param_dtype, kernel_init=init, name=name)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(_LATENT_NORM_EPS, self.dtype, self.param_dtype, name=name)

        if config.q_lora_rank is None:
            queries = linear(heads * (nope + rope), ("embed", "heads"), "q_proj")(x)
        else:
            low_rank = norm("q_a_layernorm")(linear(config.q_lora_rank, ("embed", None), "q_a_proj")(x))
            queries = linear(heads * (nope + rope), (None, "heads"), "q_b_proj")(low_rank)
        queries = rearrange(queries, "b t (h k) -> b t h k", h=heads)
        q_nope, q_rope = queries[..., :nope], rotate(queries[..., nope:], *tables, interleaved=True)

        compressed = linear(rank + rope, ("embed", None), "kv_a_proj_with_mqa")(x)
        latent = norm("kv_a_layernorm")(compressed[..., :rank])
        k_rope = rotate(compressed[..., None, rank:], *tables, interleaved=True)[:, :, 0]
        rows = jnp.concatenate([latent, k_rope], axis=-1)
        if cache is not None:
            cache = (write_cache(cache[0], rows, positions, 1, self.layout),)
            rows = cache[0]

        kv_b = declare(self, "kv_b_proj", init, (rank, heads * (nope + value_dim)), (None, "heads"), self.param_dtype)
        kv_b = rearrange(kv_b.astype(self.dtype), "r (h k) -> r h k", h=heads)
        pair = adapter_of(self, "kv_b_proj", self.dtype)
        factors = None if pair is None else (pair[0], rearrange(pair[1], "a (h k) -> a h k", h=heads))
        scale = softmax_scale(config)
        if absorbed is None:
            absorbed = cache is not None and x.shape[1] < _absorbed_below(config)
        with jax.named_scope("absorbed_attention" if absorbed else "expanded_attention"):
            if absorbed:
                q_latent = jnp.einsum("bthn,rhn->bthr", q_nope, kv_b[..., :nope])
                if factors is not None:
                    narrow = jnp.einsum("bthn,ahn->btha", q_nope, factors[1][..., :nope])
                    q_latent += jnp.einsum("btha,ra->bthr", narrow, factors[0])
                q_rows = jnp.concatenate([q_latent, q_rope], axis=-1)
                scores = jnp.einsum("bthw,bsw->bhts", q_rows, rows, preferred_element_type=jnp.float32) * scale
                probabilities = softmax(scores, mask).astype(self.dtype)
                # Of whole rows, the rotated part included: a slice of the cache would be a copy of it.
                mixed = jnp.einsum("bhts,bsw->bthw", probabilities, rows)[..., :rank]
                out = jnp.einsum("bthr,rhv->bthv", mixed, kv_b[..., nope:])
                if factors is not None:
                    out += jnp.einsum("btha,ahv->bthv", mixed @ factors[0], factors[1][..., nope:])
            else:

                def expand(rows: Float[Array, "B S R+P"]) -> tuple[Float[Array, "B H S K"], Float[Array, "B H S V"]]:
                    expanded = jnp.einsum("bsr,rhk->bhsk", rows[..., :rank], kv_b)
                    if factors is not None:
                        expanded += jnp.einsum("bsa,ahk->bhsk", rows[..., :rank] @ factors[0], factors[1])
                    shared = jnp.broadcast_to(rows[:, None, :, rank:], (*expanded.shape[:3], rope))
                    return jnp.concatenate([expanded[..., :nope], shared], axis=-1), expanded[..., nope:]

                queries = jnp.concatenate([q_nope, q_rope], axis=-1)
                if cache is None:
                    keys, values = (rearrange(part, "b h s k -> b s h k") for part in expand(rows))
                    out = attend_to_all(queries, keys, values, mask, documents, scale, self.layout)
                else:
                    out = attend_to_filled(
                        queries,
                        lambda begin, size: expand(jax.lax.dynamic_slice_in_dim(rows, begin, size, axis=1)),
                        rows.shape[1],
                        positions,
                        scale,
                    )
        out = rearrange(out, "b t h v -> b t (h v)")
        return linear(config.hidden_size, ("heads", "embed"), "o_proj")(out), cache


class MultiHeadAttention(nn.Module):
    """Plain attention with rotary embeddings over the whole head (SPEC 5.3)."""

    config: LanguageConfig
    dtype: Dtype
    param_dtype: Dtype
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        placement: Placement,
        cache: LayerCache | None = None,
        absorbed: bool | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        del absorbed  # there is one form only
        config, (positions, mask, tables, documents) = self.config, placement
        heads = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)

        def linear(axes: tuple[str, str], name: str) -> Linear:
            return Linear(config.hidden_size, axes, self.dtype, self.param_dtype, kernel_init=init, name=name)

        queries, keys, values = (
            rearrange(linear(("embed", "heads"), name)(x), "b t (h k) -> b t h k", h=heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        queries, keys = (rotate(rows, *tables, interleaved=False) for rows in (queries, keys))
        if cache is not None:
            # [B, H, S, K]: the two last axes fill a TPU's tiles whatever the number of heads.
            new = (rearrange(rows, "b t h k -> b h t k") for rows in (keys, values))
            cache = tuple(write_cache(old, rows, positions, 2, self.layout) for old, rows in zip(cache, new))
        scale = softmax_scale(config)
        if cache is None:
            out = attend_to_all(queries, keys, values, mask, documents, scale, self.layout)
        else:

            def block(begin: Array, size: int) -> tuple[Array, ...]:
                return tuple(jax.lax.dynamic_slice_in_dim(rows, begin, size, axis=2) for rows in cache)

            out = attend_to_filled(queries, block, cache[0].shape[2], positions, scale)
        out = rearrange(out, "b t h k -> b t (h k)")
        return linear(("heads", "embed"), "o_proj")(out), cache


def attend_to_all(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    mask: Bool[Array, "B T T"],
    documents: Int[Array, "B T"] | None,
    scale: float,
    layout: Layout,
) -> Float[Array, "B T H V"]:
    """Attention without a cache: as released where `documents` is None, else to the document's own past."""
    if documents is None:
        return attend(queries, keys, values, mask, scale)
    return layout.on_own_heads(partial(flash_attention, scale=scale), (queries, keys, values), documents)


def attend_to_filled(
    queries: Float[Array, "B T H K"],
    block: Callable[[Array, int], tuple[Array, ...]],
    slots: int,
    positions: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T H V"]:
    """Softmax attention to the slots of a cache up to each query's position, block by block.

    The number of blocks is a value, not a shape: a short prompt in a long cache costs what a short cache would, a block
    of queries skips the slots that all of them are before, and nothing recompiles. Sums are rescaled as the largest
    score grows (Milakov and Gimelshein, arXiv 1805.02867).

    Args:
      block: keys `[B, H, size, K]` and values `[B, H, size, V]` of the slots from `begin` on.
      slots: of the cache.
      positions: of the queries, growing along T; each sees the slots up to its own.
    """
    batch, length, heads, _ = queries.shape
    size, taken = (block_size(rows, _MOST_ROWS_A_BLOCK) for rows in (slots, length))
    by_head = rearrange(queries, "b t h k -> b h t k")

    def slot_step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        begin = number * size
        keys, values = block(begin, size)

        def query_step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            def part(rows: Array, axis: int = 2) -> Array:
                return jax.lax.dynamic_slice_in_dim(rows, number * taken, taken, axis)

            largest, total, mixed = map(part, sums)
            scores = jnp.einsum("bhtk,bhsk->bhts", part(by_head), keys, preferred_element_type=jnp.float32) * scale
            seen = begin + jnp.arange(size) <= part(positions, 1)[:, None, :, None]
            scores = jnp.where(seen, scores, -jnp.inf)
            larger = jnp.maximum(largest, scores.max(axis=-1))
            weights, keep = jnp.exp(scores - larger[..., None]), jnp.exp(largest - larger)
            new = jnp.einsum(
                "bhts,bhsv->bhtv", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
            )
            parts = (larger, total * keep + weights.sum(axis=-1), mixed * keep[..., None] + new)
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(rows, part, number * taken, 2) for rows, part in zip(sums, parts)
            )

        too_early = (positions.max(axis=0) < begin).sum()
        return jax.lax.fori_loop(too_early // taken, length // taken, query_step, sums)

    # Slot 0 is seen by every query, so the largest score is finite from the first block on.
    _, values = jax.eval_shape(lambda: block(jnp.int32(0), size))
    sums = (jnp.full((batch, heads, length), -jnp.inf), jnp.zeros((batch, heads, length)))
    start = (*sums, jnp.zeros((batch, heads, length, values.shape[-1])))
    _, total, mixed = jax.lax.fori_loop(0, positions.max() // size + 1, slot_step, start)
    return rearrange(mixed / total[..., None], "b h t v -> b t h v").astype(queries.dtype)


def write_cache(
    cache: Array, rows: Array, positions: Int[Array, "B T"], axis: int, layout: Layout = ONE_DEVICE
) -> Array:
    """The cache with new rows in the slots of their positions.

    One row a sequence goes wherever that sequence is; more rows are consecutive and start at the same position. Rows
    are written one by one: for a scatter, XLA copies the whole cache on a TPU, three times a layer and token.
    """
    rows = rows.astype(cache.dtype)
    if positions.shape[1] > 1:
        return jax.lax.dynamic_update_slice_in_dim(cache, rows, positions[0, 0], axis)

    def write(cache: Array, rows: Array, positions: Array) -> Array:
        def write_one(sequence: Array, cache: Array) -> Array:
            begin: list[Any] = [sequence, *[0] * (cache.ndim - 1)]
            begin[axis] = positions[sequence, 0]
            row = jax.lax.dynamic_slice_in_dim(rows, sequence, 1)
            return jax.lax.dynamic_update_slice(cache, row, begin)

        return jax.lax.fori_loop(0, positions.shape[0], write_one, cache)

    return layout.on_own_sequences(write, cache, rows, positions)


def init_layer_cache(config: LanguageConfig, batch: int, length: int, dtype: Dtype) -> LayerCache:
    """An empty cache of one layer: `[B, S, R + P]` for latent attention, two `[B, H, S, K]` for multi-head."""
    if config.use_mla:
        return (jnp.zeros((batch, length, config.cache_width), dtype),)
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    return (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def _absorbed_below(config: LanguageConfig) -> float:
    """Query positions below which the absorbed form needs fewer operations than the expanded one.

    Per cache row and head: absorbed T (2 R + P); expanded T (nope + P + V) and once R (nope + V).
    """
    rank = config.kv_lora_rank
    nope, value_dim = config.qk_nope_head_dim, config.v_head_dim
    assert rank is not None
    extra = 2 * rank - nope - value_dim
    return float("inf") if extra <= 0 else rank * (nope + value_dim) / extra
