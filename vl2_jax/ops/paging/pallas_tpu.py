"""Attention of few queries over pages as one Pallas kernel for TPUs: each filled page is read once, new rows written.

    sequences     a: 9 pages     b: idle     c: 3 pages          blocks of 4 pages, one list of all
    list          [a 0-3] [a 4-7] [a 8] [c 0-2]                  copies run on from one sequence into the next
    a step        scores of the next block | softmax of this one | values of this one, weighted
    beside        blocks further on arrive; new rows leave, and are waited for at the end

A block's scores are computed one step before they are used, so that their way through the MXU and that of the weights
(largest score, exponential, sum: each waits for the one before) do not wait for each other.

B sequences, T new rows of each, M rows of queries (row `t * heads + head`, heads rounded up), s slots of a block, W
width of what is mixed, V of what of it is the result. What is particular to latents or to heads is a `Form`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.paging.pages import PAGE, FloatPages, HeadPages, LatentPages, flat, pages_a_sequence, shapes_of_page

LANES = 128
SLAB = 16  # rows of bfloat16 that are one tile of memory: less cannot be written
_PIECE = 32  # rows of a page that is filled in part: 32 KB of latents, which a copy brings in less than its latency
_NEVER = -1e30  # a score that is not looked at


class Plan(NamedTuple):
    """Sizes of one call.

    Attributes:
      pages: of a block. Even: see `latent_attention.pallas_tpu`.
      blocks: in vector memory, a power of two: one is computed with, one is scored, the others arrive.
      vmem: bytes of vector memory the kernel may use.
    """

    pages: int
    blocks: int
    vmem: int


class Form(NamedTuple):
    """How a kind of attention looks at what is in vector memory. `blocks` are `[blocks, pages, ...]` of each array.

    Attributes:
      heads: rows of queries that stand for one position, a power of two.
      mixed: W.
      result: V.
      score: (queries, sequence, blocks, number) -> `[M, s]`, in any order of the slots.
      slot_of: which slot of the block a column of the scores is of.
      mix: (weights `[M, s]`, blocks, number) -> `[M, W]`.
      finish: `[M, W]` -> `[M, V]`.
      slab: (array, row of a page, shape of a slab) -> where in a page the row's slab is, and which numbers are its.
      new_row: (array, reference to the new rows, sequence) -> the one new row, as wide as a slab.
      new_page: (array, reference to the new rows, sequence, offset, T) -> a page with new row t in row t + offset, and
        which numbers of it are new.
    """

    heads: int
    mixed: int
    result: int
    score: Callable[..., Array]
    slot_of: Callable[[Array], Array]
    mix: Callable[..., Array]
    finish: Callable[[Array], Array]
    slab: Callable[..., tuple[tuple[Any, ...], Array]]
    new_row: Callable[..., Array]
    new_page: Callable[..., tuple[Array, Array]]


def attend(
    form: Form,
    queries: tuple[Float[Array, "B T H ?Q"], ...],
    new: tuple[Float[Array, "B ... T W"], ...],
    pages: FloatPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    *,
    scale: float,
    plan: Plan,
    name: str,
) -> tuple[Float[Array, "B T H V"], FloatPages]:
    """Results of all queries, and the pages with the T new rows of each sequence."""
    sequences: int = queries[0].shape[0]
    length: int = queries[0].shape[1]
    heads: int = queries[0].shape[2]
    rows: int = rows_of(length, heads)
    queries = tuple(as_rows(part, form.heads, rows) for part in queries)
    slack = 0 if length == 1 else -length % SLAB
    new = tuple(jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, slack), (0, 0)]) for part in new)
    per, given = pages_a_sequence(pages, table, sequences), pages
    pages = flat(pages, table)
    scalars = (positions,) if table is None else (positions, table.ravel())
    first_page = len(scalars) + len(queries) + len(new)
    scalar, hbm = (pl.BlockSpec(memory_space=space) for space in (pltpu.SMEM, pltpu.HBM))
    results: Any = pl.pallas_call(
        partial(
            _kernel,
            form=form,
            counts=(len(scalars), len(queries)),
            per=per,
            length=length,
            scale=scale,
            plan=plan,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((sequences, rows, form.result), queries[0].dtype),
            *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in pages),
        ],
        in_specs=[scalar] * len(scalars) + [hbm] * (len(queries) + len(new) + 2),
        out_specs=[hbm] * 3,
        scratch_shapes=[
            *(pltpu.VMEM(array.shape, array.dtype) for array in (*queries, *new)),
            pltpu.VMEM((sequences, rows, form.result), queries[0].dtype),
            *(pltpu.VMEM(*buffer) for buffer in _vector_buffers(form, pages, sequences, rows, plan)),
            pltpu.SMEM((sequences + 1,), jnp.int32),
            pltpu.SMEM((plan.blocks,), jnp.int32),
            pltpu.SMEM((plan.blocks,), jnp.int32),
            pltpu.SemaphoreType.DMA((plan.blocks,)),
            *[pltpu.SemaphoreType.DMA(())] * 3,
        ],
        input_output_aliases={first_page: 1, first_page + 1: 2},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=plan.vmem),
        name=name,
    )(*scalars, *queries, *new, *pages)
    out = results[0][:, : length * form.heads].reshape(sequences, length, form.heads, form.result)
    return out[:, :, :heads], type(pages)(*(new.reshape(old.shape) for new, old in zip(results[1:], given)))


def _vector_buffers(
    form: Form, pages: LatentPages | HeadPages, sequences: int, rows: int, plan: Plan
) -> list[tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of all scratch in vector memory, in the order of `_kernel`'s parameters."""
    shapes = shapes_of_page(pages)
    slabs = [(sequences, *shape[:-2], SLAB, shape[-1]) for shape in shapes]
    return [
        *(((plan.blocks, plan.pages, *shape), array.dtype) for shape, array in zip(shapes, pages)),  # blocks
        *((slab, array.dtype) for slab, array in zip(slabs, pages)),  # new rows, leaving
        ((rows, plan.pages * PAGE), jnp.float32),  # scores of the next block
        ((rows, LANES), jnp.float32),  # the largest of the sequence
        ((rows, LANES), jnp.float32),  # sums of the weights
        ((rows, form.mixed), jnp.float32),  # values, weighted
    ]


