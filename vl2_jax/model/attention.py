"""Self-attention of the decoder: latent (MLA) and multi-head (MHA), with and without a cache (SPEC 5.2, 5.3).

B batch, T query positions, D model width, H heads, K head width, R latent rank, P rope width.
A cache holds position s of every sequence in slot s of its pages (`ops.paging`), so that it needs no mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.config import LanguageConfig
from vl2_jax.errors import RequestError, shown
from vl2_jax.model.layers import (
    ONE_DEVICE,
    Axes,
    Dtype,
    Layout,
    Linear,
    RMSNorm,
    adapter_of,
    attend,
    declare,
    softmax,
)
from vl2_jax.model.rope import rotate, softmax_scale
from vl2_jax.ops.flash_attention.api import flash_attention
from vl2_jax.ops.latent_attention.absorbed import to_latents, to_values
from vl2_jax.ops.latent_attention.expanded import expand
from vl2_jax.ops.latent_attention.forms import attend_to_latents
from vl2_jax.ops.multi_head_attention.api import multi_head_attention
from vl2_jax.ops.narrow.product import in_dtype, widened
from vl2_jax.ops.paging.pages import (
    PAGE,
    AnyHeadPages,
    AnyLatentPages,
    HeadPages,
    Int8HeadPages,
    Int8LatentPages,
    LatentPages,
)

_LATENT_NORM_EPS = 1e-6  # the class default of the released code, whatever rms_norm_eps says (SPEC 5.1)

CacheKind = Literal["int8"]
LayerCache = AnyLatentPages | AnyHeadPages  # of each sequence, `[B, n, ...]`, or of all by a table, `[N, ...]`

_ROWS: Axes = ("batch", None, None)
_BY_HEAD: Axes = ("batch", None, "heads", None)
_KV_B: tuple[Axes, ...] = ((None, "heads"), (None, None), (None, "heads"))  # latents to keys and values, an adapter


class OuterCache(ABC):
    """Attention over a cache that somebody else lays out and fills, such as another serving engine.

    Both methods write the new rows and attend to everything of each row's own sequence up to its own position. Which
    sequence a row is of, only the implementation knows, so rows of many sequences may come in one batch of `T = 1`.
    The cache of a layer is whatever the implementation takes and gives back.
    """

    @abstractmethod
    def latents(
        self,
        q_latent: Float[Array, "B T H R"],
        q_rotated: Float[Array, "B T H P"],
        latents: Float[Array, "B T R"],
        rotated: Float[Array, "B T P"],
        cache: Any,
        scale: float,
    ) -> tuple[Float[Array, "B T H R"], Any]:
        """See `ops.latent_attention.api`: the result is mixed latents."""

    @abstractmethod
    def heads(
        self,
        queries: Float[Array, "B T H K"],
        keys: Float[Array, "B T H K"],
        values: Float[Array, "B T H K"],
        cache: Any,
        scale: float,
    ) -> tuple[Float[Array, "B T H K"], Any]:
        """See `ops.multi_head_attention.api`."""


class Placement(NamedTuple):
    """Where the rows of one pass stand in their sequences and what they may see: the same for every layer."""

    positions: Int[Array, "B T"]
    mask: Bool[Array, "B T T"] | None  # None with a cache: a query sees all up to its own position
    tables: tuple[Float[Array, "B T P/2"], Float[Array, "B T P/2"]]  # of the rotation, see `rope`
    documents: Int[Array, "B T"] | None = None  # of a packed batch without a cache: see `ops.flash_attention`
    exists: Bool[Array, "B T"] | None = None  # nobody uses the results of others, and no expert computes them
    # The table of a cache that sequences share, see `ops.paging.pages`, or what attends to a cache that is not ours.
    pages: Int[Array, "B per"] | OuterCache | None = None


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
        config, tables = self.config, placement.tables
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
        queries = rearrange(_as_it_lies(queries, cache), "b t (h k) -> b t h k", h=heads)
        q_nope, q_rope = queries[..., :nope], rotate(queries[..., nope:], *tables, interleaved=True)

        compressed = linear(rank + rope, ("embed", None), "kv_a_proj_with_mqa")(x)
        latent = norm("kv_a_layernorm")(compressed[..., :rank])
        k_rope = rotate(compressed[..., None, rank:], *tables, interleaved=True)[:, :, 0]
        kv_b = declare(self, "kv_b_proj", init, (rank, heads * (nope + value_dim)), (None, "heads"), self.param_dtype)
        factors = adapter_of(self, "kv_b_proj", self.dtype) or ()
        # Over a cache, one device multiplies with a narrow matrix as it is stored; its parts are not cut for a mesh.
        kv_b = (in_dtype if cache is not None and self.layout == ONE_DEVICE else widened)(kv_b, self.dtype)
        scale = softmax_scale(config)
        with jax.named_scope("latent_attention"):
            if isinstance(placement.pages, OuterCache):
                axes = [_BY_HEAD, *_KV_B[: 1 + len(factors)]]

                def into(*parts: Array) -> tuple[Array]:
                    return (to_latents(*parts),)

                def out_of(mixed: Array, kv_b: Array, *factors: Array) -> tuple[Array]:
                    return (to_values(mixed, kv_b, nope, *factors),)

                own = self.layout.on_own_parts
                (q_latent,) = own(into, axes, [_BY_HEAD], q_nope, kv_b, *factors)
                mixed, cache = placement.pages.latents(q_latent, q_rope, latent, k_rope, cache, scale)
                (out,) = own(out_of, axes, [_BY_HEAD], mixed, kv_b, *factors)
            elif cache is not None:
                attention = partial(attend_to_latents, absorbed=absorbed, scale=scale)
                arrays = [(q_nope, _BY_HEAD), (q_rope, _BY_HEAD), (latent, _ROWS), (k_rope, _ROWS)]
                arrays += zip((kv_b, *factors), _KV_B)
                out, cache = over_pages(self.layout, attention, arrays, cache, placement)
            elif absorbed:
                q_rows = jnp.concatenate([to_latents(q_nope, kv_b, *factors), q_rope], axis=-1)
                rows = jnp.concatenate([latent, k_rope], axis=-1)
                scores = jnp.einsum("bthw,bsw->bhts", q_rows, rows, preferred_element_type=jnp.float32) * scale
                mixed = jnp.einsum("bhts,bsr->bthr", softmax(scores, placement.mask).astype(self.dtype), latent)
                out = to_values(mixed, kv_b, nope, *factors)
            else:
                queries = jnp.concatenate([q_nope, q_rope], axis=-1)
                parts = expand(latent, k_rope, kv_b, heads, nope, *factors)
                keys, values = (rearrange(part, "b h s k -> b s h k") for part in parts)
                out = attend_to_all(queries, keys, values, placement.mask, placement.documents, scale, self.layout)
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
        config = self.config
        heads = config.num_attention_heads
        init = nn.initializers.normal(config.initializer_range)

        def linear(axes: tuple[str, str], name: str) -> Linear:
            return Linear(config.hidden_size, axes, self.dtype, self.param_dtype, kernel_init=init, name=name)

        queries, keys, values = (
            rearrange(_as_it_lies(linear(("embed", "heads"), name)(x), cache), "b t (h k) -> b t h k", h=heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        queries, keys = (rotate(rows, *placement.tables, interleaved=False) for rows in (queries, keys))
        scale = softmax_scale(config)
        if isinstance(placement.pages, OuterCache):
            out, cache = placement.pages.heads(queries, keys, values, cache, scale)
        elif cache is None:
            out = attend_to_all(queries, keys, values, placement.mask, placement.documents, scale, self.layout)
        else:
            attention = partial(multi_head_attention, scale=scale)
            arrays = [(rows, _BY_HEAD) for rows in (queries, keys, values)]
            out, cache = over_pages(self.layout, attention, arrays, cache, placement)
        out = rearrange(out, "b t h k -> b t (h k)")
        return linear(("heads", "embed"), "o_proj")(out), cache


def attend_to_all(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    mask: Bool[Array, "B T T"] | None,
    documents: Int[Array, "B T"] | None,
    scale: float,
    layout: Layout,
) -> Float[Array, "B T H V"]:
    """Attention without a cache: as released where `documents` is None, else to the document's own past."""
    if documents is None:
        return attend(queries, keys, values, mask, scale)

    def of_own(queries: Array, keys: Array, values: Array, documents: Array) -> tuple[Array]:
        return (flash_attention(queries, keys, values, documents, scale),)

    axes = [*[_BY_HEAD] * 3, ("batch", None)]
    (out,) = layout.on_own_parts(of_own, axes, [_BY_HEAD], queries, keys, values, documents)
    return out


