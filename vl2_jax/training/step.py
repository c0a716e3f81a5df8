"""One update: losses and gradients of a batch, AdamW, correction biases; a pure function of a state.

Parameters that gradients change (`trained`) and those that they do not (`kept`) are apart, so that frozen parts cost
neither gradients nor optimiser state. With low-rank adapters, these and what `lora.whole` names are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from convert.adapters import Adapters, merge
from convert.checkpoint import dtype_of
from convert.from_torch import CORRECTION_BIAS
from convert.weight_map import flatten, unflatten
from vl2_jax.config import VL2Config
from vl2_jax.errors import ConfigError
from vl2_jax.inference.prefill import matmul_precision
from vl2_jax.model.layers import ADAPTERS, Layout
from vl2_jax.model.vl2 import Params, VL2Model
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.processing.batch import IGNORED
from vl2_jax.processing.tiling import FIRST_TOKEN_ROW
from vl2_jax.training.lora import (
    abstract_adapters,
    adapters_of,
    begun_from,
    collection_of,
    init_adapters,
    is_factor,
    whole_paths,
)
from vl2_jax.training.objective import losses
from vl2_jax.training.optimizer import check_patterns, is_trained, optimizer_of
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import ModelRecipe, Recipe


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that an update changes, and the parameters that it only reads."""

    step: Int[Array, ""]
    trained: dict[str, Array]
    kept: dict[str, Any]  # arrays, or quantised matrices
    optimizer: Any


class Metrics(NamedTuple):
    """What one update tells; all are scalars."""

    loss: Float[Array, ""]
    balance: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    targets: Int[Array, ""]  # positions with a label
    positions: Int[Array, ""]  # positions that are not padding
    attended: Float[Array, ""]  # positions that each of these attends to, in sum
    tiles: Int[Array, ""]  # tiles that are not padding
    busiest_expert: Float[Array, ""]  # load / mean load, the largest of all layers
    is_finite: Bool[Array, ""]  # loss and gradients; if not, nothing was changed


def build_model(recipe: ModelRecipe, config: VL2Config, layout: Layout, **pixels: Any) -> VL2Model:
    """The model that is trained; `pixels` are its mean and deviation."""
    dtypes = dtype_of(recipe.dtype), dtype_of(recipe.param_dtype)
    return VL2Model(config, *dtypes, layout=layout, remat=recipe.remat, scan=recipe.scan, **pixels)


def init_state(recipe: Recipe, params: Params, adapters: Adapters | None = None) -> TrainState:
    """The state before the first update; optimiser states lie where their parameters do.

    Args:
      adapters: that a run with adapters goes on from.

    Raises:
      ConfigError: a pattern of `optimizer.frozen`, `lora.targets` or `lora.whole` fits no parameter, or the recipe has
        no room for the adapters.
    """
    flat = flatten(params)
    if adapters is not None:
        if lost := adapters.whole.keys() - _whole(recipe, flat).keys():
            raise ConfigError(f"model.adapters has {min(lost)!r} and others whole, which lora.whole leaves out.")
        flat = merge(flat, Adapters({}, {}, adapters.whole))
    trained, kept = _parts(recipe, flat)
    if recipe.lora.rank:
        factors = init_adapters({path: leaf for path, leaf in trained.items() if is_factor(path)}, recipe.model.seed)
        trained |= factors if adapters is None else begun_from(recipe.lora, factors, adapters)
    init = optimizer_of(recipe.optimizer).init
    if not isinstance(next(iter(flat.values())).sharding, NamedSharding):
        # Committed to its device as a restored state is, so that a run that goes on does not compile another program.
        return jax.device_put(TrainState(jnp.int32(0), trained, kept, init(trained)), jax.devices()[0])
    like = shardings_of(abstract_state(recipe, flat))
    step = jax.device_put(np.int32(0), like.step)
    return TrainState(step, trained, kept, jax.jit(init, out_shardings=like.optimizer)(trained))


def abstract_state(recipe: Recipe, params: Mapping[str, Any]) -> TrainState:
    """Shape, dtype and sharding of the state of parameters that have these three (`sharding.rules`)."""
    trained, kept = _parts(recipe, params)
    whole = NamedSharding(next(iter(params.values())).sharding.mesh, PartitionSpec())

    def beside(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        parameter = trained.get(str(getattr(path[-1], "key", ""))) if path else None
        sharding = whole if parameter is None else parameter.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    optimizer = jax.eval_shape(optimizer_of(recipe.optimizer).init, trained)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, trained, kept, jax.tree_util.tree_map_with_path(beside, optimizer))


def shardings_of(state: TrainState) -> TrainState:
    """Where every array of a state, or of its description, lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _parts(recipe: Recipe, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained, and what is kept; adapters are described only."""
    check_patterns(params, recipe.optimizer.frozen)
    if recipe.lora.rank:
        whole = _whole(recipe, params)
        kept = {path: leaf for path, leaf in params.items() if path not in whole}
        return {**abstract_adapters(recipe, params), **whole}, kept
    trained = {path: leaf for path, leaf in params.items() if is_trained(path, recipe.optimizer.frozen)}
    if not trained:
        raise ConfigError(f"optimizer.frozen is {list(recipe.optimizer.frozen)}, which leaves nothing to train.")
    return trained, {path: leaf for path, leaf in params.items() if path not in trained}


