"""Where the labels of boxes are written: inside of the picture, off one another, beside their boxes if there is room.

A label is written on one line or on a few, in smaller letters where it must, and shortened where even those do not fit.
Where a picture is so full that nothing fits any more, it is left out: two on top of each other could not be read.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "simsun.ttc", "DejaVuSans.ttf")
_FONT_SIZE, _SMALLEST_SIZE = 20, 9
_MARGIN = 2  # around the letters
_LINES = (1, 2, 3)
_LONGEST, _SHORTENED = 120, (40, 20, 10, 4, 1)  # characters
_CAREFULLY = 200  # so many boxes; more cannot be told apart anyway, and are to take no time
_STEPS = 32  # places along a side that are tried where none beside the box is free
_ON_DARK, _ON_BRIGHT = (24, 24, 24, 200), (255, 255, 255, 200)


@dataclass(frozen=True)
class Label:
    """Text as it is written, and the rectangle behind it."""

    text: str
    font: ImageFont.FreeTypeFont
    letters: tuple[float, float]  # where the text begins, from the rectangle's corner
    width: int
    height: int
    x: int = 0
    y: int = 0

    @property
    def rectangle(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom; the last two are the first pixels outside of it."""
        return self.x, self.y, self.x + self.width, self.y + self.height


def place_labels(
    texts: Sequence[str], boxes: Sequence[tuple[float, float, float, float]], size: tuple[int, int]
) -> list[Label | None]:
    """The label of every box (left, top, right, bottom) in a picture of that size; None where there is no room."""
    fonts = _fonts(size) if any(texts) else []
    known: dict[tuple[str, bool], list[Label]] = {}
    taken = np.zeros((0, 4), np.int64)
    placed: list[Label | None] = []
    is_full = False
    for number, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        is_full = is_full or number >= _CAREFULLY
        if (text, is_full) not in known:
            known[text, is_full] = list(_layouts(text, fonts[-1:] if is_full else fonts, size))
        layouts = known[text, is_full]
        label = _beside(box, layouts, taken, size)
        if label is None and layouts and not is_full:
            label = _anywhere(box, layouts, taken, size)
            is_full = label is None
        if label is not None:
            taken = np.concatenate([taken, [label.rectangle]])
        placed.append(label)
    return placed


def draw_label(draw: ImageDraw.ImageDraw, label: Label, colour: tuple[int, int, int]) -> None:
    """Letters of that colour, on a ground that they can be read on."""
    left, top, right, bottom = label.rectangle
    brightness = np.dot(colour, (0.299, 0.587, 0.114))
    draw.rectangle((left, top, right - 1, bottom - 1), fill=_ON_DARK if brightness > 140 else _ON_BRIGHT)
    draw.multiline_text(
        (left + label.letters[0], top + label.letters[1]), label.text, fill=colour, font=label.font, spacing=_MARGIN
    )


def _fonts(size: tuple[int, int]) -> list[ImageFont.FreeTypeFont]:
    """From the largest that suits the picture to the smallest that can be read."""
    largest = max(_FONT_SIZE, max(size) // 60)
    font: ImageFont.FreeTypeFont | None = None
    for name in _FONTS:
        try:
            font = ImageFont.truetype(name, largest)
            break
        except OSError:
            continue
    font = font or ImageFont.load_default(largest)  # type: ignore[assignment]
    assert font is not None
    sizes = {max(_SMALLEST_SIZE, round(largest * share)) for share in (1, 0.8, 0.6)} | {_SMALLEST_SIZE}
    return [font.font_variant(size=size) for size in sorted(sizes, reverse=True)]


def _layouts(text: str, fonts: list[ImageFont.FreeTypeFont], size: tuple[int, int]) -> Iterator[Label]:
    """All ways of writing a text that the picture has room for, the best first: whole before shortened, large first."""
    text = " ".join(text[: 2 * _LONGEST].encode("utf-8", "replace").decode("utf-8").split())
    text = "".join(letter for letter in text if letter.isprintable())
    if not text:
        return
    text = _shortened(text, _LONGEST)
    broken = dict.fromkeys(_broken(text, number) for number in _LINES)
    ways = [(lines, font) for part in (fonts[:2], fonts[2:]) for lines in broken for font in part]
    ways += [(_shortened(text, most), font) for most in _SHORTENED if most < len(text) for font in fonts[-2:]]
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    for lines, font in ways:
        left, top, right, bottom = measure.multiline_textbbox((0, 0), lines, font=font, spacing=_MARGIN)
        left, top = math.floor(left) - _MARGIN, math.floor(top) - _MARGIN
        width, height = math.ceil(right) + _MARGIN - left, math.ceil(bottom) + _MARGIN - top
        if width <= size[0] and height <= size[1]:
            yield Label(lines, font, (-left, -top), width, height)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "…"


def _broken(text: str, lines: int) -> str:
    """The text on that many lines of about the same length, or on fewer."""
    length = -(-len(text) // lines)
    while len(rows := textwrap.wrap(text, length)) > lines:
        length += 1 + length // 16
    return "\n".join(rows)


def _beside(
    box: tuple[float, float, float, float], layouts: list[Label], taken: np.ndarray, size: tuple[int, int]
) -> Label | None:
    """The first layout with a free place at the box: above it, below it, in it, beside it."""
    left, top, right, bottom = box
    for label in layouts:
        across, down = (left, right - label.width), (top, bottom - label.height)
        corners = [(x, y) for y in (top - label.height, bottom, *down) for x in across]
        corners += [(right, top), (left - label.width, top)]
        free = _free(label, np.clip(corners, -(2**30), 2**30).astype(np.int64), taken, size)
        if len(free):
            return replace(label, x=int(free[0, 0]), y=int(free[0, 1]))
    return None


def _anywhere(
    box: tuple[float, float, float, float], layouts: list[Label], taken: np.ndarray, size: tuple[int, int]
) -> Label | None:
    """The smallest whole layout, or else the smallest of all, in the free place that is nearest to the box."""
    whole = [label for label in layouts if not label.text.endswith("…")]
    for label in [min(some, key=lambda label: label.width * label.height) for some in (whole, layouts) if some]:
        room = size[0] - label.width, size[1] - label.height
        steps = max(1, label.width // 4, room[0] // _STEPS), max(1, label.height // 2, room[1] // _STEPS)
        xs, ys = (np.append(np.arange(0, end, step), end) for end, step in zip(room, steps))
        free = _free(label, np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2), taken, size)
        if len(free):
            middle = np.clip([box[0] + box[2], box[1] + box[3]], 0, np.multiply(size, 2)) / 2
            far = np.square(free + np.array([label.width, label.height]) / 2 - middle).sum(axis=1)
            x, y = free[far.argmin()]
            return replace(label, x=int(x), y=int(y))
    return None


def _free(label: Label, corners: np.ndarray, taken: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`[places, 2]` of the corners, moved into the picture, at which the label touches no other."""
    extent = np.array([label.width, label.height])
    corners = np.clip(corners, 0, size - extent)
    touches = (corners[:, None] < taken[:, 2:]) & (corners[:, None] + extent > taken[:, :2])
    return corners[~touches.all(axis=2).any(axis=1)]
