"""A cache in pages of 128 rows, and where in a page a row lies.

B sequences, N pages, H heads, K head width, R latent rank, P rotated width. Sequence b holds its position p in row
p % 128 of page `table[b, p // 128]`. A contiguous cache has no table: its arrays have an axis of sequences before that
of pages, `[B, n, ...]`, and page j of sequence b is `[b, j]`.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

PAGE = 128  # rows: 147 KB of latents in bfloat16, which a copy brings at the full rate of the memory
HALF = PAGE // 2


class LatentPages(NamedTuple):
    """Latents and rotated parts, which all heads share.

    The rotated part of row i stands beside that of row i + 64, so that 64 wide ones fill 128 lanes:

        latents[n]                     rotated[n]
        row 0   | R numbers |          | row 0,  P | row 64,  P |
        row 1   |           |          | row 1     | row 65     |
        ...                            ...
        row 127 |           |          (64 lines)
    """

    latents: Float[Array, "N 128 R"]
    rotated: Float[Array, "N 64 2*P"]

    def rows(self) -> tuple[Float[Array, "... n*128 R"], Float[Array, "... n*128 P"]]:
        """Pages `[..., n, ...]` as rows, in the order of their positions."""
        latents = rearrange(self.latents, "... n s r -> ... (n s) r")
        return latents, rearrange(self.rotated, "... n i (half p) -> ... (n half i) p", half=2)

    @staticmethod
    def of_rows(latents: Float[Array, "... n*128 R"], rotated: Float[Array, "... n*128 P"]) -> LatentPages:
        """Rows as pages."""
        return LatentPages(
            rearrange(latents, "... (n s) r -> ... n s r", s=PAGE),
            rearrange(rotated, "... (n half i) p -> ... n i (half p)", half=2, i=HALF),
        )

    def begin_of(self, row: Array) -> tuple[tuple[Array | int, ...], ...]:
        """Indices of the first number of a row in a page of each array."""
        width = self.rotated.shape[-1] // 2
        return (row, 0), (row % HALF, row // HALF * width)


class HeadPages(NamedTuple):
    """Keys and values of every head."""

    keys: Float[Array, "N H 128 K"]
    values: Float[Array, "N H 128 K"]

    def rows(self) -> tuple[Float[Array, "... H n*128 K"], Float[Array, "... H n*128 K"]]:
        """Pages `[..., n, ...]` as rows, in the order of their positions."""
        keys, values = (rearrange(pages, "... n h s k -> ... h (n s) k") for pages in self)
        return keys, values

    @staticmethod
    def of_rows(keys: Float[Array, "... H n*128 K"], values: Float[Array, "... H n*128 K"]) -> HeadPages:
        """Rows as pages."""
        return HeadPages(*(rearrange(rows, "... h (n s) k -> ... n h s k", s=PAGE) for rows in (keys, values)))

    def begin_of(self, row: Array) -> tuple[tuple[Array | int, ...], ...]:
        """Indices of the first number of a row in a page of each array."""
        return ((0, row, 0),) * 2


Pages = TypeVar("Pages", LatentPages, HeadPages)


def shapes_of_page(pages: LatentPages | HeadPages) -> list[tuple[int, ...]]:
    """Shape of one page in each array."""
    rank = 3 if isinstance(pages, HeadPages) else 2
    return [array.shape[-rank:] for array in pages]


def pages_a_sequence(pages: LatentPages | HeadPages, table: Int[Array, "B per"] | None, sequences: int) -> int:
    """How many pages a sequence may have.

    Raises:
      ValueError: the pages, or the table, are of other sequences.
    """
    given = pages[0] if table is None else table
    if given.shape[0] != sequences:
        what = f"pages {pages[0].shape} without a table" if table is None else f"a table of {table.shape[0]} rows"
        raise ValueError(
            f"{what} for {sequences} sequences; a contiguous cache is [B, n, ...], other pages have a table."
        )
    return given.shape[1]


def flat(pages: Pages, table: Int[Array, "B per"] | None) -> Pages:
    """Pages without an axis of sequences."""
    return pages if table is not None else type(pages)(*(array.reshape(-1, *array.shape[2:]) for array in pages))


def full_table(
    pages: LatentPages | HeadPages, table: Int[Array, "B per"] | None, sequences: int
) -> Int[Array, "B per"]:
    """The table, written out for pages that were a contiguous cache and are `flat` now."""
    if table is not None:
        return table
    per = pages_a_sequence(pages, None, sequences)
    return jnp.arange(sequences * per, dtype=jnp.int32).reshape(sequences, per)
