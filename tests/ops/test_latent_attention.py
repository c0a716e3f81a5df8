"""`latent_attention` equals the reference for any lengths and pages, and writes the new rows and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.paged import assert_only_new_rows_differ, pages_for
from vl2_jax.ops.latent_attention.api import latent_attention
from vl2_jax.ops.paging.pages import PAGE, LatentPages
from vl2_jax.ops.paging.xla import read_rows, write_rows

SCALE = 0.2
compiled = jax.jit(latent_attention, static_argnames="scale")


def problem(seed, positions, length, per, shuffled, sizes=(3, 32, 8), dtype=jnp.float32):
    """Arguments of `latent_attention`."""
    heads, rank, rotated = sizes
    keys = jax.random.split(jax.random.key(seed), 5)
    lead = (len(positions), length)
    shapes = [(*lead, heads, rank), (*lead, heads, rotated), (*lead, rank), (*lead, rotated)]
    new = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]
    return (*new, *pages_for(LatentPages, [(rank,), (rotated,)], keys[4], positions, per, shuffled, dtype))


def check(ours, arguments, tolerance):
    """Values as the reference, written as told."""
    *queries, new_latents, new_rotated, pages, table, positions = arguments
    out, after = ours
    expected, _ = latent_attention(*arguments, scale=SCALE, implementation="reference")
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


def test_pages_that_do_not_divide_among_sequences_are_refused():
    *new, pages, _, positions = problem(4, [0, 0], 1, 2, False)
    with pytest.raises(ValueError, match="3 pages are not as many for each of 2 sequences"):
        latent_attention(*new, LatentPages(*(a[:3] for a in pages)), None, positions, scale=SCALE)
