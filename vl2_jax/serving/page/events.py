"""What happens when a part of the page is used: from what the browser sent to what its parts show next.

Every answer is a generator of updates for four parts: the conversation, the tiles, the footer, and the box
where questions are written, which has a button that stops while an answer is written.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from vl2_jax.errors import VL2Error
from vl2_jax.serving.http.service import Service
from vl2_jax.serving.page import view
from vl2_jax.serving.page.answering import answer, phase_of
from vl2_jax.serving.page.examples import Example
from vl2_jax.serving.page.gallery import Gallery
from vl2_jax.serving.page.talk import Talk

Update = tuple[Any, ...]  # for the four parts
Updates = AsyncIterator[Update]


@dataclass(frozen=True)
class Events:
    """Of one page, which many tabs show. `settings` of an answer are those of the side panel, see `_wishes`.

    Attributes:
      examples: with the files of their pictures.
    """

    service: Service
    gallery: Gallery
    examples: Sequence[tuple[Example, Sequence[Path]]]

    async def ask(self, message: dict[str, Any], talk: Talk, *settings: Any) -> Updates:
        """A question and its pictures."""
        wishes = _wishes(*settings)
        with _told():
            talk.ask(message["text"], message["files"])
        yield (*_view(talk), gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True))
        async for update in self._write(talk, wishes):
            yield update

    async def retry(self, talk: Talk, *settings: Any) -> Updates:
        """The last question once more."""
        async for update in self._ask_again(len(talk.turns) - 1, "", talk, *settings):
            yield update

    async def edit(self, data: gr.EditData, talk: Talk, *settings: Any) -> Updates:
        """A past question in other words, with the pictures that it had."""
        number, question = _turn_of(talk, data.index), view.question_of(str(data.value))
        async for update in self._ask_again(number, question, talk, *settings):
            yield update

    async def show(self, data: gr.SelectData, talk: Talk, *settings: Any) -> Updates:
        """An example: its questions one after another."""
        example, files = self.examples[int(data.index)]
        for question in example.questions:
            async for update in self.ask({"text": question, "files": files}, talk, *settings):
                yield update
            files = ()
            if not talk.turns or talk.turns[-1].ending == "stopped":
                return

    def clear(self, talk: Talk) -> Update:
        """A new conversation."""
        self.forget(talk)
        return (*_view(talk), _box(talk))

    def forget(self, talk: Talk) -> None:
        """Ends a conversation, and removes the files that were made for it."""
        salt = talk.salt
        talk.clear()
        self.gallery.forget(salt)

    def status(self) -> tuple[str, gr.Timer]:
        """How far the model is, and whether to look again."""
        stage = self.service.stage
        shown = view.status_html(stage, phase_of(stage), self.service.settings.names[0])
        return shown, gr.Timer(active=stage.is_coming)

    async def _ask_again(self, number: int, question: str, talk: Talk, *settings: Any) -> Updates:
        wishes = _wishes(*settings)
        with _told():
            talk.ask_again(number, question)
        async for update in self._write(talk, wishes):
            yield update

    async def _write(self, talk: Talk, wishes: dict[str, Any]) -> Updates:
        async for _ in answer(self.service, self.gallery, talk, wishes):
            yield (*_view(talk), _box(talk))


def open_or_close_camera(is_open: bool) -> tuple[gr.Image, bool]:
    return gr.Image(value=None, visible=not is_open), not is_open


def take_photograph(photograph: str | None, message: dict[str, Any] | None) -> tuple[Any, Any, Any]:
    """A photograph into the question that is being written, which closes the camera."""
    if photograph is None:
        return gr.skip(), gr.skip(), gr.skip()
    message = message or {"text": "", "files": []}
    question = {"text": message["text"], "files": [*message["files"], photograph]}
    return question, *open_or_close_camera(is_open=True)


def _wishes(
    system: str | None, temperature: Any, top_p: Any, longest: Any, seed: str | None, boxes_on: Any
) -> dict[str, Any]:
    """The settings as fields of a request, which is where they are checked; before a turn is open."""
    system, seed = system or "", seed or ""
    number = int(seed) if re.fullmatch(r"\s*-?[0-9]{1,19}\s*", seed) else seed.strip() or None
    return {
        "system": system,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": longest,
        "seed": number,
        "boxes_on": boxes_on,
    }


def _view(talk: Talk) -> tuple[list[dict[str, Any]], str, str]:
    messages = [message for _, message in _messages(talk)]
    return messages, view.tiles_html(talk), view.footer_html(talk.turns[-1] if talk.turns else None)


def _box(talk: Talk) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(submit_btn=not talk.is_busy, stop_btn=talk.is_busy)


def _messages(talk: Talk) -> Iterator[tuple[int, dict[str, Any]]]:
    """Messages of each turn, with its number: pictures apart, since Gradio edits messages of text alone."""
    for number, turn in enumerate(talk.turns):
        if turn.pictures:
            yield number, {"role": "user", "content": gr.HTML(view.sent_html(turn.pictures), padding=False)}
        if turn.question:
            yield number, {"role": "user", "content": view.question_text(turn.question)}
        yield number, {"role": "assistant", "content": gr.HTML(view.answer_html(turn, talk.pictures), padding=False)}


def _turn_of(talk: Talk, index: Any) -> int:
    """The turn of a message; none that there is, if the browser names no message."""
    place = index[0] if isinstance(index, list | tuple) else index
    turns = [number for number, _ in _messages(talk)]
    return turns[place] if isinstance(place, int) and 0 <= place < len(turns) else len(talk.turns)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What is wrong with a question is shown on the page."""
    try:
        yield
    except VL2Error as error:
        raise gr.Error(escape(view.sentence(str(error))), duration=None, print_exception=False) from None