def _as_it_lies(product: Array, cache: LayerCache | None) -> Array:
    """`product`, ahead of which nothing is moved: else XLA turns the kernel on a TPU, a copy of it a call, so that the
    few rows come out with heads first.
    """
    return product if cache is None else jax.lax.optimization_barrier(product)


def over_pages(
    layout: Layout,
    attention: Callable[..., tuple[Array, Any]],
    arrays: Sequence[tuple[Array, Axes]],
    cache: LayerCache,
    placement: Placement,
) -> tuple[Array, LayerCache]:
    """`attention` of new rows to a layer's cache, each device with its own sequences and heads.

    Args:
      attention: of `ops.latent_attention` or `ops.multi_head_attention`.
      arrays: its first arguments, with the names of their axes.
    """
    begins, table, rows = placement.positions[:, 0], placement.pages, len(arrays)
    assert not isinstance(table, OuterCache)
    if placement.exists is not None:
        begins = jnp.where(placement.exists.any(axis=1), begins, -1)

    def of_own(*arrays: Array) -> tuple[Array, ...]:
        pages, (begins, *table) = type(cache)(*arrays[rows : rows + len(cache)]), arrays[rows + len(cache) :]
        out, pages = attention(*arrays[:rows], pages=pages, table=table[0] if table else None, positions=begins)
        return out, *pages

    axes_of_cache = [cache_axes(cache)] * len(cache)
    axes = [*(names for _, names in arrays), *axes_of_cache, ("batch",)]
    values, result = [*(array for array, _ in arrays), *cache, begins], _BY_HEAD
    if table is not None:  # every device writes the rows of all sequences
        values.append(table)
        axes = [tuple(None if name == "batch" else name for name in names) for names in (*axes, (None, None))]
        result = (None, *_BY_HEAD[1:])
    out, *pages = layout.on_own_parts(of_own, axes, [result, *axes_of_cache], *values)
    return out, type(cache)(*pages)


