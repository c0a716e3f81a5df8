"""What a model is asked: the prompts of VLMEvalKit's data sets as its adapter of DeepSeek-VL2 sends them (SPEC 8.5).

Pictures stand first, a line each; an answer is begun empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vl2_jax.errors import ConfigError
from vl2_jax.evaluation.metrics import is_letter
from vl2_jax.evaluation.samples import Sample
from vl2_jax.processing.conversation import Message
from vl2_jax.processing.images import load_image
from vl2_jax.processing.messages import ESCAPED_TAG, IMAGE_TAG

_SHORT = "\nAnswer the question using a single word or phrase."
_SELECT = "Please select the correct answer from the options above."
_SELECT_IN_MMMU = (
    "Answer with the option's letter from the given choices directly. "
    "Answer the question using a single word or phrase.\n"
)
_NUMBERED = re.compile(r"<image (\d)>")


@dataclass(frozen=True)
class Question:
    """A text, and the pictures that stand where it says `<image>`."""

    text: str
    images: list[Any]

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.text, "images": self.images}, {"role": "assistant", "content": ""}]


def plain(sample: Sample) -> Question:
    """The question as it is (OCRBench, MME)."""
    return _after_pictures(sample, sample.question)


def short_answer(sample: Sample) -> Question:
    """TextVQA, DocVQA, InfoVQA, ChartQA."""
    return _after_pictures(sample, sample.question + _SHORT)


def option(sample: Sample) -> Question:
    """Hint, question and options (MMBench, MMStar, AI2D, RealWorldQA, MMT-Bench)."""
    return _after_pictures(sample, _with_options(sample))


def mmmu(sample: Sample) -> Question:
    """MMMU: every picture is shown first, as often as the text names it, and then named where it belongs.

        <image><image>
         <image 1> Compare it with <image 2>.

    The first one is shown at twice its size.

    Raises:
      ConfigError: the text names a picture that the row does not have.
    """
    text, named = _with_options(sample), [int(number) for number in _NUMBERED.findall(_with_options(sample))]
    if missing := [number for number in named if not 1 <= number <= len(sample.images)]:
        raise ConfigError(f"{sample.where}: the question names picture {missing[0]} of {len(sample.images)}.")
    images = [sample.images[number - 1] for number in named] or list(sample.images)
    if named:
        numbers = iter(range(1, len(named) + 1))
        text = _NUMBERED.sub(lambda _: f"<image {next(numbers)}>", text)
    else:
        text = "".join(f"<image {number}>" for number in range(1, len(images) + 1)) + text
    text = text.replace(_SELECT, _SELECT_IN_MMMU).replace("Question:", "").replace("Options:\n", "")
    if images:
        first = load_image(images[0])
        images[0] = first.resize((2 * first.width, 2 * first.height), Image.Resampling.BILINEAR)
    return Question(IMAGE_TAG * len(images) + "\n" + _escaped(text), images)


def locate(sample: Sample) -> Question:
    """The released prompt of grounding (SPEC 8.3)."""
    return _after_pictures(sample, f"Locate <|ref|>{sample.question.strip()}<|/ref|> in the given image.")


def _with_options(sample: Sample) -> str:
    hint = f"Hint: {sample.hint}\n" if sample.hint else ""
    options = "".join(f"{letter}. {text}\n" for letter, text in (sample.options or {}).items())
    asked = f"{hint}Question: {sample.question}\n" + (f"Options:\n{options}" if options else "")
    return asked + (f"{_SELECT} \n" if options or is_letter(sample.answers) else "")


def _after_pictures(sample: Sample, text: str) -> Question:
    return Question(f"{IMAGE_TAG}\n" * len(sample.images) + _escaped(text), list(sample.images))


def _escaped(text: str) -> str:
    """A tag that a data set wrote is text."""
    return text.replace(IMAGE_TAG, ESCAPED_TAG)
