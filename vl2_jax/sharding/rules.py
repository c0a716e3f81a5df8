"""Which mesh axes an array's axes lie along: one table, for parameters and activations.

Modules name the axes of what they declare ("heads", "expert", ...); the table gives each name the mesh axes it may lie
along, in order. An axis takes as many of them as divide it and as no axis before it in the same array has taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.weight_map import flatten
from vl2_jax.config import VL2Config
from vl2_jax.model.layers import Dtype
from vl2_jax.model.vl2 import abstract_boxed_params, map_boxed

DATA, FSDP, EXPERT, TENSOR = "data", "fsdp", "expert", "tensor"
AXES = (DATA, FSDP, EXPERT, TENSOR)

RULES: Mapping[str, tuple[str, ...]] = {
    # Activations. Sequences are spread over every axis but `tensor`, tiles over all devices.
    "batch": (DATA, FSDP, EXPERT),
    "tile": AXES,
    # Parameters. `embed` is the model width, which most matrices have.
    "vocab": (TENSOR,),
    "embed": (FSDP,),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "expert": (EXPERT, TENSOR),
    "expert_mlp": (TENSOR,),  # where the experts do not divide into `expert` x `tensor`: 72 into 8 x 2
    "vision_embed": (FSDP,),  # the tower computes on tiles of its own on every device
}


def spec_of(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> PartitionSpec:
    """How an array of this shape lies on the mesh."""
    taken: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes, strict=True):
        chosen: list[str] = []
        for name in RULES.get(axis or "", ()):
            if name in taken or mesh.shape[name] == 1:
                continue
            if size % math.prod(mesh.shape[n] for n in (*chosen, name)):
                break
            chosen.append(name)
        taken.update(chosen)
        parts.append(tuple(chosen) or None)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def sharding_of(mesh: Mesh, shape: Sequence[int], axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, spec_of(mesh, shape, axes))


def abstract_sharded_params(config: VL2Config, mesh: Mesh, param_dtype: Dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding of every parameter."""

    def laid(value: Any, names: Sequence[str | None]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding_of(mesh, value.shape, names))

    return flatten(map_boxed(laid, abstract_boxed_params(config, param_dtype)))
