"""Boxes in answers: `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>` to pixels, and onto the picture.

Coordinates are 0 to 999 of the original picture's width and height (SPEC 4.10, 6.5). What the model wrote is data: it
is matched against a strict pattern of numbers and never evaluated.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from vl2_jax.processing.images import Picture, load_image
from vl2_jax.processing.labels import draw_label, place_labels

_TAG = re.compile(r"<\|(/?)(ref|det)\|>")
_NUMBER = r"\s*(-?[0-9]{1,7}(?:\.[0-9]{1,7})?)\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")

COLOURS = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 255, 255), (255, 255, 0), (255, 0, 255), (127, 127, 127),
    (255, 255, 127), (255, 127, 255), (127, 255, 255), (127, 127, 255), (127, 255, 127), (255, 127, 127),
)  # fmt: skip
LARGEST = 999  # coordinate: the right or the lower edge of the picture
BOX_IS_RIGHT = 0.5  # and more of `iou` (RefCOCO)
_LINE_WIDTH = 3


@dataclass(frozen=True)
class Box:
    """A labelled rectangle.

    Attributes:
      label: as written, without tags; empty where the text begins after it.
      x1, y1, x2, y2: in pixels of the upright picture, top left and bottom right.
      raw: the same as written, 0 to 999 of the picture's width and height.
      picture: its number in the conversation, counted from 0.
    """

    label: str
    x1: int
    y1: int
    x2: int
    y2: int
    raw: tuple[float, ...] = ()
    picture: int = 0

    @property
    def corners(self) -> tuple[int, int, int, int]:
        return self.x1, self.y1, self.x2, self.y2


def parse_boxes(text: str, width: int, height: int, *, as_released: bool = False, picture: int = 0) -> list[Box]:
    """The boxes an answer points at, in the order written; what is malformed gives no box.

    Every box that is complete is read, also of an answer that was cut off, that begins inside of a list (its
    beginning was given), or where something else lacks its boxes, its label or a tag. A rectangle whose corners are
    swapped is not one. Numbers outside of 0 to 999 are kept; they lie outside of the picture. Takes linear time.

    Args:
      width: of the picture, in pixels.
      height: likewise.
      as_released: the released rule. Labels and lists are paired in their order; an answer has no boxes at all if
        there are not as many of one as of the other, and neither may contain a line break.
      picture: the number of the picture that the boxes are in.
    """
    if not as_released:
        return [box for part in read_parts(text, width, height, picture) for box in part.boxes]
    pairs = _released_pairs(text)
    return [box for label, box_list in pairs for box in _boxes(label, box_list, width, height, picture)]


class Part(NamedTuple):
    """A piece of an answer.

    Attributes:
      kind: "ref" of a label, "det" of a list of boxes, empty of what stands between them.
      content: what was written, without the tags of labels and lists.
      boxes: of a label, those that it points at; of a list, those that no label has.
    """

    kind: str
    content: str
    boxes: list[Box]


def read_parts(text: str, width: int, height: int, picture: int = 0) -> list[Part]:
    """The whole of an answer, piece by piece, with the boxes of `parse_boxes` where they belong, in their order.

    Labels before lists are paired with them in their order. If there are fewer lists, the last labels have them: in
    `a, b [[...]]` the box is that of b. If there are more, the last label has the rest.
    """
    parts = [Part(kind, content, []) for kind, content in _parts(text)]
    labels: list[Part] = []
    lists: list[Part] = []
    for part in [*parts, Part("ref", "", [])]:
        if part.kind == "det" and "[" in part.content:
            lists.append(part)
        elif part.kind == "ref":
            owners = labels[-len(lists) :] if lists else []
            for number, found in enumerate(lists):
                owner = owners[min(number, len(owners) - 1)] if owners else found
                label = owner.content.strip() if owners else ""
                owner.boxes.extend(_boxes(label, found.content, width, height, picture))
            if lists:
                labels, lists = [], []
            labels.append(part)
    return parts


def write_boxes(boxes: Sequence[Sequence[float]], width: float, height: float) -> str:
    """`<|det|>[[x1, y1, x2, y2], ...]<|/det|>` of rectangles in a picture of that size; what `parse_boxes` reads."""
    rows = [
        [min(LARGEST, max(0, round(value / whole * LARGEST))) for value, whole in zip(box, (width, height) * 2)]
        for box in boxes
    ]
    return f"<|det|>{rows}<|/det|>"


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Shared area / area of both together, of corners (x1, y1, x2, y2)."""
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, across) * max(0.0, down)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / both if both > 0 else 0.0