def rows_of(length: int, heads: int) -> int:
    """Rows of queries of a sequence: heads a power of two, so that a shift gives a row's position; whole slabs."""
    return -(-length * power_of_two(heads) // SLAB) * SLAB


def power_of_two(n: int) -> int:
    """The lowest that is not below `n`."""
    return 1 << (n - 1).bit_length()


def as_rows(queries: Float[Array, "B T H Q"], heads: int, rows: int) -> Float[Array, "B M Q"]:
    """Queries as the kernel takes them, with rows of zeros where there is no head or no position."""
    batch, length, given, width = queries.shape
    flat = jnp.pad(queries, ((0, 0), (0, 0), (0, heads - given), (0, 0))).reshape(batch, length * heads, width)
    return jnp.pad(flat, ((0, 0), (0, rows - length * heads), (0, 0)))


def product(left: Array, right: Array, axis: int) -> Array:
    """Float32 product over the last axis of `left` and an axis of `right`, in the kernel."""
    return lax.dot_general(left, right, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def vector_bytes(form: Form, pages: LatentPages | HeadPages, sequences: int, rows: int, plan: Plan) -> int:
    """Vector memory that the kernel's scratch takes."""
    buffers = _vector_buffers(form, pages, sequences, rows, plan)
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in buffers)


def _kernel(*refs, form, counts, per, length, scale, plan):
    scalars, given, pages_in, (out_hbm, *pages), scratch = _split(refs, counts[0], counts[1] + 2, 2, 3)
    del pages_in  # the same memory as the pages that leave
    queries, new, (out,), blocks, stages, scratch = _split(scratch, counts[1], 2, 1, 2, 2)
    (scores, largest, total, mixed, active, sequence_of, block_of, arrived, given_arrived, rows_left,
     out_left) = scratch  # fmt: skip
    positions, table = scalars[0], scalars[1] if len(scalars) > 1 else None
    size, mask = plan.pages * PAGE, plan.blocks - 1
    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32

    inputs = [pltpu.make_async_copy(a, b, given_arrived) for a, b in zip(given, (*queries, *new))]
    _start(inputs)

    def out_copy(sequence):
        return pltpu.make_async_copy(out.at[sequence], out_hbm.at[sequence], out_left)

    # Which sequences have work, and how many blocks there are.

    def list_sequence(sequence, carry):
        count, steps = carry
        is_active = positions[sequence] >= 0

        @pl.when(jnp.logical_not(is_active))
        def _():
            out[sequence] = jnp.zeros(out.shape[1:], out.dtype)
            out_copy(sequence).start()

        active[count] = sequence
        return count + is_active.astype(i32), steps + jnp.where(is_active, _blocks(sequence), 0)

    def _blocks(sequence):
        return (positions[sequence] + length - 1) // size + 1

    count, steps = lax.fori_loop(0, positions.shape[0], list_sequence, (jnp.int32(0), jnp.int32(0)))

    # Copies of blocks: of the pages that exist, and of a last page that is filled in part, of the rows that do.

    def page_of(sequence, number):
        at = sequence * per + number
        return at if table is None else table[at]

    def filled(number):
        """Rows of the block `number` in vector memory; several new rows leave with their pages, which come whole."""
        end = positions[sequence_of[number]] + length
        end = end if length == 1 else (end + PAGE - 1) // PAGE * PAGE
        return jnp.minimum(end - block_of[number] * size, size)

    def copy_of(number, p, b, page, i, rows=()):
        return pltpu.make_async_copy(p.at[(page, *rows)], b.at[(number, i, *rows)], arrived.at[number])

    def block_copies(number):
        first = page_of(sequence_of[number], block_of[number] * plan.pages) if table is None else 0
        return [
            pltpu.make_async_copy(p.at[pl.ds(first, plan.pages)], b.at[number], arrived.at[number])
            for p, b in zip(pages, blocks)
        ]

    def each_page(number, do):
        """`do` with the copies of every page, one after the other."""
        rows = filled(number)
        arrays = list(zip(pages, blocks))

        def page_at(i):
            return page_of(sequence_of[number], block_of[number] * plan.pages + i)

        def whole(i, _):
            do([copy_of(number, *array, page_at(i), i) for array in arrays])
            return 0

        def piece(at, _):
            i = rows // PAGE
            do([copy_of(number, *array, page_at(i), i, _piece(array[1], at)) for array in arrays if _is_cut(array[1])])
            return 0

        lax.fori_loop(0, rows // PAGE, whole, 0)
        if length == 1:

            @pl.when(rows % PAGE > 0)
            def _():
                i = rows // PAGE
                do([copy_of(number, *array, page_at(i), i) for array in arrays if not _is_cut(array[1])])
                lax.fori_loop(0, pl.cdiv(rows % PAGE, _PIECE), piece, 0)

    def fetch(step, cursor):
        """Asks for the block at the cursor (index of an active sequence, block), and moves the cursor on."""
        index, block = cursor
        number = step & mask

        @pl.when(step < steps)
        def _():
            sequence_of[number], block_of[number] = active[index], block
            is_full = filled(number) == size

            if table is None and per >= plan.pages:
                pl.when(is_full)(lambda: _start(block_copies(number)))
                pl.when(jnp.logical_not(is_full))(lambda: each_page(number, _start))
            else:
                each_page(number, _start)

            # What never was filled may hold anything, of which a weight of 0 would make NaN.
            @pl.when((step < plan.blocks) & jnp.logical_not(is_full))
            def _():
                rows = filled(number)

                def clear(i, _):
                    for b in blocks:
                        b[number, i] = jnp.zeros(b.shape[2:], b.dtype)
                    return 0

                def clear_piece(at, _):
                    for b in filter(_is_cut, blocks):
                        part = b.at[(number, rows // PAGE, *_piece(b, at))]
                        part[...] = jnp.zeros(part.shape, b.dtype)
                    return 0

                lax.fori_loop(pl.cdiv(rows, PAGE), plan.pages, clear, 0)
                if length == 1:
                    begin = jnp.where(rows % PAGE > 0, pl.cdiv(rows % PAGE, _PIECE), PAGE // _PIECE)
                    lax.fori_loop(begin, PAGE // _PIECE, clear_piece, 0)

        ends = block + 1 == _blocks(active[jnp.minimum(index, count - 1)])
        return index + ends.astype(i32), jnp.where(ends, 0, block + 1)

    def await_block(number):
        is_full = filled(number) == size
        if per >= plan.pages:
            pl.when(is_full)(lambda: _await(block_copies(number)))
            pl.when(jnp.logical_not(is_full))(lambda: each_page(number, _await))
        else:
            each_page(number, _await)

    # New rows: put into their block, and sent to their page.

    def put_one(number):
        sequence = sequence_of[number]
        at = positions[sequence] - block_of[number] * size
        i, row = at // PAGE, at % PAGE
        page = page_of(sequence, positions[sequence] // PAGE)
        for array, (p, b, stage, rows) in enumerate(zip(pages, blocks, stages, new)):
            index, its = form.slab(array, row, stage.shape[1:])
            value = form.new_row(array, rows, sequence)
            merged = jnp.where(its, value.astype(f32), b[(number, i, *index)].astype(f32)).astype(bf16)
            b[(number, i, *index)] = merged
            stage[sequence] = merged
            pltpu.make_async_copy(stage.at[sequence], p.at[(page, *index)], rows_left).start()

    def put_many(number):
        """Whole pages, waited for at once: a chunk of rows touches one or two."""
        sequence = sequence_of[number]
        position, first = positions[sequence], block_of[number] * plan.pages

        def put_page(i, _):
            for array, (p, b, rows) in enumerate(zip(pages, blocks, new)):
                value, its = form.new_page(array, rows, sequence, position - (first + i) * PAGE, length)
                b[number, i] = jnp.where(its, value, b[number, i].astype(f32)).astype(bf16)
                copy = pltpu.make_async_copy(b.at[number, i], p.at[page_of(sequence, first + i)], rows_left)
                copy.start()
                copy.wait()
            return 0

        begin = jnp.maximum(position // PAGE - first, 0)
        lax.fori_loop(begin, jnp.minimum((position + length - 1) // PAGE + 1 - first, plan.pages), put_page, 0)

    def receive(number):
        await_block(number)
        if length > 1:
            put_many(number)
        else:
            pl.when(block_of[number] == _blocks(sequence_of[number]) - 1)(lambda: put_one(number))

    # One block: scores a step ahead, then softmax and values.

    def score(number, sequence):
        return form.score(queries, sequence, blocks, number) * scale

    row_position = lax.broadcasted_iota(i32, scores.shape, 0) >> (form.heads.bit_length() - 1)
    column_slot = form.slot_of(lax.broadcasted_iota(i32, scores.shape, 1))

    def step(this, cursor):
        cursor = fetch(this + plan.blocks - 1, cursor)
        number, following = this & mask, (this + 1) & mask
        sequence, block = sequence_of[number], block_of[number]
        pl.when(this + 1 < steps)(lambda: receive(following))
        is_first = block == 0
        seen = column_slot - row_position <= positions[sequence] - block * size
        mine = jnp.where(seen, scores[...], _NEVER)
        before = jnp.where(is_first, _NEVER, largest[...])
        larger = jnp.maximum(before, jnp.max(mine, axis=1, keepdims=True))
        scores[...] = score(following, jnp.where(this + 1 < steps, sequence_of[following], sequence))
        weights = jnp.exp(mine - larger[:, :1])
        keep = jnp.exp(before - larger)
        sums = jnp.where(is_first, 0, total[...]) * keep + jnp.sum(weights, axis=1, keepdims=True)
        values = form.mix(weights.astype(bf16), blocks, number)
        values += jnp.where(is_first, 0, mixed[...]) * keep[:, :1]
        largest[...], total[...], mixed[...] = larger, sums, values
        out[sequence] = form.finish(values * (1 / sums[:, :1])).astype(out.dtype)
        pl.when(block + 1 == _blocks(sequence))(lambda: out_copy(sequence).start())
        return cursor

    @pl.when(steps > 0)
    def _():
        cursor = jnp.int32(0), jnp.int32(0)
        for ahead in range(plan.blocks - 1):
            cursor = fetch(jnp.int32(ahead), cursor)
        _await(inputs)
        receive(jnp.int32(0))
        scores[...] = score(0, sequence_of[0])
        lax.fori_loop(0, steps, step, cursor)

    pl.when(steps == 0)(lambda: _await(inputs))

    def await_out(_, carry):
        out_copy(0).wait()
        return carry

    lax.fori_loop(0, positions.shape[0], await_out, 0)

    if length == 1:

        def await_rows(_, carry):
            for array, (p, stage) in enumerate(zip(pages, stages)):
                index, _ = form.slab(array, 0, stage.shape[1:])
                pltpu.make_async_copy(stage.at[0], p.at[(0, *index)], rows_left).wait()
            return carry

        lax.fori_loop(0, count, await_rows, 0)


def _is_cut(block):
    """Whether a page's rows stand one below the other, so that the first of them can be brought alone."""
    return block.shape[-2] == PAGE


def _piece(block, at):
    """Where in a page a piece of its rows is."""
    rows = pl.ds(pl.multiple_of(at * _PIECE, _PIECE), _PIECE)
    return (*[slice(None)] * (len(block.shape) - 4), rows, slice(None))


def _start(copies):
    for copy in copies:
        copy.start()


def _await(copies):
    for copy in copies:
        copy.wait()


def _split(values, *sizes):
    """`values` in parts of so many, and the rest."""
    parts = []
    for size in sizes:
        parts.append(values[:size])
        values = values[size:]
    return (*parts, values)
