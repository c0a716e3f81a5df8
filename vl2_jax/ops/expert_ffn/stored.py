"""Weights of experts as the kernels hold them: as they lie in HBM, and widened where a product takes them.

    bfloat16   taken as it is
    int8       widened in registers; the scales of columns multiply what a whole product adds up
    int4       four bytes of a column are eight rows of it, which registers hold next to each other
               128 x 128 MXU: a product of one group of rows at a time, which its scales multiply
               256 x 256 MXU: such a product would fill half of it, so scales multiply the widened rows, in bfloat16

The two of `ops.narrow` are in `kinds`, which says how they lie. D and F widths of what is multiplied and of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from vl2_jax.ops.narrow.kinds import GROUP, Int4, Int8

_SIGNS = -0x77777778  # 0x88888888: numbers from 0 to 15 become those from -8 to 7 in two's complement


@dataclass(frozen=True)
class Stored:
    """How a matrix lies.

    Attributes:
      dtype: of the stored rows.
      held: rows of the matrix in each.
      group: rows of the matrix with the same scales, 0 if there are no groups.
      arrays: stored rows alone, or these and scales.
    """

    dtype: str
    held: int = 1
    group: int = 0
    arrays: int = 1

    def shapes(self, stored_depth: int, depth: int, width: int) -> list[tuple[tuple[int, ...], str]]:
        """(shape, dtype) of the arrays of a matrix `depth` deep of which `stored_depth` rows are held, for two experts.

        Scales are few, and always those of all rows.
        """
        groups = (depth // self.group,) if self.group else ()
        scales = ((2, *groups, 1, width), "float32")
        return [((2, stored_depth // self.held, width), self.dtype), scales][: self.arrays]


FLOATS = Stored("bfloat16")
INT8 = Stored("int8", arrays=2)
INT4 = Stored("uint8", held=2, group=GROUP, arrays=2)


def stored_as(matrices: Sequence[Any]) -> Stored | None:
    """How these lie, or None where it is in a way that the kernels do not take."""
    kinds = {_stored(matrix) for matrix in matrices}
    return kinds.pop() if len(kinds) == 1 else None


def _stored(matrix: Any) -> Stored | None:
    if isinstance(matrix, Int8):
        return INT8
    if isinstance(matrix, Int4):
        return INT4 if 2 * matrix.alike == GROUP else None
    return FLOATS if getattr(matrix, "dtype", None) == jnp.bfloat16 else None


@dataclass(frozen=True)
class Matrix:
    """One expert's matrix in vector memory.

    Attributes:
      arrays: references to stored rows and, where there are any, scales.
      first_group: of which the first row is.
      scale_rows: see `Tiling`.
    """

    stored: Stored
    arrays: Sequence[Any]
    first_group: Any = 0
    scale_rows: bool = False

    def numbers(self, begin: int, size: int, columns: Any) -> Array:
        """Rows `[size, F]` as they lie: floats, int8 or int4."""
        held = self.stored.held
        rows = self.arrays[0][begin // held : (begin + size) // held, columns]
        return rows if held == 1 else pltpu.bitcast(pltpu.bitcast(rows, jnp.int32) ^ jnp.int32(_SIGNS), jnp.int4)

    def scales(self, row: int, columns: Any) -> Float[Array, "1 F"]:
        """What the numbers of a row are multiplied with."""
        at = (self.first_group + row // GROUP,) if self.stored.group else ()
        return self.arrays[1][*at, :, columns]


def partial_product(x: Any, matrices: Sequence[Matrix], columns: Any, begin: int, size: int) -> Float[Array, "M F"]:
    """`x[:, begin : begin + size]` times columns of matrices side by side, float32; of int8 yet to be `scaled`."""
    by_group = matrices[0].stored.group and not matrices[0].scale_rows
    depth = GROUP if by_group else size

    def product(at: int) -> Array:
        # Side by side before they are widened: afterwards v5e would take halves of registers apart for it.
        rows = jnp.concatenate([matrix.numbers(at, depth, columns) for matrix in matrices], axis=1).astype(jnp.bfloat16)
        if matrices[0].scale_rows:
            scales = [_scales(matrices, row, columns) for row in range(at, at + depth, GROUP)]
            rows *= jnp.concatenate([jnp.broadcast_to(row, (GROUP, row.shape[1])) for row in scales]).astype(rows.dtype)
        total = jnp.dot(x[:, at : at + depth], rows, preferred_element_type=jnp.float32)
        return total * _scales(matrices, at, columns) if by_group else total

    return functools.reduce(jnp.add, map(product, range(begin, begin + size, depth)))


def scaled(total: Float[Array, "M F"], matrices: Sequence[Matrix], columns: Any) -> Float[Array, "M F"]:
    """A whole product, where scales are of whole columns times these."""
    stored = matrices[0].stored
    return total if stored.arrays == 1 or stored.group else total * _scales(matrices, 0, columns)


def _scales(matrices: Sequence[Matrix], row: int, columns: Any) -> Float[Array, "1 F"]:
    return jnp.concatenate([matrix.scales(row, columns) for matrix in matrices], axis=1)
