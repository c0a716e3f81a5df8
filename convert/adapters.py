"""Low-rank adapters: what they are, merged into the parameters they belong to, or laid beside them.

merged    W + scale * a @ b, rounded to W's dtype: nothing more to compute, and in bfloat16 most of a small update lost
beside    x @ W + (x @ a) @ (scale * b): nothing lost, and several adapters may share one W
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from convert.weight_map import unflatten
from vl2_jax.model.layers import ADAPTERS

# A router is no linear layer in the released model, nor are patches; the pooling is executed by nothing.
_LINEAR = re.compile(r"(?!vision/attn_pool/).*((?<!/mlp/gate)(?<!/patch_embed)/kernel|/kv_b_proj|/experts_\w+_proj)")


@dataclass(frozen=True)
class Adapters:
    """Factors of updates `scale * a @ b`, and parameters that were trained whole beside them.

    Attributes:
      pairs: parameter path -> (a `[..., in, rank]`, b `[..., rank, out]`), float32, on the host or on devices.
      scales: parameter path -> scale.
      whole: parameter path -> what takes its place.
      base: directory or hub id of the model they were trained on, or "".
    """

    pairs: Mapping[str, tuple[Any, Any]]
    scales: Mapping[str, float]
    whole: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""

    def of(self, paths: Iterable[str]) -> Adapters:
        """Those of some parameters."""
        paths = set(paths)
        pairs = {path: pair for path, pair in self.pairs.items() if path in paths}
        whole = {path: array for path, array in self.whole.items() if path in paths}
        return Adapters(pairs, {path: self.scales[path] for path in pairs}, whole, self.base)


def can_be_adapted(path: str) -> bool:
    """Whether a parameter is a linear layer of the released model, or the linear layers of all experts."""
    return _LINEAR.fullmatch(path) is not None


def merge(params: Mapping[str, Any], adapters: Adapters, in_place: bool = False) -> dict[str, Any]:
    """Flat parameters with the adapters' products added, each in its own dtype; sums are float32.

    Args:
      in_place: the memory of `params` is taken for the result, and they cannot be used any more.
    """
    add = _add_in_place if in_place else _add
    merged = _with_whole(params, adapters)
    for path, (a, b) in adapters.pairs.items():
        merged[path] = add(merged[path], a, b * np.float32(adapters.scales[path]))
    return merged


def beside(params: Mapping[str, Array], adapters: Adapters) -> dict[str, Any]:
    """Flat parameters as a tree that holds the adapters too, under `ADAPTERS`, as `model.vl2.apply` takes it."""
    factors: dict[str, Array] = {}
    for path, (a, b) in adapters.pairs.items():
        places = factor_shardings(params[path].sharding, params[path].ndim)
        for name, half, place in zip("ab", (a, b * np.float32(adapters.scales[path])), places):
            factors[f"{path}/{name}"] = _laid(np.asarray(half, np.float32), place)
    return {**unflatten(_with_whole(params, adapters)), ADAPTERS: unflatten(factors)}


def factor_shardings(sharding: Any, rank: int) -> tuple[Any, Any]:
    """Where the factors of an array lie: as it does, whole along the axis that they share."""
    if not isinstance(sharding, NamedSharding):
        return sharding, sharding
    *stacked, rows, columns = (*sharding.spec, *[None] * rank)[:rank]
    specs = PartitionSpec(*stacked, rows, None), PartitionSpec(*stacked, None, columns)
    first, second = (NamedSharding(sharding.mesh, spec) for spec in specs)
    return first, second


def _with_whole(params: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    replaced = dict(params)
    for path, array in adapters.whole.items():
        old = params[path]
        new = array.astype(old.dtype)
        replaced[path] = _laid(np.asarray(new), old.sharding) if isinstance(old, jax.Array) else new
    return replaced


def _laid(array: np.ndarray, sharding: Any) -> Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _add_product(weight: Array, a: Array, b: Array) -> Array:
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + product).astype(weight.dtype)


_add, _add_in_place = jax.jit(_add_product), jax.jit(_add_product, donate_argnums=0)
