"""The programs that a plan compiles: those that inference and training run, with shapes instead of arrays.

B sequences, S cache slots, C positions of a prefill chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert.quantise import checked_kind, put_together
from convert.weight_map import unflatten
from vl2_jax.config import LanguageConfig, VL2Config
from vl2_jax.errors import MeshError
from vl2_jax.inference.chunks import chunking
from vl2_jax.inference.generate import DecodeState, decode_steps
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.prefill import FEWEST_TILES, prefill_chunk
from vl2_jax.inference.sampling import Sampler
from vl2_jax.model.attention import CacheKind, cache_axes, checked_cache
from vl2_jax.model.decoder import init_cache
from vl2_jax.model.vl2 import VL2Model
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.rules import abstract_sharded_params, sharding_of
from vl2_jax.training.flops import costs_of, training_costs
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import DataRecipe, ModelRecipe, Recipe
from vl2_jax.training.step import abstract_state, build_model, make_step

Purpose = Literal["decode", "prefill", "train"]

# A full fine-tune as large models are trained: float32 weights and optimiser states, bfloat16 arithmetic; a picture of
# 2 x 3 tiles and its global view a sequence.
_FULL = Recipe(model=ModelRecipe(dtype="bfloat16", remat=True, scan=True), data=DataRecipe(rows=1, tiles=7))


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      lower: traces it; to be called in the layout's context.
      kinds: bytes that one device holds, by what they are.
      flops: operations of one device beside those that XLA counts: of the routed experts, which are inside of a kernel;
        of training all of them, since XLA counts the body of a loop once.
      moved: HBM bytes of one device, at least.
      model_flops: of training, those that the model needs (`training.flops`); what is computed again is not among them.
    """

    lower: Callable[[], Any]
    kinds: dict[str, int]
    flops: float
    moved: float
    model_flops: float = 0.0


def build(
    purpose: Purpose,
    config: VL2Config,
    layout: MeshLayout,
    batch: int,
    context: int,
    recipe: Recipe | None = None,
    weights: str | None = None,
    cache: str | None = None,
) -> Program:
    """One decode step, one prefill chunk or one update of `batch` sequences of `context` positions.

    Args:
      recipe: of training.
      weights: the kind of quantised weights (`convert.quantise`); `None` is bfloat16, in training the recipe's.
      cache: its kind of cache (`attention.empty_pages`), likewise.

    Raises:
      CheckpointError, RequestError: no such kind.
      MeshError: a kind of cache for a training step, which has none, or of weights where there is no recipe.
      ConfigError: a kind of weights for a recipe without adapters.
    """
    kind, cache_kind = None if weights is None else checked_kind(weights), checked_cache(cache)
    if purpose != "train":
        return _inference(purpose, config, layout, batch, context, kind, cache_kind)
    if cache_kind is not None or (kind is not None and recipe is None):
        flag = f"--cache {cache}" if cache_kind else f"--weights {weights}"
        remedy = "" if cache_kind else ", or with --recipe of adapters ([lora])"
        raise MeshError(f"a training step updates floats and has no cache; plan it without {flag}{remedy}.")
    recipe = recipe or _FULL
    if kind is not None:
        recipe = replace(recipe, model=replace(recipe.model, weights=kind))
    return _train(config, layout, batch, context, recipe)


