"""Gradients of the experts' weights as one Pallas kernel for TPUs: rows of an expert in, its three gradients out.

    rows ordered by expert   x, dout [R, D]   dgated | dupped [R, 2F]   weighted hidden rows [R, F]
    blocks of one expert     [ 512 ] [ 96 ] | [ 384 ] | [ 416 ]         the next block arrives while one is multiplied
    one block:    ddown = weighted^T dout,  dgate | dup = x^T (dgated | dupped),  some columns at a time
    beside:       x is turned while ddown is computed, the next block's hidden rows while dgate | dup are

The depth of these products is an expert's rows, which an MXU takes 128 or 256 at a time. An expert of one block, as
most are, leaves from the product's registers as bfloat16; the sums of more blocks stay in vector memory as float32.

R rows, D model width, E experts, F expert width.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.expert_ffn.tiling import LANES

_DEPTH = 128  # rows that one copy brings and that a product's depth is a multiple of
_MOST_DEPTHS = 4  # of these in a block
_COLUMNS = 2 * LANES  # of the gradients that one step computes
_MOST_LINES = 768  # of the gradients that one product computes


class ExpertRows(NamedTuple):
    """What gradients of weights are made of, ordered by expert; `tail` rows past the last may hold anything."""

    x: Float[Array, "R D"]
    dout: Float[Array, "R D"]
    dgated_dupped: Float[Array, "R 2F"]
    weighted: Float[Array, "R F"]  # hidden rows times the weights of the sum


TAIL = _DEPTH


@dataclass(frozen=True)
class Buffers:
    """Shapes of what the kernel keeps in vector memory."""

    width: int
    expert_width: int
    depths: int = _MOST_DEPTHS  # of a block, in `_DEPTH` rows
    leaving: int = 2  # steps whose columns may be leaving at once

    @property
    def shapes(self) -> list[tuple[tuple[int, ...], str]]:
        """(shape, dtype), in the order of the kernel's parameters."""
        block, d, f = _DEPTH * self.depths, self.width, self.expert_width
        rows = [((2, block, columns), "bfloat16") for columns in (d, d, 2 * f, f)]
        return [
            *rows,
            ((d, block), "bfloat16"),  # x, turned
            ((f, block), "bfloat16"),  # weighted, turned
            ((f // LANES, d, _COLUMNS), "float32"),  # sums of dgate | dup
            ((d // _COLUMNS, f, _COLUMNS), "float32"),  # sums of ddown
            ((self.leaving, d, _COLUMNS), "bfloat16"),  # dgate | dup, leaving
            ((self.leaving, f, _COLUMNS), "bfloat16"),  # ddown, leaving
        ]

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * {"bfloat16": 2, "float32": 4}[dtype] for shape, dtype in self.shapes)


def choose_buffers(width: int, expert_width: int, vmem: int) -> Buffers | None:
    """The tallest blocks that fit; an expert's rows in few blocks are few sums that are read and written again."""
    options = (
        Buffers(width, expert_width, depths, leaving) for depths in range(_MOST_DEPTHS, 0, -1) for leaving in (4, 2)
    )
    return next((buffers for buffers in options if buffers.bytes <= vmem - (1 << 20)), None)


def weights_gradients(
    rows: ExpertRows, starts: Int[Array, " E+1"], vmem: int
) -> tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]:
    """Gradients of gate, up and down. The rows of expert e are `starts[e]` to `starts[e + 1]`, multiples of 16."""
    experts, width, expert_width = len(starts) - 1, rows.x.shape[1], rows.weighted.shape[1]
    buffers = choose_buffers(width, expert_width, vmem)
    assert buffers is not None, "the gradients of one expert do not fit in vector memory"
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    shapes = [(experts, width, expert_width)] * 2 + [(experts, expert_width, width)]
    return pl.pallas_call(
        functools.partial(_kernel, width=width, expert_width=expert_width, most_depths=buffers.depths),
        out_shape=[jax.ShapeDtypeStruct(shape, rows.x.dtype) for shape in shapes],
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[hbm] * 4],
        out_specs=[hbm] * 3,
        scratch_shapes=[
            *(pltpu.VMEM(shape, jnp.dtype(dtype)) for shape, dtype in buffers.shapes),
            pltpu.SMEM((2, buffers.leaving), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 4)),
            pltpu.SemaphoreType.DMA((2, buffers.leaving)),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem),
        name="expert_ffn_weights_gradients",
    )(starts, *rows)