def draw_boxes(image: Picture, boxes: Sequence[Box]) -> Image.Image:
    """A copy of the picture, upright as the model saw it, with every box and its label drawn on it.

    Labels stay inside of the picture and off one another (see `labels.place_labels`); colours take turns.
    """
    drawn = load_image(image, max_pixels=sys.maxsize)  # somebody has decided already that it is not too large
    draw = ImageDraw.Draw(drawn, "RGBA")
    width = max(1, min(_LINE_WIDTH, min(drawn.size) // 20), max(drawn.size) // 500)
    for number, box in enumerate(boxes):
        # What lies far outside is not visible, and Pillow counts in 32 bits.
        left, right = (min(max(x, -width), drawn.width + width) for x in (box.x1, box.x2))
        top, bottom = (min(max(y, -width), drawn.height + width) for y in (box.y1, box.y2))
        draw.rectangle((left, top, right, bottom), outline=COLOURS[number % len(COLOURS)], width=width)
    anchors = [box.corners for box in boxes]
    for number, label in enumerate(place_labels([box.label for box in boxes], anchors, drawn.size)):
        if label is not None:
            draw_label(draw, label, COLOURS[number % len(COLOURS)])
    return drawn


def _boxes(label: str, box_list: str, width: int, height: int, picture: int) -> Iterator[Box]:
    for match in _BOX.finditer(box_list):
        x1, y1, x2, y2 = (float(number) / LARGEST for number in match.groups())
        raw = tuple(float(number) if "." in number else int(number) for number in match.groups())
        corners = int(x1 * width), int(y1 * height), int(x2 * width), int(y2 * height)
        box = Box(label, *corners, raw, picture)
        if box.x1 <= box.x2 and box.y1 <= box.y2:
            yield box


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """("ref", "det" or "", what stands in it or between them) one after another, without the tags of these two kinds.

    What is open ends at a closing tag, at a tag of the other kind and at the end of the text. A closing tag that
    nothing opened tells that the text began inside of it.
    """
    kind, begin = "", 0
    pieces: list[str] = []
    for number, tag in enumerate(_TAG.finditer(text)):
        closes, of = tag[1] == "/", tag[2]
        if not kind and closes and (number == 0 or of == "det"):
            kind = of
        pieces.append(text[begin : tag.start()])
        begin = tag.end()
        if not kind or closes or of != kind:
            yield kind, "".join(pieces)
            pieces, kind = [], "" if closes else of
    yield kind, "".join([*pieces, text[begin:]])


def _released_pairs(text: str) -> Iterator[tuple[str, str]]:
    """`zip` of all labels and all lists; of a list, the first and the last character are cut off, brackets or not."""
    labels, lists = (list(_released_parts(text, kind)) for kind in ("ref", "det"))
    if len(labels) == len(lists):
        for label, box_list in zip(labels, lists, strict=True):
            yield _TAG.sub("", label).strip(), _TAG.sub("", box_list).strip()[1:-1]


def _released_parts(text: str, kind: str) -> Iterator[str]:
    """The matches of `<\\|kind\\|>(.*?)<\\|/kind\\|>`, in linear time."""
    opening, closing = f"<|{kind}|>", f"<|/{kind}|>"
    for line in text.split("\n"):
        end = 0
        while (begin := line.find(opening, end)) >= 0:
            begin += len(opening)
            end = line.find(closing, begin)
            if end < 0:
                break
            yield line[begin:end]
            end += len(closing)
