"""The routed experts as one Pallas kernel for TPUs: HBM sees the weights of the experts that were hit, x and the sums.

    pairs (token, slot) sorted by expert      e0 e0 e0 | e2 | e5 e5 e5 e5 e5      experts without rows cost nothing
    row tiles of a few heights                [  384 ] [16]  [  384 ] [ 32 ]      an expert's rows padded to 16 at most
    one tile:  gather rows of x  ->  gate, up  ->  silu(gate) * up  ->  down  ->  sums[token] += weight * row
    beside:    the next expert's weights arrive, the next tile is gathered, the tile before is combined

Everything between stays in vector memory: x as words of two bfloat16, the sums in float32, the weights of two experts.
A row of x is gathered by one load and one strided store (a DMA a row would cost a dozen scalar instructions), and a
row of the output is added by a few vector operations (through HBM: 1000 us instead of none at 4096 tokens of Small).

The order of work in the source matters: the compiler's scheduler keeps to it, mostly. Gathering, activation and
combining stand between partial products, so that the MXU never waits for them.

N tokens, k experts a token, D model width, E experts, F expert width, M rows of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.chips import Chip, chip_of_mesh
from vl2_jax.ops.expert_ffn.tiling import IN_FLIGHT, LANES, Scratch, Tiling, choose_tiling, round_up

_PRODUCT_DEPTH = 512  # of a partial product; between two of them stands other work
_DOWN_COLUMNS = 256  # of one step of the down product
_COMBINED_AT_ONCE = 8  # rows loaded before the first is stored; all of different tokens


def supports(x: Array, gate: Array, chip: Chip | None = None) -> bool:
    """Whether the kernel can do this: bfloat16, widths that fill its lanes, two experts that fit in vector memory."""
    experts, width, expert_width = gate.shape
    if x.dtype != jnp.bfloat16 or gate.dtype != jnp.bfloat16 or width % _DOWN_COLUMNS or expert_width % LANES:
        return False
    return choose_tiling(chip or chip_of_mesh(), 16, width, expert_width, experts, 1) is not None


@functools.partial(jax.jit, static_argnames=("spread_over", "tiling"))  # lowered once, however many layers
def expert_ffn(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
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
    tiling = tiling or choose_tiling(chip_of_mesh(), tokens, width, expert_width, spread_over or experts, k)
    assert tiling is not None, "ask `supports` first"
    padded = round_up(tokens, 16)
    x = jnp.pad(x, ((0, padded - tokens), (0, 0)))
    scratch = Scratch(tiling, width, expert_width)
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
            in_specs=[scalar] * 3 + [hbm] * (4 + len(before)),
            out_specs=hbm,
            scratch_shapes=_scratch_shapes(scratch, rows, experts),
            input_output_aliases={7: 0} if before else {},
            compiler_params=pltpu.CompilerParams(vmem_limit_bytes=tiling.vmem),
            name="expert_ffn",
        )(*routing, x, gate, up, down, *before)
    assert out is not None
    return out[:tokens]


class Ordered(NamedTuple):
    """Routing as the kernel reads it, in scalar memory."""

    pairs: Int[Array, " N*k+slack"]  # token << slot_bits | slot, sorted by expert
    counts: Int[Array, " E"]  # rows of each expert
    weights: Float[Array, " N<<slot_bits"]  # by pair


def order_by_expert(
    expert_ids: Int[Array, "N k"], combine_weights: Float[Array, "N k"], experts: int, slack: int
) -> Ordered:
    """One sort of integers that hold expert and pair, and one comparison: scatters and `bincount` cost 100 us more.

    Pairs of the expert that is not here (`experts`) come last and are counted nowhere.
    """
    tokens, k = expert_ids.shape
    slot_bits = bits_of(k)
    pair_bits = slot_bits + bits_of(tokens)
    if pair_bits + bits_of(experts + 1) > 31:
        raise ValueError(f"{tokens} tokens x {experts} experts do not fit in 31 bits; use a smaller chunk.")
    pair = (jnp.arange(tokens, dtype=jnp.int32) << slot_bits)[:, None] | jnp.arange(k, dtype=jnp.int32)
    keys = jnp.sort(((expert_ids.astype(jnp.int32) << pair_bits) | pair).ravel())
    every = jnp.arange(experts, dtype=jnp.int32)[:, None]
    return Ordered(
        pairs=jnp.pad(keys & ((1 << pair_bits) - 1), (0, slack)),
        counts=(expert_ids.reshape(1, -1) == every).sum(axis=1, dtype=jnp.int32),
        weights=jnp.pad(combine_weights.astype(jnp.float32), ((0, 0), (0, (1 << slot_bits) - k))).ravel(),
    )


def _scratch_shapes(s: Scratch, tokens: int, experts: int) -> list[Any]:
    """In the order of `_kernel`'s parameters."""
    return [
        *(pltpu.VMEM(shape, jnp.dtype(dtype)) for shape, dtype in s.vector_buffers(tokens)),
        pltpu.SMEM((experts + 1,), jnp.int32),
        pltpu.SMEM((experts + 2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 2 + s.down_pieces)),
        pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
        pltpu.SemaphoreType.DMA((IN_FLIGHT,)),
    ]


