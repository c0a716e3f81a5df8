"""Weights from disk to the devices of a mesh: a process reads the bytes of its own shards, a few parameters at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from convert.from_torch import CORRECTION_BIAS
from convert.parts import Parts
from convert.weight_map import Leaf, unflatten
from vl2_jax.model.vl2 import Params
from vl2_jax.progress import Report, silent

_READERS = 4  # parameters that are read at the same time, and so what is held on the host beside the devices' shards


def load_sharded(
    directory: Path,
    leaves: list[Leaf],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    verify: bool = True,
    report: Report = silent,
) -> Params:
    """The parameters of a released or converted directory, laid out as `abstract` says.

    Args:
      abstract: shape, dtype and sharding of every parameter; the router's correction biases stay float32.
      verify: compare whole parameters with the manifest. The processes share them out, so that each reads a part of
        what it does not need itself.

    Raises:
      CheckpointError: see `convert.parts`.
    """
    parts = Parts(directory, leaves, verify)
    process, processes = jax.process_index(), jax.process_count()

    def read(number: int, leaf: Leaf) -> tuple[Leaf, dict[str, np.ndarray]]:
        if verify and number % processes == process:
            parts.check(leaf)
        wanted = abstract[leaf.path]
        dtype = np.dtype(np.float32) if leaf.path.endswith(CORRECTION_BIAS) else wanted.dtype
        assert wanted.sharding is not None
        # Devices that hold the same part share one copy; slices cannot be keys.
        indices = {str(i): i for i in wanted.sharding.addressable_devices_indices_map(leaf.shape).values()}
        return leaf, {name: parts.read(leaf, index, dtype) for name, index in indices.items()}

    flat: dict[str, Array] = {}
    total, done = sum(int(np.prod(leaf.shape)) for leaf in leaves), 0
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        for number, leaf in enumerate([*leaves, *[None] * _READERS]):
            if leaf is not None:
                waiting.append(pool.submit(read, number, leaf))
            if waiting and (leaf is None or len(waiting) > _READERS):
                ready, shards = waiting.popleft().result()
                sharding = abstract[ready.path].sharding
                part = partial(_part, shards)
                flat[ready.path] = jax.make_array_from_callback(ready.shape, sharding, part)
                done += int(np.prod(ready.shape))
                report("reading weights", done, total)
    return unflatten(flat)


def _part(shards: Mapping[str, np.ndarray], index: tuple[slice, ...]) -> np.ndarray:
    return shards[str(index)]