def cache_axes(cache: LayerCache) -> Axes:
    """Logical axes of every array. Sequences are spread over devices, but not pages that any sequence may have; so are
    heads, of which latents have none.
    """
    of_page: Axes = ("heads", None, None) if isinstance(cache, AnyHeadPages) else (None, None)
    lead: Axes = ("batch", None) if cache[0].ndim == len(of_page) + 2 else (None,)
    return (*lead, *of_page)


def empty_pages(config: LanguageConfig, lead: tuple[int, ...], dtype: Dtype, kind: CacheKind | None) -> LayerCache:
    """Pages of one layer, as many as `lead` says: `(B, n)` of each sequence, or `(N,)` for a table.

    Args:
      dtype: that rows are read in.
      kind: "int8" keeps them as whole numbers; `None` is in `dtype`.
    """
    floats: Any
    whole: Any
    if config.use_mla:
        shapes = (*lead, PAGE, config.kv_lora_rank), (*lead, PAGE // 2, 2 * config.qk_rope_head_dim)
        of_scales, floats, whole = (*lead, 1, PAGE), LatentPages, Int8LatentPages
    else:
        shapes = ((*lead, config.num_key_value_heads, PAGE, config.head_dim),) * 2
        of_scales, floats, whole = (*lead, config.num_key_value_heads, 1, PAGE), HeadPages, Int8HeadPages
    if kind is None:
        return floats(*(jnp.zeros(shape, dtype) for shape in shapes))
    return whole(*(jnp.zeros(shape, jnp.int8) for shape in shapes), *(jnp.zeros(of_scales, dtype) for _ in shapes))


def checked_cache(name: str | None) -> CacheKind | None:
    """The kind of a cache by its name.

    Raises:
      RequestError: there is none of it.
    """
    if name not in (None, *get_args(CacheKind)):
        known = ", ".join(get_args(CacheKind))
        raise RequestError(f"a cache of kind {shown(name)} is not known; choose {known}, or none.")
    return cast("CacheKind | None", name)
