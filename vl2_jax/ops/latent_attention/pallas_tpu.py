"""The kernel of `ops.paging.pallas_tpu` over latents: scores of two parts, values that are the latents themselves.

Rotated parts lie two in a line, row i of a page beside row i + 64 (see `ops.paging.pages`). Queries come twice, once
for each half of a line with zeros in the other, so that a product with the lines of two pages A and B gives

    from the first half   A 0..63 | B 0..63        from the second   A 64..127 | B 64..127

and latents are multiplied in that order too: nothing is moved between lanes, and softmax asks for no order.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from vl2_jax.ops.chips import Chip, chip_of_mesh
from vl2_jax.ops.paging.pages import HALF, PAGE, AnyLatentPages, LatentPages
from vl2_jax.ops.paging.pallas_tpu import (
    LANES,
    SLAB,
    Form,
    Plan,
    attend,
    power_of_two,
    product,
    rows_of,
    vector_bytes,
)

_MOST_ROWS = 256  # of queries a sequence: what is longer is a matter of arithmetic, not of reading


def supports(q_latent: Array, q_rotated: Array, pages: AnyLatentPages, chip: Chip | None = None) -> bool:
    """Whether the kernel can do this: bfloat16, widths that fill its lanes, few rows."""
    kinds = {a.dtype for a in (q_latent, q_rotated, *pages)}
    if not isinstance(pages, LatentPages) or kinds != {jnp.dtype(jnp.bfloat16)}:
        return False
    _, length, heads, rank = q_latent.shape
    if rank % LANES or 2 * q_rotated.shape[-1] != LANES or rows_of(length, heads) > _MOST_ROWS:
        return False
    chip = chip or chip_of_mesh()
    return vector_memory(q_latent.shape, pages, choose_plan(chip)) < chip.vmem * 3 // 4


def vector_memory(queries: tuple[int, ...], pages: LatentPages, plan: Plan) -> int:
    """Bytes of vector memory that the kernel takes for queries of a shape `[B, T, H, R]`, results included."""
    batch, length, heads, rank = queries
    rows = rows_of(length, heads)
    return vector_bytes(_form(heads, rank), pages, batch, rows, plan) + 2 * batch * rows * (2 * rank + LANES)


def choose_plan(chip: Chip) -> Plan:
    """Blocks by chip."""
    pages = 4 if chip.mxu == 128 else 8
    return Plan(pages, 8, chip.vmem * 7 // 8)


@partial(jax.jit, static_argnames=("scale", "plan"))  # lowered once, however many layers
def latent_attention(
    q_latent: Float[Array, "B T H R"],
    q_rotated: Float[Array, "B T H P"],
    new_latents: Float[Array, "B T R"],
    new_rotated: Float[Array, "B T P"],
    pages: LatentPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    *,
    scale: float,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B T H R"], LatentPages]:
    """See `api.latent_attention`."""
    return attend(
        _form(*q_latent.shape[2:]),
        (q_latent, q_rotated),
        (new_latents, new_rotated),
        pages,
        table,
        positions,
        scale=scale,
        plan=plan or choose_plan(chip_of_mesh()),
        name="latent_attention",
    )


def _form(heads: int, rank: int) -> Form:
    return Form(
        heads=power_of_two(heads),
        mixed=rank,
        result=rank,
        score=_score,
        slot_of=_slot_of,
        mix=_mix,
        finish=lambda mixed: mixed,
        slab=_slab,
        new_row=_new_row,
        new_page=_new_page,
    )


def _latents(block, number):
    """A block's latents in the order of the scores."""
    halves = [
        block[number, pair + page, half : half + HALF, :]
        for pair in range(0, block.shape[1], 2)
        for half in (0, HALF)
        for page in range(2)
    ]
    return jnp.concatenate(halves, axis=0)


def _slot_of(column):
    """Columns are of (pair of pages, half, page, row of the half): the two bits in the middle change places."""
    return (column & ~(HALF | PAGE)) | ((column & HALF) << 1) | ((column & PAGE) >> 1)


def _score(queries, sequence, blocks, number):
    q_latent, q_rotated = queries
    rows, pages = q_latent.shape[1], blocks[1].shape[1]
    half = q_rotated[sequence]
    nothing = jnp.zeros_like(half)
    twice = [jnp.concatenate(both, axis=1) for both in ((half, nothing), (nothing, half))]
    lines = blocks[1][number].reshape(pages * HALF, LANES)
    beside = product(jnp.concatenate(twice, axis=0), lines, 1)
    in_order = [
        beside[half : half + rows, pair : pair + LANES] for pair in range(0, pages * HALF, LANES) for half in (0, rows)
    ]
    return product(q_latent[sequence], _latents(blocks[0], number), 1) + jnp.concatenate(in_order, axis=1)


def _mix(weights, blocks, number):
    return product(weights, _latents(blocks[0], number), 0)


def _slab(array, row, shape):
    line = row if array == 0 else row % HALF
    first = pl.multiple_of(line // SLAB * SLAB, SLAB)
    its = lax.broadcasted_iota(jnp.int32, shape, 0) == line - first
    if array == 1:
        its &= lax.broadcasted_iota(jnp.int32, shape, 1) // HALF == row // HALF
    return (pl.ds(first, SLAB), slice(None)), its


def _new_row(array, new, sequence):
    row = new[sequence].astype(jnp.float32)
    return row if array == 0 else jnp.concatenate([row, row], axis=1)


def _new_page(array, new, sequence, offset, length):
    """Rows are put in their places by a product with zeros and ones, which is exact."""

    def lines(begin, end):
        line = lax.broadcasted_iota(jnp.int32, (end - begin, new.shape[1]), 0) + begin
        of = line - offset == lax.broadcasted_iota(jnp.int32, (end - begin, new.shape[1]), 1)
        return product(of.astype(new.dtype), new[sequence], 0)

    if array == 0:
        values = lines(0, PAGE)
        row = lax.broadcasted_iota(jnp.int32, values.shape, 0)
    else:
        values = jnp.concatenate([lines(0, HALF), lines(HALF, PAGE)], axis=1)
        row, lane = (lax.broadcasted_iota(jnp.int32, values.shape, axis) for axis in range(2))
        row += lane // HALF * HALF
    return values, (row >= offset) & (row < offset + length)
