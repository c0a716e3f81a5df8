"""Pages for tests: in any order, and with numbers that show in slots that nobody may look at."""

import jax.numpy as jnp
import numpy as np

from vl2_jax.ops.paging.pages import PAGE, flat

UNSEEN = 3e4  # finite, as a slot's old rows are; any weight that it is given shows


def pages_for(kind, widths, random, positions, per, shuffled, dtype):
    """(pages, table, positions) of sequences with as many filled slots as their positions say.

    Made by NumPy, as JAX would compile for every shape.
    """
    batch = len(positions)
    count = batch * per + (3 if shuffled else 0)
    order = random.permutation(count)[: batch * per].reshape(batch, per)
    table = jnp.asarray(order, jnp.int32) if shuffled else None
    rows = [random.standard_normal((*lead, count * PAGE, width), np.float32) for *lead, width in widths]
    seen = np.zeros((count, PAGE), bool)
    for numbers, position in zip(_numbers(table, batch, per), positions):
        for slot in range(position):
            seen[numbers[slot // PAGE], slot % PAGE] = True
    pages = kind.of_rows(*(np.where(seen.reshape(-1, 1), each, np.float32(UNSEEN)) for each in rows))
    if not shuffled:
        pages = contiguous(pages, batch)
    return kind(*(jnp.asarray(array, dtype) for array in pages)), table, jnp.asarray(positions, jnp.int32)


def contiguous(pages, batch):
    return type(pages)(*(array.reshape(batch, -1, *array.shape[1:]) for array in pages))


def assert_only_new_rows_differ(before, after, table, positions, length, new):
    """Every number of the pages is as it was, but the new rows, which are as given."""
    expected = [np.array(rows) for rows in flat(type(before)(*map(np.asarray, before)), table).rows()]
    after = flat(type(after)(*map(np.asarray, after)), table)
    table = _numbers(table, len(positions), before[0].shape[1])
    for sequence, position in enumerate(np.asarray(positions)):
        for t in range(length if position >= 0 else 0):
            slot = int(position) + t
            at = table[sequence, slot // PAGE] * PAGE + slot % PAGE
            for rows, given in zip(expected, new):
                rows[..., at, :] = given[sequence, ..., t, :]
    for rows, want in zip(after.rows(), expected):
        np.testing.assert_array_equal(np.asarray(rows), want)


def _numbers(table, batch, per):
    return np.arange(batch * per).reshape(batch, per) if table is None else np.asarray(table)
