"""Scenes of coloured shapes and short printed words: sampled from a seed, and drawn.

sample_scene(random) -> Scene -> render(scene) -> Pillow image
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "green": (42, 157, 66),
    "blue": (40, 80, 214),
    "yellow": (240, 200, 20),
    "purple": (140, 50, 170),
    "orange": (245, 130, 30),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
}
WORDS = tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())
# Of a shape or a word / the side of a square as large as the picture.
_SIDES = {"small": (0.18, 0.24), "large": (0.36, 0.48)}
_WORD_HEIGHTS = (0.18, 0.28)
SHORTEST_SIDE = 112  # that the longest side of a picture may have, in pixels
_SMALLEST_FONT = 11.0
_WIDEST_RATIO = 2.0
_MOST_COVERED = 0.2  # of a shape, by another shape
_ATTEMPTS = 20

Pixels = tuple[int, int, int, int]  # x1, y1, x2, y2


@dataclass(frozen=True)
class Thing:
    """A shape or a printed word, and the rectangle it fills."""

    kind: str  # one of SHAPES, or "word"
    colour: str
    box: Pixels
    size: str = ""  # small or large, of a shape
    text: str = ""  # of a word
    font_size: float = 0.0

    @property
    def is_word(self) -> bool:
        return self.kind == "word"

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """What is drawn; width and height in pixels, background and colours as red, green, blue from 0 to 255."""

    width: int
    height: int
    background: tuple[int, ...]
    things: tuple[Thing, ...]  # from the back to the front

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if not thing.is_word)

    @property
    def words(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.is_word)


def sample_scene(random: np.random.Generator, most_shapes: int, longest_side: int, most_words: int) -> Scene:
    """A scene of up to `most_shapes` shapes and `most_words` words, at any aspect ratio between 1:2 and 2:1."""
    ratio = 1.0 if random.random() < 0.4 else _WIDEST_RATIO ** random.uniform(-1, 1)
    side = int(random.integers(SHORTEST_SIDE, longest_side + 1))
    width, height = (max(64, round(side * min(1.0, r))) for r in (ratio, 1 / ratio))
    background = tuple(int(c) for c in random.integers(200, 256, 3))
    words = min(most_words, int(random.choice(3, p=(0.35, 0.45, 0.2)))) if most_shapes else most_words
    shapes = int(random.integers(0 if words else 1, most_shapes + 1))
    things: list[Thing] = []
    for number in range(words + shapes):
        sample = _sample_word if number < words else _sample_shape
        placed = _placed(random, sample(random, width, height), things, width, height)
        things += [placed] if placed else []
    if not things:
        return sample_scene(random, most_shapes, longest_side, most_words)
    return Scene(width, height, background, tuple(things[i] for i in random.permutation(len(things))))


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, `scene.width` x `scene.height` pixels."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        fill = COLOURS[thing.colour]
        if thing.is_word:
            font = ImageFont.load_default(thing.font_size)
            left, top, *_ = font.getbbox(thing.text)
            draw.text((thing.box[0] - left, thing.box[1] - top), thing.text, fill=fill, font=font)
        elif thing.kind == "circle":
            draw.ellipse(thing.box, fill=fill)
        elif thing.kind == "ring":
            draw.ellipse(thing.box, outline=fill, width=max(2, (thing.box[2] - thing.box[0]) // 5))
        else:
            draw.polygon(_outline(thing), fill=fill)
    return image


def _sample_shape(random: np.random.Generator, width: int, height: int) -> Thing:
    size = _pick(random, tuple(_SIDES))
    side = min(round(math.sqrt(width * height) * random.uniform(*_SIDES[size])), width, height)
    return Thing(_pick(random, SHAPES), _pick(random, tuple(COLOURS)), (0, 0, side, side), size)


def _sample_word(random: np.random.Generator, width: int, height: int) -> Thing:
    text = _pick(random, WORDS)
    widest = 0.9 * width / (0.75 * len(text))
    font_size = max(_SMALLEST_FONT, min(widest, math.sqrt(width * height) * random.uniform(*_WORD_HEIGHTS) * 1.3))
    left, top, right, bottom = ImageFont.load_default(font_size).getbbox(text)
    box = (0, 0, round(right - left), round(bottom - top))
    return Thing("word", _pick(random, tuple(COLOURS)), box, text=text, font_size=font_size)


def _placed(
    random: np.random.Generator, thing: Thing, others: Sequence[Thing], width: int, height: int
) -> Thing | None:
    """The thing at a free place: nothing covers a word, shapes cover each other a little. None if it finds none."""
    _, _, across, down = thing.box
    if across >= width or down >= height:
        return None
    for _ in range(_ATTEMPTS):
        x, y = int(random.integers(width - across)), int(random.integers(height - down))
        candidate = replace(thing, box=(x, y, x + across, y + down))
        if all(_covered(candidate, other) <= (0 if other.is_word else _MOST_COVERED) for other in others):
            return candidate
    return None


def _covered(a: Thing, b: Thing) -> float:
    """Shared area of two boxes / the smaller one's."""
    across = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
    down = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
    smaller = min((t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) for t in (a, b))
    return max(0, across) * max(0, down) / smaller


def _outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a shape, for a unit square laid on its box."""
    third = 1 / 3
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
        "cross": [
            (third, 0), (2 * third, 0), (2 * third, third), (1, third), (1, 2 * third), (2 * third, 2 * third),
            (2 * third, 1), (third, 1), (third, 2 * third), (0, 2 * third), (0, third), (third, third),
        ],
        "star": _STAR,
    }  # fmt: skip
    x1, y1, x2, y2 = thing.box
    return [(x1 + x * (x2 - x1), y1 + y * (y2 - y1)) for x, y in corners[thing.kind]]


def _star() -> list[tuple[float, float]]:
    """Five points that touch all four sides of the unit square."""
    angles = [math.pi * i / 5 for i in range(10)]
    raw = [
        ((1 if i % 2 == 0 else 0.42) * math.sin(a), -(1 if i % 2 == 0 else 0.42) * math.cos(a))
        for i, a in enumerate(angles)
    ]
    (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in zip(*raw))
    return [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in raw]


def _pick(random: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(random.integers(len(choices)))]


_STAR = _star()
