"""The kernel of `ops.paging.pallas_tpu` over keys and values of every head.

A row of queries takes all heads' keys: its own head's place in them holds the query, the others zeros. So scores of all
heads are one product, and so are the mixed values, of which a row keeps its own head's. The MXU has to take up all keys
in any case; what it multiplies them with, for few rows, costs nothing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from vl2_jax.ops.chips import Chip, chip_of_mesh
from vl2_jax.ops.paging.pages import PAGE, AnyHeadPages, HeadPages
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

_MOST_ROWS = 64  # of queries a sequence: every one is multiplied with all heads' keys


def supports(queries: Array, pages: AnyHeadPages, chip: Chip | None = None) -> bool:
    """Whether the kernel can do this: bfloat16, heads that fill its lanes, few rows."""
    if not isinstance(pages, HeadPages) or {a.dtype for a in (queries, *pages)} != {jnp.dtype(jnp.bfloat16)}:
        return False
    _, length, heads, width = queries.shape
    if width != LANES or rows_of(length, heads) > _MOST_ROWS:
        return False
    chip = chip or chip_of_mesh()
    return vector_memory(queries.shape, pages, choose_plan(chip, heads)) < chip.vmem * 3 // 4


def vector_memory(queries: tuple[int, ...], pages: HeadPages, plan: Plan) -> int:
    """Bytes of vector memory that the kernel takes for queries of a shape `[B, T, H, K]`, results included."""
    batch, length, heads, width = queries
    rows = rows_of(length, heads)
    return vector_bytes(_form(heads, width), pages, batch, rows, plan) + 2 * batch * rows * 2 * width


def choose_plan(chip: Chip, heads: int) -> Plan:
    """Blocks of about 2 MB of keys and values: ten heads' page is 655 KB."""
    pages = 2 if heads > 4 else 4
    return Plan(pages, 8, chip.vmem * 7 // 8)


@partial(jax.jit, static_argnames=("scale", "plan"))  # lowered once, however many layers
def multi_head_attention(
    queries: Float[Array, "B T H K"],
    new_keys: Float[Array, "B T H K"],
    new_values: Float[Array, "B T H K"],
    pages: HeadPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    *,
    scale: float,
    plan: Plan | None = None,
) -> tuple[Float[Array, "B T H K"], HeadPages]:
    """See `api.multi_head_attention`."""
    _, _, heads, width = queries.shape
    new_keys, new_values = (rearrange(rows, "b t h k -> b h t k") for rows in (new_keys, new_values))
    return attend(
        _form(heads, width),
        (queries,),
        (new_keys, new_values),
        pages,
        table,
        positions,
        scale=scale,
        plan=plan or choose_plan(chip_of_mesh(), heads),
        name="multi_head_attention",
    )


def _form(heads: int, width: int) -> Form:
    return Form(
        heads=power_of_two(heads),
        mixed=heads * width,
        result=width,
        score=partial(_score, heads=heads),
        slot_of=lambda column: column,
        mix=_mix,
        finish=partial(_finish, heads=heads),
        slab=_slab,
        new_row=_new_row,
        new_page=_new_page,
    )


def _own(shape, head, heads):
    """Which rows of queries are of a head."""
    return lax.broadcasted_iota(jnp.int32, shape, 0) & (power_of_two(heads) - 1) == head


def _score(queries, sequence, blocks, number, *, heads):
    query = queries[0][sequence].astype(jnp.float32)
    spread = [jnp.where(_own(query.shape, head, heads), query, 0).astype(jnp.bfloat16) for head in range(heads)]
    by_page = [
        sum(product(spread[head], blocks[0][number, page, head], 1) for head in range(heads))
        for page in range(blocks[0].shape[1])
    ]
    return jnp.concatenate(by_page, axis=1)


def _mix(weights, blocks, number):
    values = blocks[1]
    by_head = [
        sum(
            product(weights[:, page * PAGE : (page + 1) * PAGE], values[number, page, head], 0)
            for page in range(values.shape[1])
        )
        for head in range(values.shape[2])
    ]
    return jnp.concatenate(by_head, axis=1)


def _finish(mixed, *, heads):
    parts = [mixed[:, head * LANES : (head + 1) * LANES] for head in range(heads)]
    return sum(jnp.where(_own(part.shape, head, heads), part, 0) for head, part in enumerate(parts))


def _slab(array, row, shape):
    del array  # keys and values lie alike
    first = pl.multiple_of(row // SLAB * SLAB, SLAB)
    return (slice(None), pl.ds(first, SLAB), slice(None)), lax.broadcasted_iota(jnp.int32, shape, 1) == row - first


def _new_row(array, new, sequence):
    del array
    return new[sequence].astype(jnp.float32)


def _new_page(array, new, sequence, offset, length):
    """Rows are put in their places by a product with zeros and ones, which is exact."""
    del array
    heads, rows = new.shape[1:3]
    line, column = (lax.broadcasted_iota(jnp.int32, (PAGE, rows), axis) for axis in range(2))
    of = (line - offset == column).astype(new.dtype)
    values = jnp.stack([product(of, new[sequence, head], 0) for head in range(heads)])
    row = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return values, (row >= offset) & (row < offset + length)
