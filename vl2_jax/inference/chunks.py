"""A prompt in chunks of few lengths: each length is a program to compile, and each chunk reads the weights once.

    CPU   512  64             1087 positions are 512 + 512 + 64
    TPU   4096 1024 256 64    1087 positions are 1024 + 64; 3500 are 4096, some of them padding

Positions past the end of a prompt reach no expert; what they cost is projections and shared experts.
"""

from __future__ import annotations

from typing import NamedTuple

_SHORTEST = 64
_MOST_ROWS = 8192  # of all sequences that a device has, so that a chunk's activations stay far below its weights


class Chunking(NamedTuple):
    """How prompts are cut on a platform.

    Attributes:
      most: positions of the longest chunk.
      ratio: of one length to the next.
      overhead: what a chunk costs by itself, as rows. Reading all experts of a layer takes a TPU as long as computing
        2048 rows (modelled: 1.2 ms for Small on v5e, 2.4 ms for both at 4096).
      devices: over which sequences are spread.
    """

    most: int
    ratio: int
    overhead: int
    devices: int = 1

    def within(self, room: int) -> Chunking:
        """Of a cache that has room for so many positions."""
        return self._replace(most=min(self.most, room))

    def lengths(self, sequences: int = 1) -> list[int]:
        """Of the chunks of so many sequences, the longest first: multiples of the shortest, at which all begin."""
        rows = -(-sequences // self.devices)
        shortest, count = self.most, 1
        while shortest // self.ratio >= _SHORTEST:
            shortest, count = shortest // self.ratio, count + 1
        lengths = [shortest * self.ratio**power for power in reversed(range(count))]
        return [length for length in lengths if length * rows <= _MOST_ROWS] or [shortest]

    def cut(self, positions: int, sequences: int = 1) -> list[int]:
        """Lengths of the chunks that hold so many positions at the least cost, the longest first."""
        lengths, rows = self.lengths(sequences), -(-sequences // self.devices)
        unit = lengths[-1]
        units = -(-positions // unit)
        costs, choices = [0], [0]
        for number in range(1, units + 1):
            options = [
                (costs[max(0, number - length // unit)] + self.overhead + length * rows, length) for length in lengths
            ]
            cost, choice = min(options)
            costs.append(cost)
            choices.append(choice)
        chunks = []
        while units > 0:
            chunks.append(choices[units])
            units -= choices[units] // unit
        return sorted(chunks, reverse=True)


_TPU = Chunking(4096, 4, 2048)
_OTHER = Chunking(512, 8, 64)


def chunking(platform: str, most: int | None = None, devices: int = 1) -> Chunking:
    """For a platform by its JAX name; with `most`, no chunk is longer."""
    usual = _TPU if platform == "tpu" else _OTHER
    return usual._replace(most=usual.most if most is None else most, devices=devices)
