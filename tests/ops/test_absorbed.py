"""The kernels of the absorbed products, interpreted on a CPU, equal the products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.interpreted import interpreted
from vl2_jax.ops.latent_attention import absorbed, projections

B, T, R = 3, 2, 256


def problem(heads, width, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(heads))
    rows = jax.random.normal(keys[0], (B, T, heads, width)).astype(dtype)
    return rows, jax.random.normal(keys[1], (R, heads * 256)).astype(dtype)


@pytest.mark.parametrize("heads", [8, 3])
def test_queries_to_latents(heads):
    rows, kv_b = problem(heads, 128)
    ours = interpreted(projections.to_latents, rows, kv_b)
    plain = absorbed.to_latents(rows.astype(jnp.float32), kv_b.astype(jnp.float32))
    np.testing.assert_allclose(np.float32(ours), plain, atol=0.01 * np.abs(plain).max())


@pytest.mark.parametrize("heads", [8, 3])
def test_mixed_latents_to_values(heads):
    rows, kv_b = problem(heads, R)
    ours = interpreted(projections.to_values, rows, kv_b)
    plain = absorbed.to_values(rows.astype(jnp.float32), kv_b.astype(jnp.float32), 128)
    np.testing.assert_allclose(np.float32(ours), plain, atol=0.01 * np.abs(plain).max())


def test_an_adapter_is_added_to_both():
    rows, kv_b = problem(2, 128, jnp.float32)
    narrow, wide = jnp.ones((R, 4)) / 7, jax.random.normal(jax.random.key(1), (4, 512))
    merged = kv_b + narrow @ wide
    np.testing.assert_allclose(
        absorbed.to_latents(rows, kv_b, narrow, wide), absorbed.to_latents(rows, merged), atol=1e-3
    )
    mixed = jax.random.normal(jax.random.key(2), (B, T, 2, R))
    np.testing.assert_allclose(
        absorbed.to_values(mixed, kv_b, 128, narrow, wide), absorbed.to_values(mixed, merged, 128), atol=1e-3
    )


@pytest.mark.parametrize(
    ("shape", "width", "dtype", "supported"),
    [
        ((8, 1, 16, 128), 256, jnp.bfloat16, True),
        ((8, 1, 16, 128), 256, jnp.float32, False),
        ((8, 1, 16, 64), 128, jnp.bfloat16, False),
        ((64, 64, 16, 128), 256, jnp.bfloat16, False),
    ],
)
def test_what_the_kernels_take(shape, width, dtype, supported):
    rows, kv_b = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((512, 16 * width), dtype)
    assert projections.supports(rows, kv_b, shape[-1]) is supported
