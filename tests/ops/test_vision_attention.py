"""The kernel of the vision tower's attention, interpreted on a CPU, equals plain XLA: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.interpreted import interpreted
from vl2_jax.ops.vision_attention import pallas_tpu
from vl2_jax.ops.vision_attention.api import vision_attention


def rows_of(tiles, length, heads, head, spread=1.0):
    rows = jax.random.normal(jax.random.key(length), (tiles, length, 3 * heads * head)) * spread
    return rows.astype(jnp.bfloat16)


@pytest.mark.parametrize(("tiles", "length", "heads", "head"), [(2, 41, 16, 8), (1, 9, 2, 64)])
def test_the_kernel_equals_plain_xla(tiles, length, heads, head):
    """Two halves of the rows of which one is not full, and so few rows that there is one half."""
    qkv = rows_of(tiles, length, heads, head, spread=3.0)
    ours = interpreted(vision_attention, qkv, heads=heads, implementation="pallas_tpu")
    wide = vision_attention(qkv.astype(jnp.float32), heads)
    np.testing.assert_allclose(np.float32(ours), wide, atol=0.01 * np.abs(wide).max())


def test_gradients_are_those_of_plain_xla():
    qkv = rows_of(3, 10, 2, 64)

    def loss(qkv, implementation):
        return jnp.sum(jnp.sin(vision_attention(qkv, 2, implementation=implementation).astype(jnp.float32)))

    ours = interpreted(gradient_of(loss), qkv, implementation="pallas_tpu")
    plain = gradient_of(loss)(qkv.astype(jnp.float32), implementation="xla")
    np.testing.assert_allclose(np.float32(ours), plain, atol=0.02 * np.abs(plain).max())


def gradient_of(loss):
    def gradient(qkv, implementation):
        return jax.grad(loss)(qkv, implementation)

    return gradient


@pytest.mark.parametrize(
    ("change", "supported"),
    [({}, True), ({"dtype": jnp.float32}, False), ({"heads": 4}, False), ({"length": 4096}, False)],
)
def test_what_does_not_fit_is_left_to_xla(change, supported):
    shape = (2, change.get("length", 729), 3 * 1152)
    qkv = jax.ShapeDtypeStruct(shape, change.get("dtype", jnp.bfloat16))
    assert pallas_tpu.supports(qkv, change.get("heads", 16)) is supported