def _kernel(
    starts, x_hbm, dout_hbm, dgated_hbm, weighted_hbm, dgate_hbm, dup_hbm, ddown_hbm,
    x, dout, dgated, weighted, x_turned, weighted_turned, gate_up_sums, down_sums, gate_up_leaving, down_leaving,
    is_leaving, arrived, left, *, width, expert_width, most_depths,
):  # fmt: skip
    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32
    experts = starts.shape[0] - 1
    block = _DEPTH * most_depths
    down_steps, gate_steps = width // _COLUMNS, expert_width // LANES
    streams = ((x_hbm, x), (dout_hbm, dout), (dgated_hbm, dgated), (weighted_hbm, weighted))

    def rows_of(expert, row):
        """Rows from `row` of an expert on, at most a block."""
        return jnp.minimum(starts[expert + 1] - starts[expert] - row, block)

    def pieces_of(expert, row):
        return (rows_of(expert, row) + _DEPTH - 1) // _DEPTH

    def copy(stream, expert, row, slot, piece):
        source, target = streams[stream]
        at = pl.multiple_of(starts[expert] + row + piece * _DEPTH, 16)
        to = pl.ds(pl.multiple_of(piece * _DEPTH, _DEPTH), _DEPTH)
        return pltpu.make_async_copy(source.at[pl.ds(at, _DEPTH)], target.at[slot, to], arrived.at[slot, stream])

    def fetch(some, expert, row, slot, first, end):
        """Pieces `first` to `end` of a block of some of the streams."""

        def fetch_piece(piece, _):
            for stream in some:
                copy(stream, expert, row, slot, piece).start()
            return 0

        lax.fori_loop(first, jnp.minimum(pieces_of(expert, row), end), fetch_piece, 0)

    def receive(stream, expert, row, slot):
        """Waits for a block, and clears the rows below its last: they are another expert's."""
        target = streams[stream][1]

        def wait(piece, _):
            copy(stream, expert, row, slot, piece).wait()
            return 0

        def clear(group, _):
            rows = pl.ds(pl.multiple_of(group * 16, 16), 16)
            target[slot, rows, :] = jnp.zeros((16, target.shape[2]), bf16)
            return 0

        pieces = pieces_of(expert, row)
        lax.fori_loop(0, pieces, wait, 0)
        lax.fori_loop(rows_of(expert, row) // 16, jnp.maximum(pieces, 1) * (_DEPTH // 16), clear, 0)

    def turn(source, target, slot, step, steps, depths):
        """Columns of a block become lines, a part of them."""
        tiles = target.shape[0] // LANES
        for i in range(-(-tiles // steps)):
            tile = jnp.minimum(step + i * steps, tiles - 1)
            lines = pl.ds(pl.multiple_of(tile * LANES, LANES), LANES)
            target[lines, 0 : depths * _DEPTH] = source[slot, 0 : depths * _DEPTH, lines].T

    def leave(kind, step, expert):
        """Copies of a step's columns, from the buffer that they are in."""
        slot = step % gate_up_leaving.shape[0]
        at = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)
        if kind == 1:
            at = pl.ds(pl.multiple_of(step * _COLUMNS, _COLUMNS), _COLUMNS)
            return [pltpu.make_async_copy(down_leaving.at[slot], ddown_hbm.at[expert, :, at], left.at[1, slot])]
        return [
            pltpu.make_async_copy(
                gate_up_leaving.at[slot, :, half * LANES : (half + 1) * LANES],
                target.at[expert, :, at],
                left.at[0, slot],
            )
            for half, target in enumerate((dgate_hbm, dup_hbm))
        ]

    def fetch_beside(step, following, slot):
        """The next block's rows, spread over half of the steps: gradients that leave do not queue behind them."""
        first, end = (
            jnp.minimum(2 * most_depths * at // (down_steps + gate_steps), most_depths) for at in (step, step + 1)
        )
        pl.when(following.exists)(lambda: fetch(range(3), following.expert, following.row, slot, first, end))

    def product(turned, right, depths, is_only, is_first, is_last, kind, step, expert, ride):
        """One step's columns of a gradient, a part of the lines at a time."""
        sums, leaving = (gate_up_sums, down_sums)[kind], (gate_up_leaving, down_leaving)[kind]
        slot = step % leaving.shape[0]

        @pl.when(is_leaving[kind, slot] == 1)
        def _():
            for each in leave(kind, step, expert):
                each.wait()

        lines = turned.shape[0]
        size = _lines(lines)
        ride()
        for begin in range(0, lines, size):
            new = jnp.dot(turned[begin : begin + size, 0 : depths * _DEPTH], right, preferred_element_type=f32)
            if not is_only:
                new += jnp.where(is_first, 0.0, sums[step, begin : begin + size, :])
                sums[step, begin : begin + size, :] = new
            leaving[slot, begin : begin + size, :] = new.astype(bf16)

        @pl.when(is_last)
        def _():
            for each in leave(kind, step, expert):
                each.start()

        is_leaving[kind, slot] = is_last.astype(i32)

    def block_of(depths, is_only, expert, slot, is_first, is_last, following):
        common = (depths, is_only, is_first, is_last)
        depth = depths * _DEPTH

        def down_step(step, _):
            fetch_beside(step, following, 1 - slot)
            at = pl.ds(pl.multiple_of(step * _COLUMNS, _COLUMNS), _COLUMNS)
            ride = functools.partial(turn, x, x_turned, slot, step, down_steps, depths)
            product(weighted_turned, dout[slot, 0:depth, at], *common, 1, step, expert, ride)
            return 0

        def gate_step(step, _):
            fetch_beside(down_steps + step, following, 1 - slot)
            at = [pl.ds(pl.multiple_of(half * expert_width + step * LANES, LANES), LANES) for half in range(2)]
            right = jnp.concatenate([dgated[slot, 0:depth, columns] for columns in at], axis=1)
            ride = functools.partial(turn, weighted, weighted_turned, 1 - slot, step, gate_steps, most_depths)
            product(x_turned, right, *common, 0, step, expert, ride)
            return 0

        for stream in range(3):
            receive(stream, expert, following.row_before, slot)
        lax.fori_loop(0, down_steps, down_step, 0)
        pl.when(following.exists)(functools.partial(receive, 3, following.expert, following.row, 1 - slot))
        lax.fori_loop(0, gate_steps, gate_step, 0)

    slots = [(kind, slot) for kind in range(2) for slot in range(is_leaving.shape[1])]
    for each in slots:
        is_leaving[each] = 0
    fetch(range(4), 0, 0, 0, 0, most_depths)
    receive(3, 0, 0, 0)

    def turn_first(step, _):
        turn(weighted, weighted_turned, 0, step, gate_steps, most_depths)
        return 0

    lax.fori_loop(0, gate_steps, turn_first, 0)

    def next_block(carry):
        expert, row, slot = carry
        is_first, is_last = row == 0, starts[expert] + row + block >= starts[expert + 1]
        following_expert = expert + is_last.astype(i32)
        following_row = jnp.where(is_last, 0, row + block)
        exists = following_expert < experts
        pl.when(exists)(lambda: fetch((3,), following_expert, following_row, 1 - slot, 0, most_depths))
        following = _Following(exists, following_expert, following_row, row)
        depths = jnp.maximum(pieces_of(expert, row), 1)
        is_only = is_first & is_last
        for candidate in range(1, most_depths + 1):
            for only in (True, False):
                run = functools.partial(block_of, candidate, only, expert, slot, is_first, is_last, following)
                pl.when((depths == candidate) & (is_only == only))(run)
        return following_expert, following_row, 1 - slot

    lax.while_loop(lambda carry: carry[0] < experts, next_block, (jnp.int32(0),) * 3)
    for kind, slot in slots:

        @pl.when(is_leaving[kind, slot] == 1)
        def _(kind=kind, slot=slot):
            for each in leave(kind, slot, 0):
                each.wait()


class _Following(NamedTuple):
    exists: Array
    expert: Array
    row: Array
    row_before: Array


def _lines(lines: int) -> int:
    """Most lines of a product that divide evenly and are whole tiles of bfloat16."""
    return max(size for size in range(16, _MOST_LINES + 1, 16) if lines % size == 0)
