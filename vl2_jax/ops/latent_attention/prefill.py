"""A chunk of queries over a cache of latent rows as one Pallas kernel for TPUs: keys and values never leave it.

    a sequence      its filled pages arrive once, and stay in vector memory for all heads       latents [S, R]
    a head          keys | values = latents kv_b[head], block by block, beside the rotated      keys [S, nope + 128]
                    parts, which are the same for all heads                                     values [S, V]
    a block of      blocks of keys up to its last position:  scores -> online softmax -> sums;  out [T, V]
    queries         only those that reach past its first position are masked

The expanded form, which takes the fewest operations for a chunk (SPEC 5.2); through HBM, the expanded keys and values
of 4096 positions of Small would be 42 MB.

B sequences, T queries of each, S slots, H heads, R latent rank, P rotated width, V value width, N pages of 128 rows.
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
from vl2_jax.ops.flash_attention.online import LANES, OnlineSoftmax, block_of_queries, dot
from vl2_jax.ops.flash_attention.slots import KEYS, attend_to_slots, rows_of
from vl2_jax.ops.paging.pages import PAGE, AnyLatentPages, LatentPages, flat, full_table

_MIB = 1 << 20


def supports(
    q_nope: Array, q_rotated: Array, kv_b: Array, pages: AnyLatentPages, slots: int, chip: Chip | None = None
) -> bool:
    """Whether the kernel can do this: bfloat16, widths that fill its lanes, a sequence that fits in vector memory.

    Args:
      slots: of a sequence.
    """
    rank, _, both = kv_b.shape
    length, nope = q_nope.shape[1], q_nope.shape[-1]
    if any(a.dtype != jnp.bfloat16 for a in (q_nope, q_rotated, kv_b, *pages)):
        return False
    if nope != LANES or 2 * q_rotated.shape[-1] != LANES or (both - nope) % LANES or rank % LANES:
        return False
    a_slot = 2 * (rank + LANES // 2 + nope + LANES + both - nope)
    a_query = 2 * 2 * (nope + LANES + both - nope)
    held = slots * a_slot + length * a_query + 4 * rank * both
    return held <= (chip or chip_of_mesh()).vmem - 8 * _MIB  # a block's scores and sums take the rest


@functools.partial(jax.jit, static_argnames="scale")  # lowered once, however many layers
def latent_prefill(
    q_nope: Float[Array, "B T H nope"],
    q_rotated: Float[Array, "B T H P"],
    kv_b: Float[Array, "R H nope+V"],
    pages: LatentPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B T H V"]:
    """Attention of query t of sequence b to the slots 0 to `positions[b] + t`, whose rows are written already.

    Args:
      q_nope: the part of the queries that is not rotated.
      kv_b: the projection from latents to each head's keys (first) and values.
      pages: latents, and rotated parts, row i of a page beside row i + 64.
      table: the page of every 128 slots of each sequence; what stands past a sequence's last query is not used. `None`
        is a contiguous cache, `[B, n, ...]`.
      positions: of each sequence's first query, from 0.
    """
    batch, queries, heads, nope = q_nope.shape
    rank, _, both = kv_b.shape
    table, pages = full_table(pages, table, batch), flat(pages, table)
    length = -(-queries // LANES) * LANES
    more = ((0, 0), (0, length - queries), (0, 0))
    q_nope, q_twice = (
        jnp.pad(a.reshape(batch, queries, -1), more) for a in (q_nope, jnp.concatenate([q_rotated, q_rotated], axis=-1))
    )
    slots = -(-table.shape[1] * PAGE // KEYS) * KEYS

    def a_head(width):
        return pl.BlockSpec((None, length, width), lambda b, h, *_: (b, 0, h))

    hbm = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        functools.partial(_kernel, queries=queries, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads),
            in_specs=[a_head(nope), a_head(LANES), pl.BlockSpec((rank, both), lambda b, h, *_: (0, h)), hbm, hbm],
            out_specs=a_head(both - nope),
            scratch_shapes=[
                pltpu.VMEM((slots, rank), kv_b.dtype),
                pltpu.VMEM((slots // 2, LANES), kv_b.dtype),
                pltpu.VMEM((slots, nope + LANES), kv_b.dtype),
                pltpu.VMEM((slots, both - nope), kv_b.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                *OnlineSoftmax.scratch(block_of_queries(length), both - nope),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, length, heads * (both - nope)), q_nope.dtype),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=chip_of_mesh().vmem - 2 * _MIB),
        name="latent_prefill",
    )(table, positions, q_nope, q_twice, kv_b.reshape(rank, -1), *pages)
    return out[:, :queries].reshape(batch, queries, heads, -1)


def _kernel(
    table, positions, q_nope, q_twice, kv_b, latents_hbm, rotated_hbm, out,
    latents, rotated, keys, values, arrived, *online, queries, scale,
):  # fmt: skip
    """One head of one sequence; the sequence's first head brings its rows."""
    nope = q_nope.shape[1]
    sequence, head = pl.program_id(0), pl.program_id(1)
    first = positions[sequence]
    filled = first + queries

    def copies(page):
        targets = ((latents_hbm, latents, PAGE), (rotated_hbm, rotated, PAGE // 2))
        return [
            pltpu.make_async_copy(source.at[table[sequence, page]], to.at[rows_of(page, lines)], arrived.at[n])
            for n, (source, to, lines) in enumerate(targets)
        ]

    def place_rotated(page, _):
        """The rotated parts of a page behind the keys: of rows below 64 the left half of the lanes, of others the
        right one, and zeros in the other; queries have theirs in both."""
        lines = rotated[rows_of(page, PAGE // 2)]
        is_left = lax.broadcasted_iota(jnp.int32, lines.shape, 1) < LANES // 2
        for half, chosen in enumerate((is_left, ~is_left)):
            part = jnp.where(chosen, lines.astype(jnp.float32), 0).astype(keys.dtype)
            keys[rows_of(2 * page + half, PAGE // 2), nope:] = part
        return 0

    @pl.when(head == 0)
    def bring_rows():
        pages = pl.cdiv(filled, PAGE)
        for act in ("start", "wait"):

            def each(page, _, act=act):
                for copy in copies(page):
                    getattr(copy, act)()
                return 0

            lax.fori_loop(0, pages, each, 0)
        lax.fori_loop(0, pages, place_rotated, 0)

    def expand(block, _):
        at = rows_of(block, KEYS)
        expanded = dot(latents[at], kv_b[...], 1, 0)
        keys[at, :nope] = expanded[:, :nope].astype(keys.dtype)
        new = expanded[:, nope:]  # weights past the last row are 0, but what is there may not be a number
        exists = lax.broadcasted_iota(jnp.int32, new.shape, 0) < filled - block * KEYS
        values[at] = jnp.where(exists, new, 0).astype(values.dtype)
        return 0

    lax.fori_loop(0, pl.cdiv(filled, KEYS), expand, 0)
    attend_to_slots(
        lambda rows: jnp.concatenate([q_nope[rows], q_twice[rows]], axis=1),
        *(keys, values, out, OnlineSoftmax(*online), first, filled, scale),
    )
