"""Low-rank adaptation: a frozen matrix W learns `W + alpha / rank * A B` (Hu et al., arXiv 2106.09685).

Adapters lie beside the parameters in flat dictionaries, "PATH/a" and "PATH/b", and go into the model as a collection of
their own. Sharded as their matrices are, along the axis that they share.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from convert.adapters import Adapters, can_be_adapted, factor_shardings
from convert.weight_map import unflatten
from vl2_jax.errors import ConfigError
from vl2_jax.training.optimizer import check_patterns, is_trained
from vl2_jax.training.recipe import LoraRecipe, Recipe


def adapted_paths(recipe: Recipe, paths: Iterable[str]) -> list[str]:
    """The parameters that get adapters: neither frozen nor trained whole.

    Raises:
      ConfigError: a pattern fits nothing that can have one.
    """
    lora, paths = recipe.lora, list(paths)
    able = [path for path in paths if can_be_adapted(path)]
    for pattern in lora.targets:
        if not fnmatch.filter(able, pattern):
            raise ConfigError(f"lora.targets has {pattern!r}, which fits no linear layer; one is {able[-1]!r}.")
    left_out = (*recipe.optimizer.frozen, *lora.whole)
    targets = [path for path in able if any(fnmatch.fnmatch(path, pattern) for pattern in lora.targets)]
    chosen = [path for path in targets if is_trained(path, left_out)]
    if not chosen:
        raise ConfigError("optimizer.frozen and lora.whole have all of lora.targets, which leaves no adapter to train.")
    return chosen


def whole_paths(recipe: Recipe, paths: Iterable[str]) -> list[str]:
    """The parameters that are trained themselves beside adapters.

    Raises:
      ConfigError: a pattern fits nothing that is trained.
    """
    paths = list(paths)
    check_patterns(paths, recipe.lora.whole, "lora.whole")
    chosen = [path for path in paths if any(fnmatch.fnmatch(path, pattern) for pattern in recipe.lora.whole)]
    return [path for path in chosen if is_trained(path, recipe.optimizer.frozen)]


def abstract_adapters(recipe: Recipe, params: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of all factors, for parameters that have these."""
    factors: dict[str, jax.ShapeDtypeStruct] = {}
    rank = recipe.lora.rank
    for path in adapted_paths(recipe, params):
        *stack, rows, columns = params[path].shape
        shapes = (*stack, rows, rank), (*stack, rank, columns)
        places = factor_shardings(getattr(params[path], "sharding", None), len(params[path].shape))
        for name, shape, place in zip("ab", shapes, places):
            laid = place if isinstance(place, NamedSharding) else None
            factors[f"{path}/{name}"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=laid)
    return factors


def init_adapters(abstract: Mapping[str, jax.ShapeDtypeStruct], seed: int) -> dict[str, Array]:
    """A uniform within 1 / sqrt(in), as PEFT draws it; B zero, so that nothing is changed at first."""

    def draw(key: Array) -> dict[str, Array]:
        keys = jax.random.split(key, len(abstract))
        return {
            path: jax.random.uniform(k, leaf.shape, leaf.dtype, -1.0, 1.0) * leaf.shape[-2] ** -0.5
            if path.endswith("/a")
            else jnp.zeros(leaf.shape, leaf.dtype)
            for k, (path, leaf) in zip(keys, abstract.items(), strict=True)
        }

    shardings = {path: leaf.sharding for path, leaf in abstract.items()}
    return jax.jit(draw, out_shardings=None if None in shardings.values() else shardings)(jax.random.key(seed))


def begun_from(recipe: LoraRecipe, fresh: Mapping[str, Array], adapters: Adapters) -> dict[str, Array]:
    """Fresh factors, with those of adapters in their place; a higher rank keeps its fresh rest, which changes nothing.

    Raises:
      ConfigError: the recipe has no room for some of them, which would be lost.
    """
    lost = [path for path in adapters.pairs if f"{path}/a" not in fresh]
    if lost:
        raise ConfigError(f"model.adapters has {lost[0]!r} ({len(lost)} in all), which lora.targets leave out.")
    begun = dict(fresh)
    for path, (a, b) in adapters.pairs.items():
        rank = a.shape[-1]
        if rank > recipe.rank:
            raise ConfigError(f"model.adapters have rank {rank} at {path!r}, more than lora.rank {recipe.rank}.")
        scale = np.float32(adapters.scales[path] / (recipe.alpha / recipe.rank))
        begun[f"{path}/a"] = fresh[f"{path}/a"].at[..., :rank].set(a)
        begun[f"{path}/b"] = fresh[f"{path}/b"].at[..., :rank, :].set(b * scale)
    return begun


def is_factor(path: str) -> bool:
    """Whether what is trained under this name is a half of an adapter, and not a parameter."""
    return path.endswith(("/a", "/b"))


def collection_of(recipe: LoraRecipe, trained: Mapping[str, Array]) -> dict[str, Any]:
    """The model's collection of adapters: B is scaled, the rest is the module's (`layers.adapter_of`)."""
    scale = recipe.alpha / recipe.rank
    factors = {path: leaf for path, leaf in trained.items() if is_factor(path)}
    return unflatten({path: leaf * scale if path.endswith("/b") else leaf for path, leaf in factors.items()})


def adapters_of(recipe: LoraRecipe, trained: Mapping[str, Any], base: str = "") -> Adapters:
    """What is trained as pairs and whole parameters, where they are."""
    paths = [path.removesuffix("/a") for path in trained if path.endswith("/a")]
    pairs = {path: (trained[f"{path}/a"], trained[f"{path}/b"]) for path in paths}
    whole = {path: leaf for path, leaf in trained.items() if not is_factor(path)}
    return Adapters(pairs, dict.fromkeys(pairs, recipe.alpha / recipe.rank), whole, base)
