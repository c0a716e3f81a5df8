"""One example a skill, on scenes that the project draws: what vl2-nano was trained for, and answers rightly here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vl2_jax.scenes import SceneSizes
from vl2_jax.scenes.drawing import Scene, render

_SEED = 3_000_000  # of these scenes; no training or evaluation draws from it


@dataclass(frozen=True)
class Example:
    """Questions about scenes, asked one after another; the pictures go with the first."""

    skill: str
    scenes: tuple[int, ...]
    questions: tuple[str, ...]

    def drawn(self) -> list[Scene]:
        return [SceneSizes().draw(np.random.default_rng((_SEED, number))) for number in self.scenes]

    def pictures(self) -> list[Image.Image]:
        return [render(scene) for scene in self.drawn()]


EXAMPLES = (
    Example("Describe", (21,), ("Describe the picture.",)),
    Example("Count", (62,), ("How many shapes are there?",)),
    Example("Read", (59,), ("What is written here?",)),
    Example("Locate", (75,), ("Locate <|ref|>the square<|/ref|> in the given image.",)),
    Example("Describe with boxes", (22,), ("<|grounding|>Describe the picture.",)),
    Example("Two pictures", (16, 21), ("Which picture shows a star?",)),
    Example("What is not there", (16,), ("Which of these is not there: yellow star, red ring or purple cross?",)),
    Example(
        "Several questions", (21,), ("Describe the picture.", "How many shapes are there?", "What is written here?")
    ),
)
