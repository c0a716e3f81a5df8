"""One update: losses and gradients of a batch, AdamW, correction biases; a pure function of a state.

Parameters that gradients change (`trained`) and those that they do not (`kept`) are apart, so that frozen parts cost
neither gradients nor optimiser state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from convert.weight_map import flatten, unflatten
from vl2_jax.inference.generate import matmul_precision
from vl2_jax.model.vl2 import Params, VL2Model
from vl2_jax.processing.batch import IGNORED
from vl2_jax.training.objective import losses
from vl2_jax.training.optimizer import CORRECTION_BIAS, check_patterns, is_trained, optimizer_of
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import Recipe


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that an update changes, and the parameters that it only reads."""

    step: Int[Array, ""]
    trained: dict[str, Array]
    kept: dict[str, Array]
    optimizer: Any

    @property
    def params(self) -> Params:
        return unflatten({**self.trained, **self.kept})


class Metrics(NamedTuple):
    """What one update tells; all are scalars."""

    loss: Float[Array, ""]
    balance: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    targets: Int[Array, ""]  # positions with a label
    positions: Int[Array, ""]  # positions that are not padding
    busiest_expert: Float[Array, ""]  # load / mean load, the largest of all layers
    is_finite: Bool[Array, ""]  # if not, nothing was changed


def init_state(recipe: Recipe, params: Params) -> TrainState:
    """The state before the first update.

    Raises:
      ConfigError: a pattern of `optimizer.frozen` fits no parameter.
    """
    flat = flatten(params)
    check_patterns(flat, recipe.optimizer.frozen)
    trained = {path: array for path, array in flat.items() if is_trained(path, recipe.optimizer.frozen)}
    kept = {path: array for path, array in flat.items() if path not in trained}
    optimizer = optimizer_of(recipe.optimizer, recipe.loop.steps).init(trained)
    return TrainState(jnp.int32(0), trained, kept, optimizer)


def make_step(model: VL2Model, recipe: Recipe) -> Callable[[TrainState, PackedBatch], tuple[TrainState, Metrics]]:
    """The jitted update. Its batch has one more leading axis: `optimizer.accumulate` batches to a step."""
    optimizer, objective = optimizer_of(recipe.optimizer, recipe.loop.steps), recipe.objective

    def loss_of(trained: dict, kept: dict, batch: PackedBatch, targets: Array) -> tuple[Array, Any]:
        with matmul_precision(model.dtype):
            found = losses(
                model,
                unflatten({**trained, **kept}),
                batch,
                count_padding=objective.count_padding,
                chunk=objective.loss_chunk,
                balance_weight=objective.balance_loss,
                targets=targets,
            )
        pieces = recipe.optimizer.accumulate
        return found.next_token + found.balance.sum() / pieces, (found.next_token, found.balance, found.load)

    def update(state: TrainState, batches: PackedBatch) -> tuple[TrainState, Metrics]:
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
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        norm = optax.global_norm(gradients)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(updates))
        new = TrainState(
            state.step + 1,
            optax.apply_updates(state.trained, updates),
            balanced(state.kept, load, objective.bias_step),
            optimizer_state,
        )
        new = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state)
        mean = jnp.maximum(load.mean(axis=-1), 1.0)
        return new, Metrics(
            loss=loss,
            balance=balance.sum() / recipe.optimizer.accumulate,
            gradient_norm=norm,
            targets=targets,
            positions=(batches.segments > 0).sum(),
            busiest_expert=(load.max(axis=-1) / mean).max(),
            is_finite=is_finite,
        )

    return jax.jit(update, donate_argnums=0)


def balanced(kept: dict[str, Array], load: Float[Array, "layers E"], step: float) -> dict[str, Array]:
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
