"""Messages to the pieces a prompt is made of, in the released format (SPEC 4.5).

A conversation is a list of messages `{"role": ..., "content": text, "images": [...]}`; each `<image>` in a user's text
stands for the next picture, and `\\<image>` for itself (`processing.messages`). Two turns become

    BOS <|User|>: q1 \n\n <|Assistant|>: a1 EOS <|User|>: q2 \n\n <|Assistant|>: a2 EOS
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vl2_jax.errors import ConversationError, shown
from vl2_jax.processing.messages import ESCAPED_TAG, IMAGE_TAG, TAG
from vl2_jax.processing.tokenizer import ASSISTANT, USER

EOS_TEXT = "<｜end▁of▁sentence｜>"

Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Piece:
    """One part of a prompt: `text` to encode, a `token` that stands for itself, or the next picture."""

    kind: str  # "text" | "token" | "image"
    value: str = ""
    is_answer: bool = False  # a training target even when prompts are masked
    is_learned: bool = True  # a training target where its turn is one


def pieces_of_conversation(messages: Conversation, bos: str, eos: str, as_released: bool = False) -> list[Piece]:
    """The pieces of a whole conversation (of `messages.read_messages`), each answer closed by `eos`.

    `as_released` knows no escaped tag, and refuses one in an answer or a system message.

    Raises:
      ConversationError: a late system message, or a number of tags that differs from the number of pictures.
    """
    pieces = [Piece("token", bos, is_answer=True)]
    for number, message in enumerate(messages):
        role, text, learned = message["role"], message["content"].strip(), message.get("learn", True)
        if as_released and role != "user" and IMAGE_TAG in text:
            raise ConversationError(f"message {number} holds {IMAGE_TAG}; only users send pictures.")
        if role == "user":
            pieces += _prompt(text, len(message["images"]), learned, as_released)
        elif role == "assistant":
            pieces += [Piece("text", text, True, learned), Piece("token", eos, True, learned)]
        elif number == 0:
            pieces.append(Piece("text", text, is_learned=learned))
        else:
            raise ConversationError(f"message {number} is a system message; it can only be the first.")
    return pieces


def pieces_of_text(text: str, images: int, bos: str, eos: str, as_released: bool = False) -> list[Piece]:
    """The pieces of a bare text without roles, as in pre-training: all of it is a target.

    Raises:
      ConversationError: a number of tags that differs from the number of pictures.
    """
    body = [Piece(piece.kind, piece.value, True) for piece in _split_images(text, images, as_released)]
    return [Piece("token", bos, is_answer=True), *body, Piece("token", eos, is_answer=True)]


def with_image_tags(prompt: str, images: int) -> str:
    """A prompt for `images` pictures: missing tags are put in front, a line each, as the released demo does."""
    return f"{IMAGE_TAG}\n" * (images - len(TAG.findall(prompt))) + prompt


def render(messages: Conversation, template: str = "deepseek", system: str = "") -> str:
    """The conversation as one readable string (the released `sft_format`); ids never come from it (SPEC 10.3, 16)."""
    separators = {"deepseek": ("\n\n", EOS_TEXT), "deepseekv2": ("\n<｜sft▁end｜>", EOS_TEXT)}.get(template, ("", ""))
    has_system = template.startswith("deepseek") and system
    text = system + separators[0] if has_system else ""
    for turn, message in enumerate(messages):
        content, separator = message["content"].strip(), separators[turn % 2]
        if template == "deepseek":
            text += f"{message['role']}: {content}{separator}" if content else f"{message['role']}:"
        elif template == "deepseekv2":
            text += content + EOS_TEXT if content else ""
        elif template == "plain":
            text += content
        elif template == "alignment":
            text += (f"{IMAGE_TAG}\n" if turn % 2 == 0 else content) if content else ""
        else:
            raise ConversationError(
                f"unknown template {template!r}; use one of deepseek, deepseekv2, plain, alignment."
            )
    return text.strip()


def _prompt(text: str, images: int, learned: bool, as_released: bool) -> list[Piece]:
    around = (": ", "\n\n") if text else (":", "")
    body = _split_images(text, images, as_released, *around)
    pieces = [Piece("token", USER), *body, Piece("token", ASSISTANT), Piece("text", ":")]
    return [Piece(piece.kind, piece.value, is_learned=learned) for piece in pieces]


def _split_images(text: str, images: int, as_released: bool, before: str = "", after: str = "") -> list[Piece]:
    parts = text.split(IMAGE_TAG) if as_released else TAG.split(text)
    if len(parts) - 1 != images:
        beyond = f", and {ESCAPED_TAG} where the text itself is meant" if len(parts) - 1 > images else ""
        raise ConversationError(
            f"{len(parts) - 1} {IMAGE_TAG} tag(s) but {images} picture(s) in {shown(text)}; "
            f"write one {IMAGE_TAG} where each picture belongs{beyond}."
        )
    parts[0] = before + parts[0]
    parts[-1] += after
    pieces: list[Piece] = []
    for i, part in enumerate(parts):
        if i:
            pieces.append(Piece("image"))
        if part:
            pieces.append(Piece("text", part if as_released else part.replace(ESCAPED_TAG, IMAGE_TAG)))
    return pieces
