"""`expert_ffn` equals the reference for any routing, values and gradients; so does the kernel, interpreted on a CPU."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from convert.quantise import quantised
from tests.ops.interpreted import interpreted
from vl2_jax.ops.chips import CHIPS
from vl2_jax.ops.expert_ffn import adapted, backward, backward_weights, pallas_tpu
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.expert_ffn.stored import FLOATS, INT4, INT8
from vl2_jax.ops.expert_ffn.tiling import Scratch, Tiling, choose_tiling
from vl2_jax.ops.grouped_matmul.api import grouped_matmul
from vl2_jax.ops.narrow.product import widened


def problem(seed, tokens, experts, k, width=12, hidden=8):
    """Drawn and routed by NumPy: JAX would compile for every shape."""
    random = np.random.default_rng(seed)
    shapes = [(tokens, width), (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    rows_and_experts = (random.standard_normal(shape, np.float32) for shape in shapes)
    scores = np.exp(3 * random.standard_normal((tokens, experts), np.float32) + 3 * random.standard_normal(experts))
    ids = np.argsort(-scores, axis=-1)[:, :k].astype(np.int32)
    weights = np.take_along_axis(scores / scores.sum(axis=-1, keepdims=True), ids, axis=-1).astype(np.float32)
    return tuple(jnp.asarray(array) for array in (*rows_and_experts, ids, weights))


compiled = jax.jit(expert_ffn, static_argnames=("implementation", "spread_over"))


def reference(*arguments):
    return compiled(*arguments, implementation="reference")


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 7, 33, 70]), st.sampled_from([1, 4, 9]), st.data())
def test_any_routing_equals_the_reference(seed, tokens, experts, data):
    k = data.draw(st.integers(1, experts))
    arguments = problem(seed, tokens, experts, k)
    np.testing.assert_allclose(compiled(*arguments), reference(*arguments), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("ids", [[[0]] * 33, [[3]] * 5, [[0, 1], [1, 0], [2, 3]]])
def test_one_expert_may_take_everything(ids):
    x, gate, up, down, _, _ = problem(0, len(ids), 4, 1)
    ids = jnp.asarray(ids)
    weights = jnp.ones(ids.shape)
    arguments = (x, gate, up, down, ids, weights)
    np.testing.assert_allclose(expert_ffn(*arguments), reference(*arguments), atol=1e-4, rtol=1e-4)


def test_rows_of_experts_elsewhere_leave_nothing_beside_adapters(monkeypatch):
    """A TPU's grouped products leave such rows, and their gradients, as memory that nobody wrote: here, no numbers."""
    x, gate, up, down, ids, weights = problem(2, 20, 4, 2)
    ids = ids.at[::3].set(4)
    factors = tuple((kernel[..., :2], kernel[:, :2]) for kernel in (gate, up, down))

    @jax.custom_vjp
    def with_unwritten_gradient(rows, is_past):
        return rows

    with_unwritten_gradient.defvjp(
        lambda rows, is_past: (rows, is_past), lambda is_past, dout: (jnp.where(is_past, jnp.nan, dout), None)
    )

    def product(lhs, rhs, sizes):
        is_past = (jnp.arange(len(lhs)) >= sizes.sum())[:, None]
        return jnp.where(is_past, jnp.nan, grouped_matmul(with_unwritten_gradient(lhs, is_past), rhs, sizes))

    def loss(x, weights, factors):
        return expert_ffn(x, gate, up, down, ids, weights, adapters=factors).sum()

    gradients = partial(jax.value_and_grad(loss, argnums=(0, 1, 2)), x, weights, factors)
    expected = gradients()
    monkeypatch.setattr(adapted, "grouped_matmul", product)
    for ours, wanted in zip(jax.tree.leaves(gradients()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(1, 4, 2), (37, 6, 3), (64, 3, 1)])
