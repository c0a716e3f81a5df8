"""What is known by name: a prompt, a rule, how scores add up, and what the paper reports (SPEC 8.5).

A name of a table here, or one with a part that is no other benchmark's: `DocVQA_VAL`, `MMBench_DEV_EN_V11`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vl2_jax.errors import ConfigError, shown
from vl2_jax.evaluation import metrics, prompts
from vl2_jax.evaluation.answers import Scored
from vl2_jax.evaluation.prompts import Question
from vl2_jax.evaluation.samples import Sample

Total = Callable[[Sequence[Scored]], float]
MAX_TOKENS = 2048  # of an answer, as the released adapter allows
_MME_PARTS = {
    **dict.fromkeys(("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark"), "perception"),
    **dict.fromkeys(("position", "posters", "scene"), "perception"),
    **dict.fromkeys(("code_reasoning", "commonsense_reasoning", "numerical_calculation"), "cognition"),
    "text_translation": "cognition",
}


def mean(rows: Sequence[Scored]) -> float:
    return 100 * sum(row.score for row in rows) / len(rows)


def points(rows: Sequence[Scored]) -> float:
    """How many are right: OCRBench has a thousand questions."""
    return sum(row.score for row in rows)


def every_order(rows: Sequence[Scored]) -> float:
    """A question is right if it is in every order of its options (MMBench)."""
    return 100 * _share_all_right(rows)


def mme(rows: Sequence[Scored]) -> float:
    """Over categories: per cents of right answers, and of pictures both of whose answers are right."""
    categories: dict[str, list[Scored]] = {}
    for row in rows:
        categories.setdefault(row.groups.get("category", ""), []).append(row)
    return sum(mean(part) + 100 * _share_all_right(part) for part in categories.values())


def _share_all_right(rows: Sequence[Scored]) -> float:
    right: dict[str, bool] = {}
    for row in rows:
        right[row.pair] = right.get(row.pair, True) and row.score == 1
    return sum(right.values()) / len(right)


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked and scored.

    Attributes:
      ask, score: see `prompts` and `metrics`.
      total: what the scores of some questions come to.
      unit: of totals.
      needs: what the rule reads of a row: "answers", "several answers", "options" or "box".
      tiles: most tiles of a picture; 0 is the model's own.
      parts: of the benchmark, by category.
      paper: what SPEC 8.5 has for Tiny, Small and Base, by the name of what was measured.
    """

    ask: Callable[[Sample], Question]
    score: Callable[[Sample, str], float]
    total: Total = mean
    unit: str = "%"
    needs: str = "answers"
    tiles: int = 0
    parts: Mapping[str, str] = field(default_factory=dict)
    paper: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def check(self, sample: Sample) -> None:
        """Whether a row has what the rule reads; a row without answers is asked and not scored.

        Raises:
          ConfigError: naming file and row.
        """
        rule = self.score.__name__.replace("_", " ")
        if self.needs == "box":
            if sample.box is None:
                raise ConfigError(f"{sample.where}: the rule {rule!r} needs a column 'bbox', which is not there.")
        elif sample.box is not None:
            raise ConfigError(f"{sample.where}: a row with a 'bbox' is one of grounding; the rule {rule!r} is not.")
        elif self.needs == "several answers" and len(sample.answers) == 1:
            raise ConfigError(
                f"{sample.where}: the rule {rule!r} counts people who agree, and 'answers' holds one answer; choose "
                "another rule (--benchmark exact)."
            )
        elif self.needs == "options" and not sample.options and not metrics.is_letter(sample.answers):
            raise ConfigError(
                f"{sample.where}: the rule {rule!r} needs options in columns A, B, ... or 'options', or a letter as "
                "'answer' to a question that holds them."
            )


_MMBENCH = Benchmark(
    prompts.option,
    metrics.choice,
    every_order,
    needs="options",
    paper={"test en": (73.3, 82.3, 83.1), "test cn": (69.2, 80.3, 79.6), "V1.1": (68.3, 79.3, 79.2)},
)
_REFCOCO, _REFCOCO_PLUS, _REFCOCOG = (
    Benchmark(prompts.locate, metrics.found_box, needs="box", paper=paper)
    for paper in (
        {"val": (84.7, 93.9, 95.1), "testA": (87.8, 95.3, 96.7), "testB": (78.4, 91.3, 92.7)},
        {"val": (75.9, 89.4, 91.2), "testA": (83.9, 92.9, 94.9), "testB": (67.4, 84.8, 87.4)},
        {"val": (73.8, 92.6, 92.8), "test": (83.9, 92.6, 92.9)},
    )
)
_INFOVQA = Benchmark(prompts.short_answer, metrics.anls, tiles=18, paper={"test": (66.1, 75.8, 78.1)})
_TEXT, _ANLS, _OPTION = (
    Benchmark(prompts.short_answer, metrics.vqa_accuracy, needs="several answers"),
    Benchmark(prompts.short_answer, metrics.anls),
    Benchmark(prompts.option, metrics.choice, needs="options"),
)


