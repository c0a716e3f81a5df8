"""Boxes in answers: `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>` to pixels, and onto the picture.

Coordinates are 0 to 999 of the original picture's width and height (SPEC 4.10, 6.5). What the model wrote is data: it
is matched against a strict pattern of numbers and never evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_REF = re.compile(r"<\|ref\|>.*?<\|/ref\|>")
_DET = re.compile(r"<\|det\|>.*?<\|/det\|>")
_TAG = re.compile(r"<\|/?(?:ref|det)\|>")
_NUMBER = r"\s*(-?\d{1,7}(?:\.\d{1,7})?)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")

COLOURS = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0), (255, 0, 255), (127, 127, 127),
    (255, 255, 127), (255, 127, 255), (127, 255, 255), (127, 127, 255), (127, 255, 127), (255, 127, 127),
)  # fmt: skip
_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "simsun.ttc", "DejaVuSans.ttf")
_FONT_SIZE = 20
_LARGEST = 999  # coordinate: the right or the lower edge of the picture
_LINE_WIDTH = 3


@dataclass(frozen=True)
class Box:
    """A labelled rectangle in pixels of the original picture, (x1, y1) top left, (x2, y2) bottom right."""

    label: str
    x1: int
    y1: int
    x2: int
    y2: int


def parse_boxes(text: str, width: int, height: int) -> list[Box]:
    """The boxes an answer points at, in the order written; what is malformed gives no box.

    The number of labels must equal the number of box lists, and a rectangle whose corners are swapped is not one, as
    in the released code. Numbers outside of 0 to 999 are kept; they lie outside of the picture.
    """
    labels, lists = _REF.findall(text), _DET.findall(text)
    if len(labels) != len(lists):
        return []
    boxes = []
    for label, box_list in zip(labels, lists, strict=True):
        inside = _TAG.sub("", box_list).strip()[1:-1]
        for match in _BOX.finditer(inside):
            x1, y1, x2, y2 = (float(number) / _LARGEST for number in match.groups())
            box = Box(_TAG.sub("", label).strip(), *map(int, (x1 * width, y1 * height, x2 * width, y2 * height)))
            if box.x1 <= box.x2 and box.y1 <= box.y2:
                boxes.append(box)
    return boxes


def write_boxes(boxes: Sequence[Sequence[float]], width: float, height: float) -> str:
    """`<|det|>[[x1, y1, x2, y2], ...]<|/det|>` of rectangles in a picture of that size; what `parse_boxes` reads."""
    rows = [
        [min(_LARGEST, max(0, round(value / whole * _LARGEST))) for value, whole in zip(box, (width, height) * 2)]
        for box in boxes
    ]
    return f"<|det|>{rows}<|/det|>"


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the picture with every box and its label drawn on it."""
    drawn = image.convert("RGB")
    draw = ImageDraw.Draw(drawn, "RGBA")
    font = _font()
    for number, box in enumerate(boxes):
        colour = COLOURS[number % len(COLOURS)]
        draw.rectangle((box.x1, box.y1, box.x2, box.y2), outline=colour, width=_LINE_WIDTH)
        left, top, right, bottom = draw.textbbox((0, 0), box.label, font=font)
        x = min(max(0, box.x1), max(0, drawn.width - (right - left)))
        y = max(0, box.y1 - _FONT_SIZE)
        draw.rectangle((x + left, y + top, x + right, y + bottom), fill=(255, 255, 255, 180))
        draw.text((x, y), box.label, fill=colour, font=font)
    return drawn


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, _FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(_FONT_SIZE)
