"""`latent_attention` equals the reference for any lengths and pages, and writes the new rows and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from tests.ops.interpreted import interpreted
from tests.ops.paged import assert_only_new_rows_differ, pages_for
from vl2_jax.ops.chips import CHIPS
from vl2_jax.ops.latent_attention import pallas_tpu
from vl2_jax.ops.latent_attention.api import latent_attention
from vl2_jax.ops.paging.pages import PAGE, LatentPages
from vl2_jax.ops.paging.pallas_tpu import Plan
from vl2_jax.ops.paging.xla import read_rows, write_rows

SCALE = 0.2
compiled = jax.jit(latent_attention, static_argnames=("scale", "implementation"))

# Blocks of two pages, so that few rows meet every path: whole blocks and parts of one, each buffer used again.
SMALL_PLAN = Plan(pages=2, blocks=4, vmem=100 << 20)
NARROW = (4, 128, 64)


def problem(seed, positions, length, per, shuffled, sizes=(3, 32, 8), dtype=jnp.float32):
    """Arguments of `latent_attention`."""
    heads, rank, rotated = sizes
    random = np.random.default_rng(seed)
    lead = (len(positions), length)
    shapes = [(*lead, heads, rank), (*lead, heads, rotated), (*lead, rank), (*lead, rotated)]
    new = [jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes]
    return (*new, *pages_for(LatentPages, [(rank,), (rotated,)], random, positions, per, shuffled, dtype))


def check(ours, arguments, tolerance):
    """Values as the reference, written as told."""
    *queries, new_latents, new_rotated, pages, table, positions = arguments
    out, after = ours
    expected, _ = compiled(*arguments, scale=SCALE, implementation="reference")
    difference = np.abs(np.asarray(out, np.float32) - np.asarray(expected, np.float32))
    assert difference.max() <= tolerance
    assert_only_new_rows_differ(pages, after, table, positions, queries[0].shape[1], (new_latents, new_rotated))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from([(1, 2), (1, 9), (5, 9), (130, 6), (640, 9)]),
    st.booleans(),
    st.data(),
)
def test_any_lengths_and_pages_equal_the_reference(seed, sizes, shuffled, data):
    """Up to a page beyond four pages a block: several blocks, the last of which overlaps the one before."""
    length, per = sizes
    place = st.integers(-1, per * PAGE - length) | st.sampled_from([-5, 0, PAGE - 1, PAGE, per * PAGE - length])
    positions = data.draw(st.lists(place, min_size=3, max_size=3))
    arguments = problem(seed, positions, length, per, shuffled)
    check(compiled(*arguments, scale=SCALE), arguments, 1e-4)


def test_narrow_floats_round_once():
    arguments = problem(1, [700, 0, -1], 3, 6, True, dtype=jnp.bfloat16)
    check(latent_attention(*arguments, scale=SCALE), arguments, 2e-2)


def test_a_table_may_hold_anything_past_the_last_row():
    *new, pages, table, positions = problem(2, [100, 250], 30, 4, True)
    wild = jnp.where(jnp.arange(4) > (positions[:, None] + 29) // PAGE, jnp.asarray([[-1], [1 << 20]]), table)
    check(latent_attention(*new, pages, wild, positions, scale=SCALE), (*new, pages, table, positions), 1e-4)


@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_are_read_as_they_were_written(shuffled):
    *_, latents, rotated, pages, table, positions = problem(3, [0, 0], 4 * PAGE, 4, shuffled)
    pages = write_rows(pages, (latents, rotated), table, positions)
    for read, written in zip(read_rows(pages, table, 2, PAGE, 2 * PAGE), (latents, rotated)):
        np.testing.assert_array_equal(read, written[:, PAGE : 3 * PAGE])


def test_pages_and_tables_of_other_sequences_are_refused():
    *new, pages, _, positions = problem(4, [0, 0], 1, 2, False)
    with pytest.raises(ValueError, match=r"pages \(1, 2, .*\) without a table for 2 sequences"):
        latent_attention(*new, LatentPages(*(a[:1] for a in pages)), None, positions, scale=SCALE)
    with pytest.raises(ValueError, match="a table of 3 rows for 2 sequences"):
        latent_attention(*new, pages, jnp.zeros((3, 2), jnp.int32), positions, scale=SCALE)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([(1, True), (1, False), (20, True)]), st.data())
def test_the_kernel_equals_the_reference_for_any_lengths_and_pages(seed, kind, data):
    """Uninitialised memory reads as NaN; a read of a page that does not exist raises, and the table names some."""
    length, shuffled = kind
    last = 9 * PAGE - length
    place = st.integers(-1, last) | st.sampled_from([-5, 0, PAGE - 1, PAGE, 2 * PAGE - 1, last])
    positions = data.draw(st.lists(place, min_size=3, max_size=3))
    *new, pages, table, positions = problem(seed, positions, length, 9, shuffled, NARROW, jnp.bfloat16)
    wild = table
    if shuffled:
        wild = jnp.where(jnp.arange(9) > (positions[:, None] + length - 1) // PAGE, 1 << 20, table)
    ours = interpreted(pallas_tpu.latent_attention, *new, pages, wild, positions, scale=SCALE, plan=SMALL_PLAN)
    check(ours, (*new, pages, table, positions), 2e-2)


@pytest.mark.parametrize("heads", [3, 32])
def test_the_kernel_takes_any_number_of_heads(heads):
    arguments = problem(5, [100], 1, 2, False, (heads, 128, 64), jnp.bfloat16)
    check(interpreted(pallas_tpu.latent_attention, *arguments, scale=SCALE, plan=SMALL_PLAN), arguments, 2e-2)


def test_the_kernel_does_nothing_for_nobody():
    arguments = problem(6, [-1, -1, -7], 1, 9, True, NARROW, jnp.bfloat16)
    ours = interpreted(pallas_tpu.latent_attention, *arguments, scale=SCALE, plan=SMALL_PLAN)
    check(ours, arguments, 0)
    assert not np.asarray(ours[0], np.float32).any()


@pytest.mark.parametrize("length", [1, 20])
def test_the_kernel_has_no_races(length, capfd):
    arguments = problem(7, [1000, -1, 250], length, 9, True, NARROW, jnp.bfloat16)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(pallas_tpu.latent_attention(*arguments, scale=SCALE, plan=SMALL_PLAN))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.parametrize("chip", CHIPS)
def test_the_kernel_is_for_narrow_floats_and_short_chunks_of_released_sizes(chip):
    def supported(batch, length, heads, rank, dtype):
        shape = jax.ShapeDtypeStruct
        pages = LatentPages(shape((batch * 32, PAGE, rank), dtype), shape((batch * 32, PAGE // 2, 128), dtype))
        queries = (shape((batch, length, heads, width), dtype) for width in (rank, 64))
        return pallas_tpu.supports(*queries, pages, CHIPS[chip])

    assert supported(64, 1, 16, 512, jnp.bfloat16) or chip == "TPU v4"
    assert supported(32, 1, 32, 512, jnp.bfloat16) or chip == "TPU v4"
    assert supported(8, 4, 16, 512, jnp.bfloat16) or chip == "TPU v4"
    assert not supported(8, 1, 16, 512, jnp.float32)
    assert not supported(1, 512, 16, 512, jnp.bfloat16)
    assert not supported(8, 1, 16, 96, jnp.bfloat16)
