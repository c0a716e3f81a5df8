"""Gradients of the experts' rows as one Pallas kernel for TPUs, built as the forward kernel is.

    one tile:  gather rows of x and dout  ->  e = dout down^T  ->  gate, up  ->  hidden rows again, dgated, dupped
               ->  dgated gate^T + dupped up^T  ->  dx[token] += row
    to HBM:    dx, the gradients of the combine weights, and for `backward_weights` the rows of `ExpertRows`

The sums of dx are float32 in vector memory. See `backward` for the maths and `pallas_tpu` for the order of work.

N tokens, k experts a token, D model width, E experts, F expert width, M rows of a tile, R rows by expert, each expert's
padded to 16.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.expert_ffn.backward_weights import TAIL, ExpertRows
from vl2_jax.ops.expert_ffn.rows import (
    PRODUCT_DEPTH,
    Gathered,
    Rows,
    clear,
    cleared_of_overlap,
    cut_experts,
    first_expert,
    in_groups,
    list_experts,
    order_by_expert,
    part_of,
    pieces_of,
    product,
    product_along,
    product_with,
    walk_tiles,
)
from vl2_jax.ops.expert_ffn.stored import FLOATS, Matrix
from vl2_jax.ops.expert_ffn.tiling import IN_FLIGHT, LANES, Scratch, Tiling, round_up

_COLUMNS = 2 * LANES  # of one step of the products with transposed weights
_UNIT = 16  # rows that one copy to HBM moves at least
_UNITS = 8  # of these, one copy where there are so many: it costs a dozen instructions, whatever its size


class BackwardScratch(Scratch):
    @property
    def gathered_a_gate_step(self) -> int:
        """Rows of dout of the next tile that are gathered beside one step of the gate and up products."""
        return 16 * -(-(self.tiling.heights[0] // 16) // self.gate_steps)

    @property
    def slack(self) -> int:
        return max(super().slack, self.gathered_a_gate_step * self.gate_steps)

    @property
    def spilled(self) -> int:
        """Two steps in one body hold more: 485 registers of 4 KB with tiles of 384 rows (v5e), 343 with 448 (v6e)."""
        return max(super().spilled, 5 * 1024 * self.tiling.heights[0])

    def vector_buffers(self, tokens: int) -> list[tuple[tuple[int, ...], str]]:
        """As in `Scratch`."""
        tall, move = self.tiling.heights[0], min(self.tiling.move, tokens)
        d, f = self.width, self.part_width
        steps = ((self.gathered_a_step, self.down_steps), (self.gathered_a_gate_step, self.gate_steps))
        combined = self.combined_a_step * self.gate_steps
        return [
            ((2, d, f), "bfloat16"),  # gate of two experts
            ((2, d, f), "bfloat16"),  # up
            ((2, f, d), "bfloat16"),  # down
            *[((round_up((tokens + 1) * self.words, 8), LANES), "int32")] * 2,  # x and dout
            ((round_up((tokens + 1) * self.lines, 64), LANES), "float32"),  # sums
            ((round_up(tokens + 1, 64), LANES), "float32"),  # gradients of the combine weights, a lane a slot
            *[((rows * times, d), "bfloat16") for rows, times in steps],  # rows of x and dout of a tile
            *[((rows * self.word_pitch, LANES), "int32") for rows, _ in steps],  # rows on their way there
            ((self.gathered_a_step * self.down_steps, LANES), "float32"),  # their combine weights
            ((tall, f), "float32"),  # dout down^T
            ((tall, 2 * LANES), "float32"),  # gate and up products of one step
            ((tall, LANES), "float32"),  # sums over columns, a lane each, that give the combine weights' gradients
            ((combined, LANES), "float32"),  # those of the tile before
            ((tall, 2 * f), "bfloat16"),  # dgated | dupped
            ((tall, f), "bfloat16"),  # weighted hidden rows
            ((round_up(combined * self.line_pitch, 8), LANES), "float32"),  # rows of dx
            ((IN_FLIGHT, move, d), "bfloat16"),  # x and dout, arriving
            ((IN_FLIGHT, move, d), "bfloat16"),  # sums, leaving
        ]


class RowsGradients(NamedTuple):
    dx: Float[Array, "N D"]
    dweights: Float[Array, "N k"]
    rows: ExpertRows
    starts: Int[Array, " E+1"]  # where the rows of each expert begin


def rows_gradients(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    expert_ids: Int[Array, "N k"],
    combine_weights: Float[Array, "N k"],
    dout: Float[Array, "N D"],
    tiling: Tiling,
) -> RowsGradients:
    """Gradients of rows and combine weights, and the rows that gradients of the experts' weights are made of."""
    (tokens, width), (experts, _, expert_width), k = x.shape, gate.shape, expert_ids.shape[1]
    padded = round_up(tokens, 16)
    x, dout = (jnp.pad(a, ((0, padded - tokens), (0, 0))) for a in (x, dout))
    scratch = BackwardScratch(tiling, width, expert_width)
    expert_ids, combine_weights = cut_experts(expert_ids, combine_weights, experts, tiling.parts)
    experts, k = experts * tiling.parts, k * tiling.parts
    firsts = range(0, padded, tiling.chunk)
    parts = [slice(first, min(first + tiling.chunk, tokens)) for first in firsts]
    routings = [order_by_expert(expert_ids[part], combine_weights[part], experts, scratch.slack) for part in parts]
    routings = [routing._replace(weights=jnp.pad(routing.weights, (0, 1))) for routing in routings]
    starts = _starts([routing.counts[:: tiling.parts] for routing in routings])
    total = round_up(expert_ids.size // tiling.parts, _UNIT) + _UNIT * experts // tiling.parts * len(parts) + TAIL
    like = functools.partial(jax.ShapeDtypeStruct, dtype=x.dtype)
    shapes = [
        like((padded, width)),
        jax.ShapeDtypeStruct((padded, LANES), jnp.float32),
        *(like((total, columns)) for columns in (width, width, 2 * expert_width, expert_width)),
    ]
    outs: Any = ()
    for number, (first, routing) in enumerate(zip(firsts, routings)):
        rows = min(tiling.chunk, padded - first)
        body = functools.partial(_kernel, scratch=scratch, first_token=first, tokens=rows, k=k)
        scalar, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
        outs = pl.pallas_call(
            body,
            out_shape=shapes,
            in_specs=[scalar] * 4 + [hbm] * (5 + len(outs)),
            out_specs=[hbm] * len(shapes),
            scratch_shapes=_scratch_shapes(scratch, rows, experts),
            input_output_aliases={9 + i: i for i in range(len(outs))},  # later calls write into the same outputs
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiling.vmem),
            name="expert_ffn_rows_gradients",
        )(*routing, starts[number : -1 : len(parts)], x, dout, gate, up, down, *outs)
    dx, dweights, *rows = outs
    dweights = dweights[:tokens, :k].reshape(tokens, tiling.parts, -1).sum(axis=1)
    return RowsGradients(dx[:tokens], dweights, ExpertRows(*rows), starts[:: len(parts)])


