"""The routed experts as one Pallas kernel for TPUs: HBM sees the weights of the experts that were hit, x and the sums.

    pairs (token, slot) sorted by expert      e0 e0 e0 | e2 | e5 e5 e5 e5 e5      experts without rows cost nothing
    row tiles of a few heights                [  384 ] [16]  [  384 ] [ 32 ]      an expert's rows padded to 16 at most
    one tile:  gather rows of x  ->  gate, up  ->  silu(gate) * up  ->  down  ->  sums[token] += weight * row
    beside:    the next expert's weights arrive, the next tile is gathered, the tile before is combined

Everything between stays in vector memory: x as words of two bfloat16, the sums in float32, the weights of two experts,
as they lie in HBM: narrow ones are widened where a product takes them (`stored`).
A row of x is gathered by one load and one strided store (a DMA a row would cost a dozen scalar instructions), and a
row of the output is added by a few vector operations (through HBM: 1000 us instead of none at 4096 tokens of Small).

The order of work in the source matters: the compiler's scheduler keeps to it, mostly. Gathering, activation and
combining stand between partial products, so that the MXU never waits for them.

N tokens, k experts a token, D model width, E experts, F expert width, M rows of a tile.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.chips import Chip, chip_of_mesh
from vl2_jax.ops.expert_ffn.rows import (
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
    product_with,
    walk_tiles,
)
from vl2_jax.ops.expert_ffn.stored import GROUP, Matrix, Stored, stored_as
from vl2_jax.ops.expert_ffn.tiling import IN_FLIGHT, LANES, Scratch, ScratchOf, Tiling, choose_tiling, round_up
from vl2_jax.ops.narrow.kinds import Narrow

Kernel = Float[Array, "E D F"] | Narrow
_DOWN_COLUMNS = 256  # of one step of the down product


def supports(x: Array, gate: Kernel, up: Kernel, down: Kernel, chip: Chip | None = None) -> bool:
    """Whether the kernel can do this: bfloat16 rows, weights of one of the kinds of `stored`, widths that fill its
    lanes, two experts that fit in vector memory."""
    (experts, width, expert_width), stored = gate.shape, stored_as((gate, up, down))
    if x.dtype != jnp.bfloat16 or stored is None or width % _DOWN_COLUMNS or expert_width % LANES:
        return False
    return choose_tiling(chip or chip_of_mesh(), 16, width, expert_width, experts, 1, _scratch_of(stored)) is not None


@functools.partial(jax.jit, static_argnames=("spread_over", "tiling"))  # lowered once, however many layers
def expert_ffn(
    x: Float[Array, "N D"],
    gate: Kernel,
    up: Kernel,
    down: Kernel,
    expert_ids: Int[Array, "N k"],
    combine_weights: Float[Array, "N k"],
    *,
    spread_over: int | None = None,
    tiling: Tiling | None = None,
) -> Float[Array, "N D"]:
    """See `api.expert_ffn`. No gradient of its own: `api` pairs it with `backward`.

    Args:
      tiling: by default the table's for the mesh being compiled for.
    """
    (tokens, width), (experts, _, expert_width), k = x.shape, gate.shape, expert_ids.shape[1]
    stored = stored_as((gate, up, down))
    assert stored is not None, "ask `supports` first"
    scratch_of, shared_by = _scratch_of(stored), spread_over or experts
    tiling = tiling or choose_tiling(chip_of_mesh(), tokens, width, expert_width, shared_by, k, scratch_of)
    assert tiling is not None, "ask `supports` first"
    padded = round_up(tokens, 16)
    x = jnp.pad(x, ((0, padded - tokens), (0, 0)))
    scratch, weights = scratch_of(tiling, width, expert_width), jax.tree.leaves((gate, up, down))
    expert_ids, combine_weights = cut_experts(expert_ids, combine_weights, experts, tiling.parts)
    experts, k = experts * tiling.parts, k * tiling.parts
    out: Array | None = None
    for first in range(0, padded, tiling.chunk):
        rows = min(tiling.chunk, padded - first)
        part = slice(first, min(first + rows, tokens))
        routing = order_by_expert(expert_ids[part], combine_weights[part], experts, scratch.slack)
        body = functools.partial(_kernel, scratch=scratch, first_token=first, tokens=rows, k=k)
        scalar, hbm = pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)
        before = () if out is None else (out,)  # later calls write their tokens into the same output
        out = pl.pallas_call(
            body,
            out_shape=jax.ShapeDtypeStruct((padded, width), x.dtype),
            in_specs=[scalar] * 3 + [hbm] * (1 + len(weights) + len(before)),
            out_specs=hbm,
            scratch_shapes=_scratch_shapes(scratch, rows, experts),
            input_output_aliases={4 + len(weights): 0} if before else {},
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiling.vmem),
            name="expert_ffn",
        )(*routing, x, *weights, *before)
    assert out is not None
    return out[:tokens]


def _steps_together(height: int) -> int:
    """Steps in one body: the fewer rows, the shorter is a step beside what it takes to fill and to empty the MXU."""
    return 4 if height <= 16 else 2 if height <= 64 else 1


def _scratch_of(stored: Stored) -> ScratchOf:
    return functools.partial(Scratch, stored=stored)


def _scratch_shapes(s: Scratch, tokens: int, experts: int) -> list[Any]:
    """In the order of `_kernel`'s parameters."""
    return [
        *(pltpu.VMEM(shape, jnp.dtype(dtype)) for shape, dtype in s.vector_buffers(tokens)),
        pltpu.SMEM((experts + 1,), jnp.int32),
        pltpu.SMEM((experts + 2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 2 + s.down_pieces, s.stored.arrays)),
        pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
        pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
    ]


