"""A conversation as the page holds it, on the server: what a browser sends is a new question, never what was said."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl2_jax.errors import ConversationError, ImageError, RequestError, shown
from vl2_jax.processing.grounding import Box
from vl2_jax.serving.http.decoding import PictureLimits
from vl2_jax.serving.http.service import Settings
from vl2_jax.serving.requests import Submission

MOST_BYTES = Settings.most_body  # of a picture: what a request over HTTP may hold, too
MOST_PICTURES = PictureLimits.most  # of a question; the service counts those of the conversation


@dataclass
class Picture:
    """A picture that was sent; what follows `address` is known once it was read.

    Attributes:
      name: of its file, as the browser told it.
      address: its bytes as a `data:` address.
      size: width and height of the upright picture.
      crop: local tiles (across, down), and `tokens`, the positions of the prompt that it takes.
      preview, overview, raster: files that the page shows: the picture, the global view, the local tiles.
    """

    name: str
    address: str
    size: tuple[int, int] = (0, 0)
    crop: tuple[int, int] = (0, 0)
    tokens: int = 0
    preview: Path | None = None
    overview: Path | None = None
    raster: Path | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Picture:
        """A file that was uploaded.

        Raises:
          ImageError: it holds more than `MOST_BYTES`, or is not there any more.
        """
        path = Path(path)
        if not path.is_file():
            raise ImageError(f"{shown(path.name)} was sent so long ago that it was removed; send it again.")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ImageError(
                f"{shown(path.name)} has {size:,} bytes, more than the limit of {MOST_BYTES:,}; scale it down."
            )
        return cls(path.name, "data:;base64," + base64.b64encode(path.read_bytes()).decode("ascii"))


@dataclass(frozen=True)
class Usage:
    """What an answer took so far, in tokens and seconds."""

    prompt_tokens: int
    picture_tokens: int
    reused_tokens: int = 0
    new_tokens: int = 0
    first_seconds: float = 0.0  # from the question to the first token
    seconds: float = 0.0  # from the first token to the last

    @property
    def tokens_per_second(self) -> float:
        return (self.new_tokens - 1) / self.seconds if self.seconds > 0 else 0.0


@dataclass
class Turn:
    """A question and what became of it.

    Attributes:
      phase: what goes on before there is text, and `share`, how much of it is done; empty once text comes.
      problem: why there is no answer, in a sentence.
      ending: "stop", "length" or "stopped"; empty while the answer is written.
      boxes: of the answer so far, in pixels of `boxes_on`.
      boxes_on: the picture that they belong to, counted from 0 over the whole conversation.
      saved: the file of that picture with its boxes drawn.
      running: the answer in the engine, and `is_stopped`, whether its user wants no more of it.
    """

    question: str
    pictures: list[Picture] = field(default_factory=list)
    answer: str = ""
    phase: str = ""
    share: float = 0.0
    problem: str = ""
    ending: str = ""
    boxes: list[Box] = field(default_factory=list)
    boxes_on: int = -1
    saved: Path | None = None
    usage: Usage | None = None
    running: Submission | None = None
    is_stopped: bool = False

    @property
    def is_over(self) -> bool:
        return bool(self.ending or self.problem)

    @property
    def is_said(self) -> bool:
        """Whether later questions are asked with it: an answer was read, if only its beginning."""
        return bool(self.answer and not self.problem)


@dataclass
class Talk:
    """Turns of one browser tab.

    Attributes:
      salt: nobody else's prompts are shared with this conversation's.
    """

    turns: list[Turn] = field(default_factory=list)
    salt: str = ""

    @property
    def is_busy(self) -> bool:
        return bool(self.turns) and not self.turns[-1].is_over

    @property
    def pictures(self) -> list[Picture]:
        """Those of what is said and of the question that is open, in the model's order."""
        return [picture for turn in self._asked() for picture in turn.pictures]

    def ask(self, question: str, files: Sequence[str | Path] = ()) -> None:
        """Opens a turn.

        Raises:
          ConversationError: nothing is asked, or the last question is still being answered.
          RequestError: there are more than `MOST_PICTURES` files; none is read.
          ImageError: see `Picture.from_file`.
        """
        if self.is_busy:
            raise ConversationError("the last question is being answered; wait for that, or stop it.")
        if not question.strip() and not files:
            raise ConversationError("there is no question; write one, or add a picture.")
        if len(files) > MOST_PICTURES:
            raise RequestError(f"{len(files)} pictures are too many for a question; send at most {MOST_PICTURES}.")
        self._open(Turn(question.strip(), [Picture.from_file(file) for file in files]))

    def ask_again(self, number: int, question: str = "") -> None:
        """Opens turn `number` again, with the same pictures; it and what follows are forgotten.

        Raises:
          ConversationError: there is no such turn, or the last question is still being answered.
        """
        if self.is_busy:
            raise ConversationError("the last question is being answered; wait for that, or stop it.")
        if not 0 <= number < len(self.turns):
            raise ConversationError(f"there is no turn {number}; this conversation has {len(self.turns)}.")
        turn = self.turns[number]
        del self.turns[number:]
        self._open(Turn(question.strip() or turn.question, turn.pictures))

    def clear(self) -> None:
        """Stops what is being written and forgets everything."""
        self.stop()
        self.turns, self.salt = [], ""

    def stop(self) -> None:
        """Ends the answer that is being written; what was read of it stays."""
        if self.is_busy:
            turn = self.turns[-1]
            turn.is_stopped = True
            if turn.running is not None:
                turn.running.cancel()

    def body(self, model: str, system: str = "", boxes_on: int = 0, **sampling: Any) -> dict[str, Any]:
        """The open question as a request of OpenAI's API, which bounds are checked for.

        Args:
          boxes_on: the picture that boxes belong to, counted from 1; 0 is the last.
          sampling: fields of the request; those that are None are left out.
        """
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
        for turn in self._asked():
            parts = [{"type": "image_url", "image_url": {"url": picture.address}} for picture in turn.pictures]
            messages.append({"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]})
            if turn.is_over:
                messages.append({"role": "assistant", "content": turn.answer})
        fields = {"boxes_on": boxes_on or None, "cache_salt": self.salt, **sampling}
        given = {name: value for name, value in fields.items() if value is not None}
        return {"model": model, "messages": messages, **given}

    def _open(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.salt = self.salt or secrets.token_hex(16)

    def _asked(self) -> list[Turn]:
        return [turn for turn in self.turns if turn.is_said or not turn.is_over]
