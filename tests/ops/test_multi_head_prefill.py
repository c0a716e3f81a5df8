"""The kernel of a chunk of queries over pages of keys and values equals plain attention, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.ops.interpreted import interpreted
from tests.ops.paged import contiguous
from vl2_jax.ops.multi_head_attention.prefill import multi_head_prefill
from vl2_jax.ops.paging.pages import HeadPages

SCALE, HEADS, WIDTH = 0.09, 2, 128


def problem(queries, slots, positions, order=None):
    """Queries, keys and values in order, and in pages with NaN past each sequence's last query; the table."""
    batch = len(positions)
    keys = jax.random.split(jax.random.key(queries), 3)
    lengths = (queries, slots, slots)
    rows = [jax.random.normal(k, (batch, n, HEADS, WIDTH)).astype(jnp.bfloat16) for k, n in zip(keys, lengths)]
    table = np.arange(batch * slots // 128, dtype=np.int32) if order is None else order
    is_filled = np.arange(slots) < np.asarray(positions)[:, None] + queries
    pages = []
    for cached in rows[1:]:
        holes = np.where(is_filled[..., None, None], np.asarray(cached, np.float32), np.nan)
        page = np.empty((len(table), HEADS, 128, WIDTH))
        page[table] = holes.reshape(-1, 128, HEADS, WIDTH).swapaxes(1, 2)
        pages.append(jnp.asarray(page, jnp.bfloat16))
    return rows, HeadPages(*pages), jnp.asarray(table.reshape(batch, -1)), jnp.asarray(positions, jnp.int32)


@pytest.mark.parametrize(
    ("queries", "slots", "positions", "shuffled"),
    [(128, 128, [0], False), (200, 768, [333, 20], True), (17, 640, [512, 0], False)],
)
def test_the_kernel_equals_plain_attention(queries, slots, positions, shuffled):
    order = np.random.default_rng(0).permutation(len(positions) * slots // 128).astype(np.int32) if shuffled else None
    rows, pages, table, first = problem(queries, slots, positions, order)
    if not shuffled:
        pages, table = contiguous(pages, len(positions)), None
    ours = interpreted(multi_head_prefill, rows[0], pages, table, first, scale=SCALE)
    q, k, v = (a.astype(jnp.float32) for a in rows)
    scores = jnp.einsum("bthk,bshk->bhts", q, k) * SCALE
    seen = jnp.arange(slots) <= (first[:, None] + jnp.arange(queries))[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    expected = np.asarray(jnp.einsum("bhts,bshv->bthv", weights, v))
    assert np.abs(np.asarray(ours, np.float32) - expected).max() <= 1e-2 * np.abs(expected).max()


def test_the_kernel_has_no_races(capfd):
    rows, pages, table, first = problem(128, 256, [100, 3])
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(multi_head_prefill(rows[0], pages, table, first, SCALE))
    assert "RACE DETECTED" not in capfd.readouterr().out
