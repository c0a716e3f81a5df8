"""Which parameters are trained, at which rate, and how (SPEC 8.2).

Parameters are flat dictionaries here, path -> array, so that patterns, checkpoints and optimiser state speak of the
same names.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from convert.from_torch import CORRECTION_BIAS
from vl2_jax.errors import ConfigError, shown
from vl2_jax.training.recipe import OptimizerRecipe

_UNUSED = "vision/attn_pool/*"  # in every checkpoint, executed by nothing (SPEC 2.3)
_NOT_HIDDEN = ("embed", "lm_head", "mlp/gate/")
_ADAM_RMS = 0.2
_SCHEDULES = ("constant", "cosine", "step", "warmup_stable_decay")
_DROPS = (0.5, 0.75)  # of a run, where "step" divides the rate by sqrt(10)

Flat = Mapping[str, Array]


def is_trained(path: str, frozen: Iterable[str]) -> bool:
    """Whether gradients change a parameter: correction biases have a rule of their own, the unused pooling has none."""
    return not path.endswith(CORRECTION_BIAS) and not any(fnmatch.fnmatch(path, p) for p in (_UNUSED, *frozen))


def check_patterns(paths: Iterable[str], patterns: Iterable[str], key: str = "optimizer.frozen") -> None:
    """Raises ConfigError for a pattern that fits no parameter; `key` is where the patterns stand in the recipe."""
    paths = list(paths)
    for pattern in patterns:
        if not any(fnmatch.fnmatch(path, pattern) for path in paths):
            raise ConfigError(f"{key} has {pattern!r}, which fits no parameter; one is {paths[0]!r}.")


def learning_rate(recipe: OptimizerRecipe, step: int, total: float) -> float:
    """The learning rate of an update, the first of which is step 0.

    Args:
      total: updates of the whole run, as far as is known (`Length.total`).
    """
    peak, warmup = recipe.learning_rate, recipe.warmup
    if step < warmup:
        return peak * step / warmup
    if recipe.schedule == "cosine":
        share = min(1.0, (step - warmup) / max(1.0, total - warmup))
        return peak * (recipe.final_share + (1 - recipe.final_share) * (1 + math.cos(math.pi * share)) / 2)
    if recipe.schedule == "step":
        return peak * 10 ** (-0.5 * sum(step >= math.floor(total * share) for share in _DROPS if total < math.inf))
    if recipe.schedule == "warmup_stable_decay" and total < math.inf:
        decay = max(1.0, math.floor(total * recipe.decay_share))
        share = min(1.0, max(0.0, (step - max(warmup, total - decay)) / decay))
        return peak * (1 - share * (1 - recipe.final_share))
    return peak


def optimizer_of(recipe: OptimizerRecipe) -> optax.GradientTransformationExtraArgs:
    """AdamW (or Muon) over a flat dictionary: matrices decay, vectors do not; the vision tower learns at its own rate.

    Its `update` takes the `rate` of the step.

    Raises:
      ConfigError: an unknown `kind` or `schedule`.
    """
    if recipe.schedule not in _SCHEDULES:
        raise ConfigError(f"optimizer.schedule is {shown(recipe.schedule)}; expected one of {', '.join(_SCHEDULES)}.")
    if recipe.kind not in ("adamw", "muon"):
        raise ConfigError(f"optimizer.kind is {shown(recipe.kind)}; expected adamw or muon.")

    def decays(params: Flat) -> dict[str, bool]:
        return {path: array.ndim > 1 for path, array in params.items()}

    def in_vision(params: Flat) -> dict[str, bool]:
        return {path: path.startswith("vision/") for path in params}

    adam = _kept_as(jnp.dtype(recipe.state_dtype), optax.scale_by_adam(recipe.beta1, recipe.beta2, recipe.epsilon))
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        adam if recipe.kind == "adamw" else optax.partition({"muon": _muon(recipe), "adam": adam}, _rules_of),
        optax.add_decayed_weights(recipe.weight_decay, decays),
        optax.masked(optax.scale(recipe.vision_multiplier), in_vision),
        _times_rate(),
    )


def _times_rate() -> optax.GradientTransformationExtraArgs:
    def update(updates: Flat, state: Any, _: Flat | None = None, *, rate: Any, **__: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda a: jnp.asarray(-rate, a.dtype) * a, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _kept_as(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, whose moments are kept in `dtype` and computed with in float32."""

    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(to) if jnp.issubdtype(a.dtype, jnp.floating) else a, state)

    def update(updates: Flat, state: Any, params: Flat | None = None) -> tuple[Any, Any]:
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def _rules_of(params: Flat) -> dict[str, str]:
    """Muon is for what multiplies hidden states: not for embeddings, routers, the vocabulary, or vectors."""
    return {
        path: "muon" if array.ndim in (2, 3) and not any(part in path for part in _NOT_HIDDEN) else "adam"
        for path, array in params.items()
    }


def _muon(recipe: OptimizerRecipe) -> optax.GradientTransformation:
    """Orthogonal updates of matrices and of stacks of them (https://kellerjordan.github.io/posts/muon), as large as
    AdamW's usually are, so that one learning rate serves both (arXiv 2502.16982).
    """

    def last_two(params: Flat) -> Any:
        return jax.tree.map(lambda a: MuonDimensionNumbers(a.ndim - 2, a.ndim - 1), params)

    def as_large_as_adam(updates: Flat, _: Flat | None) -> dict[str, Array]:
        return jax.tree.map(lambda a: _ADAM_RMS * max(a.shape[-2:]) ** 0.5 * a, updates)

    muon = scale_by_muon(mu_dtype=jnp.dtype(recipe.state_dtype), weight_dimension_numbers=last_two)
    return optax.chain(muon, optax.stateless(as_large_as_adam))