def _starts(counts: list[Int[Array, " E"]]) -> Int[Array, " E*calls+1"]:
    """Where the rows of every expert and call begin: by expert, then by call, so that an expert's are together."""
    units = (jnp.stack(counts, axis=1).ravel() + _UNIT - 1) // _UNIT
    return jnp.pad(jnp.cumsum(units * _UNIT, dtype=jnp.int32), (1, 0))


def _scratch_shapes(s: BackwardScratch, tokens: int, experts: int) -> list[Any]:
    """In the order of `_kernel`'s parameters."""
    return [
        *(pltpu.VMEM(shape, jnp.dtype(dtype)) for shape, dtype in s.vector_buffers(tokens)),
        pltpu.SMEM((experts + 1,), jnp.int32),
        pltpu.SMEM((experts + 2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 3)),
        pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
        pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
        pltpu.SemaphoreType.DMA((3,)),
    ]


def _kernel(
    pairs, counts, weights, starts, x_hbm, dout_hbm, gate_hbm, up_hbm, down_hbm, *rest, scratch, first_token, tokens, k
):  # fmt: skip
    """All row tiles of all experts that were hit, for the tokens from `first_token` on."""
    (dx_hbm, dweights_hbm, x_rows, dout_rows, dgated_rows, weighted_rows, gate, up, down, x_words, dout_words, sums,
     dweights, x_tile, dout_tile, x_stage, dout_stage, row_weights, projected, gate_up, lane_sums, lane_sums_before,
     dgated, weighted, outputs, arriving, leaving,
     hit, offsets, weight_arrived, arrived, left, rows_left) = rest[-33:]  # fmt: skip
    s, heights = scratch, scratch.tiling.heights
    f32, bf16 = jnp.float32, jnp.bfloat16

    def weight_copy(number, kind):
        """Of down, gate or up (0, 1, 2): the order of their use."""
        slot, part = number % 2, part_of(hit[number], s)
        columns = pl.ds(part.first_column, s.part_width)
        source = (down_hbm, gate_hbm, up_hbm)[kind].at[
            (part.expert, columns) if kind == 0 else (part.expert, slice(None), columns)
        ]
        return pltpu.make_async_copy(source, (down, gate, up)[kind].at[slot], weight_arrived.at[slot, kind])

    def fetch_expert(number):
        for kind in range(3):
            weight_copy(number, kind).start()

    rows = Rows(s, pairs, first_token, tokens, k)
    rows.ask(x_hbm, arriving, arrived)
    hit[0] = first_expert(counts)
    experts_hit = list_experts(counts, hit, offsets)
    rows.pack(x_hbm, arriving, arrived, x_words)
    rows.ask(dout_hbm, arriving, arrived)
    fetch_expert(0)
    rows.pack(dout_hbm, arriving, arrived, dout_words)
    clear(sums)
    clear(dweights)

    # Rows of a tile leave for the weights' gradients.

    def row_copies(streams, number, at, first, size):
        """x, dout (0, 1) and the columns of a part of an expert (2): dgated, dupped, weighted hidden rows."""
        width, column = s.part_width, part_of(hit[number], s).first_column
        here, there = (pl.ds(pl.multiple_of(begin + first, _UNIT), size) for begin in (0, at))
        columns, beside = (pl.ds(pl.multiple_of(i * s.expert_width + column, LANES), width) for i in range(2))
        ways = (
            [(x_tile.at[here], x_rows.at[there])],
            [(dout_tile.at[here], dout_rows.at[there])],
            [
                (dgated.at[here, :width], dgated_rows.at[there, columns]),
                (dgated.at[here, width:], dgated_rows.at[there, beside]),
                (weighted.at[here], weighted_rows.at[there, columns]),
            ],
        )
        return [pltpu.make_async_copy(*way, rows_left.at[stream]) for stream in streams for way in ways[stream]]

    def each_row_copy(streams, number, at, count, act):
        """`act` on the copies of `count` rows, the last of which may bring rows of zeros with them."""
        units, together = (count + _UNIT - 1) // _UNIT, min(_UNITS, heights[0] // _UNIT)

        def each(size):
            def act_on(piece, _):
                for copy in row_copies(streams, number, at, piece * size, size):
                    act(copy)
                return 0

            return act_on

        lax.fori_loop(0, units // together, each(together * _UNIT), 0)
        lax.fori_loop(units // together * together, units, each(_UNIT), 0)

    def send_rows(streams, place):
        at = starts[part_of(hit[place.number], s).expert] + place.row - offsets[place.number]
        each_row_copy(streams, place.number, at, place.end - place.row, lambda copy: copy.start())

    def await_rows(stream, first, end):
        each_row_copy((stream,), 0, 0, end - first, lambda copy: copy.wait())

    def are_new(place):
        """Rows of x and dout are the same for all parts of an expert."""
        return part_of(hit[place.number], s).is_first

    # Work that rides along with products.

    nobody = weights.shape[0] - 1  # the weight of a row that does not exist, 0
    gather_dout = functools.partial(rows.gather, Gathered(dout_words, dout_stage, dout_tile), s.gathered_a_gate_step)

    def gather_x(first, end, step, part=0, parts=1, zero=None):
        """And the combine weights of these rows."""
        rows.gather(Gathered(x_words, x_stage, x_tile), s.gathered_a_step, first, end, step, part, parts, zero)
        for row in range(s.gathered_a_step * part // parts, s.gathered_a_step * (part + 1) // parts):
            at = step * s.gathered_a_step + row
            pair = jnp.where(first + at < end, pairs[first + at], nobody)
            row_weights[pl.ds(at, 1), :] = jnp.full((1, LANES), weights[pair])

    def combine(first, end, step, part=0, parts=1, zero=None):
        rows.combine(outputs, sums, None, first, end, step, part, parts, zero)
        lane = lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        for r in range(s.combined_a_step * part // parts, s.combined_a_step * (part + 1) // parts):
            at = step + r * s.gate_steps
            pair = pairs[first + at]
            token = pl.ds(jnp.where(first + at < end, pair >> rows.slot_bits, tokens), 1)
            is_slot = lane == (pair & ((1 << rows.slot_bits) - 1))
            dweights[token, :] = jnp.where(is_slot, lane_sums_before[pl.ds(at, 1), :], dweights[token, :])

    def activate(height, number, column, part=0, parts=1):
        """Hidden rows again and the gradients of gate and up, one step's columns, a part of the rows."""
        low, high = (height // 16 * (part + i) // parts * 16 for i in range(2))
        if low < high:
            columns = pl.ds(pl.multiple_of(column * LANES, LANES), LANES)
            beside = pl.ds(pl.multiple_of(s.part_width + column * LANES, LANES), LANES)
            g, u = gate_up[low:high, :LANES], gate_up[low:high, LANES:]
            e, weight = projected[low:high, columns], row_weights[low:high, :]
            e = cleared_of_overlap(e, column, part_of(hit[number], s), s)
            sigmoid = 1.0 / (1.0 + jnp.exp(-g))
            silu = g * sigmoid
            hidden, dhidden = silu * u, weight * e
            dgated[low:high, columns] = (dhidden * u * (sigmoid + silu * (1.0 - sigmoid))).astype(bf16)
            dgated[low:high, beside] = (dhidden * silu).astype(bf16)
            weighted[low:high, columns] = (hidden * weight).astype(bf16)
            lane_sums[low:high, :] = jnp.where(column == 0, 0.0, lane_sums[low:high, :]) + hidden * e

    def transposed_dot(left, right):
        return lax.dot_general(left, right, (((1,), (1,)), ((), ())), preferred_element_type=f32)

    def tile(height, place):
        """One row tile: its products, and beside them the combining of the tile before, the gathering of the next."""
        slot = place.number % 2
        kernels = [Matrix(FLOATS, [kernel.at[slot]]) for kernel in (gate, up)]

        def project(columns, combined):
            """dout down^T; beside it the `combined` steps of combining the tile before."""

            def partial_product(k, size):
                return transposed_dot(dout_tile[0:height, k : k + size], down[slot, columns, k : k + size])

            def ride(part, parts, zero):
                for step in combined:
                    combine(place.previous, place.previous_end, step, part, parts, zero)

            projected[0:height, columns] = product_along(s.width, partial_product, ride)

        def project_step(step):
            project(pl.ds(pl.multiple_of(step * _COLUMNS, _COLUMNS), _COLUMNS), (2 * step, 2 * step + 1))

        def gate_step(step):
            columns = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)

            def ride(part, parts, zero):
                # The step before is activated; before the first step that is garbage, and overwritten.
                activate(height, place.number, jnp.maximum(step - 1, 0), part, parts)
                gather_dout(place.end, place.following_end, step, part, parts, zero)

            gate_up[0:height, :] = product_with(x_tile.at[0:height], kernels, columns, ride)

        def dx_step(step):
            columns = pl.ds(pl.multiple_of(step * _COLUMNS, _COLUMNS), _COLUMNS)

            def partial_product(kernel, begin, k, size):
                left = dgated[0:height, begin + k : begin + k + size]
                return transposed_dot(left, kernel[slot, columns, k : k + size])

            def ride(part, parts, zero):
                gather_x(place.end, place.following_end, step, part, parts, zero)

            partial_products = [
                functools.partial(partial_product, kernel, begin, *piece)
                for kernel, begin in ((gate, 0), (up, s.part_width))
                for piece in pieces_of(s.part_width, PRODUCT_DEPTH)
            ]
            rows.put_out(product(partial_products, ride), outputs, step)

        in_groups(s.part_width // _COLUMNS, 2, project_step)
        if s.part_width % _COLUMNS:
            project(slice(s.part_width - LANES, s.part_width), (s.gate_steps - 1,))

        @pl.when(place.is_first)
        def _():
            for kind in (1, 2):
                weight_copy(place.number, kind).wait()

        await_rows(2, place.previous, place.previous_end)
        pl.when(are_new(place))(lambda: await_rows(1, place.row, place.end))
        in_groups(s.gate_steps, 2, gate_step)
        activate(height, place.number, s.gate_steps - 1)
        lane_sums_before[0:height, :] = jnp.broadcast_to(
            jnp.sum(lane_sums[0:height, :], axis=1, keepdims=True), (height, LANES)
        )
        send_rows((2,), place)
        pl.when(are_new(place))(lambda: await_rows(0, place.row, place.end))
        in_groups(s.down_steps, 2, dx_step)

    # All tiles, expert by expert.

    for gather, steps in ((gather_x, s.down_steps), (gather_dout, s.gate_steps)):

        def gather_first(step, _, gather=gather):
            gather(0, jnp.minimum(offsets[1], heights[0]), step)
            return 0

        lax.fori_loop(0, steps, gather_first, 0)

    def begin_tile(place):
        pl.when(are_new(place))(lambda: send_rows((0, 1), place))

        @pl.when(place.is_first)
        def _():
            pl.when(place.number + 1 < experts_hit)(lambda: fetch_expert(place.number + 1))
            weight_copy(place.number, 0).wait()

    previous, previous_end = walk_tiles(s.tiling, offsets, experts_hit, begin_tile, tile)
    await_rows(2, previous, previous_end)

    def await_expert():
        for kind in range(3):
            weight_copy(0, kind).wait()

    pl.when(experts_hit == 0)(await_expert)  # it was asked for ahead of the count, and nothing waited for it

    def combine_last(step, _):
        combine(previous, previous_end, step)
        return 0

    lax.fori_loop(0, jnp.minimum(s.gate_steps, previous_end - previous), combine_last, 0)
    copy = pltpu.make_async_copy(
        dweights.at[pl.ds(0, tokens)], dweights_hbm.at[pl.ds(first_token, tokens)], rows_left.at[0]
    )
    copy.start()
    rows.send(sums, leaving, dx_hbm, left)
    copy.wait()
