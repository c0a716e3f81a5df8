"""How the TPU kernel cuts its work: a small table by chip and shape, with the measurement behind each choice.

All times are modelled from the TPU compiler's final schedule (see `docs/expert-dispatch.md`), not measured on a chip.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from vl2_jax.ops.chips import Chip

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
    """

    heights: tuple[int, ...]
    chunk: int
    move: int
    vmem: int
    floor: int
    fixed: int

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


def choose_tiling(chip: Chip, tokens: int, width: int, expert_width: int, experts: int, k: int) -> Tiling | None:
    """The tiling for a chip and a shape, or None where the weights of two experts do not fit in vector memory.

    As many tokens a call as fit beside the weights of two experts. The tallest tile:
      128 x 128 MXU (v5e, v5p): a tile costs little by itself, so a little above an expert's mean share; the rest gets
        low tiles (v5e, 4096 tokens, Small: tallest 256 takes 2689 us, 384 takes 2432).
      256 x 256 MXU (v6e, tpu7x): a tile costs some 110 rows by itself, so one tile for nearly every expert, two and a
        half deviations above the mean (v6e, the same: 384 takes 845 us, 448 takes 759).
    """
    wide = chip.mxu == 256
    rows = round_up(tokens, 16)
    for calls in range(1, rows // 16 + 1):
        chunk = round_up(-(-rows // calls), 16)
        share = chunk * k / experts
        if share <= 64:
            heights: tuple[int, ...] = (64, 32, 16)
        else:
            tallest = min(512, share + 2.5 * math.sqrt(share)) if wide else min(384, share)
            tall = round_up(int(tallest), 32)
            heights = (tall, *(h for h in ((384, 256, 128, 32) if wide else (256, 128, 64, 32)) if h < tall - 16))
        floor, fixed = (128, 110) if wide else (40, 8)
        tiling = Tiling(heights, chunk, min(64, chunk), chip.vmem - 2 * _MIB, floor, fixed)
        if tiling.vmem > 0 and scratch_bytes(tiling, width, expert_width) <= tiling.vmem - _MIB:
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
    def gate_steps(self) -> int:
        return self.expert_width // LANES

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


def scratch_bytes(tiling: Tiling, width: int, expert_width: int) -> int:
    """Vector memory the kernel takes: two experts' weights, x, the float32 sums, and one tile's intermediates."""
    s, tall = Scratch(tiling, width, expert_width), tiling.heights[0]
    weights = 2 * 3 * width * expert_width * 2
    x = (tiling.chunk + 1) * s.words * LANES * 4
    sums = (tiling.chunk + 1) * s.lines * LANES * 4
    tile = s.gathered_a_step * (s.down_steps * width * 2 + s.word_pitch * LANES * 4)
    hidden = tall * (2 * LANES * 4 + expert_width * 2)
    outputs = s.combined_a_step * s.gate_steps * s.line_pitch * LANES * 4
    moving = 2 * IN_FLIGHT * tiling.move * width * 2
    return weights + x + sums + tile + hidden + outputs + moving


IN_FLIGHT = 4  # copies of x and of the output that are under way at once


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _odd(n: int) -> int:
    return n + (n % 4 == 0)
