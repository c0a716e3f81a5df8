"""The kernel of a chunk of queries over latent pages equals plain attention to the expanded rows, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.ops.interpreted import interpreted
from tests.ops.paged import contiguous
from vl2_jax.ops.latent_attention.prefill import latent_prefill
from vl2_jax.ops.paging.pages import LatentPages

SCALE = 0.07
HEADS, RANK, ROPE = 2, 128, 64


def problem(queries, slots, positions, order=None):
    """Queries, kv_b, pages with NaN past each sequence's last query, the table and the rows in order."""
    batch, per = len(positions), slots // 128
    keys = jax.random.split(jax.random.key(queries), 5)
    shapes = [
        (batch, queries, HEADS, 128),
        (batch, queries, HEADS, ROPE),
        (RANK, HEADS, 256),
        (batch, slots, RANK),
        (batch, slots, ROPE),
    ]
    q_nope, q_rotated, kv_b, latents, rotated = (jax.random.normal(k, s) for k, s in zip(keys, shapes))
    kv_b *= RANK**-0.5
    narrow = [a.astype(jnp.bfloat16) for a in (q_nope, q_rotated, kv_b, latents, rotated)]
    table = np.arange(batch * per, dtype=np.int32) if order is None else order
    is_filled = np.arange(slots) < np.asarray(positions)[:, None] + queries
    holes = [np.where(is_filled[..., None], np.asarray(a, np.float32), np.nan) for a in narrow[3:]]
    pages = [np.full((batch * per, 128, a.shape[-1]), np.nan) for a in holes]
    for page, rows in zip(pages, holes):
        page[table] = rows.reshape(-1, 128, rows.shape[-1])
    beside = pages[1].reshape(-1, 2, 64, ROPE).swapaxes(1, 2).reshape(-1, 64, 2 * ROPE)
    pages = LatentPages(*(jnp.asarray(a, jnp.bfloat16) for a in (pages[0], beside)))
    return narrow, pages, jnp.asarray(table.reshape(batch, per)), jnp.asarray(positions, jnp.int32)


def expected_of(q_nope, q_rotated, kv_b, latents, rotated, positions):
    q_nope, q_rotated, kv_b, latents, rotated = (
        a.astype(jnp.float32) for a in (q_nope, q_rotated, kv_b, latents, rotated)
    )
    expanded = jnp.einsum("bsr,rhk->bshk", latents, kv_b)
    scores = jnp.einsum("bthk,bshk->bhts", q_nope, expanded[..., :128])
    scores += jnp.einsum("bthp,bsp->bhts", q_rotated, rotated)
    query = positions[:, None] + jnp.arange(q_nope.shape[1])
    seen = jnp.arange(latents.shape[1]) <= query[:, None, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * SCALE, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshv->bthv", weights, expanded[..., 128:])


@pytest.mark.parametrize(
    ("queries", "slots", "positions"),
    [(128, 128, [0]), (200, 768, [333, 20]), (17, 640, [512, 0]), (256, 1024, [768])],
)
def test_the_kernel_equals_attention_to_expanded_rows(queries, slots, positions):
    narrow, pages, _, first = problem(queries, slots, positions)
    ours = interpreted(latent_prefill, *narrow[:3], contiguous(pages, len(positions)), None, first, scale=SCALE)
    expected = np.asarray(expected_of(*narrow, first))
    assert np.abs(np.asarray(ours, np.float32) - expected).max() <= 1e-2 * np.abs(expected).max()


def test_pages_lie_in_any_order():
    positions, slots = [333, 20], 768
    order = np.random.default_rng(0).permutation(12).astype(np.int32)
    narrow, pages, table, first = problem(200, slots, positions, order)
    ours = interpreted(latent_prefill, *narrow[:3], pages, table, first, scale=SCALE)
    in_order, pages, _, _ = problem(200, slots, positions)
    plain = interpreted(latent_prefill, *in_order[:3], contiguous(pages, 2), None, first, scale=SCALE)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(plain, np.float32))


def test_the_kernel_has_no_races(capfd):
    narrow, pages, table, first = problem(128, 256, [100, 3])
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        jax.block_until_ready(latent_prefill(*narrow[:3], pages, table, first, SCALE))
    assert "RACE DETECTED" not in capfd.readouterr().out