def test_gradients_equal_those_of_the_reference(tokens, experts, k):
    x, gate, up, down, ids, weights = problem(1, tokens, experts, k)

    def loss(implementation, x, gate, up, down, weights):
        return jnp.sum(jnp.sin(expert_ffn(x, gate, up, down, ids, weights, implementation=implementation)))

    gradients = jax.jit(jax.grad(loss, argnums=(1, 2, 3, 4, 5)), static_argnums=0)
    ours, expected = (gradients(implementation, x, gate, up, down, weights) for implementation in (None, "reference"))
    for a, b in zip(ours, expected):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


# Low tiles and short chunks, so that few rows meet every path: full and partial tiles of both heights, several calls.
# What the interpreter compiles grows with the heights.
SMALL_TILING = Tiling(heights=(32, 16), chunk=48, move=48, vmem=100 << 20, floor=16, fixed=8)


def rounded(problem):
    x, gate, up, down, ids, weights = problem
    narrow = (a.astype(jnp.bfloat16) for a in (x, gate * 0.1, up * 0.1, down * 0.1))
    return (*narrow, ids, weights)


def wide_reference(x, gate, up, down, ids, weights):
    return reference(x.astype(jnp.float32), *(widened(a, jnp.float32) for a in (gate, up, down)), ids, weights)


def kept_as(kind, arguments):
    """The same problem with the experts' matrices in so few bits."""
    x, *matrices, ids, weights = arguments
    return x, *(matrix if kind == "bfloat16" else quantised(matrix, kind) for matrix in matrices), ids, weights


def close_to_the_reference(ours, arguments):
    expected = np.asarray(wide_reference(*arguments))
    assert np.abs(np.asarray(ours, np.float32) - expected).max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.slow
@settings(max_examples=9, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([1, 13, 70]),
    st.sampled_from([(256, 128), (512, 256), (768, 128)]),
    st.sampled_from(["any", "one expert takes all", "few experts"]),
    st.sampled_from(["bfloat16", "int8", "int4", "int4 in scaled rows"]),
    st.data(),
)
def test_the_kernel_equals_the_reference_for_any_routing(seed, tokens, widths, routing, kind, data):
    k = data.draw(st.integers(1, 8))
    experts = data.draw(st.sampled_from([k, 16]))
    x, gate, up, down, ids, weights = rounded(problem(seed, tokens, experts, k, *widths))
    if routing == "one expert takes all":
        ids = (ids[:, :1] * 0 + jnp.arange(k)) % experts
    elif routing == "few experts":
        ids = jnp.broadcast_to(ids[:1], ids.shape)
    arguments = kept_as(kind.split()[0], (x, gate, up, down, ids, weights))
    tiling = replace(SMALL_TILING, scale_rows="rows" in kind)
    close_to_the_reference(interpreted(pallas_tpu.expert_ffn, *arguments, tiling=tiling), arguments)


@pytest.mark.parametrize(
    ("name", "tokens"), [("TPU v5 lite", 150), pytest.param("TPU v6 lite", 250, marks=pytest.mark.slow)]
)
def test_tall_tiles_equal_the_reference(name, tokens):
    """The table's own tiling of many rows an expert: tall tiles first, low ones for what is left."""
    arguments = rounded(problem(7, tokens, 2, 1, 256, 128))
    tiling = choose_tiling(CHIPS[name], tokens, 256, 128, 2, 1, Scratch)
    assert tiling.heights[0] >= 96
    close_to_the_reference(interpreted(pallas_tpu.expert_ffn, *arguments, tiling=tiling), arguments)


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_experts_cut_into_parts_equal_the_reference(kind):
    """Halves of three tiles of columns overlap; 13 tokens, so that there is one call."""
    arguments = kept_as(kind, rounded(problem(4, 13, 6, 3, 256, 384)))
    tiling = replace(SMALL_TILING, parts=2)
    close_to_the_reference(interpreted(pallas_tpu.expert_ffn, *arguments, tiling=tiling), arguments)


def test_the_kernel_has_no_races(capfd):
    arguments = rounded(problem(3, 40, 4, 2, 256, 128))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(pallas_tpu.expert_ffn(*arguments, tiling=SMALL_TILING))
    assert "RACE DETECTED" not in capfd.readouterr().out


