"""A cache in pages of 128 rows, of floats or of whole numbers with scales, and where in a page a row lies.

B sequences, N pages, H heads, K head width, R latent rank, P rotated width. Sequence b holds its position p in row
p % 128 of page `table[b, p // 128]`. A contiguous cache has no table: its arrays have an axis of sequences before that
of pages, `[B, n, ...]`, and page j of sequence b is `[b, j]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, Int8

from vl2_jax.ops.narrow.kinds import to_int8

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

    @property
    def dtype(self) -> Any:
        """Of rows as they are read."""
        return self.latents.dtype

    def stored(self, rows: Iterable[Float[Array, "... T ?W"]]) -> tuple[Array, ...]:
        """Rows of latents and of rotated parts as the arrays hold them."""
        return tuple(part.astype(self.dtype) for part in rows)

    def floats(self) -> LatentPages:
        """The pages as they are multiplied with."""
        return self

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

    @property
    def dtype(self) -> Any:
        """Of rows as they are read."""
        return self.keys.dtype

    def stored(self, rows: Iterable[Float[Array, "... T ?W"]]) -> tuple[Array, ...]:
        """Rows of keys and of values as the arrays hold them."""
        return tuple(part.astype(self.dtype) for part in rows)

    def floats(self) -> HeadPages:
        """The pages as they are multiplied with."""
        return self

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


class Int8LatentPages(NamedTuple):
    """`LatentPages` in whole numbers, each row of both arrays with a scale, in the dtype that it is read in:

    latents[n], rotated[n]           latent_scales[n], rotated_scales[n]
    as there, a byte a number        | row 0 | row 1 | ... | row 127 |
    """

    latents: Int8[Array, "N 128 R"]
    rotated: Int8[Array, "N 64 2*P"]
    latent_scales: Float[Array, "N 1 128"]
    rotated_scales: Float[Array, "N 1 128"]

    @property
    def dtype(self) -> Any:
        return self.latent_scales.dtype

    def stored(self, rows: Iterable[Float[Array, "... T ?W"]]) -> tuple[Array, ...]:
        return _rounded(rows, self.dtype)

    def floats(self) -> LatentPages:
        of_latents = rearrange(self.latent_scales, "... 1 s -> ... s 1")
        of_halves = rearrange(self.rotated_scales, "... 1 (half i) -> ... i half", half=2)
        of_rotated = jnp.repeat(of_halves, self.rotated.shape[-1] // 2, axis=-1)
        return LatentPages(self.latents.astype(self.dtype) * of_latents, self.rotated.astype(self.dtype) * of_rotated)

    def rows(self) -> tuple[Array, ...]:
        """Pages `[..., n, ...]` as rows of the four arrays, those of scales with one number."""
        scales = (rearrange(scales, "... n 1 s -> ... (n s) 1") for scales in self[2:])
        return *LatentPages(*self[:2]).rows(), *scales

    @staticmethod
    def of_rows(latents: Array, rotated: Array, *scales: Float[Array, "... n*128 1"]) -> Int8LatentPages:
        """Rows as pages."""
        pages = (rearrange(rows, "... (n s) 1 -> ... n 1 s", s=PAGE) for rows in scales)
        return Int8LatentPages(*LatentPages.of_rows(latents, rotated), *pages)

    def begin_of(self, row: Array) -> tuple[tuple[Array | int, ...], ...]:
        return *LatentPages(*self[:2]).begin_of(row), (0, row), (0, row)


class Int8HeadPages(NamedTuple):
    """`HeadPages` in whole numbers, each row of every head with a scale: see `Int8LatentPages`."""

    keys: Int8[Array, "N H 128 K"]
    values: Int8[Array, "N H 128 K"]
    key_scales: Float[Array, "N H 1 128"]
    value_scales: Float[Array, "N H 1 128"]

    @property
    def dtype(self) -> Any:
        return self.key_scales.dtype

    def stored(self, rows: Iterable[Float[Array, "... T ?W"]]) -> tuple[Array, ...]:
        return _rounded(rows, self.dtype)

    def floats(self) -> HeadPages:
        pairs = ((self.keys, self.key_scales), (self.values, self.value_scales))
        return HeadPages(*(whole.astype(self.dtype) * jnp.swapaxes(scales, -1, -2) for whole, scales in pairs))

    def rows(self) -> tuple[Array, ...]:
        """Pages `[..., n, ...]` as rows of the four arrays, those of scales with one number."""
        scales = (rearrange(scales, "... n h 1 s -> ... h (n s) 1") for scales in self[2:])
        return *HeadPages(*self[:2]).rows(), *scales

    @staticmethod
    def of_rows(keys: Array, values: Array, *scales: Float[Array, "... H n*128 1"]) -> Int8HeadPages:
        """Rows as pages."""
        pages = (rearrange(rows, "... h (n s) 1 -> ... n h 1 s", s=PAGE) for rows in scales)
        return Int8HeadPages(*HeadPages.of_rows(keys, values), *pages)

    def begin_of(self, row: Array) -> tuple[tuple[Array | int, ...], ...]:
        return ((0, row, 0),) * 2 + ((0, 0, row),) * 2


AnyLatentPages = LatentPages | Int8LatentPages
AnyHeadPages = HeadPages | Int8HeadPages
AnyPages = AnyLatentPages | AnyHeadPages
Pages = TypeVar("Pages", bound=AnyPages)
FloatPages = TypeVar("FloatPages", bound=LatentPages | HeadPages)


def _rounded(rows: Iterable[Float[Array, "... T ?W"]], dtype: Any) -> tuple[Array, ...]:
    """Each of some rows as the nearest whole numbers, then the scales of all of them, `[..., T, 1]`."""
    whole, scales = [], []
    for part in rows:
        values, scale = to_int8(part, -1, dtype)
        whole.append(values)
        scales.append(scale)
    return *whole, *scales


def shapes_of_page(pages: LatentPages | HeadPages) -> list[tuple[int, ...]]:
    """Shape of one page in each array."""
    rank = 3 if isinstance(pages, HeadPages) else 2
    return [array.shape[-rank:] for array in pages]


def pages_a_sequence(pages: AnyPages, table: Int[Array, "B per"] | None, sequences: int) -> int:
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


def full_table(pages: AnyPages, table: Int[Array, "B per"] | None, sequences: int) -> Int[Array, "B per"]:
    """The table, written out for pages that were a contiguous cache and are `flat` now."""
    if table is not None:
        return table
    per = pages_a_sequence(pages, None, sequences)
    return jnp.arange(sequences * per, dtype=jnp.int32).reshape(sequences, per)
