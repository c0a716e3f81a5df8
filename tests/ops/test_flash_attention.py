"""`flash_attention` equals the reference for packed rows of documents and branches; so do the kernels, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tests.ops.interpreted import interpreted
from vl2_jax.ops.flash_attention import backward, pallas_tpu
from vl2_jax.ops.flash_attention.api import flash_attention
from vl2_jax.ops.flash_attention.segments import BRANCH, EVERYTHING, NOTHING, SOMETHING, kinds_of_blocks, sees

SCALE = 0.09


def packed(lengths, length):
    """Segments of a row: of each document the lengths of what its branches share and of its branches; then padding."""
    numbered = ((n + BRANCH * branch, m) for n, parts in enumerate(lengths, 1) for branch, m in enumerate(parts))
    row = [segment for segment, positions in numbered for _ in range(positions)]
    return np.array((row + [0] * length)[:length], np.int32)


ROWS = np.stack(
    [
        packed([[60, 40, 75], [70]], 256),  # branches, a document that begins inside of a block, padding
        packed([[128], [10, 118]], 256),  # blocks of one document each
    ]
)


def problem(seed, segments, heads=2, width=192, value_width=128, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    widths = (width, width, value_width, value_width)
    rows = [jax.random.normal(key, (*segments.shape, heads, w)).astype(dtype) for key, w in zip(keys, widths)]
    return rows[:3], rows[3]


def wide(arrays):
    return [a.astype(jnp.float32) for a in arrays]


def reference_of(arguments, segments, dout):
    def attended(queries, keys, values):
        return flash_attention(queries, keys, values, segments, SCALE, implementation="reference")

    out, vjp = jax.vjp(attended, *wide(arguments))
    return (out, *vjp(dout.astype(jnp.float32)))


documents = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), max_size=5)


@settings(max_examples=100, deadline=None)
@given(documents)
def test_blocks_are_left_out_only_where_nothing_is_seen(lengths):
    segments = packed(lengths, 64)
    seen = np.tril(np.ones((64, 64), bool)) & np.asarray(sees(segments[:, None], segments[None]))
    blocks = seen.reshape(8, 8, 8, 8).swapaxes(1, 2)
    kinds = np.asarray(kinds_of_blocks(jnp.asarray(segments[None]), 8))[0]
    assert not blocks[kinds == NOTHING].any()
    assert blocks[kinds == EVERYTHING].all()


def test_blocks_of_other_documents_are_left_out():
    segments = jnp.asarray(packed([[32], [32]], 64)[None])
    kinds = np.asarray(kinds_of_blocks(segments, 16))[0]
    assert kinds.tolist() == [
        [SOMETHING, NOTHING, NOTHING, NOTHING],
        [EVERYTHING, SOMETHING, NOTHING, NOTHING],
        [NOTHING, NOTHING, SOMETHING, NOTHING],
        [NOTHING, NOTHING, EVERYTHING, SOMETHING],
    ]


@pytest.mark.parametrize("length", [32, 256])
def test_blocks_of_queries_equal_the_reference(length):
    segments = jnp.asarray(ROWS[:, :length])
    arguments, dout = problem(0, segments, width=24, value_width=16)
    out, vjp = jax.vjp(lambda q, k, v: flash_attention(q, k, v, segments, SCALE), *arguments)
    for ours, expected in zip((out, *vjp(dout)), reference_of(arguments, segments, dout), strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5)


@pytest.mark.parametrize("width", [128, 192])
def test_the_kernels_equal_the_reference(width):
    segments = jnp.asarray(ROWS)
    arguments, dout = problem(1, segments, width=width, dtype=jnp.bfloat16)
    expected = reference_of(arguments, segments, dout)
    out, sums = interpreted(pallas_tpu.forward, *arguments, segments, scale=SCALE, size=128)
    gradients = interpreted(backward.backward, *arguments, segments, out, sums, dout, scale=SCALE, size=128)
    for ours, theirs in zip((out, *gradients), expected, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
        assert np.abs(ours - theirs).max() <= 1e-2 * np.abs(theirs).max()


def test_the_kernels_have_no_races(capfd):
    segments = jnp.asarray(ROWS[:1])
    arguments, dout = problem(2, segments, heads=1, dtype=jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        out, sums = jax.block_until_ready(pallas_tpu.forward(*arguments, segments, SCALE, 128))
        jax.block_until_ready(backward.backward(*arguments, segments, out, sums, dout, SCALE, 128))
    assert "RACE DETECTED" not in capfd.readouterr().out


def test_what_the_kernels_take_is_computed_block_by_block_elsewhere():
    segments = jnp.asarray(ROWS)
    arguments, dout = problem(3, segments, heads=1, width=128, dtype=jnp.bfloat16)

    def both(implementation):
        def attended(queries, keys, values):
            return flash_attention(queries, keys, values, segments, SCALE, implementation=implementation)

        return jax.jit(lambda *a: (attended(*a), *jax.vjp(attended, *a)[1](dout)))(*arguments)

    for ours, plain in zip(both(None), both("xla"), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(plain, np.float32))
