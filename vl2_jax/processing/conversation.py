"""Messages to the pieces a prompt is made of, in the released format (SPEC 4.5).

A conversation is a list of messages `{"role": ..., "content": text, "images": [...]}`; each `<image>` in a user's text
stands for the next picture. Two turns become

    BOS <|User|>: q1 \n\n <|Assistant|>: a1 EOS <|User|>: q2 \n\n <|Assistant|>: a2 EOS
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vl2_jax.errors import ConversationError
from vl2_jax.processing.tokenizer import ASSISTANT, USER

IMAGE_TAG = "<image>"
EOS_TEXT = "<｜end▁of▁sentence｜>"
_ROLES = {
    **dict.fromkeys((USER, "user"), "user"),
    **dict.fromkeys((ASSISTANT, "assistant"), "assistant"),
    **dict.fromkeys(("system", "deepseekapi-sys"), "system"),
}

Message = Mapping[str, Any]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class Piece:
    """One part of a prompt: `text` to encode, a `token` that stands for itself, or the next picture."""

    kind: str  # "text" | "token" | "image"
    value: str = ""
    is_answer: bool = False  # a training target even when prompts are masked


def pieces_of_conversation(messages: Conversation, bos: str, eos: str) -> list[Piece]:
    """The pieces of a whole conversation, each answer closed by `eos`.

    Raises:
      ConversationError: no messages, an unknown role, a late system message, a picture in an answer, or a number of
        `<image>` tags that differs from the number of pictures.
    """
    if not messages or isinstance(messages, str | Mapping):
        raise ConversationError(
            f"a conversation is a non-empty list of messages {{'role', 'content'}}, got {messages!r:.80}."
        )
    pieces = [Piece("token", bos, is_answer=True)]
    for number, message in enumerate(messages):
        role = role_of(message)
        text = content_of(message).strip()
        if role == "user":
            check_images(message)
            pieces += _prompt(text)
        elif role == "assistant":
            if IMAGE_TAG in text or message.get("images"):
                raise ConversationError(f"message {number} is an answer with {IMAGE_TAG}; only users send pictures.")
            pieces += [Piece("text", text, is_answer=True), Piece("token", eos, is_answer=True)]
        elif number == 0:
            if IMAGE_TAG in text or message.get("images"):
                raise ConversationError(f"the system message holds {IMAGE_TAG}; only users send pictures.")
            pieces.append(Piece("text", text))
        else:
            raise ConversationError(f"message {number} is a system message; it can only be the first.")
    return pieces


def pieces_of_text(text: str, bos: str, eos: str) -> list[Piece]:
    """The pieces of a bare text without roles, as in pre-training: all of it is a target."""
    return [
        Piece("token", bos, is_answer=True),
        *(_replace(piece, is_answer=True) for piece in _split_images(text)),
        Piece("token", eos, is_answer=True),
    ]


def role_of(message: Message) -> str:
    """user, assistant or system."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in _ROLES:
        raise ConversationError(f"unknown role {role!r}; use one of {', '.join(map(repr, _ROLES))}.")
    return _ROLES[role]


def content_of(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise ConversationError(f"a message's content must be text, got {type(content).__name__}.")
    return content


def check_images(message: Message) -> None:
    tags, images = message["content"].count(IMAGE_TAG), len(message.get("images") or ())
    if tags != images:
        raise ConversationError(
            f"{tags} {IMAGE_TAG} tag(s) but {images} picture(s) in {message['content']!r:.80}; "
            f"write one {IMAGE_TAG} where each picture belongs."
        )


def with_image_tags(prompt: str, images: int) -> str:
    """A prompt for `images` pictures: missing tags are put in front, a line each, as the released demo does."""
    missing = images - prompt.count(IMAGE_TAG)
    return f"{IMAGE_TAG}\n" * missing + prompt


def render(messages: Conversation, template: str = "deepseek", system: str = "") -> str:
    """The conversation as one readable string (the released `sft_format`); ids never come from it (SPEC 10.3, 16)."""
    separators = {"deepseek": ("\n\n", EOS_TEXT), "deepseekv2": ("\n<｜sft▁end｜>", EOS_TEXT)}.get(template, ("", ""))
    has_system = template.startswith("deepseek") and system
    text = system + separators[0] if has_system else ""
    for turn, message in enumerate(messages):
        content, separator = content_of(message).strip(), separators[turn % 2]
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


def _prompt(text: str) -> list[Piece]:
    if not text:
        return [Piece("token", USER), Piece("text", ":"), Piece("token", ASSISTANT), Piece("text", ":")]
    return [
        Piece("token", USER),
        *_split_images(f": {text}\n\n"),
        Piece("token", ASSISTANT),
        Piece("text", ":"),
    ]


def _split_images(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    for i, part in enumerate(text.split(IMAGE_TAG)):
        if i:
            pieces.append(Piece("image"))
        if part:
            pieces.append(Piece("text", part))
    return pieces


def _replace(piece: Piece, is_answer: bool) -> Piece:
    return Piece(piece.kind, piece.value, is_answer)
