"""Conversations to packed batches, with a position that a checkpoint can hold.

sources --mix--> order --share--> record --encode--> Encoded (or BadSample) --pack--> PackedBatch
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import textwrap
import threading
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
from vl2_jax.training.shares import Rest, ShareDataset
from vl2_jax.training.sources import JsonSource as JsonSource
from vl2_jax.training.sources import open_source, parsed

_READ_AHEAD = 64
_MOST_BAD = 1000  # samples one after another, after which the data itself is bad
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
        except VL2Error as error:
            return BadSample(where, _reason(error))
        if len(encoded) > self._most_positions:
            return BadSample(where, f"{len(encoded)} positions do not fit into a row of {self._most_positions}")
        if len(encoded.tiles) > self._most_tiles:
            return BadSample(where, f"{len(encoded.tiles)} tiles do not fit into a batch of {self._most_tiles}")
        if (encoded.labels[1:] == IGNORED).all():
            return BadSample(where, "it has no answer to learn")
        return encoded


class Batches:
    """One process's packed batches, and its place in the data.

    First fit: a batch is full when a sample fits into no row of it, or its tiles into no tile budget. The sample that
    did not fit begins the next batch; the place is before it.

    Attributes:
      records: samples of all passes, over all processes; `None` if they have no end.
      skipped: how many were left out; those not told of yet are in `reports`.
    """

    def __init__(
        self, order: grain.MapDataset, encoder: Encoder, recipe: DataRecipe, share: int, shares: int, **layout: int
    ):
        self._order, self._encoder, self._recipe, self._layout = order, encoder, recipe, layout
        self._share, self._shares = share, shares
        self._rest, self._read = Rest(), 0
        self._samples: Any = None
        self._waiting: Encoded | None = None
        self.records = None if recipe.epochs is None else len(order)
        self.skipped = 0
        self.reports: list[BadSample] = []

    def __iter__(self) -> Batches:
        return self

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

    @property
    def taken(self) -> int:
        """Samples of this process's share that its batches hold, or that were left out."""
        return self._read - (self._waiting is not None)

    def share_read(self, taken: int) -> float:
        """The share of all passes that is read once all processes together have taken so many; 0 of what never ends."""
        if self.records is None:
            return 0.0
        return 1 - (self._rest.length(self.records) - taken) / self.records

    def empty(self) -> PackedBatch:
        """A batch that holds nothing, for those that end before others do."""
        return self._packed([[]] * self._recipe.rows)

    def get_state(self) -> dict[str, Any]:
        """This process's place, as JSON."""
        rest = dataclasses.asdict(self._rest)
        return {**rest, "taken": self.taken, "skipped": self.skipped}

    def set_state(self, *states: dict[str, Any]) -> None:
        """Goes on where as many processes were. With as many as here each goes on in its own share.

        With another number, what none of them has taken is shared out again: nothing is lost or read twice.
        """
        self.close()
        rest = Rest(tuple(states[0]["left"]), states[0]["begin"])
        if len(states) == self._shares:
            mine = states[self._share]
            self._rest, self._read, self.skipped = rest, mine["taken"], mine["skipped"]
        else:
            self._rest, self._read = rest.after([state["taken"] for state in states]), 0
            self.skipped = sum(state["skipped"] for state in states) if self._share == 0 else 0

    def close(self) -> None:
        """Ends the processes that read ahead."""
        if self._samples is not None:
            self._samples.close()
        self._samples, self._read, self._waiting = None, self.taken, None

    def _packed(self, rows: list[list[Encoded]]) -> PackedBatch:
        return pack(rows, self._recipe.sequence_length, self._recipe.tiles, **self._layout)

    def _next_sample(self) -> Encoded | None:
        if self._samples is None:
            mine = ShareDataset(self._order, self._rest, self._share, self._shares, self._read)
            self._samples = _read_ahead(mine.map(self._encoder), self._recipe.workers)
        for _ in range(_MOST_BAD):
            try:
                sample = next(self._samples)
            except StopIteration:
                return None
            self._read += 1
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


def batches(recipe: DataRecipe, processor: Processor, share: int = 0, shares: int = 1) -> Batches:
    """One process's share of every batch: `rows / shares` rows of its own samples.

    Raises:
      ConfigError: rows or tiles do not divide into the processes, or there is no source.
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
    layout = {"pad_id": processor.tokenizer.pad_id, "tile_size": processor.config.tile_size}
    return Batches(_order(recipe), encoder, part, share, shares, **layout, first_tile=share * part.tiles)


def _read_ahead(samples: grain.MapDataset, workers: int) -> Any:
    """An iterator over samples that other threads or processes make."""
    if not workers:
        return iter(samples.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=_READ_AHEAD)))
    flags.FLAGS.mark_as_parsed()  # Grain's processes read absl's flags, which nobody parses here
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_READ_AHEAD)
    processes = grain.MultiprocessingOptions(workers)
    return iter(samples.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=_begin_worker))


def _begin_worker(_: int, __: int) -> None:
    """A worker ends with the run, however that ends, and signals to the run's terminal are not for it."""
    os.setpgid(0, 0)
    run = multiprocessing.parent_process()

    def end_with_run() -> None:
        if run is not None:
            run.join()
            os._exit(1)

    threading.Thread(target=end_with_run, daemon=True).start()


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
        except VL2Error:
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


def _order(recipe: DataRecipe) -> grain.MapDataset:
    """The samples of all processes in their order, the same however many share them and however long a run is.

    With epochs, files are shuffled together and each pass holds every record once; otherwise sources are mixed by
    weight.
    """
    sources = [_ordered(source, recipe, number) for number, source in enumerate(recipe.sources)]
    if recipe.epochs is not None and all(source.path for source in recipe.sources):
        together = sources[0] if len(sources) == 1 else grain.MapDataset.concatenate(sources).shuffle(seed=recipe.seed)
        return together.repeat(recipe.epochs)
    endless = [s.repeat(recipe.epochs) if source.path else s for s, source in zip(sources, recipe.sources, strict=True)]
    if len(endless) == 1:
        return endless[0]
    return grain.MapDataset.mix(endless, weights=[source.weight for source in recipe.sources])


def _ordered(source: SourceRecipe, recipe: DataRecipe, number: int) -> grain.MapDataset:
    if (source.path is None) == (source.scenes is None):
        raise ConfigError(f"data source {number} must have either a path or scenes.")
    if source.scenes is not None:
        records = grain.MapDataset.source(SceneSource(source.scenes, source.sizes))
    else:
        records = grain.MapDataset.source(open_source(source.path or "", source.images)).shuffle(
            seed=recipe.seed + number
        )
    return records.map(functools.partial(_as_described, source)) if source.apart or source.last_answer_only else records


def _as_described(source: SourceRecipe, record: dict[str, Any]) -> dict[str, Any]:
    return record | {"apart": source.apart, "last_answer_only": source.last_answer_only}
