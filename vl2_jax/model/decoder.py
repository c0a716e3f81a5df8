"""The language model: pre-norm decoder layers with dense or mixture-of-experts feed-forward parts (SPEC 5).

B batch, T query positions, S cache positions, D model width, V vocabulary.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.config import LanguageConfig
from vl2_jax.model.attention import (
    CacheKind,
    LatentAttention,
    LayerCache,
    MultiHeadAttention,
    OuterCache,
    Placement,
    cache_axes,
    empty_pages,
)
from vl2_jax.model.layers import (
    ONE_DEVICE,
    Dtype,
    GatedMLP,
    Layout,
    Linear,
    RMSNorm,
    declare,
    scan_layers,
    variables_of,
)
from vl2_jax.model.moe import MoE, Routing
from vl2_jax.model.rope import rotary_tables
from vl2_jax.ops.flash_attention.segments import sees
from vl2_jax.ops.narrow.product import rows_of
from vl2_jax.ops.paging.pages import PAGE

Cache = tuple[LayerCache, ...]


class DecoderOutput(NamedTuple):
    hidden: Float[Array, "B T D"]  # after the last norm
    cache: Cache | None
    routings: tuple[Routing, ...]  # one a mixture-of-experts layer


class Decoder(nn.Module):
    config: LanguageConfig
    dtype: Dtype
    param_dtype: Dtype
    layout: Layout = ONE_DEVICE
    remat: bool = False
    scan: bool = False

    def setup(self) -> None:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        init = nn.initializers.normal(config.initializer_range)
        self.embedding = declare(self, "embed_tokens", init, shape, ("vocab", "embed"), self.param_dtype)
        # With `remat` a layer keeps only its input for the backward pass, and computes the rest again.
        layer = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        self.layers = [
            layer(config, config.is_moe_layer(i), self.dtype, self.param_dtype, self.layout)
            for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype, self.param_dtype)
        self.lm_head = vocabulary_layer(config, self.dtype, self.param_dtype)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = self.layout.constrain(self.embedding, "vocab", None)
        return rows_of(table, ids).astype(self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        absorbed: bool | None = None,
        packed: bool = False,
        pages: Int[Array, "B per"] | OuterCache | None = None,
    ) -> DecoderOutput:
        """Runs all layers.

        Args:
          x: embeddings of text and pictures.
          positions: position of every row in its sequence; with a cache also the slot it is written to.
          segments: the document that a position belongs to, 0 for padding; documents do not see each other
            (`segments.sees`). `None` is one document. With a cache there is one, and padding reaches no expert.
          cache: rows of the positions before; a query sees the slots up to its own position.
          absorbed: see `LatentAttention`.
          packed: padding gives nothing that is used, so it need not attend as released.
          pages: the table of a cache whose pages any sequence may have (`init_pages`), or what attends to a cache that
            is not ours.
        """
        mask = _causal_mask(positions, segments) if cache is None else None
        exists = None if cache is None or segments is None else segments > 0
        tables = rotary_tables(self.config, positions)
        placement = Placement(positions, mask, tables, segments if packed else None, exists, pages)
        new_cache, routings = [], []
        looped = range(0)
        if self.scan and cache is None and not self.is_initializing():
            looped = range(self.config.first_k_dense_replace, len(self.layers))
        is_ours = not isinstance(pages, OuterCache)  # the cache; another's is no argument that JAX traces
        for i, layer in enumerate(self.layers[: len(self.layers) - len(looped)]):
            layer_cache = None if cache is None else cache[i]
            if layer_cache is not None and is_ours:
                alone, variables = self._layer(self.config.is_moe_layer(i)), variables_of(self, f"layers_{i}")
                x, layer_cache, routing = _applied(alone, variables, x, placement, layer_cache, absorbed)
            else:
                x, layer_cache, routing = layer(x, placement, layer_cache, absorbed)
            x = self.layout.constrain(x, "batch", None, None)
            if layer_cache is not None and is_ours:
                layer_cache = laid_out(layer_cache, self.layout)
            self.sow("intermediates", "layer_out", x)
            new_cache.append(layer_cache)
            if routing is not None:
                routings.append(routing)
        if looped:
            x, told = self._loop(x, placement, looped)
            routings += [jax.tree.map(operator.itemgetter(i), told) for i in range(len(looped))]
        updated = None if cache is None else tuple(new_cache)
        return DecoderOutput(self.norm(x), updated, tuple(routings))  # type: ignore[arg-type]

    def layer_alone(
        self, number: int, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        placement = Placement(positions, _causal_mask(positions, segments), rotary_tables(self.config, positions))
        return self.layers[number](x, placement, None, None)[0]

    def _loop(self, x: Array, placement: Placement, layers: range) -> tuple[Array, Routing]:
        """Mixture-of-experts layers as one loop; their routings are stacked."""
        layer = self._layer(is_moe=True)

        def body(x: Array, variables: Any) -> tuple[Array, Any]:
            told: Any = layer.apply(variables, x, placement, None, None)
            x, _, routing = told
            return self.layout.constrain(x, "batch", None, None), routing

        variables = [variables_of(self, f"layers_{i}") for i in layers]
        return scan_layers(body, x, variables, self.dtype, self.remat)

    def _layer(self, is_moe: bool) -> DecoderLayer:
        """A layer that holds no parameters."""
        return DecoderLayer(self.config, is_moe, self.dtype, self.param_dtype, self.layout, parent=None)

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """float32 logits; the product itself is in `dtype`, as released (SPEC 5)."""
        return self.lm_head(hidden).astype(jnp.float32)


def vocabulary_layer(config: LanguageConfig, dtype: Dtype, param_dtype: Dtype, **place: Any) -> Linear:
    """Hidden states to logits."""
    init = nn.initializers.normal(config.initializer_range)
    return Linear(config.vocab_size, ("embed", "vocab"), dtype, param_dtype, kernel_init=init, **place)


class DecoderLayer(nn.Module):
    config: LanguageConfig
    is_moe: bool
    dtype: Dtype
    param_dtype: Dtype
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        placement: Placement,
        cache: LayerCache | None,
        absorbed: bool | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Routing | None]:
        config = self.config

        def norm(name: str) -> RMSNorm:
            return RMSNorm(config.rms_norm_eps, self.dtype, self.param_dtype, name=name)

        kind = LatentAttention if config.use_mla else MultiHeadAttention
        attention = kind(config, self.dtype, self.param_dtype, self.layout, name="self_attn")
        mixed, cache = attention(norm("input_layernorm")(x), placement, cache, absorbed)
        x += mixed
        normed = norm("post_attention_layernorm")(x)
        if self.is_moe:
            out, routing = MoE(config, self.dtype, self.param_dtype, self.layout, name="mlp")(normed, placement.exists)
            return x + out, cache, routing
        init = nn.initializers.normal(config.initializer_range)
        mlp = GatedMLP(config.intermediate_size, self.dtype, self.param_dtype, init, name="mlp")
        return x + mlp(normed), cache, None


@partial(jax.jit, static_argnames=("layer", "absorbed"))
def _applied(
    layer: DecoderLayer,
    variables: Any,
    x: Float[Array, "B T D"],
    placement: Placement,
    cache: LayerCache,
    absorbed: bool | None,
) -> tuple[Float[Array, "B T D"], LayerCache, Routing | None]:
    """Layers of a kind are traced and lowered once, and not in each of their places: a program of Small has 26 alike.

    XLA puts what is called in its place before it optimises.
    """
    told: Any = layer.apply(variables, x, placement, cache, absorbed)
    return told


def init_cache(
    config: LanguageConfig,
    batch: int,
    length: int,
    dtype: Dtype,
    layout: Layout = ONE_DEVICE,
    kind: CacheKind | None = None,
) -> Cache:
    """An empty cache with room for `length` positions of every sequence; `kind` is that of `empty_pages`."""
    return _init_pages(config, (batch, -(-length // PAGE)), dtype, layout, kind)


def init_pages(
    config: LanguageConfig, count: int, dtype: Dtype, layout: Layout = ONE_DEVICE, kind: CacheKind | None = None
) -> Cache:
    """An empty cache of so many pages, which a table gives to sequences."""
    return _init_pages(config, (count,), dtype, layout, kind)


def _init_pages(
    config: LanguageConfig, lead: tuple[int, ...], dtype: Dtype, layout: Layout, kind: CacheKind | None
) -> Cache:
    return tuple(laid_out(empty_pages(config, lead, dtype, kind), layout) for _ in range(config.num_hidden_layers))


def page_bytes(config: LanguageConfig, dtype: Dtype, kind: CacheKind | None = None) -> int:
    """Bytes of a page in all layers."""
    page = jax.eval_shape(partial(empty_pages, config, (1,), dtype, kind))
    return config.num_hidden_layers * sum(array.size * array.dtype.itemsize for array in page)


def laid_out(cache: LayerCache, layout: Layout) -> LayerCache:
    """Sequences are spread over devices, and so are heads; latents have none, so tensor parallelism repeats them."""
    return type(cache)(*(layout.constrain(rows, *cache_axes(cache)) for rows in cache))


def _causal_mask(positions: Int[Array, "B T"], segments: Int[Array, "B T"] | None) -> Bool[Array, "B T T"]:
    length = positions.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    if segments is None:
        return causal
    return causal & sees(segments[:, :, None], segments[:, None, :]) & (segments[:, None, :] > 0)
