"""One thread that owns the device and answers everybody's requests together, token by token.

A step reads chunks of the oldest prompts (and looks at tiles that they need) for as long as those who run may wait,
then decodes one token of everyone who runs; several where nobody waits. `schedule` decides who, `device` is what it
runs on, `requests` is what callers see.

    callers' threads   submit --> inbox            listener <-- Started, Piece, ..., Finished
    the engine's            inbox --> [ cancelled? | chunks of prompts | tokens of all that run ] --> listener
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from vl2_jax.compilation import counting_compilations
from vl2_jax.errors import ClosedError, OverloadedError, RequestError
from vl2_jax.inference.answers import AnswerWriter
from vl2_jax.inference.generate import Alternatives, answer_of, picture_at, room_for, steps_a_call
from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.progress import Report, silent
from vl2_jax.serving.device import Device
from vl2_jax.serving.pages import Beginnings, PagePool, tile_digests
from vl2_jax.serving.pictures import tiles_shown
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
from vl2_jax.serving.schedule import Schedule, Sequence

if TYPE_CHECKING:
    from vl2_jax.api import VL2

log = logging.getLogger("vl2_jax.serving")

_SECONDS_OF_READING = 0.05  # in a step; what was begun by then is finished, one chunk at least
_SECONDS_A_CHUNK = 0.5  # those who run wait no longer than that for a chunk of another's prompt, where chunks allow


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
        with vl2.model.layout.on_devices():
            self._device = Device(vl2, limits)
            self._device.compile(report)
        self._schedule = Schedule(PagePool(self._device.pages), limits.max_running, limits.prefix_cache)
        self._changed = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._scheduled = (0, 0, 0)  # sequences of the schedule, those that wait, and the positions of their prompts
        self._is_over = False  # nobody has time any more
        self._steps = self._tiles_encoded = self._compilations = 0
        self._step_seconds = self._answer_seconds = 1.0
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
            would_wait = self._scheduled[0] + len(self._inbox) + 1 - self._limits.max_running
            is_long = would_wait > 0 and most is not None and tokens + len(sequence.ids) > most
            if would_wait > self._limits.max_waiting or is_long:
                seconds = min(60.0, max(1.0, self._answer_seconds * (waiting + 1) / self._limits.max_running))
                raise OverloadedError(f"{waiting} requests wait already; try again in {seconds:.0f} s.", seconds)
            self._inbox.append(sequence)
            self._changed.notify_all()
        return _Submission(sequence)

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
                running=self._scheduled[0] - self._scheduled[1],
                waiting=waiting,
                waiting_tokens=tokens,
                pages=self._device.pages - 1,
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
        return self._device.context

    def drain(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        with self._changed:
            if self._stage.name == "ready":
                self._stage = Stage("draining")
            self._changed.wait_for(lambda: not self._busy(), max(0.0, end - time.monotonic()))
            self._is_over = True
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
        """Requests that wait and positions of their prompts."""
        _, waiting, tokens = self._scheduled
        return waiting + len(self._inbox), tokens + sum(len(sequence.ids) for sequence in self._inbox)

    def _busy(self) -> bool:
        return bool(self._scheduled[0] or self._inbox)

    def _limit(self, request: Request) -> int:
        """Tokens that the answer may have."""
        room = min(self._device.context, (self._device.pages - 1) * PAGE)
        return min(request.options.max_tokens, room_for(request.prompt, room))

    def _sequence(self, request: Request, listener: Listener) -> Sequence:
        self.check(request)
        options, tokenizer = request.options, self._vl2.processor.tokenizer
        tiles = tile_digests(request.prompt)
        root = hashlib.sha256(request.salt.encode("utf-8", "surrogatepass")).digest()
        writer = AnswerWriter(tokenizer, options, self._limit(request))
        beginnings = Beginnings(root, request.prompt, tiles)
        sampler = self._device.sampler(options)
        return Sequence(request, listener, writer, sampler, tiles, beginnings, request.prompt.input_ids.tolist())

    # The engine's thread.

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:  # of what mends a step that failed, so that nothing can be computed any more
            log.exception("the engine has failed")
            self._stage = Stage("failed")
        with self._changed:
            self._take_in()
        why = "failed" if self._stage.name == "failed" else "was closed"
        for sequence in self._schedule.sequences:
            self._end(sequence, Failed(ClosedError(f"the engine {why} before this was answered.")))
        with self._changed:
            self._changed.notify_all()

    def _serve(self) -> None:
        with self._vl2.model.layout.on_devices(), counting_compilations() as names:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._busy() or self._stage.name == "closed")
                    if self._stage.name == "closed":
                        return
                    self._take_in()
                try:
                    self._step()
                except Exception as error:
                    self._recover(error)
                self._steps += 1
                self._compilations = len(names)
                with self._changed:
                    self._take_in()
                    self._changed.notify_all()

    def _take_in(self) -> None:
        self._schedule.waiting.extend(self._inbox)
        self._inbox.clear()
        self._publish()

    def _publish(self) -> None:
        """For other threads, who must not look at the schedule while it changes."""
        waiting = self._schedule.waiting
        self._scheduled = len(self._schedule.sequences), len(waiting), sum(len(s.ids) for s in waiting)

    def _step(self) -> None:
        for sequence in self._schedule.sequences:
            if sequence.is_cancelled or self._is_over:
                sequence.writer.finish_reason = "cancelled"
                self._end(sequence, self._finished(sequence))
        begun = time.perf_counter()
        while (reading := self._schedule.next_to_read()) is not None:
            try:
                self._read(reading)
            except Exception as error:
                if self._device.is_lost:
                    raise
                self._end(reading, Failed(error))
            if time.perf_counter() - begun >= _SECONDS_OF_READING:
                break
        if self._schedule.running:
            self._decode()

    def _read(self, sequence: Sequence) -> None:
        """One chunk of a prompt, or a tile for it. After its last chunk the sequence has a token, and runs."""
        begun, device = time.perf_counter(), self._device
        shown = tiles_shown(sequence.request.prompt, sequence.computed)
        missing = device.tiles.missing([sequence.tiles[number] for number in shown])[: device.tiles.devices]
        if missing:
            device.look(sequence, missing)
            self._tiles_encoded += len(missing)
            sequence.timings.vision_seconds += time.perf_counter() - begun
            return
        device.read(sequence, self._chunk_length(sequence))
        sequence.timings.prefill_seconds += time.perf_counter() - begun
        self._schedule.remember(sequence)
        if not sequence.unread:
            self._begin(sequence)

    def _chunk_length(self, sequence: Sequence) -> int:
        """Of the next chunk: as long as is useful, but so that those who run do not wait long for it."""
        lengths, seconds = self._device.lengths, self._device.seconds
        useful = next((n for n in reversed(lengths) if n >= sequence.unread), lengths[0])
        fitting = [n for n in lengths if n <= min(self._device.room(sequence), useful)] or lengths[-1:]
        if not self._schedule.running:
            return fitting[0]
        return next((n for n in fitting if seconds[n] <= _SECONDS_A_CHUNK), fitting[-1])

    def _begin(self, sequence: Sequence) -> None:
        """The token after all that was read. An answer that went back to wait goes on."""
        told = self._device.begin(sequence, _is_plain(sequence))
        self._schedule.has_read()
        if not sequence.has_started:
            sequence.has_started = True
            sequence.timings.reused_tokens = sequence.reused
            self._tell(sequence, Started(sequence.reused))
        self._push(sequence, *told)

    def _decode(self) -> None:
        """A token of everyone who runs; several, where nobody waits."""
        schedule = self._schedule
        longest = max(s.writer.limit - len(s.writer.ids) for s in schedule.running)
        is_alone = not (schedule.reading or schedule.waiting or self._inbox)
        steps = min(steps_a_call(self._step_seconds), longest) if is_alone else 1
        schedule.give_room(steps)
        if not schedule.running:
            return
        by_slot = {sequence.slot: sequence for sequence in schedule.running}
        begun, greedy = time.perf_counter(), all(map(_is_plain, schedule.running))
        tokens, logprobs, counts, others = self._device.decode(by_slot, steps, greedy)
        seconds = time.perf_counter() - begun
        self._step_seconds = seconds / steps
        for slot, sequence in by_slot.items():
            sequence.timings.decode_seconds += seconds
            own, told = slice(0, counts[slot]), Alternatives(others.ids[slot], others.logprobs[slot])
            self._push(sequence, tokens[slot, own], logprobs[slot, own], told)

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
            self._end(sequence, self._finished(sequence))

    def _finished(self, sequence: Sequence) -> Finished:
        writer, prompt = sequence.writer, sequence.request.prompt
        timings = dataclasses.replace(
            sequence.timings,
            tiles=len(prompt.tiles),
            prompt_tokens=len(prompt),
            new_tokens=len(writer.ids),
            waited_seconds=(sequence.begun or time.perf_counter()) - sequence.arrived,
        )
        picture = picture_at(prompt, sequence.request.boxes_on)
        return Finished(answer_of(writer, prompt, picture, self._vl2.processor.as_released, timings))

    def _end(self, sequence: Sequence, event: Finished | Failed) -> None:
        self._schedule.end(sequence)
        self._publish()
        seconds = time.perf_counter() - sequence.arrived
        self._answer_seconds += 0.1 * (seconds - self._answer_seconds)
        self._tell(sequence, event)

    def _tell(self, sequence: Sequence, event: Event) -> None:
        try:
            sequence.listener(event)
        except Exception:  # of whoever listens, which harms nobody else
            sequence.is_cancelled = True

    def _recover(self, error: Exception) -> None:
        """After a step that failed: whoever was in it alone fails; else everyone is computed again, one at a time."""
        schedule = self._schedule
        affected = [*schedule.running, *([schedule.reading] if schedule.reading else [])] or [schedule.waiting[0]]
        if len(affected) == 1:
            self._end(affected[0], Failed(error))
        else:
            for sequence in reversed(affected):
                sequence.is_suspect = True
                schedule.send_back(sequence)
        if self._device.is_lost:
            schedule.pool.forget()
            self._device.make()


class _Submission:
    """See `requests.Submission`."""

    def __init__(self, sequence: Sequence):
        self._sequence = sequence

    def cancel(self) -> None:
        self._sequence.is_cancelled = True


def _is_plain(sequence: Sequence) -> bool:
    """Whether the greedy program is enough."""
    options = sequence.request.options
    return options.is_greedy and not options.has_extras and not sequence.request.top_logprobs
