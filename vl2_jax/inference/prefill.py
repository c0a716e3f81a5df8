"""Pictures and prompts into a cache: tiles one by one, positions in chunks of few lengths.

    tiles   --[a tile a device]-->  table of their tokens
    prompt  --[chunk] [chunk] [chunk]-->  cache, last hidden row

Nothing here is compiled for the length of a prompt or the number of its pictures: chunks have few lengths
(`inference.chunks`), and the table of tile tokens and the cache have few sizes, mostly one.

B batch, C positions of a chunk, S cache slots, I tiles, M tokens of a tile, D model width.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vl2_jax.inference.answers import Timings
from vl2_jax.inference.chunks import Chunking
from vl2_jax.model.attention import cache_axes
from vl2_jax.model.decoder import Cache, init_cache, page_bytes
from vl2_jax.model.layers import Axes
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.processing.batch import TEXT, Encoded, renumbered_rows
from vl2_jax.progress import Report, silent

_SMALLEST_CACHE = 256
FEWEST_TILES = 32  # room of a table; a context of 4096 has room for 20 tiles of 196 tokens
_ALWAYS_WHOLE = 1 << 30  # bytes of a cache that has room for the whole context, however short the prompt


@dataclass
class Memory:
    """What a cache holds after an answer, so that the next turn of the conversation computes only what is new.

    It belongs to one conversation. The call that takes it uses it up, whether it can reuse the cache or not: there is
    never an old cache beside a new one.
    """

    cache: Cache
    fingerprints: np.ndarray  # uint64 [positions], of the one sequence in the cache

    def free(self) -> None:
        for leaf in jax.tree.leaves(self.cache):
            leaf.delete()


def prefill(
    model: VL2Model,
    params: Params,
    prompts: Sequence[Encoded],
    capacity: int,
    chunking: Chunking,
    pad_id: int,
    memory: Memory | None,
    spent: Timings,
    report: Report,
) -> tuple[Float[Array, "B D"], Cache]:
    """The hidden row of every prompt's last position, and the cache of all before it and itself.

    What it took is added to `spent`.
    """
    batch, start = len(prompts), 0
    longest = max(map(len, prompts))
    if memory is not None and batch == 1:
        start = _shared_prefix(memory.fingerprints, prompts[0].fingerprints())
    spent.reused_tokens = start
    if memory is not None and not start:
        memory.free()
    if memory is not None and start:
        cache = _grown(memory, capacity_for(model, batch, capacity))
    else:
        cache = empty_cache(model, batch, capacity_for(model, batch, capacity))
    room = slots_of(cache)

    begun = time.perf_counter()
    lengths = chunking.within(room).cut(longest - start, batch)
    # A chunk that would pass the end of the cache computes some positions again instead.
    begins = [min(start + sum(lengths[:number]), room - length) for number, length in enumerate(lengths)]
    shows_pictures = any((p.visual_index[min(begins) :] != TEXT).any() for p in prompts)
    tiles = np.concatenate([p.tiles for p in prompts])
    table = encode_tiles(model, params, tiles if shows_pictures else tiles[:0], report)
    jax.block_until_ready(table)
    spent.vision_seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    last = np.asarray([len(p) - 1 for p in prompts], np.int32)
    ids = np.full((batch, start + sum(lengths)), pad_id, np.int32)
    index = np.full_like(ids, TEXT)
    for row, (prompt, visual_rows) in enumerate(zip(prompts, renumbered_rows(prompts))):
        ids[row, : len(prompt)] = prompt.input_ids
        index[row, : len(prompt)] = visual_rows
    hidden: Any = np.zeros((batch, model.config.language_config.hidden_size), model.dtype)
    for number, (begin, length) in enumerate(zip(begins, lengths)):
        _tell(report, "reading the prompt", number, len(lengths), hidden)
        part = slice(begin, begin + length)
        hidden, cache = prefill_chunk(
            model, params, ids[:, part], index[:, part], table, cache, hidden, np.int32(begin), last
        )
    jax.block_until_ready(hidden)
    spent.prefill_seconds = time.perf_counter() - begun
    return hidden, cache


def compile_prefill(
    model: VL2Model, params: Params, batch: int, chunking: Chunking, report: Report
) -> tuple[Float[Array, "B D"], Cache]:
    """Hidden rows and a cache of nothing, after all programs of `prefill` have run for so many prompts."""
    config = model.config
    size = config.vision_config.image_size
    table = encode_tiles(model, params, np.zeros((1, size, size, 3), np.uint8))
    hidden: Any = np.zeros((batch, config.language_config.hidden_size), model.dtype)
    cache = empty_cache(model, batch, capacity_for(model, batch, config.language_config.max_position_embeddings))
    last = np.full(batch, -1, np.int32)
    lengths = chunking.within(slots_of(cache)).lengths(batch)
    for number, length in enumerate(lengths):
        report("compiling for prompts", number, len(lengths))
        ids = np.zeros((batch, length), np.int32)
        hidden, cache = prefill_chunk(
            model, params, ids, np.full_like(ids, TEXT), table, cache, hidden, np.int32(0), last
        )
    return hidden, cache


def encode_tiles(
    model: VL2Model, params: Params, tiles: np.ndarray, report: Report = silent
) -> Float[Array, "room M D"]:
    """Tokens of all tiles, then rows of zeros up to the size of a table. Each device computes a tile at a time."""
    devices = model.layout.devices
    room = math.ceil(bucket(len(tiles), FEWEST_TILES) / devices) * devices
    table = empty_table(model, room)
    for begin in range(0, len(tiles), devices):
        _tell(report, "looking at pictures", begin, len(tiles), table)
        table = encode_some(model, params, tiles[begin : begin + devices], table, begin)
    return table


def encode_some(
    model: VL2Model, params: Params, tiles: np.ndarray, table: Float[Array, "room M D"], begin: int
) -> Float[Array, "room M D"]:
    """The table with the tokens of tiles, at most one a device, from row `begin` on."""
    missing = model.layout.devices - len(tiles)
    return _encode_tiles(model, params, np.pad(tiles, ((0, missing), *[(0, 0)] * 3)), table, np.int32(begin))


def capacity_for(model: VL2Model, batch: int, needed: int) -> int:
    """Cache slots a sequence: of the whole context unless that is much memory, so that prompts of any length share
    their programs; else `needed` rounded up to few sizes.
    """
    config = model.config.language_config
    whole = bucket(max(needed, config.max_position_embeddings), _SMALLEST_CACHE)
    size = batch * whole // PAGE * page_bytes(config, model.dtype, model.cache_kind)
    return whole if size <= _ALWAYS_WHOLE * model.layout.devices else bucket(needed, _SMALLEST_CACHE)


def bucket(size: int, smallest: int) -> int:
    """`size` rounded up to a power of two, or to one and a half of one: few shapes, at most a third too large."""
    power = max(smallest, 1 << max(0, size - 1).bit_length())
    return power * 3 // 4 if power * 3 // 4 >= max(size, smallest) and power % 4 == 0 else power


def slots_of(cache: Cache) -> int:
    """Positions a cache has room for, of each sequence."""
    return cache[0][0].shape[1] * PAGE


def matmul_precision(dtype: Any) -> Any:
    """float32 products are float32 on every platform; a TPU would round their inputs to bfloat16 otherwise."""
    return jax.default_matmul_precision("highest" if jnp.dtype(dtype) == jnp.float32 else "default")


@partial(jax.jit, static_argnums=(0, 1, 2))
def empty_cache(model: VL2Model, batch: int, capacity: int) -> Cache:
    return init_cache(model.config.language_config, batch, capacity, model.dtype, model.layout, model.cache_kind)


@partial(jax.jit, static_argnums=(0, 1))
def empty_table(model: VL2Model, tiles: int) -> Float[Array, "I M D"]:
    shape = (tiles, model.config.tokens_per_tile, model.config.language_config.hidden_size)
    return model.layout.constrain(jnp.zeros(shape, model.dtype), None, None, None)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _encode_tiles(
    model: VL2Model, params: Params, tiles: Array, table: Float[Array, "I M D"], begin: Array
) -> Float[Array, "I M D"]:
    """The table with the tokens of some tiles from row `begin` on."""
    with matmul_precision(model.dtype):
        tokens = apply(model, params, tiles, method="encode_tiles")
    return model.layout.constrain(jax.lax.dynamic_update_slice_in_dim(table, tokens, begin, 0), None, None, None)


@partial(jax.jit, static_argnums=0, donate_argnums=(5, 6))
def prefill_chunk(
    model: VL2Model,
    params: Params,
    ids: Array,
    index: Array,
    table: Array,
    cache: Cache,
    hidden: Array,
    begin: Array,
    last: Array,
    pages: Int[Array, "B per"] | None = None,
) -> tuple[Float[Array, "B D"], Cache]:
    """One chunk: fills slots `begin` to `begin + C`, and keeps the hidden rows of prompts that end inside of it.

    Positions after the `last` of their prompt are padding. `pages` is the table of a cache that sequences share.
    """
    length = ids.shape[1]
    positions = jnp.broadcast_to(begin + jnp.arange(length), ids.shape)
    exists = (positions <= last[:, None]).astype(jnp.int32)
    with matmul_precision(model.dtype):
        x = apply(model, params, ids, index, table, method="embed")
        out = apply(model, params, x, positions, exists, cache, pages=pages, method="decode")
    within = last - begin
    row = jnp.take_along_axis(out.hidden, jnp.clip(within, 0, length - 1)[:, None, None], axis=1)[:, 0]
    hidden = jnp.where(((within >= 0) & (within < length))[:, None], row, hidden)
    return model.layout.constrain(hidden, None, None), out.cache


def _grown(memory: Memory, capacity: int) -> Cache:
    """The remembered cache with room for `capacity` positions."""
    missing = -(-capacity // PAGE) - memory.cache[0][0].shape[1]
    if missing <= 0:
        return memory.cache
    return each_replaced(
        memory.cache, lambda old: jnp.pad(old, [(0, missing if axis == 1 else 0) for axis in range(old.ndim)])
    )


def each_replaced(cache: Cache, change: Callable[[Array], Array]) -> Cache:
    """`change` of every array of a cache; each old one is freed before the next new one is made."""

    def replaced(old: Array) -> Array:
        new = jax.block_until_ready(change(old))
        old.delete()
        return new

    return jax.tree.map(replaced, cache)


def repeat(model: VL2Model, hidden: Array, cache: Cache, n: int) -> tuple[Array, Cache]:
    """Every row of a batch `n` times, laid out as what it was."""
    axes = cache_axes(cache[0])
    return _repeat(model, hidden, n, (None, None)), each_replaced(cache, lambda old: _repeat(model, old, n, axes))


@partial(jax.jit, static_argnums=(0, 2, 3))
def _repeat(model: VL2Model, rows: Array, n: int, axes: Axes) -> Array:
    return model.layout.constrain(jnp.repeat(rows, n, axis=0), *axes)


def _tell(report: Report, phase: str, done: int, total: int, result: Any) -> None:
    """Reports progress, once the step before is really done; without a listener nothing waits."""
    if report is not silent:
        jax.block_until_ready(result)
        report(phase, done, total)


def _shared_prefix(old: np.ndarray, new: np.ndarray) -> int:
    """Positions that need not be computed again; the last one always is, for its hidden row."""
    length = min(len(old), len(new) - 1)
    different = np.flatnonzero(old[:length] != new[:length])
    return int(different[0]) if len(different) else length