def _whole(recipe: Recipe, params: Mapping[str, Any]) -> dict[str, Any]:
    """What is trained itself beside adapters.

    Raises:
      ConfigError: see `lora.whole_paths`; or it is quantised.
    """
    whole = {path: params[path] for path in whole_paths(recipe, params)}
    if quantised := [path for path, leaf in whole.items() if isinstance(leaf, Narrow)]:
        raise ConfigError(
            f"lora.whole has {quantised[0]!r}, which is quantised and cannot be trained itself; give it an adapter "
            "(lora.targets), or the model in floats."
        )
    return whole


def model_params(recipe: Recipe, trained: Mapping[str, Array], kept: Mapping[str, Any]) -> Params:
    """What the model computes with: its parameters, and its adapters beside them where these are trained."""
    params = unflatten({**kept, **{path: leaf for path, leaf in trained.items() if not is_factor(path)}})
    return {**params, ADAPTERS: collection_of(recipe.lora, trained)} if recipe.lora.rank else params


def params_of(recipe: Recipe, state: TrainState) -> dict[str, Array]:
    """The flat parameters of the trained model, adapters merged; not of one with quantised matrices."""
    if recipe.lora.rank:
        learned = adapters_of(recipe.lora, state.trained)
        return merge({**state.kept, **learned.whole}, Adapters(learned.pairs, learned.scales))
    return {**state.trained, **state.kept}


def make_step(model: VL2Model, recipe: Recipe, like: TrainState | None = None) -> Any:
    """The jitted update, (state, batches, learning rate) -> (state, `Metrics`).

    Its batch has one more leading axis: `optimizer.accumulate` batches to a step.

    Args:
      like: a state on a mesh; the new one lies as it does.
    """
    optimizer, objective = optimizer_of(recipe.optimizer), recipe.objective

    def loss_of(trained: dict, kept: dict, batch: PackedBatch, targets: Array) -> tuple[Array, Any]:
        params = model_params(recipe, trained, kept)
        with matmul_precision(model.dtype):
            found = losses(
                model,
                params,
                batch,
                count_padding=objective.count_padding,
                chunk=objective.loss_chunk,
                balance_weight=objective.balance_loss,
                targets=targets,
            )
        pieces = recipe.optimizer.accumulate
        return found.next_token + found.balance.sum() / pieces, (found.next_token, found.balance, found.load)

    def update(state: TrainState, batches: PackedBatch, rate: ArrayLike) -> tuple[TrainState, Metrics]:
        targets = jnp.maximum((batches.labels[..., 1:] != IGNORED).sum(), 1)
        gradients_of = jax.value_and_grad(loss_of, has_aux=True)

        def accumulate(sums: Any, batch: PackedBatch) -> tuple[Any, None]:
            (_, told), gradients = gradients_of(state.trained, state.kept, batch, targets)
            return jax.tree.map(jnp.add, sums, (gradients, told)), None

        first = jax.tree.map(lambda a: a[0], batches)
        (_, told), gradients = gradients_of(state.trained, state.kept, first, targets)
        if recipe.optimizer.accumulate > 1:
            rest = jax.tree.map(lambda a: a[1:], batches)
            (gradients, told), _ = jax.lax.scan(accumulate, (gradients, told), rest)
        loss, balance, load = told
        norm = optax.global_norm(gradients)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def advanced() -> TrainState:
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained, rate=rate)
            trained: Any = optax.apply_updates(state.trained, updates)
            bias_step = 0.0 if recipe.lora.rank else objective.bias_step  # adapters on their own could not hold it
            kept = balanced(state.kept, load, bias_step)
            return TrainState(state.step + 1, trained, kept, optimizer_state)

        # A branch rather than a choice between two states: each would be written, 5 times the time on a CPU.
        new = jax.lax.cond(is_finite, advanced, lambda: state)
        mean = jnp.maximum(load.mean(axis=-1), 1.0)
        return new, Metrics(
            loss=loss,
            balance=balance.sum() / recipe.optimizer.accumulate,
            gradient_norm=norm,
            targets=targets,
            positions=(batches.segments > 0).sum(),
            attended=jnp.where(batches.segments > 0, batches.positions + 1.0, 0.0).sum(),
            tiles=jax.vmap(partial(shown_tiles, model.config.tokens_per_tile))(batches).sum(),
            busiest_expert=(load.max(axis=-1) / mean).max(),
            is_finite=is_finite,
        )

    return jax.jit(update, donate_argnums=0, out_shardings=None if like is None else (shardings_of(like), None))


def shown_tiles(tokens_per_tile: int, batch: PackedBatch) -> Int[Array, ""]:
    """How many tiles of a batch some position shows; the only tile of a small picture is its global view too."""
    number = batch.tiles.shape[0]
    of_position = (batch.visual_index - FIRST_TOKEN_ROW) // tokens_per_tile
    marked = jnp.where(of_position < 0, number, of_position).ravel()
    return jnp.zeros(number, jnp.int32).at[marked].set(1, mode="drop").sum()


@jax.jit
def all_finite(state: TrainState) -> Bool[Array, ""]:
    """Whether all that is trained consists of numbers, optimiser states included."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((state.trained, state.optimizer))]).all()


def balanced(kept: dict[str, Any], load: Float[Array, "layers E"], step: float) -> dict[str, Any]:
    """Correction biases, one step up for experts below the mean load, down for those above (arXiv 2408.15664)."""
    paths = sorted((path for path in kept if path.endswith(CORRECTION_BIAS)), key=_layer)
    if not step or not paths:
        return kept
    moved = {
        path: kept[path] + step * jnp.sign(row.mean() - row).astype(kept[path].dtype)
        for path, row in zip(paths, load, strict=True)
    }
    return {**kept, **moved}


def _layer(path: str) -> int:
    return int(path.split("layers_")[1].split("/")[0])
