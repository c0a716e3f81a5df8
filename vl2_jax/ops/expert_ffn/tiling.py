"""How the TPU kernel cuts its work: a small table by chip and shape, with the measurement behind each choice.

All times are modelled from the TPU compiler's final schedule (see `docs/expert-dispatch.md`), not measured on a chip.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from vl2_jax.ops.chips import Chip
from vl2_jax.ops.expert_ffn.stored import FLOATS, Stored

LANES = 128
_MIB = 1 << 20


@dataclass(frozen=True)
class Tiling:
    """Sizes of one call of the kernel.

    Attributes:
      heights: rows of a row tile, falling. An expert's rows are cut into tiles of these heights.
      chunk: tokens that are in vector memory at once; more tokens take several calls, which read the weights again.
      move: rows of x or of the output that one copy moves.
      vmem: bytes of vector memory the kernel may use.
      floor, fixed: a tile of `m` rows costs as much time as `max(m, floor) + fixed` rows do.
      parts: an expert is cut along F into so many, which are experts of their own: down is linear, so their outputs
        add up to its. They are smaller, so that more tokens fit beside two of them.
      scale_rows: whether rows of int4 weights are multiplied with their scales as they are widened, and not what each
        group of rows adds up to: 128 rows are half of what a 256 x 256 MXU takes at once.
    """

    heights: tuple[int, ...]
    chunk: int
    move: int
    vmem: int
    floor: int
    fixed: int
    parts: int = 1
    scale_rows: bool = False

    @functools.cached_property
    def plan(self) -> list[tuple[int, int]]:
        """[(rows, kind)] from many to few: an expert with at most so many rows left gets a tile `heights[kind]` next.

        The cheapest cut by the cost of a tile, found from few rows to many.
        """
        cost = [max(height, self.floor) + self.fixed for height in self.heights]
        best, first = [0], [0]
        for units in range(1, 2 * self.heights[0] // 16 + 1):
            options = [(c + best[max(0, units - h // 16)], kind) for kind, (c, h) in enumerate(zip(cost, self.heights))]
            value, kind = min(options)
            best.append(value)
            first.append(kind)
        last_of_run = [n for n in range(len(first) - 1, 0, -1) if n == len(first) - 1 or first[n] != first[n + 1]]
        return [(16 * n, first[n]) for n in last_of_run]


def choose_tiling(
    chip: Chip, tokens: int, width: int, expert_width: int, experts: int, k: int, scratch: ScratchOf
) -> Tiling | None:
    """The tiling for a chip and a shape, or None where the weights of two experts do not fit in vector memory.

    `scratch` is what the kernel keeps there.

    As many tokens a call as fit beside the weights of two experts, or of two parts of experts, if weights are read
    less often then. The tallest tile:
      128 x 128 MXU (v5e, v5p): a tile costs little by itself, so about an expert's mean share; the rest gets
        low tiles (v5e, 4096 tokens, Small: tallest 256 takes 2689 us, 384 takes 2412).
      256 x 256 MXU (v6e, tpu7x): a tile costs some 110 rows by itself, so one tile for nearly every expert, two and a
        half deviations above the mean (v6e, the same: 384 takes 845 us, 448 takes 759).
    Few rows an expert get low tiles, which are computed while the next expert arrives; that of narrow weights arrives
    sooner (v6e, int4: a step of the gate and up products is 363 cycles with 64 rows, 304 with 16).
    """
    of_parts = functools.partial(
        _fewest_calls, chip, round_up(tokens, 16), width, expert_width, k / experts, scratch=scratch
    )
    # Parts that overlap compute more; where the weights are read several times it is made up for.
    tiles = expert_width // LANES
    fitting = [of_parts(parts=n) for n in (1, 2, 3) if tiles % n == 0 or chip.vmem <= 64 * _MIB]

    def columns_read(tiling: Tiling) -> int:
        return -(-tokens // tiling.chunk) * tiling.parts * Scratch(tiling, width, expert_width).part_width

    return None if fitting[0] is None else min(filter(None, fitting), key=columns_read)


def _fewest_calls(
    chip: Chip, rows: int, width: int, expert_width: int, share_of_rows: float, *, parts: int, scratch: ScratchOf
) -> Tiling | None:
    wide = chip.mxu == 256
    for calls in range(1, rows // 16 + 1):
        chunk = round_up(-(-rows // calls), 16)
        share = chunk * share_of_rows
        few = share <= 64
        if few:
            heights: tuple[int, ...] = (64, 16) if wide else (64, 32, 16)
        else:
            tallest = min(512, share + 2.5 * math.sqrt(share)) if wide else min(384, share)
            tall = round_up(int(tallest), 32)
            heights = (tall, *(h for h in ((384, 256, 128) if wide else (256, 128, 64, 32)) if h < tall - 16))
        # Where there are tiles of 16 rows, they cost a little less than the next higher ones.
        floor, fixed = (16 if few else 128, 110) if wide else (30 if few else 40, 8)
        tiling = Tiling(heights, chunk, min(64, chunk), chip.vmem - 2 * _MIB, floor, fixed, parts, wide)
        kept = scratch(tiling, width, expert_width)
        if tiling.vmem > 0 and kept.bytes + kept.spilled <= tiling.vmem:
            return tiling
    return None


@dataclass(frozen=True)
class Scratch:
    """Shapes of what the kernel keeps in vector memory, rows x lanes, and how rows are pitched.

    A strided access of 8 rows is one instruction unless the stride is a multiple of 8, which hits one memory bank: so
    rows of the staging buffers are pitched by an odd number (v6e, 4096 tokens, Small: 866 us with even, 845 with odd).
    """

    tiling: Tiling
    width: int
    expert_width: int
    stored: Stored = FLOATS

    @property
    def part_width(self) -> int:
        """Columns of a part of an expert. The last part ends where the expert does, and may overlap the one before."""
        return LANES * -(-(self.expert_width // LANES) // self.tiling.parts)

    @property
    def overlap(self) -> int:
        """Tiles of columns that the last two parts share."""
        return (self.part_width * self.tiling.parts - self.expert_width) // LANES

    @property
    def scale_rows(self) -> bool:
        """`Tiling.scale_rows`, where rows have scales of their own."""
        return self.stored.group > 0 and self.tiling.scale_rows

    @property
    def words(self) -> int:
        """Lines of 128 words of 32 bits that a row of x takes, two bfloat16 a word."""
        return self.width // (2 * LANES)

    @property
    def lines(self) -> int:
        """Lines of 128 float32 that a row of the output takes."""
        return self.width // LANES

    @property
    def word_pitch(self) -> int:
        return _odd(self.words)

    @property
    def line_pitch(self) -> int:
        return _odd(self.lines)

    @property
    def down_steps(self) -> int:
        return self.width // 256

    @property
    def down_pieces(self) -> int:
        """Copies that bring an expert's down projection; each takes as many steps of the product."""
        return 2 if self.down_steps % 2 == 0 else 1

    @property
    def gate_steps(self) -> int:
        return self.part_width // LANES

    @property
    def gathered_a_step(self) -> int:
        """Rows of the next tile that are gathered beside one step of the down product."""
        return 16 * -(-(self.tiling.heights[0] // 16) // self.down_steps)

    @property
    def combined_a_step(self) -> int:
        """Rows of the previous tile that are combined beside one step of the gate and up products."""
        return -(-self.tiling.heights[0] // self.gate_steps)

    @property
    def slack(self) -> int:
        """Rows past the last that index lists must have."""
        return max(self.gathered_a_step * self.down_steps, self.combined_a_step * self.gate_steps)

    def vector_buffers(self, tokens: int) -> list[tuple[tuple[int, ...], str]]:
        """(shape, dtype) of everything in vector memory, in the order of the kernel's parameters.

        One row more than there are tokens takes what belongs to no token.
        """
        tall, move = self.tiling.heights[0], min(self.tiling.move, tokens)
        return [
            *self.stored.shapes(self.width, self.width, self.part_width),  # gate of two experts
            *self.stored.shapes(self.width, self.width, self.part_width),  # up
            *self.stored.shapes(self.part_width, self.expert_width, self.width),  # down
            ((round_up((tokens + 1) * self.words, 8), LANES), "int32"),  # x
            ((round_up((tokens + 1) * self.lines, 64), LANES), "float32"),  # sums
            ((self.gathered_a_step * self.down_steps, self.width), "bfloat16"),  # rows of a tile
            ((self.gathered_a_step * self.word_pitch, LANES), "int32"),  # rows on their way there
            ((tall, 2 * LANES), "float32"),  # gate and up products of one step
            ((tall, self.part_width), "bfloat16"),  # their activation
            ((round_up(self.combined_a_step * self.gate_steps * self.line_pitch, 8), LANES), "float32"),  # outputs
            ((IN_FLIGHT, move, self.width), "bfloat16"),  # x, arriving
            ((IN_FLIGHT, move, self.width), "bfloat16"),  # sums, leaving
        ]

    @property
    def spilled(self) -> int:
        """Bytes of vector memory for what does not fit in registers, at most.

        Products of groups of rows hold more: 818 registers of 4 KB with int4 and tiles of 384 rows (v5e).
        """
        return max(_MIB, 10 * 1024 * self.tiling.heights[0]) if self.stored.group else _MIB

    @property
    def bytes(self) -> int:
        """Vector memory that the kernel takes for a whole chunk."""
        sizes = {"int8": 1, "uint8": 1, "bfloat16": 2, "float32": 4, "int32": 4}
        return sum(math.prod(shape) * sizes[dtype] for shape, dtype in self.vector_buffers(self.tiling.chunk))


ScratchOf = Callable[[Tiling, int, int], Scratch]
IN_FLIGHT = 4  # copies of x and of the output that are under way at once


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _odd(n: int) -> int:
    return n + (n % 4 == 0)
