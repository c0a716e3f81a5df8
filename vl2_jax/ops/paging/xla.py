"""Plain XLA over pages: new rows written in place, blocks of pages read, attention to the blocks that are filled.

B sequences, T query positions, H heads, S slots of a sequence, s slots of a block, W width of a row. Positions are
those of the first new row; a negative one is of a sequence that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.paging.pages import PAGE, Pages, pages_a_sequence

_PAGES_A_BLOCK = 4
_QUERIES_A_BLOCK = 512


def write_rows(
    pages: Pages,
    new: tuple[Float[Array, "B ... T W"], ...],
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
) -> Pages:
    """The pages with T new rows of each sequence, in place where the pages are donated.

    Args:
      new: in the order of the pages' arrays: latents `[B, T, R]` and rotated parts `[B, T, P]`, or keys and values
        `[B, H, T, K]`.

    A loop over the sequences: for a scatter, XLA copies the whole cache. One row is one update. More rows may begin
    anywhere in a page: the pages that they can touch are read, and those that they do touch are written back.
    """
    new = pages.stored(new)
    sequences, length = positions.shape[0], new[0].shape[-2]
    per = pages_a_sequence(pages, table, sequences)
    many = min(per, (length + PAGE - 2) // PAGE + 1)  # that rows from anywhere can touch

    def page_of(sequence: Array, number: Array) -> tuple[Array, ...]:
        return (sequence, number) if table is None else (table[sequence, number],)

    def write_one(sequence: Array, pages: Pages) -> Pages:
        position = jnp.maximum(positions[sequence], 0)
        begins = pages.begin_of(position % PAGE)

        def put(array: Array, rows: Array, begin: tuple[Array | int, ...]) -> Array:
            page: tuple[Array, ...] = page_of(sequence, position // PAGE)
            row = rows[sequence].reshape(*[1] * len(page), *rows.shape[1:])
            old = jax.lax.dynamic_slice(array, (*page, *begin), row.shape)
            row = jnp.where(positions[sequence] < 0, old, row)
            return jax.lax.dynamic_update_slice(array, row, (*page, *begin))

        return type(pages)(*map(put, pages, new, begins))

    def write_many(sequence: Array, pages: Pages) -> Pages:
        position = jnp.maximum(positions[sequence], 0)
        first = jnp.minimum(position // PAGE, per - many)
        numbers = [page_of(sequence, first + i) for i in range(many)]
        window = type(pages)(*(jnp.concatenate([_page(array, number) for number in numbers]) for array in pages))
        filled = [
            jax.lax.dynamic_update_slice_in_dim(old, rows[sequence], position - first * PAGE, axis=-2)
            for old, rows in zip(window.rows(), new)
        ]
        written = type(pages).of_rows(*filled)

        def write_page(i: Array, pages: Pages) -> Pages:
            def put(array: Array, window: Array) -> Array:
                page: tuple[Array, ...] = page_of(sequence, first + i)
                new = window[i].reshape(*[1] * len(page), *window.shape[1:])
                return jax.lax.dynamic_update_slice(array, new, (*page, *[0] * (array.ndim - len(page))))

            return type(pages)(*map(put, pages, written))

        end = jnp.where(positions[sequence] < 0, 0, (position + length - 1) // PAGE + 1 - first)
        return jax.lax.fori_loop(position // PAGE - first, end, write_page, pages)

    return jax.lax.fori_loop(0, sequences, write_one if length == 1 else write_many, pages)


def read_pages(
    pages: Pages,
    table: Int[Array, "B per"] | None,
    sequences: int,
    first: Array | int,
    count: int,
    only: Array | None = None,
) -> Pages:
    """`count` pages of every sequence, or of only one, from its page `first` on, as they are kept: arrays `[B or 1,
    count, ...]`.
    """
    begin = jnp.asarray(0 if only is None else only), jnp.asarray(first)
    read = _Read(table, begin, (sequences if only is None else 1, count))
    return type(pages)(*map(read.of, pages))


class _Read(NamedTuple):
    """Pages to take out of an array."""

    table: Array | None
    begin: tuple[Array, Array]
    counts: tuple[int, int]

    def of(self, array: Array) -> Array:
        if array.dtype.itemsize != 2:
            return self._take(array)
        # XLA:CPU would widen all pages to float32 ahead of a loop that reads some of them.
        return jax.lax.platform_dependent(array, cpu=self._take_narrow, default=self._take)

    def _take(self, array: Array) -> Array:
        if self.table is not None:
            return array.at[jax.lax.dynamic_slice(self.table, self.begin, self.counts)].get(mode="clip")
        return jax.lax.dynamic_slice(array, (*self.begin, *[0] * (array.ndim - 2)), (*self.counts, *array.shape[2:]))

    def _take_narrow(self, array: Array) -> Array:
        bits = self._take(jax.lax.bitcast_convert_type(array, jnp.uint16))
        return jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(bits), array.dtype)


def read_rows(
    pages: Pages,
    table: Int[Array, "B per"] | None,
    sequences: int,
    begin: Array | int,
    size: int,
    only: Array | None = None,
) -> tuple[Array, Array]:
    """The rows of the slots from `begin` on, both of whole pages, as floats: `[B or 1, size, W]`, or `[B or 1, H, size,
    W]`.
    """
    if size % PAGE:
        raise ValueError(f"{size} rows are not whole pages of {PAGE}.")
    return read_pages(pages, table, sequences, begin // PAGE, size // PAGE, only).floats().rows()


def attend_to_filled(
    queries: tuple[Float[Array, "B H T ?W"], ...],
    block: Callable[[Array, int, Array | None], Any],
    score: Callable[..., Float[Array, "b H T s"]],
    mix: Callable[..., Float[Array, "b H T V"]],
    slots: int,
    positions: Int[Array, " B"],
    scale: float,
) -> Float[Array, "B H T V"]:
    """Softmax attention to the slots up to each query's position, in float32.

    Few slots are attended to at once. More are read block by block, a sequence at a time, which stays in a CPU's cache.
    The number of blocks is a value, not a shape: a short prompt in a long cache costs what a short cache would, a
    block of queries skips the slots that all of them are before, and nothing recompiles. Sums are rescaled as the
    largest score grows (Milakov and Gimelshein, arXiv 1805.02867).

    Args:
      block: what is attended to in the slots from a begin on, so many of them, of all sequences or of only one.
      score: float32 products of `queries` and a block.
      mix: weights (float32) and a block to their mix, in float32.
      slots: of a sequence; a multiple of a page.
      positions: of the first query; query t sees the slots up to `positions + t`. Negative: the result is 0.
    """
    batch, heads, length, _ = queries[0].shape
    size = min(slots, _PAGES_A_BLOCK * PAGE)
    taken = next(n for n in range(min(length, _QUERIES_A_BLOCK), 0, -1) if length % n == 0)
    reach = positions[:, None] + jnp.arange(length)

    def scores_of(queries: tuple[Array, ...], rows: Any, begin: Array | int, new: Array | int, reach: Array) -> Array:
        """Scores of the slots from `begin` on; those before `new` were counted already."""
        slot = begin + jnp.arange(size)
        seen = (slot >= new) & (slot <= reach[:, None, :, None])
        return jnp.where(seen, score(*queries, rows) * scale, -jnp.inf)

    if size == slots:
        rows = block(jnp.int32(0), size, None)
        scores = scores_of(queries, rows, 0, 0, reach)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = mix(weights, rows) / weights.sum(axis=-1, keepdims=True)
        return jnp.where((positions < 0)[:, None, None, None], 0, mixed)

    first_block = jax.eval_shape(lambda: block(jnp.int32(0), size, jnp.int32(0)))
    width = jax.eval_shape(mix, jax.ShapeDtypeStruct((1, heads, length, size), jnp.float32), first_block).shape[-1]

    def of_sequence(sequence: Array) -> Float[Array, "H T V"]:
        own = [jax.lax.dynamic_slice_in_dim(each, sequence, 1) for each in (*queries, reach)]

        def slot_step(number: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            begin = jnp.minimum(number * size, slots - size)  # the last block overlaps the one before
            rows = block(begin, size, sequence)

            def with_queries(own: list[Array], sums: tuple[Array, ...]) -> tuple[Array, ...]:
                (*queries, reach), (largest, total, mixed) = own, sums
                scores = scores_of(tuple(queries), rows, begin, number * size, reach)
                # Slot 0 is seen by every query, so the largest score is finite from the first block on.
                larger = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
                weights, keep = jnp.exp(scores - larger), jnp.exp(largest - larger)
                return larger, total * keep + weights.sum(axis=-1, keepdims=True), mixed * keep + mix(weights, rows)

            def query_step(step: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
                def part(rows: Array, axis: int = 2) -> Array:
                    return jax.lax.dynamic_slice_in_dim(rows, step * taken, taken, axis)

                new = with_queries([*map(part, own[:-1]), part(own[-1], 1)], tuple(map(part, sums)))
                return tuple(
                    jax.lax.dynamic_update_slice_in_dim(old, part, step * taken, 2) for old, part in zip(sums, new)
                )

            if taken == length:
                return with_queries(own, sums)
            too_early = jnp.clip(number * size - positions[sequence], 0, length)
            return jax.lax.fori_loop(too_early // taken, length // taken, query_step, sums)

        column = (1, heads, length, 1)
        sums = (jnp.full(column, -jnp.inf), jnp.zeros(column), jnp.zeros((1, heads, length, width)))
        filled = jnp.where(positions[sequence] < 0, 0, (positions[sequence] + length - 1) // size + 1)
        _, total, mixed = jax.lax.fori_loop(0, filled, slot_step, sums)
        return (mixed / jnp.where(filled > 0, total, 1))[0]

    return jax.lax.map(of_sequence, jnp.arange(batch))


def _page(pages: Array, number: tuple[Array, ...]) -> Array:
    """One page, `[1, ...]`."""
    shape = pages.shape[len(number) :]
    return jax.lax.dynamic_slice(pages, [*number, *[0] * len(shape)], (*[1] * len(number), *shape)).reshape(1, *shape)