def _kernel(pairs, counts, weights, x_hbm, *rest, scratch, first_token, tokens, k):
    """All row tiles of all experts that were hit, for the tokens from `first_token` on."""
    s, heights, each = scratch, scratch.tiling.heights, scratch.stored.arrays
    gate_hbm, up_hbm, down_hbm = (rest[i * each : (i + 1) * each] for i in range(3))
    out_hbm, *buffers = rest[-15 - 3 * each :]
    gate, up, down = (buffers[i * each : (i + 1) * each] for i in range(3))
    (x_words, sums, x_tile, stage, gate_up, hidden, outputs, arriving, leaving,
     hit, offsets, weight_arrived, x_arrived, out_left) = buffers[3 * each :]  # fmt: skip

    def gate_up_copies(number):
        slot, part = number % 2, part_of(hit[number], s)
        columns = pl.ds(part.first_column, s.part_width)
        return [
            pltpu.make_async_copy(source.at[part.expert, ..., columns], target.at[slot], weight_arrived.at[slot, i, n])
            for i, (sources, targets) in enumerate(((gate_hbm, gate), (up_hbm, up)))
            for n, (source, target) in enumerate(zip(sources, targets, strict=True))
        ]

    def down_copies(number, piece):
        """Down comes in pieces: the first columns are multiplied while the last ones arrive."""
        slot, part = number % 2, part_of(hit[number], s)
        width, held = s.width // s.down_pieces, s.stored.held
        columns = pl.ds(pl.multiple_of(piece * width, LANES), width)
        rows = pl.ds(pl.multiple_of(part.first_column // held, LANES // held), s.part_width // held)
        return [
            pltpu.make_async_copy(
                source.at[(part.expert, rows, columns) if n == 0 else (part.expert, ..., columns)],
                target.at[slot, ..., columns],
                weight_arrived.at[slot, 2 + piece, n],
            )
            for n, (source, target) in enumerate(zip(down_hbm, down, strict=True))
        ]

    def copies_of(number):
        pieces = (down_copies(number, piece) for piece in range(s.down_pieces))
        return (*gate_up_copies(number), *itertools.chain.from_iterable(pieces))

    def fetch_expert(number):
        for copy in copies_of(number):
            copy.start()

    rows = Rows(s, pairs, first_token, tokens, k)
    rows.ask(x_hbm, arriving, x_arrived)

    # The first expert's weights are asked for at once, or, as copies are served in order, after the last piece of x.

    hit[0] = first_expert(counts)
    if rows.pieces <= IN_FLIGHT:
        fetch_expert(0)
    experts_hit = list_experts(counts, hit, offsets)
    rows.pack(x_hbm, arriving, x_arrived, x_words, when_all_are_asked_for=lambda: fetch_expert(0))
    clear(sums)

    gather = functools.partial(rows.gather, Gathered(x_words, stage, x_tile), s.gathered_a_step)
    combine = functools.partial(rows.combine, outputs, sums, weights)

    def activate(height, number, column, part=0, parts=1):
        """silu(gate) * up of one step's columns, a part of the rows; 0 where another part of the expert has them."""
        low, high = (height // 16 * (part + i) // parts * 16 for i in range(2))
        if low < high:
            g, u = gate_up[low:high, :LANES], gate_up[low:high, LANES:]
            columns = pl.ds(pl.multiple_of(column * LANES, LANES), LANES)
            u = cleared_of_overlap(u, column, part_of(hit[number], s), s)
            hidden[low:high, columns] = (g * (1.0 / (1.0 + jnp.exp(-g))) * u).astype(jnp.bfloat16)

    def tile(height, place):
        """One row tile: its products, and beside them the combining of the tile before, the gathering of the next."""
        slot = place.number % 2
        together = _steps_together(height)
        first_group = part_of(hit[place.number], s).first_column // GROUP
        of_gate, of_up, of_down = (
            Matrix(s.stored, [array.at[slot] for array in arrays], first, s.scale_rows)
            for arrays, first in ((gate, 0), (up, 0), (down, first_group))
        )

        def gate_step(step):
            columns = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)

            def ride(part, parts, zero):
                # The step before is activated; before the first step that is garbage, and overwritten.
                activate(height, place.number, jnp.maximum(step - 1, 0), part, parts)
                combine(place.previous, place.previous_end, step, part, parts, zero)

            gate_up[0:height, :] = product_with(x_tile.at[0:height], (of_gate, of_up), columns, ride)

        def down_step(step):
            columns = pl.ds(pl.multiple_of(step * _DOWN_COLUMNS, LANES), _DOWN_COLUMNS)

            def ride(part, parts, zero):
                gather(place.end, place.following_end, step, part, parts, zero)

            total = product_with(hidden.at[0:height], (of_down,), columns, ride)
            rows.put_out(total, outputs, step)

        in_groups(s.gate_steps, together, gate_step)
        activate(height, place.number, s.gate_steps - 1)

        def down_piece(piece, _):
            def await_piece():
                for copy in down_copies(place.number, piece):
                    copy.wait()

            pl.when(place.is_first)(await_piece)
            steps = s.down_steps // s.down_pieces
            in_groups(steps, together, lambda step: down_step(piece * steps + step))
            return 0

        lax.fori_loop(0, s.down_pieces, down_piece, 0)

    # All tiles, expert by expert.

    def gather_first(step, _):
        gather(0, jnp.minimum(offsets[1], heights[0]), step)
        return 0

    lax.fori_loop(0, s.down_steps, gather_first, 0)

    def begin_tile(place):
        @pl.when(place.is_first)
        def _():
            pl.when(place.number + 1 < experts_hit)(lambda: fetch_expert(place.number + 1))
            for copy in gate_up_copies(place.number):
                copy.wait()

    previous, previous_end = walk_tiles(s.tiling, offsets, experts_hit, begin_tile, tile)

    def await_expert():
        for copy in copies_of(0):
            copy.wait()

    pl.when(experts_hit == 0)(await_expert)  # it was asked for ahead of the count, and nothing waited for it

    def combine_last(step, _):
        combine(previous, previous_end, step)
        return 0

    lax.fori_loop(0, jnp.minimum(s.gate_steps, previous_end - previous), combine_last, 0)

    rows.send(sums, leaving, out_hbm, out_left)
