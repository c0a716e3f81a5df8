"""TPU slices by name, and what their chips can do.

Sources: cloud.google.com/tpu/docs (compute, memory and bandwidths of a chip), jax-ml.github.io/scaling-book (bandwidth
of a link). Figures of public documents differ by a few per cent; everything computed from them is an estimate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from vl2_jax.errors import MeshError, shown
from vl2_jax.installation import install_line
from vl2_jax.ops import chips


class Chip(NamedTuple):
    """What one JAX device has: half a chip on tpu7x, a chip elsewhere.

    Attributes:
      flops: bfloat16 operations a second.
      memory: bytes of HBM that the compiler lets a program use.
      bandwidth: bytes of HBM a second.
      link: bytes a second along one axis of the torus, both directions together.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


_GIB = float(1 << 30)
CHIPS = {
    "v4": Chip(chips.CHIPS["TPU v4"].flops, 31.25 * _GIB, 1200e9, 90e9),
    "v5e": Chip(chips.CHIPS["TPU v5 lite"].flops, 15.75 * _GIB, 819e9, 90e9),
    "v5p": Chip(chips.CHIPS["TPU v5"].flops, 95 * 1e9, 2765e9, 180e9),
    "v6e": Chip(chips.CHIPS["TPU v6 lite"].flops, 31.25 * _GIB, 1638e9, 180e9),
    "tpu7x": Chip(chips.CHIPS["TPU7x"].flops, 96 * _GIB * 0.99, 7380e9 / 2, 180e9),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
TOPOLOGIES = {"v4": _DEEP, "v5e": _FLAT, "v5p": _DEEP, "v6e": _FLAT, "tpu7x": _DEEP}


class Slice(NamedTuple):
    """Some devices that do not exist here, for which programs can be compiled."""

    name: str
    chip: Chip
    devices: tuple[Any, ...]


@contextmanager
def _without_its_warnings() -> Iterator[None]:
    """libtpu writes to standard error that it finds no TPU, which is as it should be."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@cache
def find_slice(name: str) -> Slice:
    """The slice "v5e:2x4".

    Raises:
      MeshError: no such slice, or no TPU compiler on this machine.
    """
    kind, _, shape = name.partition(":")
    if kind not in TOPOLOGIES or shape not in TOPOLOGIES[kind]:
        kinds = "; ".join(f"{k}:{', '.join(shapes)}" for k, shapes in TOPOLOGIES.items())
        raise MeshError(f"there is no TPU slice {shown(name)}; choose one of {kinds}.")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no Cloud TPU to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once
    from jax.experimental import topologies

    if shape == "1x1":  # the compiler's smallest host has four chips; one of them is a slice too
        shape = "2x2"
    try:
        with _without_its_warnings():
            found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}")
    except Exception as error:  # of many types, from a library that may be missing
        raise MeshError(
            f"the TPU compiler does not answer ({str(error).splitlines()[0]}); it is a package: {install_line('tpu')}"
        ) from None
    devices = tuple(found.devices)
    return Slice(name, CHIPS[kind], devices[:1] if name.endswith(":1x1") else devices)