def _like(benchmark: Benchmark, what: str, *paper: float) -> Benchmark:
    tiny, small, base = paper
    return replace(benchmark, paper={what: (tiny, small, base)})


BENCHMARKS = {
    "DocVQA": _like(_ANLS, "test", 88.9, 92.3, 93.3),
    "InfoVQA": _INFOVQA,
    "InfographicVQA": _INFOVQA,
    "ChartQA": Benchmark(prompts.short_answer, metrics.relaxed_accuracy, paper={"test": (81.0, 84.5, 86.0)}),
    "TextVQA": _like(_TEXT, "val", 80.7, 83.4, 84.2),
    "VQAv2": _TEXT,
    "OCRBench": Benchmark(prompts.plain, metrics.containment, points, "points", paper={"of 1000": (809, 834, 811)}),
    "OCRVQA": Benchmark(prompts.short_answer, metrics.exact),
    "GQA": Benchmark(prompts.short_answer, metrics.exact),
    "MMStar": _like(_OPTION, "val", 45.9, 57.0, 61.3),
    "AI2D": _like(_OPTION, "test", 71.6, 80.0, 81.4),
    "MMMU": Benchmark(prompts.mmmu, metrics.choice, paper={"validation": (40.7, 48.0, 51.1)}),
    "RealWorldQA": Benchmark(prompts.option, metrics.choice, paper={"test": (64.2, 65.4, 68.4)}),
    "MMT-Bench": _like(_OPTION, "val", 53.2, 62.9, 63.6),
    "MMBench": _MMBENCH,
    "CCBench": Benchmark(prompts.option, metrics.choice, every_order, needs="options"),
    "SEEDBench": _OPTION,
    "ScienceQA": _OPTION,
    "MME": Benchmark(
        prompts.plain, metrics.yes_or_no, mme, "points", parts=_MME_PARTS, paper={"sum": (1915, 2123, 2253)}
    ),
    "POPE": Benchmark(prompts.plain, metrics.yes_or_no),
    "RefCOCO": _REFCOCO,
    "RefCOCO+": _REFCOCO_PLUS,
    "RefCOCOplus": _REFCOCO_PLUS,
    "RefCOCOg": _REFCOCOG,
    # rules by themselves, for data of one's own
    "vqa": _TEXT,
    "anls": _ANLS,
    "relaxed": Benchmark(prompts.short_answer, metrics.relaxed_accuracy),
    "exact": Benchmark(prompts.plain, metrics.exact),
    "contains": Benchmark(prompts.plain, metrics.containment),
    "yes-no": Benchmark(prompts.plain, metrics.yes_or_no),
    "option": _OPTION,
    "grounding": Benchmark(prompts.locate, metrics.found_box, needs="box"),
}
_PARTS = re.compile(
    r"(?:[\s_.-]*(?:val|validation|test[ab]?|testcore|testdev|dev|train|mini|lite|all|mi|en|cn|v\d+|img|no|mask|balanced))*"
)


def benchmark_of(name: str) -> tuple[str, Benchmark]:
    """The benchmark that a name means, and what it is called here.

    Raises:
      ConfigError: it means none that is known.
    """
    known = {key.lower(): key for key in BENCHMARKS}
    given = name.lower()
    for key in sorted(known, key=len, reverse=True):
        if given.startswith(key) and _PARTS.fullmatch(given[len(key) :]):
            return known[key], BENCHMARKS[known[key]]
    raise ConfigError(
        f"{shown(name)} is not the name of a benchmark that is known; say which its rows are of, with --benchmark: "
        f"{', '.join(BENCHMARKS)}."
    )


def tile_shapes(side: int, most: int) -> tuple[tuple[int, int], ...]:
    """All (width, height) of at most so many tiles, in the order of the released list, which decides between equals."""
    shapes = [(w, h) for w in range(1, most + 1) for h in range(1, most // w + 1)]
    return tuple((w * side, h * side) for w, h in sorted(shapes, key=lambda s: (s[0] * s[1], min(s), s[0])))
