"""One thread that owns the device and answers everybody's requests together, token by token.

A step reads a chunk of the oldest prompt (or looks at a tile that it needs), and decodes one token of everyone who
runs; several where nobody waits. `schedule` decides who, `programs` is what runs, `requests` is what callers see.

    callers' threads   submit --> inbox            listener <-- Started, Piece, ..., Finished
    the engine's            inbox --> [ cancelled? | chunk of a prompt | tokens of all that run ] --> listener
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vl2_jax.compilation import counting_compilations
from vl2_jax.errors import ClosedError, ContextLengthError, OverloadedError, RequestError
from vl2_jax.inference.answers import Answer, AnswerWriter
from vl2_jax.inference.chunks import chunking
from vl2_jax.inference.generate import Alternatives, picture_at
from vl2_jax.inference.prefill import empty_table, encode_some, prefill_chunk
from vl2_jax.inference.sampling import Extras, Sampler
from vl2_jax.inference.turns import DEVICES
from vl2_jax.model.decoder import Cache
from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.progress import Report, silent
from vl2_jax.serving import programs
from vl2_jax.serving.pages import SCRATCH, Beginnings, PagePool, tile_digests
from vl2_jax.serving.pictures import TileTable, tiles_shown
from vl2_jax.serving.programs import Rows
from vl2_jax.serving.requests import (
    MOST_ALTERNATIVES,
    Event,
    Failed,
    Finished,
    Limits,
    Listener,
    Load,
    Piece,
    Request,
    Stage,
    Started,
    Token,
)
from vl2_jax.serving.room import pages_for
from vl2_jax.serving.schedule import Schedule, Sequence

if TYPE_CHECKING:
    from vl2_jax.api import VL2

_STEPS_A_CALL = 16
_SECONDS_A_CALL = 0.1  # tokens should appear at least this often
_SECONDS_A_CHUNK = 0.5  # those who run wait no longer than that for a chunk of another's prompt, where chunks allow
_FEWEST_TILES = 64  # rows of the table of tiles


class Engine:
    """Answers for one model; see `requests.Serves` for what callers use.

    Args:
      vl2: the model. Others may use it at the same time, in turns.
      limits: how much is taken on.
      report: called with (phase, done, total) while everything is compiled, which happens here, once.

    Raises:
      RequestError: `limits` are not positive, or the pages do not hold a single page for each request.
    """

    def __init__(self, vl2: VL2, limits: Limits | None = None, report: Report = silent):
        limits = limits or Limits()
        if limits.max_running < 1 or limits.max_waiting < 0 or (limits.pages is not None and limits.pages < 2):
            raise RequestError(f"{limits} cannot serve anybody; at least one request and two pages are needed.")
        self._vl2, self._limits = vl2, limits
        self._model, self._params = vl2.model, vl2.params
        language = vl2.config.language_config
        self._vocabulary = language.vocab_size
        self._context = min(limits.context or language.max_position_embeddings, language.max_position_embeddings)
        leaf = jax.tree.leaves(self._params)[0]
        platform = next(iter(leaf.devices())).platform
        self._lengths = chunking(platform, vl2.chunk_size).within(self._context).lengths()
        spare = 0 if self._lengths[-1] % PAGE == 0 or PAGE % self._lengths[-1] == 0 else self._lengths[-1]
        self._per = -(-(self._context + spare) // PAGE)
        self._page_count = pages_for(vl2.config, self._weights(), vl2.model.dtype, limits, platform=platform)
        self._tiles = TileTable(-(-_FEWEST_TILES // self._model.layout.devices), self._model.layout.devices)
        self._schedule = Schedule(PagePool(self._page_count), limits.max_running, limits.prefix_cache)
        self._changed = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._stage = Stage("compiling")
        self._steps = self._tiles_encoded = self._compilations = 0
        self._seconds = dict.fromkeys(self._lengths, 0.0)
        self._step_seconds = _SECONDS_A_CALL
        self._answer_seconds = 1.0
        self._hidden: Any = None
        self._table: Any = None
        self._cache: Cache = ()
        self._slots: Any = None
        with DEVICES, self._model.layout.on_devices():
            self._make_memory()
            self._compile(report)
        self._stage = Stage("ready", share=1.0)
        self._thread = threading.Thread(target=self._run, name="vl2-engine", daemon=True)
        self._thread.start()

    # What callers use, from any thread.

    def submit(self, request: Request, listener: Listener) -> _Submission:
        sequence = self._sequence(request, listener)
        with self._changed:
            if self._stage.name != "ready":
                raise ClosedError(f"the engine is {self._stage.name} and takes nothing on; ask another one.")
            waiting, tokens = self._waiting()
            most = self._limits.max_waiting_tokens
            would_wait = self._in_work() + waiting + 1 - self._limits.max_running
            is_long = would_wait > 0 and most is not None and tokens + len(sequence.ids) > most
            if would_wait > self._limits.max_waiting or is_long:
                seconds = min(60.0, max(1.0, self._answer_seconds * (waiting + 1) / self._limits.max_running))
                raise OverloadedError(f"{waiting} requests wait already; try again in {seconds:.0f} s.", seconds)
            self._inbox.append(sequence)
            self._changed.notify_all()
        return _Submission(self, sequence)

    def check(self, request: Request) -> None:
        self._limit(request)
        if not 0 <= request.top_logprobs <= MOST_ALTERNATIVES:
            raise RequestError(f"top_logprobs is {request.top_logprobs}; expected 0 to {MOST_ALTERNATIVES}.")
        picture_at(request.prompt, request.boxes_on)

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def load(self) -> Load:
        with self._changed:
            schedule, (waiting, tokens) = self._schedule, self._waiting()
            return Load(
                running=self._in_work(),
                waiting=waiting,
                waiting_tokens=tokens,
                pages=self._page_count - 1,
                pages_used=schedule.pool.used,
                preemptions=schedule.preemptions,
                prefix_queries=schedule.prefix_queries,
                prefix_hits=schedule.prefix_hits,
                compilations=self._compilations,
                steps=self._steps,
                tiles_encoded=self._tiles_encoded,
            )

    @property
    def context(self) -> int:
        return self._context

    def drain(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._changed:
            if self._stage.name == "ready":
                self._stage = Stage("draining")
            self._changed.wait_for(lambda: not self._busy(), max(0.0, end - time.monotonic()))
            for sequence in [*self._schedule.sequences, *self._inbox]:
                sequence.is_cancelled = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._busy(), 60)

    def close(self) -> None:
        with self._changed:
            self._stage = Stage("closed")
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _waiting(self) -> tuple[int, int]:
        waiting = [*self._schedule.waiting, *self._inbox]
        return len(waiting), sum(len(sequence.ids) for sequence in waiting)

    def _in_work(self) -> int:
        return len(self._schedule.running) + (self._schedule.reading is not None)

    def _busy(self) -> bool:
        return bool(self._schedule.sequences or self._inbox)

    def _limit(self, request: Request) -> int:
        """Tokens that the answer may have; the last of them is never fed back."""
        length, room = len(request.prompt), min(self._context, (self._page_count - 1) * PAGE)
        if length > room:
            raise ContextLengthError(
                f"the prompt has {length} tokens ({(request.prompt.visual_index >= 0).sum()} of them for pictures), "
                f"there is room for {room}; shorten the text, or send fewer or smaller pictures."
            )
        return min(request.options.max_tokens, room - length + 1)

    def _sequence(self, request: Request, listener: Listener) -> Sequence:
        self.check(request)
        options, tokenizer = request.options, self._vl2.processor.tokenizer
        sampler = Sampler.of(options, self._vocabulary, 1)
        sampler = sampler._replace(extras=Extras.of(options, self._vocabulary, 1, tokenizer.eos_id))
        tiles = tile_digests(request.prompt)
        root = hashlib.sha256(request.salt.encode("utf-8", "surrogatepass")).digest()
        writer = AnswerWriter(tokenizer, options, self._limit(request))
        beginnings = Beginnings(root, request.prompt, tiles)
        return Sequence(request, listener, writer, sampler, tiles, beginnings, request.prompt.input_ids.tolist())

    # The engine's thread.

    def _run(self) -> None:
        with self._model.layout.on_devices(), counting_compilations() as names:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._busy() or self._stage.name == "closed")
                    if self._stage.name == "closed":
                        break
                    self._schedule.waiting.extend(self._inbox)
                    self._inbox.clear()
                try:
                    self._step()
                except Exception as error:
                    self._recover(error)
                self._steps += 1
                self._compilations = len(names)
                with self._changed:
                    self._changed.notify_all()
        self._schedule.waiting.extend(self._inbox)
        self._inbox.clear()
        for sequence in self._schedule.sequences:
            self._end(sequence, Failed(ClosedError("the engine was closed before this was answered.")))

    def _step(self) -> None:
        for sequence in self._schedule.sequences:
            if sequence.is_cancelled:
                self._end(sequence, self._finished(sequence, "cancelled"))
        reading = self._schedule.next_to_read()
        if reading is not None:
            try:
                self._read(reading)
            except Exception as error:
                if self._is_lost():
                    raise
                self._end(reading, Failed(error))
        if self._schedule.running:
            self._decode()

    def _read(self, sequence: Sequence) -> None:
        """One chunk of a prompt, or a tile for it. After its last chunk the sequence has a token, and runs."""
        begun = time.perf_counter()
        prompt = sequence.request.prompt
        shown = tiles_shown(prompt, sequence.computed)
        missing = self._tiles.missing([sequence.tiles[number] for number in shown])
        if missing:
            self._look(sequence, missing[: self._tiles.devices])
            sequence.timings.vision_seconds += time.perf_counter() - begun
            return
        length = self._chunk_length(sequence)
        begin, part = sequence.computed, sequence.ids[sequence.computed : sequence.computed + length]
        ids, index = np.zeros((1, length), np.int32), np.full((1, length), -1, np.int32)
        ids[0, : len(part)] = part
        visual = self._tiles.rows_of(prompt, sequence.tiles)[begin : begin + length]
        index[0, : len(visual)] = visual
        last = np.asarray([len(sequence.ids) - 1], np.int32)
        with DEVICES:
            self._hidden, self._cache = prefill_chunk(
                self._model, self._params, ids, index, self._table, self._cache, self._hidden, np.int32(begin), last,
                self._pages_of(sequence),
            )  # fmt: skip
            jax.block_until_ready(self._hidden)
        seconds = time.perf_counter() - begun
        self._seconds[length] = seconds
        sequence.timings.prefill_seconds += seconds
        sequence.computed = min(begin + length, len(sequence.ids))
        self._schedule.remember(sequence)
        if not sequence.unread:
            self._begin(sequence)

    def _look(self, sequence: Sequence, missing: list[bytes]) -> None:
        prompt = sequence.request.prompt
        some = np.stack([prompt.tiles[sequence.tiles.index(digest)] for digest in missing])
        row = self._tiles.place(missing)
        try:
            with DEVICES:
                self._table = encode_some(self._model, self._params, some, self._table, row)
                jax.block_until_ready(self._table)
        except Exception:
            self._tiles.forget()
            raise
        self._tiles_encoded += len(missing)

    def _chunk_length(self, sequence: Sequence) -> int:
        """Of the next chunk: as long as is useful, but so that those who run do not wait long for it."""
        room = self._per * PAGE - sequence.computed
        useful = next((n for n in reversed(self._lengths) if n >= sequence.unread), self._lengths[0])
        fitting = [n for n in self._lengths if n <= min(room, useful)] or self._lengths[-1:]
        if not self._schedule.running:
            return fitting[0]
        return next((n for n in fitting if self._seconds[n] <= _SECONDS_A_CHUNK), fitting[-1])

    def _begin(self, sequence: Sequence) -> None:
        """The token after all that was read. An answer that went back to wait goes on."""
        seen, counts = np.zeros(self._vocabulary, bool), np.zeros(self._vocabulary, np.int16)
        seen[sequence.ids] = True
        np.add.at(counts, sequence.writer.ids, 1)
        step = np.asarray([len(sequence.writer.ids)], np.int32)
        with DEVICES:
            self._slots, *told = programs.begin(
                self._model, self._params, self._hidden, self._slots, np.int32(sequence.slot), seen, counts, step,
                sequence.sampler, _is_plain(sequence),
            )  # fmt: skip
            token, logprob, others = jax.device_get(told)
        self._schedule.has_read()
        if not sequence.has_started:
            sequence.has_started, sequence.started = True, time.perf_counter()
            sequence.timings.reused_tokens = sequence.reused
            self._tell(sequence, Started(sequence.reused))
        self._push(sequence, token, logprob, others)

    def _decode(self) -> None:
        """A token of everyone who runs; several, where nobody waits."""
        schedule = self._schedule
        longest = max(s.writer.limit - len(s.writer.ids) for s in schedule.running)
        is_alone = not (schedule.reading or schedule.waiting or self._inbox)
        steps = int(np.clip(_SECONDS_A_CALL / self._step_seconds, 1, min(_STEPS_A_CALL, longest))) if is_alone else 1
        schedule.give_room(steps)
        if not schedule.running:
            return
        by_slot = {sequence.slot: sequence for sequence in schedule.running}
        count = self._bucket(1 + max(by_slot))
        rows, samplers = self._rows(by_slot, count)
        greedy = all(map(_is_plain, schedule.running))
        begun = time.perf_counter()
        with DEVICES:
            self._cache, self._slots, *told = programs.decode(
                self._model, self._params, self._cache, self._slots, rows, samplers, np.int32(steps), greedy
            )
            tokens, logprobs, counts, others = jax.device_get(told)
        seconds = time.perf_counter() - begun
        self._step_seconds = seconds / steps
        for slot, sequence in by_slot.items():
            sequence.timings.decode_seconds += seconds
            own, told = slice(0, counts[slot]), Alternatives(others.ids[slot], others.logprobs[slot])
            self._push(sequence, tokens[slot, own], logprobs[slot, own], told)

    def _rows(self, by_slot: dict[int, Sequence], count: int) -> tuple[Rows, Sampler]:
        whole = partial(np.zeros, count, np.int32)
        pages = np.full((count, self._per), SCRATCH, np.int32)
        rows = Rows(whole(), whole(), whole(), np.ones(count, bool), np.full(count, -1, np.int32), pages)
        samplers = [programs.nothing()] * count
        for slot, sequence in by_slot.items():
            rows.token[slot] = sequence.ids[-1]
            rows.position[slot] = sequence.computed
            rows.step[slot] = len(sequence.writer.ids)
            rows.done[slot] = False
            if not sequence.request.options.ignore_eos:
                rows.eos[slot] = self._vl2.processor.tokenizer.eos_id
            pages[slot, : len(sequence.pages)] = sequence.pages
            own = sequence.sampler
            assert own.extras is not None
            samplers[slot] = own._replace(extras=own.extras._replace(bias=np.zeros((1, 0), np.float32)))
        return rows, programs.sampler_of(samplers, count)

    def _push(self, sequence: Sequence, tokens: np.ndarray, logprobs: np.ndarray, others: Alternatives) -> None:
        """New tokens of an answer, to whoever listens; the answer may end with one of them."""
        writer, text, told = sequence.writer, "", []
        told_each = sequence.request.top_logprobs
        for number, (id_, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist())):
            if writer.finished:
                break
            text += writer.push(id_, logprob)
            sequence.ids.append(id_)
            pairs = zip(others.ids[number].tolist(), others.logprobs[number].tolist())
            told.append(Token(id_, logprob, tuple(pairs)[:told_each]))
        sequence.computed = len(sequence.ids) - 1
        self._schedule.remember(sequence)
        if writer.finished:
            text += writer.close()
        self._tell(sequence, Piece(text, tuple(told)))
        if writer.finished:
            self._end(sequence, self._finished(sequence, writer.finish_reason))

    def _finished(self, sequence: Sequence, reason: str) -> Finished:
        writer, prompt, request = sequence.writer, sequence.request.prompt, sequence.request
        timings = dataclasses.replace(
            sequence.timings,
            tiles=len(prompt.tiles),
            prompt_tokens=len(prompt),
            new_tokens=len(writer.ids),
            waited_seconds=(sequence.begun or time.perf_counter()) - sequence.arrived,
        )
        picture = picture_at(prompt, request.boxes_on)
        size = prompt.image_sizes[picture] if prompt.image_sizes else None
        whole, as_released = prompt.begun + writer.text, self._vl2.processor.as_released
        boxes = parse_boxes(whole, *size, as_released=as_released, picture=picture) if size else []
        return Finished(Answer(writer.text, writer.ids, writer.logprobs, boxes, reason, len(prompt), timings))

    def _end(self, sequence: Sequence, event: Finished | Failed) -> None:
        self._schedule.end(sequence)
        seconds = time.perf_counter() - sequence.arrived
        self._answer_seconds += 0.1 * (seconds - self._answer_seconds)
        self._tell(sequence, event)

    def _tell(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.listener(event)
        except Exception:  # of whoever listens, which harms nobody else
            sequence.is_cancelled = True

    # Memory and programs.

    def _weights(self) -> int:
        """Bytes of them on one device."""
        leaves = jax.tree.leaves(self._params)
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    def _make_memory(self) -> None:
        self._cache, self._slots = programs.empty(self._model, self._page_count, self._limits.max_running)
        self._table = empty_table(self._model, self._tiles.rows)
        self._hidden = np.zeros((1, self._vl2.config.language_config.hidden_size), self._model.dtype)

    def _is_lost(self) -> bool:
        """Whether a program failed after it was given the memory that it updates."""
        held = jax.tree.leaves((self._cache, self._slots, self._table, self._hidden))
        return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in held)

    def _recover(self, error: Exception) -> None:
        """After a step that failed: whoever was in it alone fails; else everyone is computed again, one at a time."""
        schedule = self._schedule
        affected = [*schedule.running, *([schedule.reading] if schedule.reading else [])]
        if len(affected) == 1:
            self._end(affected[0], Failed(error))
        else:
            for sequence in reversed(affected):
                sequence.is_suspect = True
                schedule.send_back(sequence)
        if self._is_lost():
            schedule.pool.forget()
            self._tiles.forget()
            self._make_memory()

    def _bucket(self, count: int) -> int:
        return next(size for size in self._buckets() if size >= count)

    def _buckets(self) -> list[int]:
        most = self._limits.max_running
        return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]

    def _pages_of(self, sequence: Sequence) -> np.ndarray:
        pages = np.full((1, self._per), SCRATCH, np.int32)
        pages[0, : len(sequence.pages)] = sequence.pages
        return pages

    def _compile(self, report: Report) -> None:
        """Runs every program on nothing."""
        config, model, params = self._vl2.config, self._model, self._params
        size, eos = config.vision_config.image_size, self._vl2.processor.tokenizer.eos_id
        nobody = np.full((1, self._per), SCRATCH, np.int32)
        total, done = 1 + len(self._lengths) + 2 * (1 + len(self._buckets())), 0
        report("compiling", done, total)
        self._table = encode_some(model, params, np.zeros((1, size, size, 3), np.uint8), self._table, 0)
        for length in self._lengths:
            report("compiling", done := done + 1, total)
            ids, last = np.zeros((1, length), np.int32), np.asarray([-1], np.int32)
            index = np.full_like(ids, -1)
            for _ in range(2):  # the second time shows how long it takes
                begun = time.perf_counter()
                self._hidden, self._cache = prefill_chunk(
                    model, params, ids, index, self._table, self._cache, self._hidden, np.int32(0), last, nobody
                )
                jax.block_until_ready(self._hidden)
                self._seconds[length] = time.perf_counter() - begun
        one = programs.nothing()
        assert one.extras is not None
        one = one._replace(extras=one.extras._replace(bias=np.zeros((1, self._vocabulary), np.float32)))
        seen, counts = np.zeros(self._vocabulary, bool), np.zeros(self._vocabulary, np.int16)
        for greedy in (True, False):
            report("compiling", done := done + 1, total)
            self._slots, *_ = programs.begin(
                model, params, self._hidden, self._slots, np.int32(0), seen, counts, np.zeros(1, np.int32), one, greedy
            )
            for count in self._buckets():
                report("compiling", done := done + 1, total)
                rows, samplers = self._rows({}, count)
                rows = rows._replace(eos=np.full(count, eos, np.int32))
                self._cache, self._slots, *told = programs.decode(
                    model, params, self._cache, self._slots, rows, samplers, np.int32(1), greedy
                )
                jax.block_until_ready(told)
        report("compiling", total, total)


class _Submission:
    """See `requests.Submission`."""

    def __init__(self, engine: Engine, sequence: Sequence):
        self._engine, self._sequence = engine, sequence

    def cancel(self) -> None:
        self._sequence.is_cancelled = True


def _is_plain(sequence: Sequence) -> bool:
    """Whether the greedy program is enough."""
    options = sequence.request.options
    return options.is_greedy and not options.has_extras and not sequence.request.top_logprobs
