"""Boxes of records: placeholders filled in, and answers written so that what points at something can be read again.

An answer is learned as the model writes it, `<|ref|>label<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>` with integers
from 0 to 999 (SPEC 4.10). What differs from that is mended where there is one way to mend it:

    [1, 2, 3, 4]                     a box without the list around it
    [[1, 2, 3, 4]]<|det|>[[5, ...    lists one after another: one list
    <|ref|>cat<|det|>[[1, 2, ...     a tag that is missing beside a whole list
    <bbox>, asked for <|ref|>cat     no label in the answer, and one in its question

and refused where it would have to be guessed: corners that are swapped (or a width and a height), numbers outside of 0
to 999, shares of 1, a list that is cut off, boxes without any label.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vl2_jax.errors import ConversationError, shown
from vl2_jax.processing.grounding import LARGEST, parse_boxes, write_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.processing.messages import checked_text, is_empty

_BESIDE = 0.02  # of a side: boxes of many data sets go a little over the edge
_BETWEEN = r"[\s,;]*"  # lists that belong together
_PLACEHOLDER = re.compile(rf"<ref-object>|<bbox>(?:{_BETWEEN}<bbox>)*")
_REF, _END_REF, _DET, _END_DET = "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"
_TAG = re.compile(r"(<\|/?(?:ref|det)\|>)")
_LABEL = re.compile(r"<\|ref\|>(.*?)<\|/ref\|>", re.DOTALL)
_NUMBER = r"\s*-?\d{1,7}(?:\.\d{1,17})?\s*"
_FOUR = ",".join([_NUMBER] * 4)
_ROWS = rf"\[{_FOUR}\](?:\s*(?:,\s*)?\[{_FOUR}\])*"
_BOX = re.compile(_FOUR)
_LIST = re.compile(rf"\s*(?:\[\s*{_ROWS}\s*\]|{_ROWS}(?!\s*(?:,\s*)?\[))")
_LIST_AT_END = re.compile(rf"(?:\[\s*{_ROWS}\s*\]|(?<![\[,\s]){_ROWS})\s*$")


def place_objects(messages: Sequence[dict[str, Any]], objects: Any, pictures: Sequence[Any]) -> None:
    """`<ref-object>` and `<bbox>` placeholders of messages to the model's tags, in the order they stand.

    Args:
      objects: `{"ref": labels, "bbox": boxes, "bbox_type": "real" | "norm1", "image_id": picture of each box}`.
      pictures: of the conversation.

    Raises:
      ConversationError: placeholders and objects do not match, or a box is no rectangle of its picture.
    """
    if is_empty(objects):
        return
    if isinstance(objects, list) and all(isinstance(item, Mapping) for item in objects):
        keys = ("ref", "bbox", "image_id")
        objects = {key: [item[key] for item in objects if item.get(key) is not None] for key in keys}
    if not isinstance(objects, Mapping):
        raise ConversationError(f"'objects' must hold 'ref' and 'bbox', got {type(objects).__name__}.")
    refs, rows = _list_of(objects, "ref"), _list_of(objects, "bbox")
    of_picture = [0 if number is None else number for number in _list_of(objects, "image_id")] or [0] * len(rows)
    if len(of_picture) != len(rows):
        raise ConversationError(f"'objects' has {len(rows)} boxes and {len(of_picture)} image_id.")
    kind_of_box = objects.get("bbox_type")
    kind_of_box = "real" if is_empty(kind_of_box) else kind_of_box
    if not (isinstance(kind_of_box, str) and kind_of_box in ("real", "norm1")):
        raise ConversationError(f"bbox_type is {shown(kind_of_box)}; expected 'real' (pixels) or 'norm1' (0 to 1).")
    taken = {"ref-object": 0, "bbox": 0}

    def next_of(kind: str, entries: Sequence[Any]) -> Any:
        taken[kind] += 1
        if taken[kind] > len(entries):
            raise ConversationError(f"more <{kind}> placeholders than entries in 'objects'.")
        return entries[taken[kind] - 1]

    def replaced(match: re.Match[str]) -> str:
        if match.group() == "<ref-object>":
            taken["ref-object"] *= len(refs) > 1  # the only label is that of every placeholder
            return f"{_REF}{_checked_label(next_of('ref-object', refs))}{_END_REF}"
        lists = "".join(next_box() for _ in range(match.group().count("<bbox>")))
        return lists.replace(f"]{_END_DET}{_DET}[", ", ")

    def next_box() -> str:
        box, picture = next_of("bbox", rows), of_picture[taken["bbox"] - 1]
        if not (isinstance(picture, int) and 0 <= picture < len(pictures)):
            raise ConversationError(f"a box belongs to picture {shown(picture)}, but there are {len(pictures)}.")
        size = (1, 1) if kind_of_box == "norm1" else size_of(picture)
        _check_box(box, *size)
        return write_boxes([box], *size)

    size_of = functools.cache(lambda number: load_image(pictures[number]).size)
    for message in messages:
        message["content"] = _PLACEHOLDER.sub(replaced, message["content"])
    if taken != {"ref-object": len(refs), "bbox": len(rows)}:
        raise ConversationError(
            f"'objects' has {len(refs)} ref and {len(rows)} bbox, of which {taken['ref-object']} and {taken['bbox']} "
            "have a placeholder <ref-object> or <bbox>."
        )


def with_boxes_that_can_be_read(answer: str, question: str) -> str:
    """An answer whose boxes are written as the model writes them, all of which `parse_boxes` reads.

    Raises:
      ConversationError: they cannot be mended without guessing.
    """
    if not _TAG.search(answer):
        return answer
    segments = _segments(answer)
    asked = {" ".join(label.split()) for label in _LABEL.findall(question)}
    has_labels = any(kind == "label" for kind, _ in segments)
    label = f"{_REF}{asked.pop()}{_END_REF}" if len(asked) == 1 and not has_labels else ""
    text, boxes = "", 0
    for kind, value in segments:
        if kind == "text":
            text += value
        elif kind == "label":
            text += f"{_REF}{value}{_END_REF}"
        else:
            text += f"{label}{_DET}{value}{_END_DET}"
            boxes += len(value)
    found = len(parse_boxes(text, LARGEST, LARGEST))
    if found != boxes:
        raise ConversationError(
            f"of {boxes} boxes in the answer {shown(text)}, {found} can be read; give each list its label "
            f"{_REF}...{_END_REF} before it."
        )
    return text


def _list_of(objects: Mapping[str, Any], key: str) -> list[Any]:
    value = objects.get(key)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if value is not None and not isinstance(value, list):
        raise ConversationError(f"{key!r} of 'objects' must be a list, got {shown(value)}.")
    return value or []


def _check_box(box: Any, width: float, height: float) -> None:
    """Raises ConversationError for what is no rectangle of the picture; edges may lie outside by a little."""
    if not (isinstance(box, Sequence) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)):
        raise ConversationError(f"the box {shown(box)} of 'objects' is not four numbers x1, y1, x2, y2.")
    x1, y1, x2, y2 = box
    x, y = _BESIDE * width, _BESIDE * height
    if not (-x <= x1 <= x2 <= width + x and -y <= y1 <= y2 <= height + y):
        raise ConversationError(
            f"the box {shown(box)} is not inside of its picture of {width} x {height}; see bbox_type."
        )


def _checked_label(label: Any) -> str:
    label = " ".join(checked_text(label, "a label of a box must be text").split())
    if _TAG.search(label):
        raise ConversationError(f"the label {shown(label)} holds a tag of boxes.")
    return label


def _segments(answer: str) -> list[tuple[str, Any]]:
    """("text", str), ("label", str) and ("boxes", rows) of an answer, in order."""
    parts = [*_TAG.split(answer), "", ""]  # text, tag, text, tag, ..., text
    segments: list[tuple[str, Any]] = [("text", parts[0])]
    place = 1
    while place < len(parts) - 2:
        tag, inside, closing = parts[place : place + 3]
        place += 2
        rest = inside
        if tag == _REF and closing in (_END_REF, _DET):
            segments.append(("label", _checked_label(inside)))
            rest = ""
        elif tag == _DET and (closing == _END_DET or (whole := _LIST.match(inside))):
            list_text = inside if closing == _END_DET else whole.group()  # type: ignore[union-attr]
            _add_boxes(segments, _rows(list_text))
            rest = inside[len(list_text) :]
        elif tag == _END_DET and segments[-1][0] == "text" and (whole := _LIST_AT_END.search(segments[-1][1])):
            segments[-1] = ("text", segments[-1][1][: whole.start()])
            _add_boxes(segments, _rows(whole.group()))
        else:
            raise ConversationError(
                f"the boxes of the answer {shown(answer)} are not whole: {tag} {shown(inside, 30)}."
            )
        if (tag, closing) in ((_REF, _END_REF), (_DET, _END_DET)):
            rest += parts[place + 1]
            place += 2
        segments.append(("text", rest))
    return segments


def _add_boxes(segments: list[tuple[str, Any]], rows: list[list[int]]) -> None:
    """Rows after others with nothing between them belong to those."""
    if len(segments) > 1 and segments[-2][0] == "boxes" and re.fullmatch(_BETWEEN, segments[-1][1]):
        segments.pop()
        segments[-1] = ("boxes", segments[-1][1] + rows)
    else:
        segments.append(("boxes", rows))


def _rows(text: str) -> list[list[int]]:
    """The rectangles of a list, whatever brackets are around it."""
    inside = text.strip().strip("[] \n\t")
    if not re.fullmatch(_ROWS, f"[{inside}]"):
        raise ConversationError(f"{shown(text)} is not a list of boxes [[x1, y1, x2, y2], ...].")
    rows = [[float(number) for number in row.split(",")] for row in _BOX.findall(inside)]
    numbers = [number for row in rows for number in row]
    if max(numbers) <= 1 and not all(number in (0, 1) for number in numbers):
        raise ConversationError(f"the boxes {shown(text)} are shares of 1; the model's numbers are 0 to {LARGEST}.")
    if not all(0 <= x1 <= x2 <= LARGEST and 0 <= y1 <= y2 <= LARGEST for x1, y1, x2, y2 in rows):
        raise ConversationError(
            f"{shown(text)} is not made of boxes [x1, y1, x2, y2] with x1 <= x2 and y1 <= y2, from 0 to {LARGEST}."
        )
    return [[round(number) for number in row] for row in rows]
