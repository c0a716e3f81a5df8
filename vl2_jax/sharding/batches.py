"""Packed batches on a mesh: every host makes the rows of its own devices, and the tiles that those rows show.

Rows lie along `data`, `fsdp` and `expert`, tiles along these and `tensor`: so the tiles of a host's rows are the host's
own, evenly over its devices.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vl2_jax.errors import MeshError
from vl2_jax.sharding.rules import AXES, TENSOR, sharding_of


def share_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(which share of a batch's rows this process makes, how many shares there are).

    Raises:
      MeshError: its devices hold rows that are not next to each other, or unlike numbers of them.
    """
    process = jax.process_index() if process is None else process
    groups = mesh.size // mesh.shape[TENSOR]
    numbers = np.arange(groups).repeat(mesh.shape[TENSOR])
    owners = np.asarray([device.process_index for device in mesh.devices.ravel()])
    mine = sorted({int(n) for n, owner in zip(numbers, owners, strict=True) if owner == process})
    if mine != list(range(mine[0], mine[-1] + 1)) or groups % len(mine) or mine[0] % len(mine):
        raise MeshError(f"process {process} would hold rows {mine} of {groups}; choose a mesh that keeps them together")
    return mine[0] // len(mine), groups // len(mine)


def spread(batch: Any, mesh: Mesh, share: int, shares: int) -> Any:
    """A host's share of stacked packed batches as arrays on the mesh.

    Args:
      batch: `PackedBatch` of NumPy arrays with one leading axis more, the rows (or tiles) of this share on the next.

    Raises:
      MeshError: rows do not divide into the devices.
    """
    tile_axes = ("tile", None, None, None)

    def lay(local: np.ndarray) -> jax.Array:
        axes = (None, *(tile_axes if local.ndim == 5 else ("batch", None)))
        shape = (local.shape[0], local.shape[1] * shares, *local.shape[2:])
        first = share * local.shape[1]
        sharding = sharding_of(mesh, shape, axes)
        parts = mesh.size if axes[1] == "tile" else mesh.size // mesh.shape[TENSOR]
        if shape[1] % parts:
            what = "tiles" if axes[1] == "tile" else "rows"
            raise MeshError(f"{shape[1]} {what} a batch do not divide into {parts} devices; change data.{what}.")

        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[1].indices(shape[1])
            return local[index[0], begin - first : end - first]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(lay, batch)


assert AXES[-1] == TENSOR  # `share_of_process` numbers devices so
