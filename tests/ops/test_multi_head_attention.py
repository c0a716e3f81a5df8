"""`multi_head_attention` equals the reference for any lengths and pages, and writes the new rows and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tests.ops.interpreted import interpreted
from tests.ops.paged import assert_only_new_rows_differ, pages_for
from vl2_jax.ops.multi_head_attention import pallas_tpu
from vl2_jax.ops.multi_head_attention.api import multi_head_attention
from vl2_jax.ops.paging.pages import PAGE, HeadPages
from vl2_jax.ops.paging.pallas_tpu import Plan

SCALE = 0.2
compiled = jax.jit(multi_head_attention, static_argnames=("scale", "implementation"))
SMALL_PLAN = Plan(pages=2, blocks=4, vmem=100 << 20)


def problem(seed, positions, length, per, shuffled, sizes=(3, 32), dtype=jnp.float32):
    """Arguments of `multi_head_attention`."""
    random = np.random.default_rng(seed)
    shape = (len(positions), length, *sizes)
    new = [jnp.asarray(random.standard_normal(shape, np.float32), dtype) for _ in range(3)]
    return (*new, *pages_for(HeadPages, [sizes, sizes], random, positions, per, shuffled, dtype))


def check(ours, arguments, tolerance):
    """Values as the reference, written as told."""
    queries, *new, pages, table, positions = arguments
    out, after = ours
    expected, _ = compiled(*arguments, scale=SCALE, implementation="reference")
    difference = np.abs(np.asarray(out, np.float32) - np.asarray(expected, np.float32))
    assert difference.max() <= tolerance
    by_head = [jnp.swapaxes(rows, 1, 2) for rows in new]
    assert_only_new_rows_differ(pages, after, table, positions, queries.shape[1], by_head)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(1, 2), (1, 9), (130, 6)]), st.booleans(), st.data())
def test_any_lengths_and_pages_equal_the_reference(seed, sizes, shuffled, data):
    length, per = sizes
    place = st.integers(-1, per * PAGE - length) | st.sampled_from([-5, 0, PAGE - 1, PAGE, per * PAGE - length])
    positions = data.draw(st.lists(place, min_size=3, max_size=3))
    arguments = problem(seed, positions, length, per, shuffled)
    check(compiled(*arguments, scale=SCALE), arguments, 1e-4)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(1, True), (1, False), (5, True)]), st.data())
def test_the_kernel_equals_the_reference_for_any_lengths_and_pages(seed, kind, data):
    """Uninitialised memory reads as NaN; a read of a page that does not exist raises, and the table names some."""
    length, shuffled = kind
    last = 9 * PAGE - length
    place = st.integers(-1, last) | st.sampled_from([-5, 0, PAGE - 1, PAGE, 2 * PAGE - 1, last])
    positions = data.draw(st.lists(place, min_size=2, max_size=2))
    *new, pages, table, positions = problem(seed, positions, length, 9, shuffled, (3, 128), jnp.bfloat16)
    wild = table
    if shuffled:
        wild = jnp.where(jnp.arange(9) > (positions[:, None] + length - 1) // PAGE, 1 << 20, table)
    ours = interpreted(pallas_tpu.multi_head_attention, *new, pages, wild, positions, scale=SCALE, plan=SMALL_PLAN)
    check(ours, (*new, pages, table, positions), 2e-2)


@pytest.mark.parametrize("length", [1, 5])
def test_the_kernel_has_no_races(length, capfd):
    arguments = problem(7, [1000, 250], length, 9, True, (3, 128), jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(pallas_tpu.multi_head_attention(*arguments, scale=SCALE, plan=SMALL_PLAN))
    assert "RACE DETECTED" not in capfd.readouterr().out
