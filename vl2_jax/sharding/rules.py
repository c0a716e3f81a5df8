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

from convert.quantise import abstract_quantised, is_quantised
from convert.weight_map import flatten
from vl2_jax.config import VL2Config
from vl2_jax.model.layers import Dtype
from vl2_jax.model.vl2 import abstract_boxed_params
from vl2_jax.ops.narrow.kinds import Narrow

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


def specs_of(mesh: Mesh, kernel: Any, axes: Sequence[str | None]) -> Any:
    """How a matrix, or those of all experts, lies on the mesh: of every part, where it is `Narrow`."""
    if not isinstance(kernel, Narrow):
        return spec_of(mesh, kernel.shape, axes)
    *lead, columns = [*spec_of(mesh, kernel.units, axes), *[None] * kernel.ndim][: kernel.ndim]

    def of_part(part: Any) -> PartitionSpec:
        whole = [*lead, *[None] * (len(part.shape) - kernel.ndim), columns]
        return PartitionSpec(*(None if size == 1 else names for size, names in zip(part.shape, whole)))

    return jax.tree.map(of_part, kernel)


def abstract_sharded_params(
    config: VL2Config, mesh: Mesh, param_dtype: Dtype, kind: str | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding of every parameter, or of its parts where it is quantised.

    Args:
      kind: of `convert.quantise`; `None` is of floats.
    """
    flat: dict[str, jax.ShapeDtypeStruct] = {}
    for path, box in flatten(abstract_boxed_params(config, param_dtype)).items():
        value, parts = box.value, {"": box.value}
        if kind is not None and is_quantised(path):
            value = abstract_quantised(path, value.shape, kind)
            parts = {f"/{name}": part for name, part in vars(value).items()}
        specs = specs_of(mesh, value, box.names)
        for name, part in parts.items():
            spec = getattr(specs, name[1:]) if name else specs
            flat[path + name] = jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=NamedSharding(mesh, spec))
    return flat
