"""`expert_ffn` equals the reference for any routing, values and gradients; so does the kernel, interpreted on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tests.ops.interpreted import interpreted
from vl2_jax.ops.chips import CHIPS
from vl2_jax.ops.expert_ffn import backward, pallas_tpu
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.expert_ffn.tiling import Scratch, Tiling, choose_tiling


def problem(seed, tokens, experts, k, width=12, hidden=8):
    keys = jax.random.split(jax.random.key(seed), 6)
    shapes = [(tokens, width), (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    x, gate, up, down = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    scores = jax.random.normal(keys[4], (tokens, experts)) * 3 + jax.random.normal(keys[5], (experts,)) * 3
    weights, ids = jax.lax.top_k(jax.nn.softmax(scores), k)
    return (x, gate, up, down, ids, weights)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 7, 33, 70]), st.sampled_from([1, 4, 9]), st.data())
def test_any_routing_equals_the_reference(seed, tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    arguments = problem(seed, tokens, experts, k)
    ours = expert_ffn(*arguments)
    np.testing.assert_allclose(ours, expert_ffn(*arguments, implementation="reference"), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("ids", [[[0]] * 33, [[3]] * 5, [[0, 1], [1, 0], [2, 3]]])
def test_one_expert_may_take_everything(ids):
    x, gate, up, down, _, _ = problem(0, len(ids), 4, 1)
    ids = jnp.asarray(ids)
    weights = jnp.ones(ids.shape)
    ours = expert_ffn(x, gate, up, down, ids, weights)
    reference = expert_ffn(x, gate, up, down, ids, weights, implementation="reference")
    np.testing.assert_allclose(ours, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (37, 6, 3), (64, 3, 1)])
def test_gradients_equal_those_of_the_reference(tokens, experts, k):
    x, gate, up, down, ids, weights = problem(1, tokens, experts, k)

    def loss(implementation, x, gate, up, down, weights):
        return jnp.sum(jnp.sin(expert_ffn(x, gate, up, down, ids, weights, implementation=implementation)))

    arguments = (x, gate, up, down, weights)
    ours = jax.grad(loss, argnums=(1, 2, 3, 4, 5))(None, *arguments)
    reference = jax.grad(loss, argnums=(1, 2, 3, 4, 5))("reference", *arguments)
    for a, b in zip(ours, reference):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


# Low tiles and short chunks, so that few rows meet every path: full and partial tiles of both heights, several calls.
# What the interpreter compiles grows with the heights.
SMALL_TILING = Tiling(heights=(32, 16), chunk=48, move=48, vmem=100 << 20, floor=16, fixed=8)


def rounded(problem):
    x, gate, up, down, ids, weights = problem
    narrow = (a.astype(jnp.bfloat16) for a in (x, gate * 0.1, up * 0.1, down * 0.1))
    return (*narrow, ids, weights)


def wide_reference(x, gate, up, down, ids, weights):
    return expert_ffn(*(a.astype(jnp.float32) for a in (x, gate, up, down)), ids, weights, implementation="reference")


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1, 13, 70]),
    st.sampled_from([(256, 128), (512, 256), (768, 128)]),
    st.sampled_from(["any", "one expert takes all", "few experts"]),
    st.data(),
)
def test_the_kernel_equals_the_reference_for_any_routing(seed, tokens, widths, routing, data):
    k = data.draw(st.integers(1, 8))
    experts = data.draw(st.sampled_from([k, 16]))
    x, gate, up, down, ids, weights = rounded(problem(seed, tokens, experts, k, *widths))
    if routing == "one expert takes all":
        ids = (ids[:, :1] * 0 + jnp.arange(k)) % experts
    elif routing == "few experts":
        ids = jnp.broadcast_to(ids[:1], ids.shape)
    ours = interpreted(pallas_tpu.expert_ffn, x, gate, up, down, ids, weights, tiling=SMALL_TILING)
    expected = np.asarray(wide_reference(x, gate, up, down, ids, weights))
    assert np.abs(np.asarray(ours, np.float32) - expected).max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "tokens"), [("TPU v5 lite", 150), pytest.param("TPU v6 lite", 250, marks=pytest.mark.slow)]
)
def test_tall_tiles_equal_the_reference(name, tokens):
    """The table's own tiling of many rows an expert: tall tiles first, low ones for what is left."""
    arguments = rounded(problem(7, tokens, 2, 1, 256, 128))
    tiling = choose_tiling(CHIPS[name], tokens, 256, 128, 2, 1)
    assert tiling.heights[0] >= 96
    ours = np.asarray(interpreted(pallas_tpu.expert_ffn, *arguments, tiling=tiling), np.float32)
    expected = np.asarray(wide_reference(*arguments))
    assert np.abs(ours - expected).max() <= 1e-2 * np.abs(expected).max()


