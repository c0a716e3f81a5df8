"""The memory that an engine holds on its devices, and what runs on it: `programs`, with shapes and numbers made here.

Once it is made, only the engine's thread calls what computes. Programs are given the memory that they update; where
one fails after that, the memory is lost (`Device.is_lost`) and made anew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vl2_jax.inference.generate import Alternatives
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.prefill import empty_table, encode_some, prefill_chunk
from vl2_jax.inference.sampling import Sampler
from vl2_jax.inference.turns import DEVICES
from vl2_jax.model.decoder import Cache
from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.processing.batch import TEXT
from vl2_jax.progress import Report
from vl2_jax.serving import programs
from vl2_jax.serving.pages import SCRATCH
from vl2_jax.serving.pictures import TileTable
from vl2_jax.serving.programs import Rows, sampler_of, with_bias
from vl2_jax.serving.requests import Limits
from vl2_jax.serving.room import pages_for
from vl2_jax.serving.schedule import Sequence as Asked

if TYPE_CHECKING:
    from vl2_jax.api import VL2

_TILES_KEPT = 64  # rows of the table of tiles


class Device:
    """Pages, slots and tiles of one engine.

    Attributes:
      context: positions that a prompt and its answer may have together.
      pages: of the cache, the scratch page among them.
      lengths: of chunks, the longest first.
      seconds: that a chunk of each length took the last time.
    """

    def __init__(self, vl2: VL2, limits: Limits):
        self._model, self._params, self._eos = vl2.model, vl2.params, vl2.processor.tokenizer.eos_id
        config = vl2.config.language_config
        weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(vl2.params))
        self.context = min(limits.context or config.max_position_embeddings, config.max_position_embeddings)
        self.lengths = vl2.generator.chunking.within(self.context).lengths()
        self.seconds = dict.fromkeys(self.lengths, 0.0)
        self.pages = pages_for(
            vl2.config, weights, vl2.model.dtype, limits, vl2.model.cache_kind, platform=vl2.generator.platform
        )
        spare = 0 if PAGE % self.lengths[-1] == 0 else self.lengths[-1]  # of a last chunk that begins anywhere
        self._per = -(-(self.context + spare) // PAGE)
        self._slot_count, self._vocabulary = limits.max_running, config.vocab_size
        self._nobody = self.sampler(SamplingOptions())  # of a slot that has no request
        devices = vl2.model.layout.devices
        self.tiles = TileTable(-(-_TILES_KEPT // devices), devices)
        self.make()

    def make(self) -> None:
        """All memory, empty; no tile is known. What there was goes first: two caches would not fit."""
        self.cache: Cache = ()
        self._slots: Any = None
        self._table: Any = None
        self._hidden: Any = None
        self.tiles.forget()
        with DEVICES:
            self.cache, self._slots = programs.empty(self._model, self.pages, self._slot_count)
            self._table = empty_table(self._model, self.tiles.rows)
        self._hidden = np.zeros((1, self._model.config.language_config.hidden_size), self._model.dtype)

    def sampler(self, options: SamplingOptions) -> Sampler:
        """Options as a row of the programs."""
        return sampler_of(options, self._vocabulary, self._eos)

    @property
    def is_lost(self) -> bool:
        """Whether a program failed after it was given the memory that it updates."""
        held = jax.tree.leaves((self.cache, self._slots, self._table, self._hidden))
        return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in held)

    def room(self, sequence: Asked) -> int:
        """Positions that its next chunk may have."""
        return self._per * PAGE - sequence.computed

    def look(self, sequence: Asked, digests: Sequence[bytes]) -> None:
        """Computes tiles of a prompt, at most one a device."""
        tiles = sequence.request.prompt.tiles
        some = np.stack([tiles[sequence.tiles.index(digest)] for digest in digests])
        row = self.tiles.place(digests)
        try:
            with DEVICES:
                self._table = encode_some(self._model, self._params, some, self._table, row)
                jax.block_until_ready(self._table)
        except Exception:  # the row holds nothing now
            self.tiles.forget()
            raise

    def read(self, sequence: Asked, length: int) -> None:
        """A chunk of so many positions of a prompt, whose tiles are known, into its pages."""
        begin = sequence.computed
        ids, index = np.zeros((1, length), np.int32), np.full((1, length), TEXT, np.int32)
        for row, values in ((ids, sequence.ids), (index, self.tiles.rows_of(sequence.request.prompt, sequence.tiles))):
            part = values[begin : begin + length]
            row[0, : len(part)] = part
        last = np.asarray([len(sequence.ids) - 1], np.int32)
        self._chunk(ids, index, begin, last, self._pages_of([sequence.pages]))
        sequence.computed = min(begin + length, len(sequence.ids))

    def begin(self, sequence: Asked, greedy: bool) -> tuple[np.ndarray, np.ndarray, Alternatives]:
        """The slot of a sequence that is read, and its next token: `[1]`, its log-probability, the likeliest."""
        seen, counts = np.zeros(self._vocabulary, bool), np.zeros(self._vocabulary, np.int16)
        seen[sequence.ids] = True
        np.add.at(counts, sequence.writer.ids, 1)
        step = np.asarray([len(sequence.writer.ids)], np.int32)
        with DEVICES:
            self._slots, *told = programs.begin(
                self._model, self._params, self._hidden, self._slots, np.int32(sequence.slot), seen, counts, step,
                with_bias(sequence.sampler, sequence.request.options, self._vocabulary), greedy,
            )  # fmt: skip
            return jax.device_get(tuple(told))

    def decode(
        self, by_slot: Mapping[int, Asked], steps: int, greedy: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Alternatives]:
        """Up to `steps` tokens of each slot: `[r, n]`, their log-probabilities, how many there are, the likeliest."""
        count = next(size for size in self._buckets() if size > max(by_slot))
        rows, samplers = self._rows(by_slot, count)
        with DEVICES:
            return self._decode(rows, samplers, steps, greedy)

    def compile(self, report: Report) -> None:
        """Runs every program on nothing."""
        size = self._model.config.vision_config.image_size
        total, done = 1 + len(self.lengths) + 2 * (1 + len(self._buckets())), 0
        with DEVICES:
            report("compiling", done, total)
            self._table = encode_some(self._model, self._params, np.zeros((1, size, size, 3), np.uint8), self._table, 0)
            for length in self.lengths:
                report("compiling", done := done + 1, total)
                ids, last = np.zeros((1, length), np.int32), np.asarray([-1], np.int32)
                for _ in range(2):  # the second time shows how long it takes
                    self._chunk(ids, np.full_like(ids, TEXT), 0, last, self._pages_of([[]]))
            one = with_bias(self._nobody, SamplingOptions(), self._vocabulary)
            seen, counts = np.zeros(self._vocabulary, bool), np.zeros(self._vocabulary, np.int16)
            for greedy in (True, False):
                report("compiling", done := done + 1, total)
                self._slots, *_ = programs.begin(
                    self._model, self._params, self._hidden, self._slots, np.int32(0), seen, counts,
                    np.zeros(1, np.int32), one, greedy,
                )  # fmt: skip
                for count in self._buckets():
                    report("compiling", done := done + 1, total)
                    self._decode(*self._rows({}, count), 1, greedy)
            report("compiling", total, total)

    def _chunk(self, ids: np.ndarray, index: np.ndarray, begin: int, last: np.ndarray, pages: np.ndarray) -> None:
        with DEVICES:
            begun = time.perf_counter()
            self._hidden, self.cache = prefill_chunk(
                self._model, self._params, ids, index, self._table, self.cache, self._hidden, np.int32(begin), last,
                pages,
            )  # fmt: skip
            jax.block_until_ready(self._hidden)
            self.seconds[ids.shape[1]] = time.perf_counter() - begun

    def _decode(
        self, rows: Rows, samplers: Sampler, steps: int, greedy: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Alternatives]:
        self.cache, self._slots, *told = programs.decode(
            self._model, self._params, self.cache, self._slots, rows, samplers, np.int32(steps), greedy
        )
        return jax.device_get(tuple(told))

    def _rows(self, by_slot: Mapping[int, Asked], count: int) -> tuple[Rows, Sampler]:
        whole = partial(np.zeros, count, np.int32)
        pages = self._pages_of([by_slot[slot].pages if slot in by_slot else [] for slot in range(count)])
        rows = Rows(whole(), whole(), whole(), np.ones(count, bool), np.full(count, -1, np.int32), pages)
        samplers = [self._nobody] * count
        for slot, sequence in by_slot.items():
            rows.token[slot] = sequence.ids[-1]
            rows.position[slot] = sequence.computed
            rows.step[slot] = len(sequence.writer.ids)
            rows.done[slot] = False
            if not sequence.request.options.ignore_eos:
                rows.eos[slot] = self._eos
            samplers[slot] = sequence.sampler
        return rows, jax.tree.map(lambda *parts: np.concatenate(parts), *samplers)

    def _buckets(self) -> list[int]:
        most = self._slot_count
        return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]

    def _pages_of(self, each: Sequence[Sequence[int]]) -> np.ndarray:
        """A row of the table for the pages of each sequence."""
        table = np.full((len(each), self._per), SCRATCH, np.int32)
        for row, pages in zip(table, each):
            row[: len(pages)] = pages
        return table
