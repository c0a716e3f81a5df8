"""`multi_head_attention` equals the reference for any lengths and pages, and writes the new rows and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.paged import assert_only_new_rows_differ, pages_for
from vl2_jax.ops.multi_head_attention.api import multi_head_attention
from vl2_jax.ops.paging.pages import PAGE, HeadPages

SCALE = 0.2
compiled = jax.jit(multi_head_attention, static_argnames="scale")


def problem(seed, positions, length, per, shuffled, sizes=(3, 32), dtype=jnp.float32):
    """Arguments of `multi_head_attention`."""
    *keys, last = jax.random.split(jax.random.key(seed), 4)
    new = [jax.random.normal(key, (len(positions), length, *sizes), dtype) for key in keys]
    return (*new, *pages_for(HeadPages, [sizes, sizes], last, positions, per, shuffled, dtype))


def check(ours, arguments, tolerance):
    """Values as the reference, written as told."""
    queries, *new, pages, table, positions = arguments
    out, after = ours
    expected, _ = multi_head_attention(*arguments, scale=SCALE, implementation="reference")
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
