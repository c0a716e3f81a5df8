"""Asking an engine all questions of a benchmark, many at once, and writing down what comes back."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vl2_jax.errors import ConfigError, ContextLengthError, VL2Error
from vl2_jax.evaluation import answers
from vl2_jax.evaluation.answers import EVERYTHING, AnswerFile, Scored, Share
from vl2_jax.evaluation.benchmarks import Benchmark, tile_shapes
from vl2_jax.evaluation.metrics import said
from vl2_jax.evaluation.samples import Sample, Samples
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.processing.batch import Processor
from vl2_jax.progress import Report, silent
from vl2_jax.serving.requests import Event, Failed, Finished, Request, Serves


def rows_left(known: Mapping[tuple[int, int], Scored], rows: int, share: Share = EVERYTHING) -> list[int]:
    """Rows of a share that nobody has answered yet.

    Args:
      known: what has been answered, see `answers.read`.
    """
    done = answers.rows_done(known)
    return [row for row in range(rows) if share.has(row) and row not in done]


def seen_by(benchmark: Benchmark, processor: Processor) -> Processor:
    """The processor with as many tiles a picture as the benchmark is asked with."""
    if not benchmark.tiles:
        return processor
    shapes = tile_shapes(processor.config.tile_size, benchmark.tiles)
    return processor.replace(config=dataclasses.replace(processor.config, candidate_resolutions=shapes))


def evaluate(
    engine: Serves,
    processor: Processor,
    samples: Samples,
    benchmark: Benchmark,
    folder: Path,
    settings: dict[str, Any],
    rows: int,
    share: Share = EVERYTHING,
    in_flight: int = 16,
    report: Report = silent,
) -> None:
    """Asks what is not answered yet of the first `rows` rows, a share of them.

    Args:
      folder: where the answers are, and go to; `answers.begin` has made it.
      settings: what the answers depend on; `max_tokens` among them.
      in_flight: questions that are in the engine at once.

    Raises:
      ConfigError: a row that cannot be read, or that the rule does not fit, by file and row.
    """
    hash_ = answers.settings_hash(settings)
    known = answers.read(folder, hash_)
    left = rows_left(known, rows, share)
    options = SamplingOptions(max_tokens=settings["max_tokens"])
    with AnswerFile(folder / share.file, hash_) as file:
        number = 0
        report("answering", number, len(left))
        asked = _questions(samples, benchmark, left, known, file)
        for answer in _ask(engine, seen_by(benchmark, processor), benchmark, asked, options, in_flight):
            file.write(answer)
            number += answer.number == 0
            report("answering", number, len(left))


def _questions(
    samples: Samples, benchmark: Benchmark, rows: Iterable[int], known: dict[tuple[int, int], Scored], file: AnswerFile
) -> Iterator[tuple[Sample, int]]:
    """What has no answer yet, and of how many questions of its row it is one."""
    for row in rows:
        found = samples[row]
        if not found:
            file.write(Scored(row, of=0, is_scored=False))
        for sample in found:
            benchmark.check(sample)
            if sample.key not in known:
                yield sample, len(found)


def _ask(
    engine: Serves,
    processor: Processor,
    benchmark: Benchmark,
    questions: Iterable[tuple[Sample, int]],
    options: SamplingOptions,
    in_flight: int,
) -> Iterator[Scored]:
    """Answers in the order in which they come. While the engine computes, the next question's pictures are read."""
    ended: queue.SimpleQueue[tuple[Sample, int, Event]] = queue.SimpleQueue()
    waiting = 0
    for sample, of in questions:
        while waiting >= in_flight:
            waiting -= 1
            yield _scored(benchmark, *ended.get())
        try:
            prompt = processor.encode(benchmark.ask(sample).messages)
            sample = dataclasses.replace(sample, size=prompt.image_sizes[-1] if prompt.image_sizes else (0, 0))
            engine.submit(Request(prompt, options), partial(_listen, ended, sample, of))
        except ContextLengthError as error:  # as good as a wrong answer; the benchmark counts it
            yield dataclasses.replace(_described(sample, of), error=str(error), is_scored=bool(_expected(sample)))
            continue
        except VL2Error as error:
            where = "" if str(error).startswith(sample.where) else f"{sample.where}: "
            raise ConfigError(f"{where}{error}") from None
        waiting += 1
    for _ in range(waiting):
        yield _scored(benchmark, *ended.get())


def _listen(ended: queue.SimpleQueue[tuple[Sample, int, Event]], sample: Sample, of: int, event: Event) -> None:
    if isinstance(event, Finished | Failed):
        ended.put((sample, of, event))


def _scored(benchmark: Benchmark, sample: Sample, of: int, event: Event) -> Scored:
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Finished)
    answer, is_scored = event.answer, bool(_expected(sample))
    return dataclasses.replace(
        _described(sample, of),
        text=answer.text,
        score=benchmark.score(sample, said(answer.text)) if is_scored else 0.0,
        is_scored=is_scored,
        finish_reason=answer.finish_reason,
        new_tokens=len(answer.token_ids),
    )


def _described(sample: Sample, of: int) -> Scored:
    row, number = sample.key
    return Scored(
        row,
        number,
        of,
        sample.name,
        question=sample.question,
        expected=_expected(sample),
        groups=dict(sample.groups or {}),
        pair=sample.pair,
    )


def _expected(sample: Sample) -> str:
    """What is right, as people read it."""
    if sample.box is not None:
        return "box " + ", ".join(f"{value:.0f}" for value in sample.box)
    return " | ".join(dict.fromkeys(_with_option(sample, answer) for answer in sample.answers))


def _with_option(sample: Sample, answer: str) -> str:
    option = (sample.options or {}).get(answer)
    return answer if option is None else f"{answer}. {option}"
