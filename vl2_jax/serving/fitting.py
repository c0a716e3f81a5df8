"""How many answers at once a device has memory for, told from shapes, before anything is loaded."""

from __future__ import annotations

import jax
import numpy as np

from convert.checkpoint import dtype_of
from convert.weight_map import plan
from vl2_jax.api import fastest_dtype
from vl2_jax.config import VL2Config
from vl2_jax.memory import usable_memory

_SHARE = 0.9  # of a device's memory that is planned with: programs, pictures and the system have the rest


def most_sequences(config: VL2Config, dtype: str | None, context: int) -> int | None:
    """Sequences of `context` tokens whose cache one device holds beside the weights; `None` if nothing tells.

    Weights that do not fit by themselves are not told here: then it is 0.
    """
    memory = _device_memory()
    if memory is None:
        return None
    leaves = plan(config)
    size = np.dtype(dtype_of(dtype or fastest_dtype(config, leaves))).itemsize
    weights = size * sum(int(np.prod(leaf.shape)) for leaf in leaves)
    language = config.language_config
    sequence = size * language.cache_width * language.num_hidden_layers * context
    return max(0, int(memory * _SHARE - weights) // sequence)


def _device_memory() -> int | None:
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return usable_memory()
    return (device.memory_stats() or {}).get("bytes_limit")
