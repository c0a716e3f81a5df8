"""Kinds of matrices that are kept in fewer bytes than they are multiplied in.

A kind is what stands in a tree of parameters in the place of an array, and what `product` takes in that place.

    Bits     uint16 [.., D, F]        the upper half of a float32: bfloat16, as whole numbers
    Int8     int8   [.., D, F]        times a float32 scale of each column
    Int4     uint8  [.., D / 2, F]    two numbers a byte, times a float32 scale of each column and group of rows

    row 2 j of an Int4 is the low halves of the bytes of stored row j, row 2 j + 1 the high ones; in stored order, the
    low halves of all stored rows come first

XLA:CPU widens arrays of narrow floats as a whole around a loop; whole numbers it leaves alone. A stored row is one row
of the array in which a matrix lies; it holds one or more rows of the matrix.

E experts, D and F width of what is multiplied and of the result, S stored rows, p rows of the matrix in each, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, UInt8, UInt16
from jaxtyping import Int8 as Int8Array

GROUP = 128  # rows of an Int4 with the same scales, if they divide its rows
_MOST = 127  # of whole numbers in eight bits, to both sides of 0


class Narrow(ABC):
    """What all kinds have: shape, rank and place of the matrix, or of those of all experts, and what products need.

    `expert` is 0 where there is one matrix.
    """

    @property
    @abstractmethod
    def stored(self) -> Array:
        """The array whose rows are stored rows, `[S, F]` or `[E, S, F]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def ndim(self) -> int:
        return self.stored.ndim

    @property
    def sharding(self) -> Any:
        return self.stored.sharding

    @property
    def alike(self) -> int:
        """How many stored rows one after another have the same scales."""
        return self.stored.shape[-2]

    @property
    def units(self) -> tuple[int, ...]:
        """How many there are along each axis of what can be cut apart."""
        return self.shape

    def at(self, expert: Array | None) -> Any:
        """That of one expert; `None` is all there is."""
        return self if expert is None else jax.tree.map(lambda part: part[expert], self)

    @abstractmethod
    def widened(self, dtype: Any) -> Float[Array, "... D F"]:
        """The matrix as an array, or all of them."""

    def widened_in_stored_order(self, dtype: Any) -> Float[Array, "... D F"]:
        """As `widened`, with rows in stored order: made without moving any number past another."""
        return self.widened(dtype)

    @property
    def a_stored_row(self) -> int:
        """Rows of the matrix in each stored row: p."""
        return self.shape[-2] // self.stored.shape[-2]

    def by_stored(self, x: Float[Array, "... D"]) -> Float[Array, "... S p"]:
        """What each stored row is multiplied with."""
        return x.reshape(*x.shape[:-1], -1, self.a_stored_row)

    def to_stored_order(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """What is multiplied, for a matrix in stored order."""
        return jnp.swapaxes(self.by_stored(x), -1, -2).reshape(x.shape)

    def from_stored_order(self, y: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Undoes `to_stored_order`."""
        return jnp.swapaxes(y.reshape(*y.shape[:-1], self.a_stored_row, -1), -1, -2).reshape(y.shape)

    @abstractmethod
    def in_stored(self, rows: Array) -> tuple[Float[Array, ...], ...]:
        """The p rows of the matrix that each of these stored rows holds, float32, without scales."""

    def scaled(self, sums: Float[Array, "R F"], expert: Array, begin: Array | int) -> Float[Array, "R F"]:
        """Sums over stored rows that have the same scales, of each of R segments of the matrix, times these.

        Args:
          begin: in each segment, the first stored row that was added.
        """
        del expert, begin
        return sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bits(Narrow):
    """bfloat16 numbers as whole ones."""

    bits: UInt16[Array, "... D F"]

    @classmethod
    def of(cls, array: Array) -> Bits:
        """Of a bfloat16 array, where it lies; on one device it is not copied."""
        if len(array.sharding.device_set) == 1:
            # As free to move as the array was: programs of arguments that are partly bound to a device are compiled
            # again for their own results, which then all are.
            where = array.sharding if array.committed else None
            return cls(jax.device_put(np.asarray(array).view(np.uint16), where, may_alias=True))
        return cls(lax.bitcast_convert_type(array, jnp.uint16))

    @property
    def stored(self) -> Array:
        return self.bits

    def in_stored(self, rows: Array) -> tuple[Array, ...]:
        return (_float32(rows),)

    def widened(self, dtype: Any) -> Array:
        return _float32(self.bits).astype(dtype)

    def taken(self, rows: Int[Array, ...]) -> Float[Array, "... F"]:
        """Some rows, float32."""
        return _float32(self.bits[rows])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8(Narrow):
    """Whole numbers from -127 to 127 and a scale of each column."""

    values: Int8Array[Array, "... D F"]
    scales: Float32[Array, "... 1 F"]

    @property
    def stored(self) -> Array:
        return self.values

    def widened(self, dtype: Any) -> Array:
        return (self.values.astype(jnp.float32) * self.scales).astype(dtype)

    def in_stored(self, rows: Array) -> tuple[Array, ...]:
        return (rows.astype(jnp.float32),)

    def scaled(self, sums: Array, expert: Array, begin: Array | int) -> Array:
        return sums * self.scales.reshape(-1, self.scales.shape[-1])[expert]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4(Narrow):
    """Whole numbers from -8 to 7, kept as 0 to 15, and a scale of each group and column.

    Scales of a group are a row by themselves: XLA lays [E, G, F] out by E and F on a TPU where 8 does not divide G, and
    the kernels of experts, which read those of one, would have all of them copied before.
    """

    nibbles: UInt8[Array, "... S F"]
    scales: Float32[Array, "... G 1 F"]

    @property
    def stored(self) -> Array:
        return self.nibbles

    @property
    def shape(self) -> tuple[int, ...]:
        *experts, stored, width = self.nibbles.shape
        return (*experts, 2 * stored, width)

    @property
    def alike(self) -> int:
        return self.nibbles.shape[-2] // self.scales.shape[-3]

    @property
    def units(self) -> tuple[int, ...]:
        *groups, _, width = self.scales.shape
        return (*groups, width)

    def widened(self, dtype: Any) -> Array:
        *experts, groups, width = self.units
        halves = jnp.stack(self.in_stored(self.nibbles.reshape(*experts, groups, self.alike, width)), axis=-2)
        return (halves * self.scales[..., None, :, :]).reshape(*experts, -1, width).astype(dtype)

    def widened_in_stored_order(self, dtype: Any) -> Array:
        *experts, groups, width = self.units
        grouped = self.nibbles.reshape(*experts, 1, groups, self.alike, width)
        # Bytes shifted by 0 and by 4 along a new axis: XLA:CPU takes three times as long for two arrays put together.
        halves = (grouped >> jnp.asarray([0, 4], jnp.uint8).reshape(2, 1, 1, 1) & 15).astype(jnp.int32) - 8
        scales = jnp.expand_dims(self.scales, -4)
        return (halves.astype(jnp.float32) * scales).reshape(*experts, -1, width).astype(dtype)

    def in_stored(self, rows: Array) -> tuple[Array, ...]:
        whole = rows.astype(jnp.int32)
        return tuple((half - 8).astype(jnp.float32) for half in (whole & 15, whole >> 4))

    def scaled(self, sums: Array, expert: Array, begin: Array | int) -> Array:
        segments, width = sums.shape
        by_segment = self.scales.reshape(-1, segments, self.units[-2] // segments, width)
        begins = (expert, 0, begin // self.alike, 0)
        return sums * lax.dynamic_slice(by_segment, begins, (1, segments, 1, width))[0, :, 0]


def _float32(bits: UInt16[Array, ...]) -> Float[Array, ...]:
    return lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def to_int8(array: Float[Array, ...], axis: int, dtype: Any = jnp.float32) -> tuple[Int8Array[Array, ...], Array]:
    """The nearest whole numbers from -127 to 127, and the scales in `dtype` that the largest along `axis` gives."""
    wide = array.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis=axis, keepdims=True)
    scales = (jnp.where(largest > 0, largest, 1) / _MOST).astype(dtype)
    values = jnp.clip(jnp.rint(wide / scales.astype(jnp.float32)), -_MOST, _MOST)
    return values.astype(jnp.int8), scales
