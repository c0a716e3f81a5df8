"""Conversations to packed batches, with a position that a checkpoint can hold.

sources --mix--> record --encode--> Encoded (or BadSample) --pack--> PackedBatch
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from dataclasses import dataclass
from typing import Any

import grain
from absl import flags

from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.processing.batch import IGNORED, Encoded, Processor
from vl2_jax.processing.conversation import Conversation
from vl2_jax.scenes import SceneSource
from vl2_jax.training.formats import last_answer_only, questions_apart, to_conversation
from vl2_jax.training.packing import PackedBatch, pack
from vl2_jax.training.recipe import DataRecipe, SourceRecipe
from vl2_jax.training.sources import JsonSource as JsonSource
from vl2_jax.training.sources import open_source, parsed

_READ_AHEAD = 64
_MOST_BAD = 1000  # samples one after another, after which the data itself is bad
_BAD = (VL2Error, OSError)  # what records raise; the system's for names of pictures that cannot be
_LONGEST_REASON = 240  # characters


class SampleError(VL2Error):
    """A sample that cannot be trained on, where the recipe says that this ends the run."""


@dataclass(frozen=True)
class BadSample:
    """Why a sample was left out, and where it stands."""

    where: str
    reason: str


class Encoder:
    """Records to `Encoded`; what cannot be trained on becomes a `BadSample`. Runs in worker processes."""

    def __init__(self, processor: Processor, most_positions: int, most_tiles: int):
        self._processor, self._most_positions, self._most_tiles = processor, most_positions, most_tiles

    def __call__(self, record: dict[str, Any]) -> Encoded | BadSample:
        where = record["where"]
        try:
            messages = _messages_of(record)
            if record.get("apart"):
                encoded = self._processor.encode_apart(questions_apart(messages))
            else:
                encoded = self._processor.encode(messages, inference=False)
        except _BAD as error:
            return BadSample(where, _reason(error))
        if len(encoded) > self._most_positions:
            return BadSample(where, f"{len(encoded)} positions do not fit into a row of {self._most_positions}")
        if len(encoded.tiles) > self._most_tiles:
            return BadSample(where, f"{len(encoded.tiles)} tiles do not fit into a batch of {self._most_tiles}")
        if (encoded.labels[1:] == IGNORED).all():
            return BadSample(where, "it has no answer to learn")
        return encoded


class PackDataset(grain.IterDataset):
    """Batches of packed rows, of an `IterDataset` of samples."""

    def __init__(self, parent: grain.IterDataset, recipe: DataRecipe, **layout: int):
        super().__init__(parent)
        self._recipe, self._layout = recipe, layout

    def __iter__(self) -> PackIterator:
        return PackIterator(iter(self._parent), self._recipe, **self._layout)


class PackIterator(grain.DatasetIterator):
    """First fit: a batch is full when a sample fits into no row of it, or its tiles into no tile budget.

    The sample that did not fit begins the next batch; the state is the position before it.
    """

    def __init__(self, parent: grain.DatasetIterator, recipe: DataRecipe, **layout: int):
        super().__init__(parent)
        self._recipe, self._layout = recipe, layout
        self._before = parent.get_state()
        self._waiting: Encoded | None = None
        self.skipped = 0
        self.reports: list[BadSample] = []

    def __next__(self) -> PackedBatch:
        rows: list[list[Encoded]] = [[] for _ in range(self._recipe.rows)]
        room = [self._recipe.sequence_length] * self._recipe.rows
        tiles = self._recipe.tiles
        while True:
            sample = self._waiting or self._next_sample()
            self._waiting = None
            if sample is None:
                break
            row = next((i for i, left in enumerate(room) if left >= len(sample)), None)
            if row is None or len(sample.tiles) > tiles:
                self._waiting = sample
                break
            rows[row].append(sample)
            room[row] -= len(sample)
            tiles -= len(sample.tiles)
        if not any(rows):
            raise StopIteration
        return self._packed(rows)

    def empty(self) -> PackedBatch:
        """A batch that holds nothing, for those that end before others do."""
        return self._packed([[]] * self._recipe.rows)

    def _packed(self, rows: list[list[Encoded]]) -> PackedBatch:
        return pack(rows, self._recipe.sequence_length, self._recipe.tiles, **self._layout)

    def get_state(self) -> dict[str, Any]:
        state = self._before if self._waiting is not None else self._parent.get_state()
        return {"samples": state, "skipped": self.skipped}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["samples"])
        self._before, self._waiting, self.skipped = state["samples"], None, state["skipped"]

    def _next_sample(self) -> Encoded | None:
        for _ in range(_MOST_BAD):
            self._before = self._parent.get_state()
            try:
                sample = next(self._parent)
            except StopIteration:
                return None
            if not isinstance(sample, BadSample):
                return sample
            told = f"{sample.where}: {sample.reason.rstrip('.')}"
            if self._recipe.on_bad_sample == "raise":
                raise SampleError(f"{told}; mend it, or set data.on_bad_sample = 'skip'.")
            self.skipped += 1
            self.reports.append(sample)
        raise SampleError(
            f"{_MOST_BAD} samples one after another cannot be trained on, at last {told}; mend the data, or leave this "
            "source out."
        )


def batches(recipe: DataRecipe, processor: Processor, share: int = 0, shares: int = 1) -> grain.IterDataset:
    """One host's share of every batch: `rows / shares` rows of its own samples.

    Raises:
      ConfigError: rows or tiles do not divide into the hosts, or there is no source.
    """
    if recipe.rows % shares or recipe.tiles % shares:
        raise ConfigError(f"{recipe.rows} rows and {recipe.tiles} tiles do not divide into {shares} hosts.")
    if recipe.on_bad_sample not in ("skip", "raise"):
        raise ConfigError(f"data.on_bad_sample is {recipe.on_bad_sample!r}; expected 'skip' or 'raise'.")
    if not recipe.sources:
        raise ConfigError("data.sources is empty; give at least one {path = ...} or {scenes = seed}.")
    part = dataclasses.replace(recipe, rows=recipe.rows // shares, tiles=recipe.tiles // shares)
    config = dataclasses.replace(processor.config, mask_prompt=not recipe.learn_prompts)
    encoder = Encoder(processor.replace(config=config), part.sequence_length, part.tiles)
    samples = _mixed(recipe, share, shares).map(encoder)
    if recipe.workers:
        flags.FLAGS.mark_as_parsed()  # Grain's processes read absl's flags, which nobody parses here
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
        stream = samples.to_iter_dataset(options).mp_prefetch(grain.MultiprocessingOptions(recipe.workers))
    else:
        stream = samples.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=_READ_AHEAD))
    layout = {"pad_id": processor.tokenizer.pad_id, "tile_size": processor.config.tile_size}
    return PackDataset(stream, part, **layout, first_tile=share * part.tiles)


def first_questions(recipe: DataRecipe, processor: Processor, count: int) -> list[tuple[Conversation, str]]:
    """The first question of as many conversations of the sources, one source after another, and its answer.

    What cannot be asked is left out.
    """
    found: list[tuple[Conversation, str]] = []
    sources = [_ordered(source, recipe, number) for number, source in enumerate(recipe.sources)]
    for number in range(count):
        source, place = sources[number % len(sources)], number // len(sources)
        if place >= len(source):
            continue
        record = source[place]
        try:
            messages = _messages_of(record)
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("learn", True)]
            end = next(iter(answers), None)
            if end:  # there is one, and something before it
                processor.encode([*messages[:end], {"role": "assistant", "content": ""}])  # it can be asked
                found.append((messages[:end], messages[end]["content"]))
        except _BAD:
            continue
    return found


def _reason(error: Exception) -> str:
    """One short line: names of pictures and texts of records can be of any length."""
    return textwrap.shorten(str(error), _LONGEST_REASON, placeholder="...")


def _messages_of(record: dict[str, Any]) -> Conversation:
    if "messages" in record:  # of a scene
        messages = record["messages"]
    else:
        messages = to_conversation(parsed(record["record"]), record["folder"])
    return last_answer_only(messages) if record.get("last_answer_only") else messages


def _mixed(recipe: DataRecipe, share: int, shares: int) -> grain.MapDataset:
    """One host's share of all sources.

    Sources are shared out before they are mixed: a mixture repeats itself, and a host could see one source alone.
    """
    parts = [_ordered(source, recipe, number) for number, source in enumerate(recipe.sources)]
    if recipe.epochs is not None and all(source.path for source in recipe.sources):
        return grain.MapDataset.concatenate(parts).shuffle(seed=recipe.seed)[share::shares]
    mine = [part[share::shares] for part in parts]
    return mine[0] if len(mine) == 1 else grain.MapDataset.mix(mine, weights=[s.weight for s in recipe.sources])


def _ordered(source: SourceRecipe, recipe: DataRecipe, number: int) -> grain.MapDataset:
    if (source.path is None) == (source.scenes is None):
        raise ConfigError(f"data source {number} must have either a path or scenes.")
    if source.scenes is not None:
        records = grain.MapDataset.source(SceneSource(source.scenes, source.sizes))
    else:
        records = grain.MapDataset.source(open_source(source.path or "", source.images))
        records = records.shuffle(seed=recipe.seed + number).repeat(recipe.epochs)
    return records.map(functools.partial(_as_described, source)) if source.apart or source.last_answer_only else records


def _as_described(source: SourceRecipe, record: dict[str, Any]) -> dict[str, Any]:
    return record | {"apart": source.apart, "last_answer_only": source.last_answer_only}
