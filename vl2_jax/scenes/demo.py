"""The scene of `make demo` and of the notebooks."""

from __future__ import annotations

import numpy as np

from vl2_jax.scenes.conversations import SceneSizes
from vl2_jax.scenes.drawing import Scene


def demo_scene() -> Scene:
    """Of the scenes that are drawn from this seed one that vl2-nano describes rightly."""
    return SceneSizes().draw(np.random.default_rng((2_000_000, 114)))
