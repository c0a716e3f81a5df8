"""A model that answers at once, in place of the loaded one: these tests are about what surrounds an answer."""

import io
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from vl2_jax.processing.grounding import Box


@dataclass
class Timings:
    new_tokens: int = 1


@dataclass
class Answer:
    text: str
    boxes: list[Box] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=lambda: [1])
    finish_reason: str = "stop"
    timings: Timings = field(default_factory=Timings)


class Model:
    """Says what it is told to say, a word at a time; remembers what it was asked and how."""

    def __init__(self):
        self.words = ["hello ", "there"]
        self.boxes: list[Box] = []
        self.asked: list[Any] = []
        self.options: dict[str, Any] = {}
        self.loaded: tuple[str, dict] = ("", {})

    def load(self, model, **options):
        self.loaded = model, options
        return self

    def generate(self, conversations, *, on_text=None, report=None, boxes_on=-1, n=1, **sampling):
        self.asked, self.options = conversations, sampling | {"n": n, "boxes_on": boxes_on}
        for word in self.words if on_text else ():
            on_text(0, word)
        return [Answer("".join(self.words), self.boxes) for _ in range(n)]

    def chat(self):
        return Chat(self)


class Chat:
    def __init__(self, model: Model):
        self.messages: list[dict] = []
        self._model = model

    def ask(self, text, images=(), on_text=None, *, report=None, **sampling):
        turn = {"role": "user", "content": text, "images": list(images)}
        self._model.asked, self._model.options = [*self.messages, turn], sampling
        for word in self._model.words:
            if isinstance(word, BaseException):
                raise word
            on_text(0, word)
        self.messages += [turn, {"role": "assistant", "content": "".join(self._model.words)}]


@pytest.fixture
def model(monkeypatch) -> Model:
    found = Model()
    monkeypatch.setattr("vl2_jax.api.load", found.load)
    return found


@pytest.fixture
def standard_input(monkeypatch):
    """Gives bytes to standard input."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


@pytest.fixture
def typed(monkeypatch):
    """Types lines at the prompt; an exception among them is what pressing its key raises."""

    def give(*lines: str | BaseException) -> None:
        left = iter(lines)

        def read(_: str = "") -> str:
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return give
