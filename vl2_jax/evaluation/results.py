"""Answers to numbers: one for the whole benchmark, and one for each part that its rows name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vl2_jax.evaluation.answers import Scored
from vl2_jax.evaluation.benchmarks import Benchmark
from vl2_jax.evaluation.metrics import said
from vl2_jax.training.folder import write

RESULTS_FILE, SUBMISSION_FILE, PAGE_FILE = "results.json", "submission.json", "wrong.html"
_MOST_PARTS = 64  # of a column; more values are not parts of a benchmark but names of its rows


@dataclass(frozen=True)
class Line:
    """One line of the table: a part of the benchmark, or all of it."""

    part: str
    questions: int
    score: float


@dataclass(frozen=True)
class Results:
    """What a benchmark came to.

    Attributes:
      lines: all of it first; none where nobody here knows the right answers.
      unanswered: prompts that were too long for the model's context, which count as wrong.
      cut: answers that ended at the most tokens.
    """

    benchmark: str
    unit: str
    answered: int
    lines: list[Line]
    unanswered: int = 0
    cut: int = 0
    paper: dict[str, Sequence[float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        return self.lines[0].score if self.lines else None


def results_of(name: str, benchmark: Benchmark, answers: Iterable[Scored], settings: dict[str, Any]) -> Results:
    answers = [answer for answer in answers if answer.of]
    scored = [answer for answer in answers if answer.is_scored]
    lines = [Line("all", len(scored), benchmark.total(scored))] if scored else []
    for column, parts in _parts(benchmark, scored).items():
        if len(parts) <= _MOST_PARTS:
            lines += [Line(f"{column}: {part}", len(of), benchmark.total(of)) for part, of in sorted(parts.items())]
    return Results(
        name,
        benchmark.unit,
        len(answers),
        lines,
        unanswered=sum(bool(answer.error) for answer in answers),
        cut=sum(answer.finish_reason == "length" for answer in answers),
        paper=dict(benchmark.paper),
        settings=settings,
    )


def _parts(benchmark: Benchmark, scored: Sequence[Scored]) -> dict[str, dict[str, list[Scored]]]:
    columns: dict[str, dict[str, list[Scored]]] = {}
    for answer in scored:
        groups = dict(answer.groups)
        if part := benchmark.parts.get(groups.get("category", "")):
            groups = {"part": part} | groups
        for column, value in groups.items():
            columns.setdefault(column, {}).setdefault(value, []).append(answer)
    return columns


def table(results: Results) -> str:
    """The numbers in columns, and the paper's beside them."""
    longest = max([len(line.part) for line in results.lines] + [24])
    rows = [
        f"{line.part:{longest}} {line.questions:7} questions {line.score:7.1f} {results.unit}" for line in results.lines
    ]
    if not rows:
        rows = [f"{results.answered} answers; the data has no right ones, so they are for the benchmark's own server"]
    for what, (tiny, small, base) in results.paper.items():
        rows.append(f"{'the paper, ' + what:{longest}} Tiny {tiny:g}, Small {small:g}, Base {base:g} {results.unit}")
    if results.unanswered:
        rows.append(f"{results.unanswered} prompts were too long for the model's context, and count as wrong")
    return "\n".join(rows)


def save(folder: Path, results: Results, answers: Iterable[Scored]) -> None:
    """The numbers as JSON; what nobody here can score, as the server of DocVQA and InfoVQA takes it."""
    write(folder / RESULTS_FILE, json.dumps(asdict(results) | {"score": results.score}, indent=2))
    unscored = [answer for answer in answers if answer.of and not answer.is_scored]
    if unscored:
        rows = [
            {"questionId": int(answer.name) if answer.name.isdecimal() else answer.name, "answer": said(answer.text)}
            for answer in unscored
        ]
        write(folder / SUBMISSION_FILE, json.dumps(rows, indent=1))
