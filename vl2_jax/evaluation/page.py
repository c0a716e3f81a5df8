"""The wrong answers with their pictures, as one HTML page that needs nothing beside it and runs nothing."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable

from PIL import ImageDraw

from vl2_jax.errors import VL2Error
from vl2_jax.evaluation.answers import Scored
from vl2_jax.evaluation.results import Results
from vl2_jax.evaluation.samples import Sample, Samples
from vl2_jax.processing.grounding import draw_boxes, parse_boxes
from vl2_jax.processing.images import load_image

MOST_SHOWN = 200  # at about 30 kB each
_LONGEST_SIDE, _QUALITY = 420, 80  # of the pictures, in pixels, and of JPEG
_LONGEST_TEXT = 2000  # characters
_RIGHT = (0, 140, 60)
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td, th {{ padding: .2rem 1rem .2rem 0; text-align: left }}
article {{ border-top: 1px solid #8886; padding: 1rem 0 }}
img {{ max-width: 100%; margin: .25rem .5rem .25rem 0 }}
dt {{ font-weight: 600 }} dd {{ margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere }}
</style></head><body>
"""


def page(results: Results, answers: Iterable[Scored], samples: Samples) -> str:
    """HTML of the numbers and of what was wrong, the worst first. All text of data and model is escaped."""
    wrong = sorted((a for a in answers if a.is_scored and a.score < 1), key=lambda a: (a.score, a.row, a.number))
    title = html.escape(f"{results.benchmark}: {results.settings.get('model', '')}")
    left_out = len(wrong) - MOST_SHOWN
    parts = [
        _HEAD.format(title=title),
        f"<h1>{title}</h1>\n<table>",
        *(
            f"<tr><td>{html.escape(line.part)}<td>{line.questions} questions<td>{line.score:.1f} {results.unit}"
            for line in results.lines
        ),
        f"</table>\n<h2>Answers that are not right: {len(wrong)}</h2>",
        f"<p>The first {MOST_SHOWN} are shown, {left_out} are left out.</p>" if left_out > 0 else "",
        *(_article(answer, samples) for answer in wrong[:MOST_SHOWN]),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _article(answer: Scored, samples: Samples) -> str:
    try:
        sample = samples[answer.row][answer.number]
        pictures = "".join(_picture(picture, sample, answer) for picture in sample.images)
    except (VL2Error, IndexError) as error:  # of a file that changed or went since
        pictures = f"<p>{html.escape(str(error))}</p>"
    groups = ", ".join(f"{column} {value}" for column, value in answer.groups.items())
    rows = {"question": answer.question, "right": answer.expected, "answer": answer.text or answer.error or "(none)"}
    listed = "".join(f"<dt>{name}<dd>{html.escape(_short(text))}" for name, text in rows.items())
    name = html.escape(_short(" ".join(filter(None, (answer.name, groups)))))
    return f"<article><h3>{name} &middot; {answer.score:.2f}</h3>{pictures}<dl>{listed}</dl></article>"


def _picture(picture: object, sample: Sample, answer: Scored) -> str:
    image = load_image(picture)
    if sample.box is not None:
        image = draw_boxes(image, parse_boxes(answer.text, *image.size))
        ImageDraw.Draw(image).rectangle(sample.box, outline=_RIGHT, width=max(2, max(image.size) // 200))
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " ..."
