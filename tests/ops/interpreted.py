"""TPU kernels on a CPU."""

from collections.abc import Callable
from functools import cache, partial

import jax
from jax.experimental.pallas import tpu as pltpu


def interpreted(function, *arguments, detect_races=False, **options):
    """`function`, whose kernels Python interprets: as one program, and waited for.

    An interpreted kernel calls back into Python, which computes with jax. Anything else that is computed at that moment
    may wait for it, and it for that. A race is printed as "RACE DETECTED".
    """
    parameters = pltpu.InterpretParams(detect_races=detect_races)
    with pltpu.force_tpu_interpret_mode(parameters):  # uninitialised memory reads as NaN, reads out of bounds raise
        return jax.block_until_ready(_program(function, detect_races, tuple(options.items()))(*arguments))


@cache
def _program(function: Callable, detect_races: bool, options: tuple[tuple[str, object], ...]) -> Callable:
    """Jitted once for all tests, as most of their time is compilation."""
    return jax.jit(partial(function, **dict(options)))
