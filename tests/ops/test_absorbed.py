"""Products of heads with `kv_b`: kernels for TPUs, interpreted on a CPU, and matrices that are stored narrow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.quantise import abstract_quantised, quantised
from tests.ops.interpreted import interpreted
from vl2_jax.ops.latent_attention import absorbed, projections
from vl2_jax.ops.latent_attention.expanded import expand, expanded_attention
from vl2_jax.ops.narrow.kinds import Bits
from vl2_jax.ops.paging.pages import LatentPages

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


def narrow(kind, heads, rank=R):
    """`kv_b` of a kind with keys of 48 and values of 80, and the numbers that it stands for."""
    array = jax.random.normal(jax.random.key(3), (rank, heads * 128))
    kernel = Bits.of(array.astype(jnp.bfloat16)) if kind == "bits" else quantised(array, kind)
    return kernel, np.float64(kernel.widened(jnp.float32)).reshape(rank, heads, 128)


@pytest.mark.parametrize("kind", ["bits", "int8", "int4"])
@pytest.mark.parametrize("heads", [1, 3])
def test_heads_are_multiplied_with_a_narrow_matrix_as_it_is_stored(kind, heads):
    """Also where an odd number of rows, or none, is a group: see `tests/convert/test_quantise.py`."""
    for rank in (R, 24):
        kernel, exact = narrow(kind, heads, rank)
        q_nope = jax.random.normal(jax.random.key(4), (B, T, heads, 48))
        mixed = jax.random.normal(jax.random.key(5), (B, T, heads, rank))
        latents = jax.jit(absorbed.to_latents)(q_nope, kernel)
        np.testing.assert_allclose(latents, np.einsum("bthn,rhn->bthr", q_nope, exact[..., :48]), atol=2e-4)
        values = jax.jit(absorbed.to_values, static_argnums=2)(mixed, kernel, 48)
        np.testing.assert_allclose(values, np.einsum("bthr,rhv->bthv", mixed, exact[..., 48:]), atol=2e-4)
        rows = jax.random.normal(jax.random.key(6), (B, 5, rank))
        keys, values = expand(rows, jnp.ones((B, 5, 2)), kernel, heads, 48)
        whole = np.einsum("bsr,rhk->bhsk", rows, exact)
        np.testing.assert_allclose(keys, np.concatenate([whole[..., :48], np.ones((B, heads, 5, 2))], -1), atol=2e-4)
        np.testing.assert_allclose(values, whole[..., 48:], atol=2e-4)


def test_a_layer_leaves_no_wide_matrix_to_the_next():
    """XLA makes ahead, of all layers at once, what waits for nothing; a wide matrix here takes 8.4 MB."""
    heads, rank, length = 16, 512, 128
    pages = LatentPages(jnp.zeros((1, 1, 128, rank)), jnp.zeros((1, 1, 64, 128)))

    def layers(x, kernels):
        for kernel in kernels:
            q = (x, x[..., :64])
            new = (x.reshape(1, length, -1)[..., :rank], x[:, :, 0, :64])
            out, _ = expanded_attention(
                *q, *new, kernel, pages=pages, table=None, positions=jnp.zeros(1, jnp.int32), scale=0.1
            )
            x = jnp.tanh(out)
        return x

    x, kernel = jnp.ones((1, length, heads, 128)), abstract_quantised("kv_b_proj", (rank, heads * 256), "int4")
    few, many = (
        jax.jit(layers).lower(x, [kernel] * count).compile().memory_analysis().temp_size_in_bytes for count in (2, 6)
    )
    assert many - few < 4 * 8.4e6 / 2
