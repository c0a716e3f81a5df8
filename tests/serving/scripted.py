"""An engine without a model: it answers with the words of a script, in a thread of its own, as the real one does."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vl2_jax.errors import ClosedError, ContextLengthError, OverloadedError
from vl2_jax.inference.answers import Answer, AnswerWriter, Timings
from vl2_jax.processing.batch import Processor
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.serving.requests import Failed, Finished, Limits, Load, Piece, Request, Stage, Started, Token

UNLIKELY = -2.0  # log-probability of the likeliest alternative


@dataclass(eq=False)
class Job:
    request: Request
    listener: Callable
    ids: list[int]
    writer: AnswerWriter
    cancelled: bool = False
    ended: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class ScriptedEngine:
    """Writes a token of every running request a step.

    Attributes:
      script: from a request to the text of its answer, or to the exception that it fails with after `fails_after`.
      seconds: of a step.
    """

    processor: Processor
    script: Callable[[Request], str | Exception] = lambda request: "It is a red square."
    seconds: float = 0.0
    limits: Limits = field(default_factory=Limits)
    context: int = 4096
    fails_after: int = 2
    stage: Stage = field(default_factory=lambda: Stage("ready"))

    def __post_init__(self) -> None:
        self.context = self.limits.context or self.context
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.requests: list[Request] = []
        self.cancelled = self.steps = 0
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def load(self) -> Load:
        return Load(running=len(self.running), waiting=len(self.waiting), pages=100, pages_used=len(self.running))

    def check(self, request: Request) -> None:
        if len(request.prompt) > self.context:
            raise ContextLengthError("too long")

    def submit(self, request: Request, listener: Callable) -> Job:
        self.check(request)
        if self.stage.name != "ready":
            raise ClosedError("the engine takes no requests any more.")
        with self._lock:
            if len(self.running) + len(self.waiting) - self.limits.max_running >= self.limits.max_waiting:
                raise OverloadedError(f"{len(self.waiting)} requests wait; try again.", 0.5)
            says = self.script(request)
            text = "fails at once or later" if isinstance(says, Exception) else says
            ids = [*self.processor.tokenizer.encode(text), self.processor.tokenizer.eos_id]
            writer = AnswerWriter(self.processor.tokenizer, request.options, request.options.max_tokens)
            job = Job(request, listener, ids, writer)
            self.requests.append(request)
            self.waiting.append(job)
        self._wake.put(None)
        return job

    def drain(self, seconds: float) -> None:
        self.stage = Stage("draining")
        end = time.monotonic() + seconds
        while (self.running or self.waiting) and time.monotonic() < end:
            time.sleep(0.01)
        for job in [*self.running, *self.waiting]:
            job.cancel()

    def close(self) -> None:
        self.stage = Stage("closed")
        self._wake.put(None)

    def _run(self) -> None:
        while self.stage.name != "closed":
            with self._lock:
                while self.waiting and len(self.running) < self.limits.max_running:
                    self.running.append(self.waiting.pop(0))
            if not self.running:
                self._wake.get()
                continue
            time.sleep(self.seconds)
            self.steps += 1
            for job in list(self.running):
                self._step(job)
                if job.ended:
                    self.running.remove(job)

    def _step(self, job: Job) -> None:
        says, writer, number = self.script(job.request), job.writer, len(job.writer.ids)
        if job.cancelled:
            self.cancelled += 1
            self._end(job, "cancelled")
            return
        if isinstance(says, Exception) and number >= self.fails_after:
            job.ended = True
            job.listener(Failed(says))
            return
        if number == 0:
            job.listener(Started(reused_tokens=min(3, len(job.request.prompt))))
        id_ = job.ids[min(number, len(job.ids) - 1)]
        others = tuple((other, UNLIKELY - other) for other in range(job.request.top_logprobs))
        text = writer.push(id_, -0.5)
        if writer.finished:
            text += writer.close()
        job.listener(Piece(text, (Token(id_, -0.5, others),)))
        if writer.finished:
            self._end(job, writer.finish_reason)

    def _end(self, job: Job, reason: str) -> None:
        job.ended = True
        writer, prompt = job.writer, job.request.prompt
        size = prompt.image_sizes[job.request.boxes_on] if prompt.image_sizes else None
        picture = job.request.boxes_on % max(1, len(prompt.image_sizes))
        boxes = parse_boxes(writer.text, *size, picture=picture) if size else []
        timings = Timings(prompt_tokens=len(prompt), new_tokens=len(writer.ids))
        job.listener(Finished(Answer(writer.text, writer.ids, writer.logprobs, boxes, reason, len(prompt), timings)))
