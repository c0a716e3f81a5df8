"""Pages of whole numbers: rows are rounded when they are written, and are what is attended to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl2_jax.ops.latent_attention.api import latent_attention
from vl2_jax.ops.latent_attention.expanded import expanded_attention
from vl2_jax.ops.multi_head_attention.api import multi_head_attention
from vl2_jax.ops.paging.pages import PAGE, HeadPages, Int8HeadPages, Int8LatentPages, LatentPages
from vl2_jax.ops.paging.xla import read_rows, write_rows

SCALE, RANK, ROTATED, HEADS, WIDTH = 0.2, 32, 8, 3, 16
PER = 6  # pages a sequence: more than a block of attention
POSITIONS = [300, -1, 0]  # of the first row of each sequence; the second one does nothing


def rounded(rows):
    """The nearest of 127 steps to either side of 0, up to each row's largest number. NumPy, in double precision."""
    step = np.abs(rows).max(axis=-1, keepdims=True).astype(np.float64) / 127
    return np.rint(rows / step) * step


def random_rows(seed, *shape):
    """Rows of different sizes."""
    random = np.random.default_rng(seed)
    return random.standard_normal(shape, np.float32) * random.uniform(0.01, 2, (*shape[:-1], 1)).astype(np.float32)


def empty(kind, shuffled, dtype=jnp.float32):
    """(pages, table) of three sequences with six pages each."""
    lead, table = (3, PER), None
    if shuffled:
        lead, table = (3 * PER + 2,), jnp.asarray(np.random.default_rng(0).permutation(3 * PER).reshape(3, PER) + 1)
    rows = lead[-1] * PAGE
    widths = [(RANK,), (ROTATED,)] if kind in (LatentPages, Int8LatentPages) else [(HEADS, WIDTH)] * 2
    shapes = [(*lead[:-1], *heads, rows, width) for *heads, width in widths]
    if kind in (LatentPages, HeadPages):
        return kind.of_rows(*(jnp.zeros(shape, dtype) for shape in shapes)), table
    whole = [jnp.zeros(shape, jnp.int8) for shape in shapes]
    return kind.of_rows(*whole, *(jnp.zeros((*shape[:-1], 1), dtype) for shape in shapes)), table


def new_rows(kind, seed, length):
    shapes = [(3, length, RANK), (3, length, ROTATED)]
    if kind in (HeadPages, Int8HeadPages):
        shapes = [(3, HEADS, length, WIDTH)] * 2
    return tuple(random_rows(seed + n, *shape) for n, shape in enumerate(shapes))


@pytest.mark.parametrize("kind", [Int8LatentPages, Int8HeadPages])
@pytest.mark.parametrize("shuffled", [False, True])
def test_rows_are_read_as_127_steps_to_their_largest_number(kind, shuffled):
    """Many rows, across the ends of pages, and then a single one behind them."""
    pages, table = empty(kind, shuffled)
    first, last = new_rows(kind, 1, 200), new_rows(kind, 3, 1)
    pages = write_rows(pages, first, table, jnp.asarray(POSITIONS))
    pages = write_rows(pages, last, table, jnp.asarray(POSITIONS) + jnp.asarray([200, 0, 200]))
    for read, many, one in zip(read_rows(pages, table, 3, 0, PER * PAGE), first, last):
        expected = np.zeros(read.shape)
        for sequence, position in ((0, 300), (2, 0)):
            expected[sequence, ..., position : position + 200, :] = rounded(many)[sequence]
            expected[sequence, ..., position + 200, :] = rounded(one)[sequence, ..., 0, :]
        np.testing.assert_allclose(read, expected, rtol=1e-6)


def test_a_row_of_zeros_is_one():
    pages, _ = empty(Int8LatentPages, False)
    pages = write_rows(pages, (np.zeros((3, 1, RANK)), np.zeros((3, 1, ROTATED))), None, jnp.zeros(3, jnp.int32))
    assert not any(np.asarray(read).any() for read in read_rows(pages, None, 3, 0, PAGE))


@pytest.mark.parametrize("length", [1, 130])
def test_attention_is_that_of_floats_to_the_rounded_rows(length):
    """Both forms of latents, and heads; the floats are rounded here, and attended to by the reference."""
    seed, positions = 7, jnp.asarray(POSITIONS)

    def both(attention, whole, floats, queries, *rest, **implementation):
        new, earlier = new_rows(whole, seed, length), new_rows(whole, seed + 2, 300)
        found = []
        for kind, change, options in ((whole, np.asarray, {}), (floats, rounded, implementation)):
            pages, table = empty(kind, kind is whole)
            rows, before = ([jnp.asarray(change(part), jnp.float32) for part in parts] for parts in (new, earlier))
            pages = write_rows(pages, tuple(before), table, jnp.asarray([0, -1, -1]))
            if kind in (HeadPages, Int8HeadPages):
                rows = [jnp.swapaxes(part, 1, 2) for part in rows]
            given = {"pages": pages, "table": table, "positions": positions, "scale": SCALE, **options}
            found.append(jax.jit(lambda *a, given=given: attention(*a, **given)[0])(*queries, *rows, *rest))
        np.testing.assert_allclose(*found, atol=1e-4 * np.abs(found[1]).max())
        assert np.abs(found[1]).max() > 0.1

    def queries(*widths):
        return [np.random.default_rng(width).standard_normal((3, length, HEADS, width), np.float32) for width in widths]

    both(latent_attention, Int8LatentPages, LatentPages, queries(RANK, ROTATED), implementation="reference")
    both(multi_head_attention, Int8HeadPages, HeadPages, queries(WIDTH), implementation="reference")
    kv_b = np.random.default_rng(9).standard_normal((RANK, HEADS * 2 * WIDTH), np.float32) / 6
    both(expanded_attention, Int8LatentPages, LatentPages, queries(WIDTH, ROTATED), kv_b)
