"""What kernels need to know of the chip they are compiled for: sizes, looked up by the kind of the mesh's devices.

Nothing here asks which devices are attached. Under `jax.set_mesh(mesh)` the mesh being compiled for says it, so that a
program for a TPU can be lowered on a machine that has none; without one, sizes are those that every chip has.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

_MIB = 1 << 20


class Chip(NamedTuple):
    """One TensorCore, and the JAX device that it is (with its twin, on v4 and v5p).

    Attributes:
      vmem: bytes of vector memory (JAX's own table, `jax._src.tpu_info`).
      mxu: side of the systolic array.
      flops: bfloat16 operations a second of the device (cloud.google.com/tpu/docs).
    """

    vmem: int
    mxu: int
    flops: float


CHIPS = {
    "TPU v4": Chip(16 * _MIB, 128, 275e12),
    "TPU v5 lite": Chip(128 * _MIB, 128, 197e12),
    "TPU v5": Chip(64 * _MIB, 128, 459e12),
    "TPU v6 lite": Chip(128 * _MIB, 256, 918e12),
    "TPU7x": Chip(64 * _MIB, 256, 2307e12 / 2),
}
_SMALLEST = CHIPS["TPU v5"]  # of the chips whose vector memory holds two experts; v4 is known by its mesh


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 operations a second of a device; None where no figure is known, as of a CPU."""
    return CHIPS[device_kind].flops if device_kind in CHIPS else None


def chip_of_mesh() -> Chip:
    """The chip of the mesh that is being compiled for; sizes that fit all newer ones if there is no mesh."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return CHIPS.get(getattr(device, "device_kind", ""), _SMALLEST)
