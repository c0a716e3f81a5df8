"""Grouped products equal the reference for groups of any size, in XLA and in the interpreted kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.interpreted import interpreted
from vl2_jax.ops.grouped_matmul.api import grouped_matmul, grouped_transposed_matmul

SIZES = st.lists(st.sampled_from([0, 0, 1, 5, 16, 63, 64, 130]), min_size=1, max_size=6).filter(sum)


def arrays(sizes, width=128, depth=256, dtype=jnp.bfloat16):
    random, rows = np.random.default_rng(sum(sizes)), sum(sizes)
    shapes = [(rows, depth), (len(sizes), depth, width), (rows, width)]
    lhs, rhs, other = (jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes)
    return lhs, rhs, other, jnp.asarray(sizes)


def close(ours, expected, tolerance=1e-2):
    ours, expected = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
    assert np.abs(ours - expected).max(initial=0) <= tolerance * np.abs(expected).max(initial=1e-9)


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@settings(max_examples=10, deadline=None)
@given(SIZES, st.booleans())
def test_products_equal_the_reference(implementation, sizes, transposed):
    arguments = arrays(sizes)
    ours = interpreted(both_products, *arguments, transposed=transposed, implementation=implementation)
    for a, b in zip(ours, interpreted(both_products, *arguments, transposed=False, implementation="reference")):
        close(a, b)


def both_products(lhs, rhs, other, groups, transposed, implementation):
    rhs = rhs.swapaxes(1, 2) if transposed else rhs
    return (
        grouped_matmul(lhs, rhs, groups, transpose_rhs=transposed, implementation=implementation),
        grouped_transposed_matmul(lhs, other, groups, implementation=implementation),
    )


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_equal_those_of_the_reference(transposed):
    lhs, rhs, other, groups = arrays([5, 0, 40, 3], dtype=jnp.float32)
    rhs = rhs.swapaxes(1, 2) if transposed else rhs

    def plain(lhs, rhs):
        group = jnp.searchsorted(jnp.cumsum(groups), jnp.arange(lhs.shape[0]), side="right")
        each = rhs.swapaxes(1, 2)[group] if transposed else rhs[group]
        return jnp.einsum("nk,nkm->nm", lhs, each)

    ours = jax.vjp(lambda *a: grouped_matmul(*a, groups, transpose_rhs=transposed), lhs, rhs)[1](other)
    for a, b in zip(ours, jax.vjp(plain, lhs, rhs)[1](other), strict=True):
        close(a, b, 1e-5)


def test_rows_agree_with_ragged_dot():
    lhs, rhs, _, groups = arrays([7, 0, 33], dtype=jnp.float32)
    close(grouped_matmul(lhs, rhs, groups), jax.lax.ragged_dot(lhs, rhs, groups), 1e-5)
