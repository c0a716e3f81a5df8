"""Products with weights that are kept in fewer bytes, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.quantise import abstract_quantised, quantised
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.grouped_matmul.api import grouped_matmul
from vl2_jax.ops.narrow.kinds import Bits
from vl2_jax.ops.narrow.product import product, rows_of, widened

# One segment and many, trips of 8 rows and of one, depths that no block divides, and rows wider than a block.
SHAPES = [(96, 40), (1280, 64), (77, 33), (13, 5), (48, 20000)]


def narrow_matrices(shape, seed=0):
    """bfloat16 matrices as bits, and as they are in float64."""
    array = jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), jnp.bfloat16)
    return Bits.of(array), np.asarray(array).astype(np.float64)


def close(ours, exact, terms):
    """Within what float32 sums of so many products of normal numbers round."""
    np.testing.assert_allclose(ours, exact, atol=4 * terms**0.5 * np.finfo(np.float32).eps * 4, rtol=2e-6)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_multiply_as_the_numbers_they_are(shape, rows):
    kernel, exact = narrow_matrices((3, *shape))
    x = np.random.default_rng(1).standard_normal((rows, shape[0]), np.float32)
    for expert in (0, 2):
        close(jax.jit(product)(x, kernel, expert), x @ exact[expert], shape[0])
    close(jax.jit(product)(x, Bits(kernel.bits[1])), x @ exact[1], shape[0])


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", [(1280, 64), (192, 40), (64, 20000), (24, 7), (12, 5)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_matrices_multiply_as_the_numbers_they_stand_for(kind, shape, rows):
    """Many groups in a segment, a group a segment, one group, and none: see `tests/convert/test_quantise.py`."""
    random = np.random.default_rng(3)
    kernel = quantised(random.standard_normal((3, *shape), np.float32), kind)
    exact = np.asarray(kernel.widened(jnp.float32)).astype(np.float64)
    x = random.standard_normal((rows, shape[0]), np.float32)
    close(jax.jit(product)(x, kernel, 2), x @ exact[2], shape[0])
    one = jax.tree.map(lambda part: part[1], kernel)
    close(jax.jit(product)(x, one), x @ exact[1], shape[0])


def test_bits_are_the_numbers_again():
    kernel, exact = narrow_matrices((30, 7))
    assert (kernel.shape, kernel.ndim, kernel.bits.nbytes) == ((30, 7), 2, 2 * 30 * 7)
    np.testing.assert_array_equal(widened(kernel, jnp.float32), exact)
    np.testing.assert_array_equal(rows_of(kernel, jnp.asarray([[3, 0]])), exact[[[3, 0]]])


@pytest.mark.parametrize(("rows", "most"), [(1, 1 / 8), (8, 1 / 3)])
@pytest.mark.parametrize("kind", ["bits", "int8", "int4"])
def test_no_wide_copy_of_a_matrix_is_made(kind, rows, most):
    """Inside of a loop that all steps of an answer share, where XLA:CPU would widen narrow floats ahead of it."""
    kernel = Bits(jax.ShapeDtypeStruct((2048, 4096), jnp.uint16))
    if kind != "bits":
        kernel = abstract_quantised("mlp", (2048, 4096), kind)

    @jax.jit
    def steps(x, kernel):
        return jax.lax.fori_loop(0, 3, lambda _, x: product(x, kernel)[:, :2048], x)

    program = steps.lower(jax.ShapeDtypeStruct((rows, 2048), jnp.float32), kernel).compile()
    assert program.memory_analysis().temp_size_in_bytes < most * 4 * 2048 * 4096


@pytest.mark.parametrize("kind", ["bits", "int8", "int4"])
@pytest.mark.parametrize("shape", [(192, 40), (64, 20000)])
def test_gradients_of_rows_are_products_with_transposes(kind, shape):
    """One block of columns, and several."""
    kernel, exact = narrow_matrices((3, *shape))
    if kind != "bits":
        kernel = quantised(jnp.asarray(exact, jnp.float32), kind)
        exact = np.asarray(kernel.widened(jnp.float32)).astype(np.float64)
    random = np.random.default_rng(4)
    x, dout = (random.standard_normal((5, width), np.float32) for width in shape)
    (found,) = jax.jit(lambda x, kernel: jax.vjp(lambda x: product(x, kernel, 2), x)[1](dout))(x, kernel)
    close(found, dout @ exact[2].T, shape[1])


def test_gradients_of_experts_of_int4_are_those_of_the_numbers_they_stand_for():
    experts, width, hidden, k = 6, 64, 48, 2
    random = np.random.default_rng(6)
    shapes = (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
    kernels = [quantised(random.standard_normal(shape, np.float32), "int4") for shape in shapes]
    x, dout = (jnp.asarray(random.standard_normal((50, width), np.float32) / width) for _ in range(2))
    ids = jnp.asarray([random.permutation(experts + 1)[:k] for _ in range(50)])
    weights = jnp.asarray(random.random((50, k), np.float32))
    pairs = [
        tuple(jnp.asarray(0.1 * random.standard_normal(s, np.float32)) for s in ((experts, d, 2), (experts, 2, f)))
        for _, d, f in shapes
    ]

    def gradients(kernels, implementation=None):
        def beside(x, weights, pairs):
            return expert_ffn(x, *kernels, ids, weights, adapters=tuple(pairs))

        def alone(x, weights):
            return expert_ffn(x, *kernels, ids, weights, implementation=implementation)

        return jax.vjp(beside, x, weights, pairs)[1](dout), jax.vjp(alone, x, weights)[1](dout)

    ours = jax.jit(gradients)(kernels)
    exact = jax.jit(lambda kernels: gradients(kernels, "reference"))([k.widened(jnp.float32) for k in kernels])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_gradients_through_layers_need_the_wide_matrices_of_one():
    """A wide matrix here takes 9 MB, the rows of a layer 0.1 MB."""

    def loss(x, kernels):
        for kernel in kernels:
            x = jax.nn.tanh(product(x, kernel))
        return x.sum()

    kernel, x = abstract_quantised("mlp", (1536, 1536), "int4"), jax.ShapeDtypeStruct((16, 1536), jnp.float32)
    programs = (jax.jit(jax.grad(loss)).lower(x, [kernel] * count).compile() for count in (2, 8))
    few, many = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert many - few < 6 * 3 * 4 * 16 * 1536
    assert few < 1.5 * 4 * 1536 * 1536


@pytest.mark.parametrize("tokens", [1, 50])
def test_experts_of_bits_are_the_experts_they_stand_for(tokens):
    experts, width, hidden, k = 6, 48, 80, 2
    (gate, up, down), exact = zip(
        *(narrow_matrices((experts, *s), n) for n, s in enumerate(((width, hidden), (width, hidden), (hidden, width))))
    )
    random = np.random.default_rng(5)
    x = random.standard_normal((tokens, width), np.float32) / width
    ids = np.stack([random.permutation(experts + 1)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = random.random((tokens, k), np.float32)
    expected = np.zeros(x.shape)
    for token, (chosen, weight) in enumerate(zip(ids, weights)):
        for expert, share in zip(chosen, weight):
            if expert < experts:
                gated = x[token] @ exact[0][expert]
                expected[token] += share * (
                    (gated / (1 + np.exp(-gated)) * (x[token] @ exact[1][expert])) @ exact[2][expert]
                )
    np.testing.assert_allclose(jax.jit(expert_ffn)(x, gate, up, down, ids, weights), expected, atol=2e-5)


def test_grouped_products_take_bits():
    kernel, exact = narrow_matrices((4, 32, 24))
    x, sizes = np.random.default_rng(2).standard_normal((21, 32), np.float32), np.asarray([5, 0, 9, 7])
    expected = np.concatenate([rows @ m for rows, m in zip(np.split(x, np.cumsum(sizes)[:-1]), exact)])
    close(jax.jit(grouped_matmul)(x, kernel, jnp.asarray(sizes)), expected, 32)


def test_layers_one_after_another_need_the_room_of_one():
    def layers(x, kernels):
        for kernel in kernels:
            x += product(jax.nn.relu(product(x, kernel)), kernel)
        return x

    kernel, x = Bits(jax.ShapeDtypeStruct((1536, 1536), jnp.uint16)), jax.ShapeDtypeStruct((700, 1536), jnp.float32)
    programs = (jax.jit(layers).lower(x, [kernel] * count).compile() for count in (2, 8))
    few, many = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert many < 1.1 * few
