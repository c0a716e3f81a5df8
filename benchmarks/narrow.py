"""Products with narrow weights on a CPU against float32, in one run: 150 MB of matrices in turn, as in decoding.

    python benchmarks/narrow.py [--rows 1 48] [--rounds 10]

The kinds take turns round by round, so that a busy machine slows all of them; what is printed is the best round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.quantise import quantised
from vl2_jax.ops.narrow.kinds import Bits
from vl2_jax.ops.narrow.product import product

SHAPES = ((1280, 896), (1280, 3840), (1280, 32320))  # an expert, projections, a quarter of the vocabulary of vl2-tiny
_BYTES = 150e6
_KINDS = {
    "float32": lambda array: array,
    "bfloat16": lambda array: Bits.of(array.astype(jnp.bfloat16)),
    "int8": partial(quantised, kind="int8"),
    "int4": partial(quantised, kind="int4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 48])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    for rows in options.rows:
        for shape in SHAPES:
            best = seconds_of(rows, shape, options.rounds)
            told = "  ".join(f"{kind} {1e3 * t:7.2f} ms ({best['float32'] / t:.2f} x)" for kind, t in best.items())
            print(f"{rows:3} rows  {shape[0]} x {shape[1]:5}  {told}", flush=True)


def seconds_of(rows: int, shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Kind -> seconds of one product."""
    count = max(1, int(_BYTES // (4 * shape[0] * shape[1])))
    array = jnp.asarray(np.random.default_rng(0).standard_normal((1, *shape), np.float32))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, shape[0]), np.float32))
    kernels = {
        kind: jax.tree.map(lambda part: jnp.repeat(part, count, axis=0), kept(array)) for kind, kept in _KINDS.items()
    }
    best = dict.fromkeys(kernels, float("inf"))
    for round_ in range(rounds + 1):
        for kind, kernel in kernels.items():
            begun = time.perf_counter()
            _in_turn(x, kernel).block_until_ready()
            if round_:  # the first one compiles
                best[kind] = min(best[kind], (time.perf_counter() - begun) / count)
    return best


@jax.jit
def _in_turn(x: jax.Array, kernels: Any) -> jax.Array:
    """A product with each matrix; each waits for the one before."""

    def step(number: jax.Array, x: jax.Array) -> jax.Array:
        return x + 1e-6 * product(x, kernels, number)[:, :1]

    return jax.lax.fori_loop(0, kernels.shape[0], step, x)


if __name__ == "__main__":
    main()