ROUTINGS = {
    "any": lambda ids: ids,
    "three experts take all": lambda ids: ids * 0 + jnp.asarray([3, 0, 5]),
    "some are not here": lambda ids: jnp.where(ids % 2 == 0, ids, 6),
    "none is here": lambda ids: jnp.full_like(ids, 6),
}


def test_narrow_experts_equal_the_reference_of_what_they_stand_for_and_have_no_races(capfd):
    """Two groups of rows in a matrix, two calls of 48 and 16 tokens, tiles of both heights."""
    x, gate, up, down, ids, weights = kept_as("int4", rounded(problem(5, 50, 6, 3, 256, 128)))
    for routing in ("any", "some are not here"):
        arguments = (x, gate, up, down, ROUTINGS[routing](ids).astype(ids.dtype), weights)
        ours = interpreted(pallas_tpu.expert_ffn, *arguments, tiling=SMALL_TILING, detect_races=True)
        close_to_the_reference(ours, arguments)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_narrow_experts_of_many_groups_equal_the_reference(kind):
    """Three groups of rows in `down`; int4 as chips with a 256 x 256 MXU scale it."""
    arguments = kept_as(kind, rounded(problem(4, 13, 6, 3, 256, 384)))
    tiling = replace(SMALL_TILING, scale_rows=True)
    close_to_the_reference(interpreted(pallas_tpu.expert_ffn, *arguments, tiling=tiling), arguments)