def _kernel(
    pairs, counts, weights, x_hbm, gate_hbm, up_hbm, down_hbm, *rest, scratch, first_token, tokens, k
):  # fmt: skip
    """All row tiles of all experts that were hit, for the tokens from `first_token` on."""
    (out_hbm, gate, up, down, x_words, sums, x_tile, stage, gate_up, hidden, outputs, arriving, leaving,
     hit, offsets, weight_arrived, x_arrived, out_left) = rest[-18:]  # fmt: skip
    s, heights, slot_bits = scratch, scratch.tiling.heights, bits_of(k)
    f32, bf16, i32 = jnp.float32, jnp.bfloat16, jnp.int32

    def copy_of(source, target, number, part, columns):
        slot = number % 2
        return pltpu.make_async_copy(
            source.at[hit[number], :, columns], target.at[slot, :, columns], weight_arrived.at[slot, part]
        )

    def gate_up_copies(number):
        pairs = ((gate_hbm, gate), (up_hbm, up))
        return [copy_of(*pair, number, part, pl.ds(0, s.expert_width)) for part, pair in enumerate(pairs)]

    def down_copy(number, piece):
        """Down comes in pieces: the first columns are multiplied while the last ones arrive."""
        width = s.width // s.down_pieces
        return copy_of(down_hbm, down, number, 2 + piece, pl.ds(pl.multiple_of(piece * width, LANES), width))

    def copies_of(number):
        return (*gate_up_copies(number), *(down_copy(number, piece) for piece in range(s.down_pieces)))

    def fetch_expert(number):
        for copy in copies_of(number):
            copy.start()

    # x arrives in pieces and is packed: word c of a row holds columns 256 c + lane (low) and 256 c + 128 + lane (high).

    move = min(s.tiling.move, tokens)
    pieces = -(-tokens // move)  # the last piece overlaps the one before

    def piece_start(piece):
        return pl.multiple_of(jnp.minimum(piece * move, tokens - move), 16)

    def x_copy(piece):
        buffer = piece % IN_FLIGHT
        source = x_hbm.at[pl.ds(first_token + piece_start(piece), move)]
        return pltpu.make_async_copy(source, arriving.at[buffer], x_arrived.at[buffer])

    for piece in range(min(IN_FLIGHT, pieces)):
        x_copy(piece).start()

    # The experts that were hit, and where the rows of each begin. The first one's weights are asked for at once, or,
    # as copies are served in order, after the last piece of x.

    experts = counts.shape[0]
    hit[0] = lax.while_loop(
        lambda expert: (expert < experts - 1) & (counts[expert] == 0), lambda expert: expert + 1, jnp.int32(0)
    )
    if pieces <= IN_FLIGHT:
        fetch_expert(0)

    def list_expert(expert, carry):
        number, row = carry
        hit[number], offsets[number] = expert, row
        return number + (counts[expert] > 0).astype(i32), row + counts[expert]

    experts_hit, rows = lax.fori_loop(0, experts, list_expert, (jnp.int32(0), jnp.int32(0)))
    offsets[experts_hit] = offsets[experts_hit + 1] = rows

    def pack_piece(piece, _):
        x_copy(piece).wait()

        def pack_sixteen(group, _):
            rows = pl.ds(pl.multiple_of(group * 16, 16), 16)
            for c in range(s.words):
                left, right = (arriving[piece % IN_FLIGHT, rows, _columns(2 * c + half)] for half in range(2))
                even, odd = _exchange_halves(pltpu.bitcast(left, i32), pltpu.bitcast(right, i32))
                at = (piece_start(piece) + group * 16) * s.words + c
                x_words[pl.ds(at, 8, stride=2 * s.words), :] = even
                x_words[pl.ds(at + s.words, 8, stride=2 * s.words), :] = odd
            return 0

        lax.fori_loop(0, move // 16, pack_sixteen, 0)
        if pieces > IN_FLIGHT:
            pl.when(piece + IN_FLIGHT < pieces)(lambda: x_copy(piece + IN_FLIGHT).start())
            pl.when(piece + IN_FLIGHT == pieces - 1)(lambda: fetch_expert(0))
        return 0

    lax.fori_loop(0, pieces, pack_piece, 0)
    for line, count in _pieces(s.words, 8):
        x_words[pl.ds(tokens * s.words + line, count), :] = jnp.zeros((count, LANES), i32)

    def clear(group, _):
        sums[pl.ds(pl.multiple_of(group * 64, 64), 64), :] = jnp.zeros((64, LANES), f32)
        return 0

    lax.fori_loop(0, sums.shape[0] // 64, clear, 0)

    # Work that rides along with products. `zero` are zeros that depend on a product: without them the scheduler puts
    # this work before the product, where it hides nothing.

    def gather(first, end, step, part=0, parts=1, zero=None):
        """Rows `first` to `end` of the next tile, as far as this part of this step goes: x_words to x_tile."""
        groups = s.gathered_a_step // 16
        for group in range(groups * part // parts, groups * (part + 1) // parts):
            base = pl.multiple_of(step * s.gathered_a_step + group * 16, 16)
            for r in range(16):
                row = first + base + r
                at = jnp.where(row < end, pairs[row] >> slot_bits, tokens) * s.words
                at = pl.multiple_of(at, 8) if s.words % 8 == 0 else at
                for line, count in _pieces(s.words, 8):
                    to = (group * 16 + r) * s.word_pitch + line
                    words = x_words[pl.ds(at + line, count), :]
                    stage[to : to + count, :] = words if zero is None else words | zero[:count]
            for c in range(s.words):
                at = group * 16 * s.word_pitch + c
                even, odd = (stage[pl.ds(at + i * s.word_pitch, 8, stride=2 * s.word_pitch), :] for i in range(2))
                for half, words in enumerate(_exchange_halves(even, odd)):
                    x_tile[pl.ds(base, 16), _columns(2 * c + half)] = pltpu.bitcast(words, bf16)

    def combine(first, end, step, part=0, parts=1, zero=None):
        """sums[token] += weight * output, for rows `gate_steps` apart: neighbours in a list may be of one token only
        if a router names an expert twice."""
        last = s.combined_a_step * (part + 1) // parts
        at_once = _COMBINED_AT_ONCE if s.gate_steps >= k else 1
        for begin in range(s.combined_a_step * part // parts, last, at_once):
            added = []
            for r in range(begin, min(last, begin + at_once)):
                place = step + r * s.gate_steps
                pair = pairs[first + place]
                at = jnp.where(first + place < end, pair >> slot_bits, tokens) * s.lines
                at = pl.multiple_of(at, 8) if s.lines % 8 == 0 else at
                weight = weights[pair] if zero is None else weights[pair] + pltpu.bitcast(zero, f32)
                for line, count in _pieces(s.lines, 8):
                    to = pl.ds(at + line, count)
                    row = outputs[pl.ds(place * s.line_pitch + line, count), :]
                    added.append((to, sums[to, :] + (weight if zero is None else weight[:count]) * row))
            for to, value in added:
                sums[to, :] = value

    def activate(height, column, part=0, parts=1):
        """silu(gate) * up of one step's columns, a part of the rows."""
        low, high = (height // 16 * (part + i) // parts * 16 for i in range(2))
        if low < high:
            g, u = gate_up[low:high, :LANES], gate_up[low:high, LANES:]
            columns = pl.ds(pl.multiple_of(column * LANES, LANES), LANES)
            hidden[low:high, columns] = (g * (1.0 / (1.0 + jnp.exp(-g))) * u).astype(bf16)

    def product(depth: int, partial_product: Callable, ride: Callable | None):
        """A product in partial ones along its depth, `ride(part, parts, product so far)` between them."""
        blocks = list(_pieces(depth, _PRODUCT_DEPTH))
        rides = max(1, len(blocks) - 1)  # nothing rides after the last: its result is waited for
        total = None
        for part, (begin, size) in enumerate(blocks):
            new = partial_product(begin, size)
            total = new if total is None else total + new
            if ride is not None and part < rides:
                ride(part, rides, new)
        return total

    def tile(height, number, is_first, previous, previous_end, following, following_end):
        """One row tile: its products, and beside them the combining of the tile before, the gathering of the next."""
        slot = number % 2

        def gate_step(step, _):
            columns = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)

            def partial_product(k, size):
                both = [kernel[slot, k : k + size, columns] for kernel in (gate, up)]
                return jnp.dot(
                    x_tile[0:height, k : k + size], jnp.concatenate(both, axis=1), preferred_element_type=f32
                )

            def ride(part, parts, so_far):
                # The step before is activated; before the first step that is garbage, and overwritten.
                activate(height, jnp.maximum(step - 1, 0), part, parts)
                combine(previous, previous_end, step, part, parts, _zeros_after(so_far))

            gate_up[0:height, :] = product(s.width, partial_product, ride)
            return 0

        def down_step(step, _):
            columns = pl.ds(pl.multiple_of(step * _DOWN_COLUMNS, LANES), _DOWN_COLUMNS)

            def partial_product(k, size):
                kernel = down[slot, k : k + size, columns]
                return jnp.dot(hidden[0:height, k : k + size], kernel, preferred_element_type=f32)

            def ride(part, parts, so_far):
                gather(following, following_end, step, part, parts, _zeros_after(so_far))

            total = product(s.expert_width, partial_product, ride)
            for c in range(_DOWN_COLUMNS // LANES):
                for row in range(0, height, 8):
                    line = step * (_DOWN_COLUMNS // LANES) + c
                    outputs[pl.ds(row * s.line_pitch + line, 8, stride=s.line_pitch), :] = total[
                        row : row + 8, c * LANES : (c + 1) * LANES
                    ]
            return 0

        lax.fori_loop(0, s.gate_steps, gate_step, 0)
        activate(height, s.gate_steps - 1)

        def down_piece(piece, _):
            pl.when(is_first)(lambda: down_copy(number, piece).wait())
            steps = s.down_steps // s.down_pieces
            return lax.fori_loop(piece * steps, (piece + 1) * steps, down_step, 0)

        lax.fori_loop(0, s.down_pieces, down_piece, 0)

    # All tiles, expert by expert.

    def gather_first(step, _):
        gather(0, jnp.minimum(offsets[1], heights[0]), step)
        return 0

    lax.fori_loop(0, s.down_steps, gather_first, 0)

    def next_tile(carry):
        number, row, previous, previous_end = carry
        is_first, end = row == offsets[number], offsets[number + 1]

        @pl.when(is_first)
        def _():
            pl.when(number + 1 < experts_hit)(lambda: fetch_expert(number + 1))
            for copy in gate_up_copies(number):
                copy.wait()

        kind, height = _tile_for(end - row, s.tiling)
        tile_end = jnp.minimum(row + height, end)
        following_number = number + (tile_end == end).astype(i32)
        following_end = jnp.where(following_number < experts_hit, offsets[following_number + 1], tile_end)
        for candidate, rows in enumerate(heights):
            pl.when(kind == candidate)(
                functools.partial(tile, rows, number, is_first, previous, previous_end, tile_end, following_end)
            )
        return following_number, tile_end, row, tile_end

    start = (jnp.int32(0),) * 4
    _, _, previous, previous_end = lax.while_loop(lambda carry: carry[0] < experts_hit, next_tile, start)

    def await_expert():
        for copy in copies_of(0):
            copy.wait()

    pl.when(experts_hit == 0)(await_expert)  # it was asked for ahead of the count, and nothing waited for it

    def combine_last(step, _):
        combine(previous, previous_end, step)
        return 0

    lax.fori_loop(0, jnp.minimum(s.gate_steps, previous_end - previous), combine_last, 0)

    # The sums leave as rows of bfloat16.

    def out_copy(piece):
        buffer = piece % IN_FLIGHT
        target = out_hbm.at[pl.ds(first_token + piece_start(piece), move)]
        return pltpu.make_async_copy(leaving.at[buffer], target, out_left.at[buffer])

    def store_piece(piece, _):
        if pieces > IN_FLIGHT:
            pl.when(piece >= IN_FLIGHT)(lambda: out_copy(piece - IN_FLIGHT).wait())

        def store_sixteen(group, _):
            for c in range(s.lines):
                at = (piece_start(piece) + group * 16) * s.lines + c
                halves = [sums[pl.ds(at + i * 8 * s.lines, 8, stride=s.lines), :] for i in range(2)]
                rows = pl.ds(pl.multiple_of(group * 16, 16), 16)
                leaving[piece % IN_FLIGHT, rows, _columns(c)] = jnp.concatenate(halves, axis=0).astype(bf16)
            return 0

        lax.fori_loop(0, move // 16, store_sixteen, 0)
        out_copy(piece).start()
        return 0

    lax.fori_loop(0, pieces, store_piece, 0)
    for piece in range(max(0, pieces - IN_FLIGHT), pieces):
        out_copy(piece).wait()


def _tile_for(rows_left, tiling: Tiling):
    """(kind, height) of the next tile of an expert with so many rows left."""
    kind, height = jnp.int32(0), jnp.int32(tiling.heights[0])
    for rows, candidate in tiling.plan:
        kind = jnp.where(rows_left <= rows, candidate, kind)
        height = jnp.where(rows_left <= rows, tiling.heights[candidate], height)
    return kind, height


def _exchange_halves(a, b):
    """Words (low of a, low of b) and (high of a, high of b). Done twice it changes nothing."""
    return (a & 0xFFFF) | (b << 16), lax.shift_right_logical(a, jnp.full_like(a, 16)) | (b & jnp.int32(-65536))


def _zeros_after(product):
    """Integer zeros that depend on a product: the sign bit of its absolute value."""
    bits = pltpu.bitcast(product[:8, :LANES], jnp.int32)
    return lax.shift_right_logical(bits & jnp.int32(0x7FFFFFFF), jnp.full_like(bits, 31))


def _columns(tile: int) -> slice:
    return slice(tile * LANES, (tile + 1) * LANES)


def _pieces(length: int, most: int) -> list[tuple[int, int]]:
    """(begin, size) of pieces of at most `most`."""
    return [(begin, min(most, length - begin)) for begin in range(0, length, most)]


def bits_of(values: int) -> int:
    """Bits that numbers below `values` take."""
    return (values - 1).bit_length()
