"""A chunk of queries over a cache of keys and values as one Pallas kernel for TPUs.

    a head of a     its filled pages arrive in vector memory while the head before is worked on    keys, values [S, K]
    sequence
    a block of      blocks of keys up to its last position:  scores -> online softmax -> sums      out [T, K]
    queries

B sequences, T queries of each, S slots, H heads, K head width, N pages of 128 rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.chips import Chip, chip_of_mesh
from vl2_jax.ops.flash_attention.online import LANES, OnlineSoftmax, block_of_queries
from vl2_jax.ops.flash_attention.slots import KEYS, attend_to_slots, rows_of
from vl2_jax.ops.paging.pages import PAGE, AnyHeadPages, HeadPages, flat, full_table

_MIB = 1 << 20


def supports(queries: Array, pages: AnyHeadPages, slots: int, chip: Chip | None = None) -> bool:
    """Whether the kernel can do this: bfloat16, heads of whole lanes, two heads of a sequence in vector memory.

    Args:
      slots: of a sequence.
    """
    length, width = queries.shape[1], queries.shape[-1]
    if any(a.dtype != jnp.bfloat16 for a in (queries, *pages)) or width % LANES:
        return False
    return 8 * width * (slots + length) <= (chip or chip_of_mesh()).vmem - 8 * _MIB  # scores and sums take the rest


@functools.partial(jax.jit, static_argnames="scale")  # lowered once, however many layers
def multi_head_prefill(
    queries: Float[Array, "B T H K"],
    pages: HeadPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B T H K"]:
    """Attention of query t of sequence b to the slots 0 to `positions[b] + t`, whose rows are written already.

    Args:
      pages: keys and values.
      table: the page of every 128 slots of each sequence; what stands past a sequence's last query is not used. `None`
        is a contiguous cache, `[B, n, ...]`.
      positions: of each sequence's first query, from 0.
    """
    batch, count, heads, width = queries.shape
    table, pages = full_table(pages, table, batch), flat(pages, table)
    length = -(-count // LANES) * LANES
    rows = jnp.pad(queries.reshape(batch, count, -1), ((0, 0), (0, length - count), (0, 0)))
    slots = -(-table.shape[1] * PAGE // KEYS) * KEYS
    a_head = pl.BlockSpec((None, length, width), lambda b, h, *_: (b, 0, h))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        functools.partial(_kernel, queries=count, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads),
            in_specs=[a_head, hbm, hbm],
            out_specs=a_head,
            scratch_shapes=[
                *[pltpu.VMEM((2, slots, width), queries.dtype)] * 2,
                pltpu.SemaphoreType.DMA((2, 2)),
                *OnlineSoftmax.scratch(block_of_queries(length), width),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(rows.shape, queries.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=chip_of_mesh().vmem - 2 * _MIB),
        name="multi_head_prefill",
    )(table, positions, rows, *pages)
    return out[:, :count].reshape(queries.shape)


def _kernel(
    table, positions, q_rows, keys_hbm, values_hbm, out, keys, values, arrived, *online, queries, scale
):  # fmt: skip
    """One head of one sequence; beside it the next one's pages arrive."""
    sequence, head, heads = pl.program_id(0), pl.program_id(1), pl.num_programs(1)
    number, first = sequence * heads + head, positions[sequence]
    filled, mine = first + queries, number % 2

    def of_pages(number, act):
        sequence, head = number // heads, number % heads
        buffer = number % 2

        def each(page, _):
            for n, (source, target) in enumerate(((keys_hbm, keys), (values_hbm, values))):
                rows = target.at[buffer, rows_of(page, PAGE)]
                act(pltpu.make_async_copy(source.at[table[sequence, page], head], rows, arrived.at[buffer, n]))
            return 0

        lax.fori_loop(0, pl.cdiv(positions[sequence] + queries, PAGE), each, 0)

    def start(number):
        of_pages(number, lambda copy: copy.start())

    pl.when(number == 0)(lambda: start(number))
    pl.when(number + 1 < pl.num_programs(0) * heads)(lambda: start(number + 1))
    of_pages(number, lambda copy: copy.wait())

    # Weights past the last row are 0, but what is there may not be a number.
    last = rows_of((filled - 1) // KEYS, KEYS)
    tail = values[mine, last].astype(jnp.float32)
    exists = lax.broadcasted_iota(jnp.int32, tail.shape, 0) < (filled - 1) % KEYS + 1
    values[mine, last] = jnp.where(exists, tail, 0).astype(values.dtype)

    attend_to_slots(
        lambda rows: q_rows[rows],
        *(keys.at[mine], values.at[mine], out, OnlineSoftmax(*online), first, filled, scale),
    )