def _inference(
    purpose: Purpose,
    config: VL2Config,
    layout: MeshLayout,
    batch: int,
    context: int,
    weights: str | None,
    cache_kind: CacheKind | None,
) -> Program:
    language = config.language_config
    model = VL2Model(config, jnp.bfloat16, jnp.bfloat16, layout=layout, cache_kind=cache_kind)
    flat = abstract_sharded_params(config, layout.mesh, jnp.bfloat16, weights)
    params = unflatten(put_together(dict(flat)))

    def array(shape: tuple[int, ...], dtype: Any, *axes: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(layout.mesh, shape, axes))

    layers = jax.eval_shape(lambda: init_cache(language, batch, context, jnp.bfloat16, kind=cache_kind))
    cache = tuple(
        type(layer)(*(array(leaf.shape, leaf.dtype, *cache_axes(layer)) for leaf in layer)) for layer in layers
    )
    kinds = weight_kinds(flat) | {"cache": _bytes(jax.tree.leaves(cache))}
    if purpose == "prefill":
        chunk = min(chunking("tpu", devices=layout.devices).lengths(batch)[0], context)
        ids, index = (array((batch, chunk), jnp.int32, None, None) for _ in range(2))
        table = array((FEWEST_TILES, config.tokens_per_tile, language.hidden_size), jnp.bfloat16, None, None, None)
        hidden = array((batch, language.hidden_size), jnp.bfloat16, None, None)
        last = array((batch,), jnp.int32, None)
        flops = _expert_flops(language, batch * chunk, layout)
        lower = partial(prefill_chunk.lower, model, params, ids, index, table, cache, hidden, np.int32(0), last)
        return Program(lower, kinds, flops, _moved(language, kinds, batch * chunk))
    vocabulary = language.vocab_size
    tokens, positions, steps_taken = (array((batch,), jnp.int32, "batch") for _ in range(3))
    ended = array((batch,), jnp.bool_, "batch")
    seen = array((batch, vocabulary), jnp.bool_, "batch", None)
    state = DecodeState(cache, tokens, positions, steps_taken, ended, seen)
    sampler = Sampler.of(SamplingOptions(), vocabulary, batch)
    done, steps, eos = np.zeros(batch, bool), np.int32(1), np.ones(batch, np.int32)
    lower = partial(decode_steps.lower, model, params, state, done, steps, sampler, eos, True)
    return Program(lower, kinds, _expert_flops(language, batch, layout), _moved(language, kinds, batch))


def _train(config: VL2Config, layout: MeshLayout, batch: int, context: int, recipe: Recipe) -> Program:
    model = build_model(recipe.model, config, layout)
    flat = abstract_sharded_params(config, layout.mesh, jnp.dtype(recipe.model.param_dtype), recipe.model.weights)
    state = abstract_state(recipe, put_together(dict(flat)))
    size = config.vision_config.image_size
    tiles = math.ceil(batch * recipe.data.tiles / recipe.data.rows / layout.devices) * layout.devices

    def array(shape: tuple[int, ...], dtype: Any, axis: str) -> Any:
        names = (None, axis, *[None] * (len(shape) - 2))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(layout.mesh, shape, names))

    pieces = recipe.optimizer.accumulate
    rows = array((pieces, batch, context), jnp.int32, "batch")
    packed = PackedBatch(rows, rows, rows, rows, rows, array((pieces, tiles, size, size, 3), jnp.uint8, "tile"))
    kinds = weight_kinds(flat)
    kinds["optimiser states"] = _bytes(jax.tree.leaves(state.optimizer))
    kinds["batch"] = _bytes(jax.tree.leaves(packed))
    positions, tiles = pieces * batch * context, pieces * tiles
    work = positions, positions * context / 2, tiles  # a document fills its row
    needed = training_costs(config, recipe).of(*work) / layout.devices
    again = costs_of(config).forward(*work) / layout.devices if recipe.model.remat else 0.0
    moved = 4 * sum(kinds.values())
    step, rate = make_step(model, recipe, state), np.float32(recipe.optimizer.learning_rate)
    return Program(lambda: step.lower(state, packed, rate), kinds, needed + again, moved, needed)


def weight_kinds(flat: dict[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Bytes of one device's weights, by part."""
    kinds = {"routed experts": 0, "other language weights": 0, "vision and projector": 0}
    for path, leaf in flat.items():
        kind = "other language weights" if path.startswith("language/") else "vision and projector"
        kinds["routed experts" if "/experts_" in path else kind] += _bytes([leaf])
    return kinds


def _bytes(leaves: list[Any]) -> int:
    """Of one device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def _expert_flops(language: LanguageConfig, tokens: int, layout: MeshLayout) -> float:
    """Multiplications and additions of the routed experts on one device, spread evenly."""
    if not language.n_routed_experts:
        return 0.0
    layers = sum(language.is_moe_layer(i) for i in range(language.num_hidden_layers))
    each = 6 * language.hidden_size * (language.moe_intermediate_size or 0) * (language.num_experts_per_tok or 0)
    return layers * tokens * each / layout.devices


def _moved(language: LanguageConfig, kinds: dict[str, int], tokens: int) -> float:
    """HBM bytes of one pass at least: the experts that some token chose, the other weights and the cache, once."""
    experts, k = language.n_routed_experts or 1, language.num_experts_per_tok or 1
    hit = 1 - (1 - k / experts) ** tokens
    return kinds["routed experts"] * hit + kinds["other language weights"] + kinds["cache"]