def test_the_kernel_has_no_races(capfd):
    arguments = rounded(problem(3, 40, 4, 2, 256, 128))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(pallas_tpu.expert_ffn(*arguments, tiling=SMALL_TILING))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("grouped", ["xla", "pallas_tpu"])
def test_gradients_by_grouped_products_equal_those_of_the_reference(grouped):
    x, gate, up, down, ids, weights = rounded(problem(5, 50, 6, 3, 256, 128))
    dout = jax.random.normal(jax.random.key(9), x.shape)
    ours = interpreted(backward.backward, x, gate, up, down, ids, weights, dout, implementation=grouped)
    _, vjp = jax.vjp(lambda *a: wide_reference(*a[:4], ids, a[4]), x, gate, up, down, weights)
    for a, b in zip(ours, vjp(dout), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max()


def part_of(ids, first, count):
    """Ids as a device sees them that holds the experts from `first` on."""
    here = (ids >= first) & (ids < first + count)
    return jnp.where(here, ids - first, count)


@pytest.mark.parametrize("tokens", [3, 50])
def test_experts_that_are_not_here_give_nothing(tokens):
    """Three devices' shares of the experts add up to the whole, values and gradients."""
    x, gate, up, down, ids, weights = problem(6, tokens, 6, 3)

    def whole(x, gate, up, down, weights):
        return expert_ffn(x, gate, up, down, ids, weights, implementation="reference")

    def parts(x, gate, up, down, weights):
        return sum(
            expert_ffn(x, *(a[i : i + 2] for a in (gate, up, down)), part_of(ids, i, 2), weights, spread_over=6)
            for i in (0, 2, 4)
        )

    arguments = (x, gate, up, down, weights)
    np.testing.assert_allclose(parts(*arguments), whole(*arguments), atol=2e-4, rtol=1e-4)
    ours, theirs = (
        jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1, 2, 3, 4))(*arguments) for f in (parts, whole)
    )
    for a, b in zip(ours, theirs):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("first", [0, 2, 6])
def test_the_kernels_leave_out_experts_that_are_not_here(first):
    x, gate, up, down, ids, weights = rounded(problem(5, 50, 6, 3, 256, 128))
    ids = part_of(ids, first, 2)
    gate, up, down = (a[:2] for a in (gate, up, down))
    dout = jax.random.normal(jax.random.key(9), x.shape)
    arguments = (x, gate, up, down, ids, weights)
    out = interpreted(pallas_tpu.expert_ffn, *arguments, spread_over=6, tiling=SMALL_TILING)
    ours = interpreted(backward.backward, *arguments, dout)
    expected, vjp = jax.vjp(lambda *a: wide_reference(*a[:4], ids, a[4]), x, gate, up, down, weights)
    for a, b in zip((out, *ours), (expected, *vjp(dout)), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max()


def test_the_kernel_ends_well_without_any_row_to_multiply():
    x, gate, up, down, ids, weights = rounded(problem(5, 50, 6, 3, 256, 128))
    nobody, (gate, up, down) = jnp.full_like(ids, 2), (a[:2] for a in (gate, up, down))
    arguments = (x, gate, up, down, nobody, weights)
    ours = interpreted(pallas_tpu.expert_ffn, *arguments, spread_over=6, tiling=SMALL_TILING)
    assert not np.asarray(ours, np.float32).any()


@pytest.mark.parametrize("tokens", [1, 8, 64, 256, 512, 4096, 16384])
@pytest.mark.parametrize("size", [(1280, 896, 64), (2048, 1408, 64), (2560, 1536, 72)])
@pytest.mark.parametrize("name", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_every_chip_and_size_has_a_tiling_that_fits(name, size, tokens):
    width, expert_width, experts = size
    tiling = choose_tiling(CHIPS[name], tokens, width, expert_width, experts, 6)
    assert tiling is not None
    assert Scratch(tiling, width, expert_width).bytes < CHIPS[name].vmem
    assert tiling.plan[-1][0] > 0
    assert all(height % 16 == 0 for height in tiling.heights)
