"""Meshes by name or by size, checked against the model before anything is loaded.

"auto"                    what suits the model and the number of devices
"expert"                  all devices along one axis
"expert=4,tensor=2"       as it says; axes that are not named have size 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from convert.weight_map import flatten
from vl2_jax.config import VL2Config
from vl2_jax.errors import MeshError
from vl2_jax.model.vl2 import abstract_params
from vl2_jax.sharding.rules import AXES, DATA, EXPERT, FSDP, TENSOR

AUTO = "auto"
# What one device holds of the weights that are not experts, at most, if there are enough devices.
_DENSE_BYTES = 5 << 30
_TRAINED_BYTES = 4 << 30


def make_mesh(
    description: str, config: VL2Config, devices: Sequence[Any] | None = None, training: bool = False
) -> Mesh:
    """The mesh that `description` names, over all devices or the given ones.

    Raises:
      MeshError: it cannot be read, needs another number of devices, or does not divide the model.
    """
    devices = jax.devices() if devices is None else devices
    sizes = parse_mesh(description, len(devices), config, training)
    shape = tuple(sizes[axis] for axis in AXES)
    needed = math.prod(shape)
    if needed != len(devices):
        raise MeshError(
            f"mesh {description!r} has {needed} devices, but there are {len(devices)}; the sizes must multiply to that."
        )
    check_divides(sizes, config)
    # A mesh axis may take a part of an axis of the torus: 8 of the 4 x 4 x 4 chips of a v5p slice.
    placed = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(description: str, devices: int, config: VL2Config, training: bool = False) -> dict[str, int]:
    """Size of every axis.

    Raises:
      MeshError: an unknown axis, or a size that is not a positive number.
    """
    text = description.strip()
    if text == AUTO:
        return default_mesh(config, devices, training)
    if text in AXES:
        return dict.fromkeys(AXES, 1) | {text: devices}
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        name, separator, number = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not separator or not number.isdigit() or int(number) < 1:
            raise MeshError(
                f"mesh {description!r}: {part.strip()!r} is not understood; write auto, one of {', '.join(AXES)}, or "
                "sizes such as expert=4,tensor=2."
            )
        sizes[name] = int(number)
    return sizes


def default_mesh(config: VL2Config, devices: int, training: bool = False) -> dict[str, int]:
    """Experts over as many devices as divide them; before that, other weights cut until a device can hold them.

    Inference cuts them along `tensor`, training (with gradients and optimiser states) along `fsdp`.
    """
    cut = FSDP if training else TENSOR
    held, most = dense_parameters(config) * (16 if training else 2), _TRAINED_BYTES if training else _DENSE_BYTES
    experts = config.language_config.n_routed_experts or 1
    best: tuple[tuple[float, ...], dict[str, int]] | None = None
    for parts in _divisors(devices):
        for expert in _divisors(devices // parts):
            sizes = dict.fromkeys(AXES, 1) | {cut: parts, EXPERT: expert, DATA: devices // (parts * expert)}
            if undivided(sizes, config):
                continue
            score = (max(held / parts, most), -math.gcd(experts, expert), parts)
            if best is None or score < best[0]:
                best = (score, sizes)
    assert best is not None  # one device along every axis but `data` always divides
    return best[1]


def dense_parameters(config: VL2Config) -> int:
    """What is not a routed expert."""
    leaves = flatten(abstract_params(config)).items()
    return sum(math.prod(leaf.shape) for path, leaf in leaves if "/experts_" not in path)


def check_divides(sizes: Mapping[str, int], config: VL2Config) -> None:
    """Raises MeshError naming everything that a mesh does not divide."""
    problems = undivided(sizes, config)
    if problems:
        raise MeshError(f"the mesh does not divide the model: {'; '.join(problems)}.")


def undivided(sizes: Mapping[str, int], config: VL2Config) -> list[str]:
    """What the sizes of a mesh do not divide, each with the sizes that would do."""
    language = config.language_config
    parts = [
        (TENSOR, "attention heads", language.num_attention_heads),
        (TENSOR, "width of the dense layer", language.intermediate_size),
        (FSDP, "model width", language.hidden_size),
        (FSDP, "vision width", config.vision_config.width),
    ]
    if language.n_routed_experts:
        parts.append((EXPERT, "routed experts", language.n_routed_experts))
        if language.n_routed_experts % (sizes[EXPERT] * sizes[TENSOR]):
            parts.append((TENSOR, "width of an expert", language.moe_intermediate_size or 1))
        if language.n_shared_experts:
            shared = language.n_shared_experts * (language.moe_intermediate_size or 1)
            parts.append((TENSOR, "width of the shared experts", shared))
    return [
        f"{number} ({what}) is not a multiple of {axis}={sizes[axis]}, choose one of {_listed(number)}"
        for axis, what, number in parts
        if number % sizes[axis]
    ]


def _listed(number: int) -> str:
    return ", ".join(str(n) for n in _divisors(number) if n <= 64)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