def test_gradients_beside_narrow_experts_are_those_beside_what_they_stand_for():
    x, gate, up, down, ids, weights = kept_as("int4", problem(1, 37, 4, 3, 32, 16))

    @jax.jit
    def gradients(gate, up, down):
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(expert_ffn(x, gate, up, down, ids, w))), (0, 1))(x, weights)

    ours, expected = gradients(gate, up, down), gradients(*(widened(a, jnp.float32) for a in (gate, up, down)))
    for a, b in zip(ours, expected, strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


def gradient_tiling(width, hidden):
    """Two heights, and vector memory for blocks of 128 rows only: what an interpreted kernel repeats, it compiles."""
    vmem = backward_weights.Buffers(width, hidden, depths=1).bytes + (1 << 20)
    return replace(SMALL_TILING, heights=(32, 16), vmem=vmem)


@jax.jit
def wide_gradients(x, gate, up, down, ids, weights, dout):
    _, vjp = jax.vjp(lambda *a: wide_reference(*a[:4], ids, a[4]), x, gate, up, down, weights)
    return vjp(dout)


def gradients_agree(arguments, dout, tiling, **options):
    ours = interpreted(backward.backward, *arguments, dout, tiling=tiling, **options)
    for a, b in zip(ours, wide_gradients(*arguments, dout), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= 2e-2 * np.abs(b).max()


def test_gradients_of_the_kernels_equal_those_of_the_reference_and_have_no_races(capfd):
    """Two calls of 48 and 16 tokens share the rows of each expert. One test of all routings, as one program is."""
    x, gate, up, down, ids, weights = rounded(problem(5, 50, 6, 3, 256, 128))
    dout = jax.random.normal(jax.random.key(9), x.shape)
    for routing, changed in ROUTINGS.items():
        print(routing)
        changed_ids = changed(ids).astype(ids.dtype)
        gradients_agree((x, gate, up, down, changed_ids, weights), dout, gradient_tiling(256, 128), detect_races=True)
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_of_odd_widths_and_many_rows_equal_those_of_the_reference(parts):
    """An odd number of column tiles, so that halves of an expert overlap; experts of several tiles and blocks."""
    x, gate, up, down, ids, weights = rounded(problem(8, 100, 2, 2, 512, 384))
    dout = jax.random.normal(jax.random.key(9), x.shape)
    tiling = replace(gradient_tiling(512, 384), chunk=112, parts=parts)
    gradients_agree((x, gate, up, down, ids, weights), dout, tiling)


def test_gradients_of_weights_sum_over_all_blocks_of_an_expert():
    """Blocks of 128 rows: none, a part of one, exactly one, three; rows of the next expert do not matter."""
    counts, width, hidden = np.asarray([0, 5, 128, 300, 0, 3]), 256, 128
    starts = np.concatenate([[0], np.cumsum(-(-counts // 16) * 16)])
    rng = np.random.default_rng(0)
    exists = np.concatenate([np.arange(-(-count // 16) * 16) < count for count in counts])
    unwritten = np.full((backward_weights.TAIL, 1), np.nan)
    rows = [
        np.concatenate([rng.normal(size=(len(exists), n)) * exists[:, None], np.repeat(unwritten, n, axis=1)])
        for n in (width, width, 2 * hidden, hidden)
    ]
    rows = backward_weights.ExpertRows(*(jnp.asarray(a, jnp.bfloat16) for a in rows))
    vmem = backward_weights.Buffers(width, hidden, depths=1).bytes + (1 << 20)
    ours = interpreted(backward_weights.weights_gradients, rows, jnp.asarray(starts, jnp.int32), vmem=vmem)
    x, dout, dgated_dupped, weighted = (np.asarray(a, np.float32) for a in rows)
    for expert in range(len(counts)):
        of = slice(starts[expert], starts[expert + 1])
        dgate_dup = x[of].T @ dgated_dupped[of]
        expected = (dgate_dup[:, :hidden], dgate_dup[:, hidden:], weighted[of].T @ dout[of])
        for a, b in zip(ours, expected, strict=True):
            assert np.abs(np.asarray(a[expert], np.float32) - b).max() <= 1e-2 * max(1, np.abs(b).max())


def part_of(ids, first, count):
    """Ids as a device sees them that holds the experts from `first` on."""
    here = (ids >= first) & (ids < first + count)
    return jnp.where(here, ids - first, count)


@pytest.mark.parametrize("tokens", [3, 50])
def test_experts_that_are_not_here_give_nothing(tokens):
    """Three devices' shares of the experts add up to the whole, values and gradients."""
    x, gate, up, down, ids, weights = problem(6, tokens, 6, 3)

    def whole(x, gate, up, down, weights):
        return reference(x, gate, up, down, ids, weights)

    def parts(x, gate, up, down, weights):
        return sum(
            expert_ffn(x, *(a[i : i + 2] for a in (gate, up, down)), part_of(ids, i, 2), weights, spread_over=6)
            for i in (0, 2, 4)
        )

    @partial(jax.jit, static_argnums=0)
    def values_and_gradients(function, *arguments):
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(jnp.cos(out))

    (out, ours), (expected, theirs) = (values_and_gradients(f, x, gate, up, down, weights) for f in (parts, whole))
    np.testing.assert_allclose(out, expected, atol=2e-4, rtol=1e-4)
    for a, b in zip(ours, theirs):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max()


@pytest.mark.parametrize("first", [0, 2, 6])
def test_the_kernel_leaves_out_experts_that_are_not_here(first):
    x, gate, up, down, ids, weights = rounded(problem(5, 50, 6, 3, 256, 128))
    ids = part_of(ids, first, 2)
    arguments = (x, *(a[:2] for a in (gate, up, down)), ids, weights)
    close_to_the_reference(
        interpreted(pallas_tpu.expert_ffn, *arguments, spread_over=6, tiling=SMALL_TILING), arguments
    )


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
    """And of narrower weights at least as many tokens fit beside two experts."""
    width, expert_width, experts = size
    fewest = 0
    for stored in (FLOATS, INT8, INT4):
        scratch = partial(Scratch, stored=stored)
        tiling = choose_tiling(CHIPS[name], tokens, width, expert_width, experts, 6, scratch)
        assert tiling is not None
        assert scratch(tiling, width, expert_width).bytes < CHIPS[name].vmem
        assert tiling.plan[-1][0] > 0
        assert all(height % 16 == 0 for height in tiling.heights)
        assert tiling.chunk >= fewest
        fewest = tiling.chunk
