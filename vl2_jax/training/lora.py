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
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from convert.adapters import Adapters, can_be_adapted
from convert.weight_map import unflatten
from vl2_jax.errors import ConfigError
from vl2_jax.training.recipe import LoraRecipe


def adapted_paths(recipe: LoraRecipe, paths: Iterable[str]) -> list[str]:
    """The parameters that get adapters.

    Raises:
      ConfigError: a pattern fits nothing that can have one.
    """
    able = [path for path in paths if can_be_adapted(path)]
    for pattern in recipe.targets:
        if not fnmatch.filter(able, pattern):
            raise ConfigError(f"lora.targets has {pattern!r}, which fits no linear layer; one is {able[-1]!r}.")
    return [path for path in able if any(fnmatch.fnmatch(path, pattern) for pattern in recipe.targets)]


def abstract_adapters(recipe: LoraRecipe, params: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of all factors, for parameters that have these."""
    factors: dict[str, jax.ShapeDtypeStruct] = {}
    for path in adapted_paths(recipe, params):
        *stack, rows, columns = params[path].shape
        factors[f"{path}/a"] = jax.ShapeDtypeStruct((*stack, rows, recipe.rank), jnp.float32)
        factors[f"{path}/b"] = jax.ShapeDtypeStruct((*stack, recipe.rank, columns), jnp.float32)
        if isinstance(sharding := params[path].sharding, NamedSharding):
            *stacked, along_rows, along_columns = (*sharding.spec, *[None] * (len(stack) + 2))[: len(stack) + 2]
            for name, spec in (("a", (*stacked, along_rows, None)), ("b", (*stacked, None, along_columns))):
                laid = NamedSharding(sharding.mesh, PartitionSpec(*spec))
                factors[f"{path}/{name}"] = factors[f"{path}/{name}"].update(sharding=laid)
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


def collection_of(recipe: LoraRecipe, factors: Mapping[str, Array]) -> dict[str, Any]:
    """The model's collection of adapters: B is scaled, the rest is the module's (`layers.adapter_of`)."""
    scale = recipe.alpha / recipe.rank
    return unflatten({path: leaf * scale if path.endswith("/b") else leaf for path, leaf in factors.items()})


def adapters_of(recipe: LoraRecipe, factors: Mapping[str, Array]) -> Adapters:
    """The factors as pairs, where they are."""
    paths = [path.removesuffix("/a") for path in factors if path.endswith("/a")]
    pairs = {path: (factors[f"{path}/a"], factors[f"{path}/b"]) for path in paths}
    return Adapters(pairs, recipe.rank, recipe.alpha)
