"""What the forward and the backward kernel share: rows of tokens in vector memory, and the row tiles of the experts.

    HBM -> arriving [move, D] -> words: two bfloat16 a word, so that a row is a few whole vectors
    words -> stage -> tile        a row is gathered by one load and one strided store, 16 rows are unpacked together
    outputs -> sums -> leaving -> HBM        a row is combined by a few vector operations, and leaves as bfloat16

N tokens, k experts a token, D model width, E experts, M rows of a tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl2_jax.ops.expert_ffn.stored import Matrix, partial_product, scaled
from vl2_jax.ops.expert_ffn.tiling import IN_FLIGHT, LANES, Scratch, Tiling

PRODUCT_DEPTH = 512  # of a partial product; between two of them stands other work
_COMBINED_AT_ONCE = 8  # rows loaded before the first is stored; all of different tokens


class Ordered(NamedTuple):
    """Routing as a kernel reads it, in scalar memory."""

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


def cut_experts(
    expert_ids: Int[Array, "N k"], combine_weights: Float[Array, "N k"], experts: int, parts: int
) -> tuple[Int[Array, "N k*parts"], Float[Array, "N k*parts"]]:
    """Routing to parts of experts, those of one expert next to each other (`Tiling.parts`)."""
    if parts == 1:
        return expert_ids, combine_weights
    every = [jnp.where(expert_ids < experts, expert_ids * parts + part, experts * parts) for part in range(parts)]
    return jnp.concatenate(every, axis=1), jnp.tile(combine_weights, (1, parts))


class Part(NamedTuple):
    """Where a part of an expert's weights stands."""

    expert: Any
    is_first: Any
    first_column: Any
    overlaps: Any  # the part after it, which ends where the expert does


def part_of(number, scratch: Scratch) -> Part:
    """The part with this number among those of all experts."""
    parts, width = scratch.tiling.parts, scratch.part_width
    if parts == 1:
        return Part(number, True, 0, False)
    part = lax.rem(number, parts)
    column = pl.multiple_of(jnp.minimum(part * width, scratch.expert_width - width), LANES)
    return Part(lax.div(number, parts), part == 0, column, part == parts - 2)


def cleared_of_overlap(columns, step, part: Part, scratch: Scratch):
    """A step's columns, or 0 where they are the next part's too."""
    if not scratch.overlap:
        return columns
    return jnp.where(part.overlaps & (step >= scratch.gate_steps - scratch.overlap), 0.0, columns)


class Gathered(NamedTuple):
    """Buffers that rows pass on their way into a tile."""

    words: Any
    stage: Any
    tile: Any


