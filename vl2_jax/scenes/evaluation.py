"""How well a model answers questions about scenes that it has not seen: exact answers, boxes, words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vl2_jax.api import VL2
from vl2_jax.inference.answers import Answer
from vl2_jax.processing.conversation import IMAGE_TAG
from vl2_jax.processing.grounding import BOX_IS_RIGHT, Box, iou, parse_boxes
from vl2_jax.progress import Report, silent
from vl2_jax.scenes.conversations import SceneSizes, scene_conversation

_POINTING = ("locate", "grounded caption")
_LONG = ("caption", "grounded caption")
_MAX_TOKENS = 200
_BATCH = 16


@dataclass(frozen=True)
class Asked:
    """One question in a conversation of its own, the right answer and the model's."""

    skill: str
    images: list[Any]
    question: str
    expected: str
    answer: Answer

    @property
    def score(self) -> float:
        """1 for the right text; for boxes the share that is found at IoU 0.5, over the more of both numbers."""
        if self.skill not in _POINTING:
            return float(self.answer.text.strip() == self.expected)
        size = self.images[-1].size
        return matched(parse_boxes(self.expected, *size), parse_boxes(self.answer.text, *size))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    skill: str
    questions: int
    score: float


def questions(seed: int, count: int, sizes: SceneSizes) -> Iterator[tuple[str, list[Any], str, str]]:
    """(skill, pictures, question, answer) of `count` held-out conversations, every question asked by itself."""
    for number in range(count):
        conversation = scene_conversation((seed, number), sizes)
        messages, images = conversation["messages"], conversation["messages"][0]["images"]
        tags = f"{IMAGE_TAG}\n" * len(images)
        pairs = zip(messages[0::2], messages[1::2], conversation["skills"], strict=True)
        for question, answer, skill in pairs:
            yield skill, images, tags + question["content"].removeprefix(tags), answer["content"]


def ask_all(vl2: VL2, count: int, seed: int, sizes: SceneSizes, report: Report = silent) -> list[Asked]:
    """Greedy answers to every question of `count` conversations, questions of like length together."""
    asked = sorted(questions(seed, count, sizes), key=lambda q: (len(q[3]), q[0]))
    found: list[Asked] = []
    for begin in range(0, len(asked), _BATCH):
        report("asking", begin, len(asked))
        part = asked[begin : begin + _BATCH]
        turns = [[{"role": "user", "content": text, "images": images}] for _, images, text, _ in part]
        answers = vl2.generate(turns, max_tokens=_MAX_TOKENS)
        found += [Asked(*question, answer) for question, answer in zip(part, answers, strict=True)]
    return found


def table(asked: Sequence[Asked]) -> list[Row]:
    """A row a skill, then what the skills come to."""
    groups: dict[str, list[Asked]] = {skill: [] for skill in sorted({a.skill for a in asked})}
    for a in asked:
        groups[a.skill].append(a)
    groups["all short questions"] = [a for a in asked if a.skill not in (*_LONG, "locate")]
    groups["all boxes"] = [a for a in asked if a.skill in _POINTING]
    return [Row(skill, len(part), sum(a.score for a in part) / len(part)) for skill, part in groups.items() if part]


def matched(expected: Sequence[Box], found: Sequence[Box]) -> float:
    """Share of boxes that agree at IoU 0.5, each with one other at most."""
    left = list(found)
    hits = 0
    for box in expected:
        best = max(left, key=lambda other: iou(box.corners, other.corners), default=None)
        if best is not None and iou(box.corners, best.corners) >= BOX_IS_RIGHT:
            hits += 1
            left.remove(best)
    return hits / max(1, len(expected), len(found))
