"""Which implementation runs: decided when a program is lowered, by the platform that it is lowered for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax

Implementation = Literal["xla", "pallas_tpu", "reference"]


def choose(implementation: Implementation | None, kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable:
    """The one that is asked for; of `None`, the kernel on TPUs and the plain one elsewhere."""
    if implementation is None:
        return partial(jax.lax.platform_dependent, tpu=kernel, default=plain)
    return kernel if implementation == "pallas_tpu" else plain
