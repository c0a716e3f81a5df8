"""What the page shows, as HTML that is safe by the way it is made: whatever a model, a user or a file name says is
escaped, numbers are numbers, and nothing else comes from outside.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from vl2_jax.processing.grounding import COLOURS, LARGEST, Box, read_parts
from vl2_jax.processing.tokenizer import GROUNDING_TAGS
from vl2_jax.serving.page.talk import Picture, Talk, Turn
from vl2_jax.serving.requests import Stage

_TAG = re.compile("|".join(map(re.escape, GROUNDING_TAGS)))
_BEGUN = re.compile(r"<(?:\|/?[a-z]*\|?)?\Z")  # what may become a tag with the next piece
_MARKUP = re.compile(r"<(?=[a-zA-Z/!?])|&(?=#|[a-zA-Z])")  # where a tag or a character reference may begin
_WHOLE = (LARGEST, LARGEST)
_ROOM, _ROOM_ACROSS = 12, 40  # percent of a picture that a label needs above a box, and to its right


def question_text(question: str) -> str:
    """A question as Gradio's conversation takes it, which would read markup in it: only that is escaped.

    `question_of` gives back what was typed, so that a question can be edited.
    """
    return _MARKUP.sub(lambda found: escape(found[0]), question) or " "


def question_of(text: str) -> str:
    """What `question_text` was made of."""
    return text.replace("&lt;", "<").replace("&amp;", "&").strip()


def sent_html(pictures: Sequence[Picture]) -> str:
    """The pictures of a question; the name of one that is not read yet, or cannot be."""
    shown = [_image(p.preview, p.name) if p.preview else f"<span>{escape(p.name)}</span>" for p in pictures]
    return f'<div class="sent">{"".join(shown)}</div>'


def answer_html(turn: Turn, pictures: Sequence[Picture]) -> str:
    """An answer: its text, whose mentions have the colours of their boxes, and the picture with the boxes on it."""
    if turn.problem:
        return f'<div class="answer problem" role="alert">{escape(sentence(turn.problem))}</div>'
    picture = pictures[turn.boxes_on] if 0 <= turn.boxes_on < len(pictures) else None
    text = text_html(turn.answer, turn.is_over, picture.size if picture else _WHOLE)
    parts = [f'<div class="text">{text}{_note(turn)}</div>']
    if turn.boxes and picture is not None:
        parts.append(figure_html(picture, turn.boxes, turn.saved))
    return f'<div class="answer{"" if turn.is_over else " writing"}">{"".join(parts)}</div>'


def text_html(text: str, is_over: bool = True, size: tuple[int, int] = _WHOLE) -> str:
    """A model's text without its lists of boxes, in which a label that has boxes has the colour of its first one.

    Args:
      size: of the picture that the boxes are on.
    """
    shown, number = [], 0
    for kind, content, boxes in read_parts(text if is_over else _BEGUN.sub("", text), *size):
        if kind != "det" or "[" not in content:
            words = escape(_TAG.sub("", content))
            coloured = f'<span class="mention c{number % len(COLOURS)}">{words}</span>'
            shown.append(coloured if kind == "ref" and boxes else words)
        number += len(boxes)
    return "".join(shown)


def figure_html(picture: Picture, boxes: Sequence[Box], saved: Path | None = None) -> str:
    """A picture under its boxes, of which each shows its label where one points at it or comes to it by Tab."""
    width, height = picture.size
    drawn = []
    for number, box in sorted(enumerate(boxes), key=lambda one: -_area(one[1])):  # small ones on top
        (x1, x2), (y1, y2) = _within(box.x1, box.x2, width), _within(box.y1, box.y2, height)
        label = escape(box.label or f"box {number + 1}")
        side = (" below" if y1 < _ROOM else "") + (" left" if x1 > 100 - _ROOM_ACROSS else "")  # where there is room
        drawn.append(
            f'<span class="box c{number % len(COLOURS)}{side}" tabindex="0" role="img" aria-label="{label}" '
            f'style="left:{x1:.2f}%;top:{y1:.2f}%;width:{x2 - x1:.2f}%;height:{y2 - y1:.2f}%"><b>{label}</b></span>'
        )
    link = f'<a class="save" href="{address(saved)}" download="boxes.png">Save picture</a>' if saved else ""
    return (
        f'<figure class="boxes"><div class="canvas" style="aspect-ratio:{width}/{height}">'
        f"{_image(picture.preview, picture.name)}{''.join(drawn)}</div>"
        f"<figcaption>{len(boxes)} box{'es' * (len(boxes) != 1)}{link}</figcaption></figure>"
    )


def tiles_html(talk: Talk) -> str:
    """The pictures of a conversation, each beside the tiles that the model sees of it."""
    shown = [picture for picture in talk.pictures if picture.preview is not None]
    if not shown:
        told = "A small view of the whole picture, and tiles cut from it. They are here once you ask about a picture."
        return f'<div class="tiles empty">{told}</div>'
    return f'<div class="tiles">{"".join(_tiles(number, picture) for number, picture in enumerate(shown, 1))}</div>'


def footer_html(turn: Turn | None) -> str:
    """What the last answer took: tokens of the prompt and of its pictures, speed, time to the first token."""
    usage = turn.usage if turn else None
    if usage is None:
        return '<div class="usage">Tokens and times of an answer stand here.</div>'
    facts = [
        ("prompt", f"{usage.prompt_tokens:,} tokens"),
        ("of pictures", f"{usage.picture_tokens:,} tokens"),
        ("answer", f"{usage.new_tokens:,} tokens"),
        ("first token", f"{usage.first_seconds:.2f} s" if usage.new_tokens else "…"),
        ("speed", f"{usage.tokens_per_second:.0f} tokens/s" if usage.tokens_per_second else "…"),
    ]
    if usage.reused_tokens:
        facts.insert(2, ("known before", f"{usage.reused_tokens:,} tokens"))
    return f'<div class="usage">{"".join(f"<span>{name} <b>{value}</b></span>" for name, value in facts)}</div>'


def status_html(stage: Stage, phase: str, model: str) -> str:
    """Which model, and how far it is."""
    told = "ready" if stage.name == "ready" else escape(phase)
    if stage.is_coming:
        told += "<progress></progress>" if not stage.share else f'<progress value="{stage.share:.3f}"></progress>'
        told += f"{stage.share:.0%}" if stage.share else ""
    return f'<div class="status {escape(stage.name)}"><b>{escape(model)}</b><span class="stage">{told}</span></div>'


def sentence(text: str) -> str:
    """With a capital letter, unless it begins with a name of a field or a file."""
    first = text.split(" ", 1)[0]
    return text[:1].upper() + text[1:] if first.isalpha() else text


def colours_css() -> str:
    """A class for each colour of boxes: that of a mention, of its box, and what stands out where one points at it."""
    rules = []
    for number, colour in enumerate(COLOURS):
        rules.append(f".c{number} {{ --box: rgb{colour}; }}")
        rules.append(f".answer:has(.mention.c{number}:hover) .box:not(.c{number}) {{ opacity: 0.15; }}")
    return "\n".join(rules)


def address(path: Path | None) -> str:
    """Where the browser finds a file of the gallery."""
    return f"gradio_api/file={quote(str(path))}" if path else ""


def _note(turn: Turn) -> str:
    if turn.phase:
        share = f" {turn.share:.0%}" if turn.share else ""
        return f'<span class="phase">{escape(turn.phase)}{share}…</span>'
    told = {"stopped": "stopped", "length": "cut at the longest answer"}.get(turn.ending)
    return f' <span class="ending">{told}</span>' if told else ""


def _tiles(number: int, picture: Picture) -> str:
    (width, height), (across, down) = picture.size, picture.crop
    cut = f"global view + {across} × {down} tiles" if picture.raster else "global view alone"
    files = [("picture", picture.preview), ("global view", picture.overview), ("tiles", picture.raster)]
    views = [f"<div>{_image(file, f'{name} {number}')}<i>{name}</i></div>" for name, file in files if file]
    told = f"<b>Picture {number}</b> {width} × {height} pixels → {cut}, {picture.tokens} tokens"
    return f'<figure><figcaption>{told}</figcaption><div class="views">{"".join(views)}</div></figure>'


def _image(path: Path | None, name: str) -> str:
    return f'<img src="{address(path)}" alt="{escape(name)}">'


def _within(low: float, high: float, whole: int) -> Iterator[float]:
    """Both ends in percent of a side, inside of the picture."""
    return (100 * min(max(value, 0), whole) / max(1, whole) for value in (low, high))


def _area(box: Box) -> int:
    return (box.x2 - box.x1) * (box.y2 - box.y1)