@dataclass(frozen=True)
class Rows:
    """Moves of the rows of the tokens that are in vector memory at once.

    Attributes:
      pairs: (token, slot) pairs in scalar memory, sorted by expert.
      first_token, tokens: which rows of HBM these are.
    """

    scratch: Scratch
    pairs: Any
    first_token: int
    tokens: int
    k: int

    @property
    def move(self) -> int:
        return min(self.scratch.tiling.move, self.tokens)

    @property
    def pieces(self) -> int:
        return -(-self.tokens // self.move)  # the last piece overlaps the one before

    @property
    def slot_bits(self) -> int:
        return bits_of(self.k)

    def piece_start(self, piece):
        return pl.multiple_of(jnp.minimum(piece * self.move, self.tokens - self.move), 16)

    # Rows arrive in pieces and are packed: word c of a row holds columns 256 c + lane (low) and 256 c + 128 + lane.

    def arrival(self, source, arriving, arrived, piece):
        buffer = piece % IN_FLIGHT
        rows = source.at[pl.ds(self.first_token + self.piece_start(piece), self.move)]
        return pltpu.make_async_copy(rows, arriving.at[buffer], arrived.at[buffer])

    def ask(self, source, arriving, arrived):
        """Starts the first copies; `pack` starts the others."""
        for piece in range(min(IN_FLIGHT, self.pieces)):
            self.arrival(source, arriving, arrived, piece).start()

    def pack(self, source, arriving, arrived, words, when_all_are_asked_for: Callable = lambda: None):
        """Packs all rows as they arrive, and a row of zeros that belongs to no token."""
        s, move = self.scratch, self.move

        def pack_piece(piece, _):
            self.arrival(source, arriving, arrived, piece).wait()

            def pack_sixteen(group, _):
                rows = pl.ds(pl.multiple_of(group * 16, 16), 16)
                for c in range(s.words):
                    left, right = (arriving[piece % IN_FLIGHT, rows, columns_of(2 * c + half)] for half in range(2))
                    even, odd = exchange_halves(pltpu.bitcast(left, jnp.int32), pltpu.bitcast(right, jnp.int32))
                    at = (self.piece_start(piece) + group * 16) * s.words + c
                    words[pl.ds(at, 8, stride=2 * s.words), :] = even
                    words[pl.ds(at + s.words, 8, stride=2 * s.words), :] = odd
                return 0

            lax.fori_loop(0, move // 16, pack_sixteen, 0)
            if self.pieces > IN_FLIGHT:
                following = piece + IN_FLIGHT
                pl.when(following < self.pieces)(lambda: self.arrival(source, arriving, arrived, following).start())
                pl.when(following == self.pieces - 1)(when_all_are_asked_for)
            return 0

        lax.fori_loop(0, self.pieces, pack_piece, 0)
        for line, count in pieces_of(s.words, 8):
            words[pl.ds(self.tokens * s.words + line, count), :] = jnp.zeros((count, LANES), jnp.int32)

    # Work that rides along with products. `zero` are zeros that depend on a product: without them the scheduler puts
    # this work before the product, where it hides nothing.

    def gather(self, source: Gathered, a_step, first, end, step, part=0, parts=1, zero=None):
        """Rows `first` to `end` of the next tile, as far as this part of this step goes: words to tile."""
        s = self.scratch
        groups = a_step // 16
        for group in range(groups * part // parts, groups * (part + 1) // parts):
            base = pl.multiple_of(step * a_step + group * 16, 16)
            for r in range(16):
                row = first + base + r
                at = jnp.where(row < end, self.pairs[row] >> self.slot_bits, self.tokens) * s.words
                at = _whole_vectors(at, s.words)
                for line, count in pieces_of(s.words, 8):
                    to = (group * 16 + r) * s.word_pitch + line
                    words = source.words[pl.ds(at + line, count), :]
                    source.stage[to : to + count, :] = words if zero is None else words | zero[:count]
            for c in range(s.words):
                top = group * 16 * s.word_pitch + c
                even, odd = (
                    source.stage[pl.ds(top + i * s.word_pitch, 8, stride=2 * s.word_pitch), :] for i in range(2)
                )
                for half, words in enumerate(exchange_halves(even, odd)):
                    source.tile[pl.ds(base, 16), columns_of(2 * c + half)] = pltpu.bitcast(words, jnp.bfloat16)

    def put_out(self, product, outputs, step):
        """A product's columns as lines of the outputs' rows."""
        s, tiles = self.scratch, product.shape[1] // LANES
        for c in range(tiles):
            for row in range(0, product.shape[0], 8):
                lines = pl.ds(row * s.line_pitch + step * tiles + c, 8, stride=s.line_pitch)
                outputs[lines, :] = product[row : row + 8, columns_of(c)]

    def combine(self, outputs, sums, weights, first, end, step, part=0, parts=1, zero=None):
        """sums[token] += weight * output, for rows `gate_steps` apart: neighbours in a list may be of one token only
        if a router names an expert twice. All weights are 1 where there are none."""
        s = self.scratch
        last = s.combined_a_step * (part + 1) // parts
        at_once = _COMBINED_AT_ONCE if s.gate_steps >= self.k else 1
        for begin in range(s.combined_a_step * part // parts, last, at_once):
            added = []
            for r in range(begin, min(last, begin + at_once)):
                place = step + r * s.gate_steps
                pair = self.pairs[first + place]
                at = jnp.where(first + place < end, pair >> self.slot_bits, self.tokens) * s.lines
                at = _whole_vectors(at, s.lines)
                if weights is not None:
                    weight = weights[pair] if zero is None else weights[pair] + pltpu.bitcast(zero, jnp.float32)
                for line, count in pieces_of(s.lines, 8):
                    to = pl.ds(at + line, count)
                    row = outputs[pl.ds(place * s.line_pitch + line, count), :]
                    if weights is not None:
                        row = (weight if zero is None else weight[:count]) * row
                    elif zero is not None:
                        row = row + pltpu.bitcast(zero, jnp.float32)[:count]
                    added.append((to, sums[to, :] + row))
            for to, value in added:
                sums[to, :] = value

    def send(self, sums, leaving, target, left):
        """The sums leave as rows of bfloat16."""
        s, move = self.scratch, self.move

        def departure(piece):
            buffer = piece % IN_FLIGHT
            rows = target.at[pl.ds(self.first_token + self.piece_start(piece), move)]
            return pltpu.make_async_copy(leaving.at[buffer], rows, left.at[buffer])

        def store_piece(piece, _):
            if self.pieces > IN_FLIGHT:
                pl.when(piece >= IN_FLIGHT)(lambda: departure(piece - IN_FLIGHT).wait())

            def store_sixteen(group, _):
                for c in range(s.lines):
                    at = (self.piece_start(piece) + group * 16) * s.lines + c
                    halves = [sums[pl.ds(at + i * 8 * s.lines, 8, stride=s.lines), :] for i in range(2)]
                    rows = pl.ds(pl.multiple_of(group * 16, 16), 16)
                    both = jnp.concatenate(halves, axis=0).astype(jnp.bfloat16)
                    leaving[piece % IN_FLIGHT, rows, columns_of(c)] = both
                return 0

            lax.fori_loop(0, move // 16, store_sixteen, 0)
            departure(piece).start()
            return 0

        lax.fori_loop(0, self.pieces, store_piece, 0)
        for piece in range(max(0, self.pieces - IN_FLIGHT), self.pieces):
            departure(piece).wait()


def clear(buffer):
    """Zeros in a buffer of whole groups of 64 lines."""

    def clear_group(group, _):
        buffer[pl.ds(pl.multiple_of(group * 64, 64), 64), :] = jnp.zeros((64, LANES), buffer.dtype)
        return 0

    lax.fori_loop(0, buffer.shape[0] // 64, clear_group, 0)


def first_expert(counts):
    """The first expert that was hit; the last, if none was."""
    experts = counts.shape[0]
    return lax.while_loop(
        lambda expert: (expert < experts - 1) & (counts[expert] == 0), lambda expert: expert + 1, jnp.int32(0)
    )


def list_experts(counts, hit, offsets):
    """Lists the experts that were hit, and where the rows of each begin; returns how many."""

    def list_expert(expert, carry):
        number, row = carry
        hit[number], offsets[number] = expert, row
        return number + (counts[expert] > 0).astype(jnp.int32), row + counts[expert]

    experts_hit, rows = lax.fori_loop(0, counts.shape[0], list_expert, (jnp.int32(0), jnp.int32(0)))
    offsets[experts_hit] = offsets[experts_hit + 1] = rows
    return experts_hit


class TilePlace(NamedTuple):
    """Which rows a tile holds, and those of its neighbours."""

    number: Any  # of the expert among those that were hit
    is_first: Any  # of its expert
    row: Any
    end: Any
    previous: Any
    previous_end: Any
    following_end: Any  # the next tile begins where this one ends


def walk_tiles(tiling: Tiling, offsets, experts_hit, begin_tile: Callable, tile: Callable):
    """`begin_tile(place)` and `tile(height, place)` of all tiles, expert by expert; returns the last one's rows."""

    def next_tile(carry):
        number, row, previous, previous_end = carry
        is_first, end = row == offsets[number], offsets[number + 1]
        kind, height = _tile_for(end - row, tiling)
        tile_end = jnp.minimum(row + height, end)
        following_number = number + (tile_end == end).astype(jnp.int32)
        following_end = jnp.where(following_number < experts_hit, offsets[following_number + 1], tile_end)
        place = TilePlace(number, is_first, row, tile_end, previous, previous_end, following_end)
        begin_tile(place)
        for candidate, rows in enumerate(tiling.heights):
            pl.when(kind == candidate)(functools.partial(tile, rows, place))
        return following_number, tile_end, row, tile_end

    return lax.while_loop(lambda carry: carry[0] < experts_hit, next_tile, (jnp.int32(0),) * 4)[2:]


def _tile_for(rows_left, tiling: Tiling):
    """(kind, height) of the next tile of an expert with so many rows left."""
    kind, height = jnp.int32(0), jnp.int32(tiling.heights[0])
    for rows, candidate in tiling.plan:
        kind = jnp.where(rows_left <= rows, candidate, kind)
        height = jnp.where(rows_left <= rows, tiling.heights[candidate], height)
    return kind, height


def in_groups(count: int, of: int, step: Callable):
    """`step(i)` for all i below `count`, some in one body: while the MXU empties after one, it fills for the next."""

    def group(number, _):
        for i in range(of):
            step(of * number + i)
        return 0

    if count >= of:
        lax.fori_loop(0, count // of, group, 0)
    for i in range(count - count % of, count):
        step(jnp.int32(i))


def product_along(depth: int, partial_product: Callable, ride: Callable | None):
    """A product in partial ones along its depth, `partial_product(begin, size)`."""
    return product([functools.partial(partial_product, *piece) for piece in pieces_of(depth, PRODUCT_DEPTH)], ride)


def product_with(x_rows, matrices: Sequence[Matrix], columns, ride: Callable):
    """Products of rows `[M, D]` in vector memory with columns of one expert's matrices, side by side."""
    partial = functools.partial(partial_product, x_rows, matrices, columns)
    return scaled(product_along(x_rows.shape[1], partial, ride), matrices, columns)


def product(partial_products: Sequence[Callable], ride: Callable | None):
    """A sum of partial products, `ride(part, parts, zeros that depend on the product so far)` between them."""
    rides = max(1, len(partial_products) - 1)  # nothing rides after the last: its result is waited for
    total = None
    for part, multiply in enumerate(partial_products):
        new = multiply()
        total = new if total is None else total + new
        if ride is not None and part < rides:
            ride(part, rides, _zeros_after(new))
    return total


def _whole_vectors(at, lines: int):
    """A row's first line, and what is known of it."""
    return pl.multiple_of(at, 8) if lines % 8 == 0 else at


def exchange_halves(a, b):
    """Words (low of a, low of b) and (high of a, high of b). Done twice it changes nothing."""
    return (a & 0xFFFF) | (b << 16), lax.shift_right_logical(a, jnp.full_like(a, 16)) | (b & jnp.int32(-65536))


def _zeros_after(product):
    """Integer zeros that depend on a product: the sign bit of its absolute value."""
    bits = pltpu.bitcast(product[:8, :LANES], jnp.int32)
    return lax.shift_right_logical(bits & jnp.int32(0x7FFFFFFF), jnp.full_like(bits, 31))


def columns_of(tile: int) -> slice:
    return slice(tile * LANES, (tile + 1) * LANES)


def pieces_of(length: int, most: int) -> list[tuple[int, int]]:
    """(begin, size) of pieces of at most `most`."""
    return [(begin, min(most, length - begin)) for begin in range(0, length, most)]


def bits_of(values: int) -> int:
    """Bits that numbers below `values` take."""
    return (values - 1).bit_length()
