"""Messages as programs and data sets have them, to one form.

    OpenAI, Hugging Face   {"role": "user", "content": [{"type": "image_url" | "image", ...}, {"type": "text", ...}]}
    LLaVA, ShareGPT        {"from": "human", "value": "<image>\\nWhat is it?"}, also with "image" or "images"
    the one form           {"role": "user", "content": "<image>\\nWhat is it?", "images": [picture]}

In the text of a question `<image>` stands for the next picture and `\\<image>` for itself; answers, system messages and
the text parts of questions hold plain text. An answer that is not to be learned has `"learn": False`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vl2_jax.errors import ConversationError, shown
from vl2_jax.processing.tokenizer import as_unicode

IMAGE_TAG = "<image>"
ESCAPED_TAG = "\\" + IMAGE_TAG
TAG = re.compile(rf"(?<!\\){IMAGE_TAG}")  # that stands for a picture
ROLES = {
    **dict.fromkeys(("user", "human", "<|user|>"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "<|assistant|>"), "assistant"),
    **dict.fromkeys(("system", "developer", "deepseekapi-sys"), "system"),
}
# What tells whether a turn is learned, and the value that says that it is.
SWITCHES = {
    **dict.fromkeys(("learn", "loss", "loss_scale", "loss_weight", "weight"), True),
    **dict.fromkeys(("train", "training", "trainable", "label"), True),
    **dict.fromkeys(("mask", "masked"), False),
}
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_PICTURE_PARTS = ("image", "image_url", "input_image")
_ENCODED = ("bytes", "data", "base64")  # keys whose text is the picture itself
_PICTURE_KEYS = (*_ENCODED, "image_url", "image", "path", "url", "source")
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "refusal")  # of an answer
_OTHER_MEDIA = ("videos", "video", "audios", "audio")
_DEEPEST = 64  # lists in lists


def read_messages(
    messages: Any, pictures: Sequence[Any] = (), found: Callable[[Any], Any] = lambda picture: picture
) -> list[dict[str, Any]]:
    """Messages of the one form.

    Args:
      messages: a list of them, in any form above.
      pictures: those of the whole conversation, which go to the tags that have none of their own, in order; where no
        question has any tag, they stand before the first one, a line each.
      found: makes of a picture in hand what is handed on.

    Raises:
      ConversationError: what is no message, an unknown role or part, a picture that is no user's, too many of them.
    """
    messages = plain(messages)
    if not isinstance(messages, list) or not messages:
        raise ConversationError(
            f"a conversation is a non-empty list of messages {{'role', 'content'}}, got {shown(messages)}."
        )
    read = [_message(message, number, found) for number, message in enumerate(messages)]
    questions = [message for message in read if message["role"] == "user"]
    left = list(pictures)
    if left and questions and not any(message["images"] for message in questions):
        questions[0]["content"] = f"{IMAGE_TAG}\n" * len(left) + questions[0]["content"]
        questions[0]["images"] = [None] * len(left)
    for message in questions:
        filled = [left.pop(0) if image is None and left else image for image in message["images"]]
        message["images"] = [image for image in filled if image is not None]
    if left:
        tags = len(pictures) - len(left)
        raise ConversationError(
            f"{tags} {IMAGE_TAG} tag(s) but {len(pictures)} picture(s); write one for each picture."
        )
    return read


def plain(value: Any, depth: int = 0) -> Any:
    """What data frames and clients hold as lists, dictionaries and numbers of Python; what is not a number is null."""
    if isinstance(value, str | bytes | int | None):
        return value
    if isinstance(value, float):
        return None if value != value else value
    if depth > _DEEPEST:
        raise ConversationError(f"lists in lists deeper than {_DEEPEST} are no conversation.")
    if isinstance(value, np.generic):
        return plain(value.item(), depth + 1)
    if isinstance(value, np.ndarray) and (value.dtype == object or value.ndim < 2):
        value = value.tolist()
    if not isinstance(value, Mapping) and hasattr(value, "model_dump") and not isinstance(value, type):
        value = value.model_dump()  # of OpenAI's client
    if isinstance(value, Mapping):
        return {key: plain(inner, depth + 1) for key, inner in value.items()}
    is_list = isinstance(value, Sequence) and not isinstance(value, bytearray | memoryview)
    return [plain(inner, depth + 1) for inner in value] if is_list else value


def is_empty(value: Any) -> bool:
    """Null, or nothing in a text, a list or an object."""
    return value is None or (isinstance(value, str | bytes | list | Mapping | int) and not value)


def given(of: Mapping[str, Any], *keys: str) -> Any:
    """The value of the first of some keys that has one, else None."""
    return next((of[key] for key in keys if of.get(key) is not None), None)


def pictures_of(value: Any, found: Callable[[Any], Any] = lambda picture: picture) -> list[Any]:
    """One picture, several or none, as a list without nulls."""
    if hasattr(value, "__array__") and not isinstance(value, Image.Image):
        is_one = getattr(value, "ndim", 0) < 4 and str(getattr(value, "dtype", "")) != "object"
    else:
        is_one = isinstance(value, str | bytes | bytearray | memoryview | os.PathLike | Mapping | Image.Image)
        is_one = is_one or hasattr(value, "read") or not isinstance(value, Iterable)
    pictures = [picture_of(item) for item in ([value] if is_one else value)]
    return [found(picture) for picture in pictures if picture is not None]


def picture_of(item: Any) -> Any:
    """A picture in hand, as `load_image` takes it, out of the dictionaries around it. None if there is none."""
    key = ""
    while isinstance(item, Mapping):
        key = next((key for key in _PICTURE_KEYS if not is_empty(item.get(key))), "")
        item = item.get(key)
    if is_empty(item):
        return None
    return {"bytes": item} if isinstance(item, str) and key in _ENCODED else item


def switch(key: str, value: Any) -> bool | None:
    """Whether a turn is learned, by one of `SWITCHES`; None where nothing is said.

    Raises:
      ConversationError: neither yes nor no.
    """
    says = _WORDS.get(value.lower()) if isinstance(value, str) else None
    if isinstance(value, int | float) and value in (0, 1):
        says = bool(value)
    if says is not None:
        return says == SWITCHES[key]
    if value is None or (key in ("label", "mask") and not isinstance(value, int | float)):  # of something else
        return None
    raise ConversationError(f"{key!r} of a message is {shown(value)}; expected true or false, or 1 or 0.")


def refuse_other_media(of: Mapping[str, Any], what: str) -> None:
    """Raises ConversationError for moving pictures and sound."""
    unknown = next((key for key in _OTHER_MEDIA if not is_empty(of.get(key))), None)
    if unknown:
        raise ConversationError(f"a {what} has {unknown}, which the model cannot take.")


def checked_text(text: Any, what: str) -> str:
    """Text that can be encoded: what is not Unicode is U+FFFD. `what` begins the sentence about what is no text.

    Raises:
      ConversationError: it is no text.
    """
    if not isinstance(text, str):
        raise ConversationError(f"{what}, got {type(text).__name__} {shown(text)}.")
    return as_unicode(text)


def _message(message: Any, number: int, found: Callable[[Any], Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConversationError(f"a message must be an object {{'role', 'content'}}, got {shown(message)}.")
    refuse_other_media(message, "message")
    role = _role(given(message, "role", "from"))
    content = given(message, "content", "value")
    images = pictures_of(message.get("images"), found) or pictures_of(message.get("image"), found)
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, list):
        text, slots = _joined(content, is_question=role == "user", found=found)
        own = iter(images)
        images = [next(own, None) if slot is None else slot for slot in slots] + list(own)
    else:
        text = _text(message, role, content)
        images += [None] * (len(TAG.findall(text)) - len(images) if role == "user" else 0)
    if role != "user" and images:
        who = "an answer" if role == "assistant" else "a system message"
        raise ConversationError(f"message {number} is {who} with a picture; only users send pictures.")
    if role != "assistant" and "\0" in text:
        raise ConversationError(f"the text {shown(text)} holds a NUL character; take it out.")
    learned = all(switch(key, message.get(key)) is not False for key in SWITCHES)
    return {"role": role, "content": text, "images": images} | ({} if learned else {"learn": False})


def _role(role: Any) -> str:
    name = ROLES.get(role.lower()) if isinstance(role, str) else None
    if name is None:
        raise ConversationError(f"unknown role {shown(role)}; use one of 'user', 'assistant' and 'system'.")
    return name


def _text(message: Mapping[str, Any], role: str, content: Any) -> str:
    if content is None and role != "user":
        if isinstance(message.get("refusal"), str):
            return as_unicode(message["refusal"])
        if any(key in message for key in ("content", "value", *_INSTEAD_OF_CONTENT)):
            return ""
    if content is None and not ("content" in message or "value" in message):
        raise ConversationError(
            f"a message's content must be text or parts, and there is none in the keys {shown(list(message))}."
        )
    return checked_text(content, "a message's content must be text or parts")


def _joined(parts: list[Any], is_question: bool, found: Callable[[Any], Any]) -> tuple[str, list[Any]]:
    """The text of parts with a tag for each picture, and the pictures, None for one that is elsewhere.

    Parts of text are joined before tags in them are escaped: no tag is made of what stands in two of them.
    """
    text, run, images = "", "", []

    def escaped() -> str:
        return run.replace(IMAGE_TAG, ESCAPED_TAG) if is_question else run

    for part in parts:
        if part is None:
            continue
        kind = _kind(part)
        if kind in _TEXT_PARTS:
            value = part if isinstance(part, str) else given(part, "text", "refusal")
            value = "" if value is None else checked_text(value, "the text of a part must be text")
            run += value
        else:
            picture = picture_of(part)
            images.append(None if picture is None else found(picture))
            text += escaped() + ("\n" if run.endswith("\\") else "") + IMAGE_TAG + "\n"
            run = ""
    return text + escaped(), images


def _kind(part: Any) -> str:
    """One of `_TEXT_PARTS` or `_PICTURE_PARTS`."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise ConversationError(f"a part of a message must be an object {{'type', ...}}, got {shown(part)}.")
    kind = part.get("type")
    if kind is None and part.get("text") is not None:
        return "text"
    if kind is None and given(part, *_PICTURE_KEYS) is not None:
        return "image"
    if not isinstance(kind, str) or kind not in (*_TEXT_PARTS, *_PICTURE_PARTS):
        raise ConversationError(f"a part of a message has the unknown type {shown(kind)}; use 'text' or 'image_url'.")
    return kind
