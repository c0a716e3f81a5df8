"""OpenAI's messages to ours, and the pictures apart: what is sent over a network is text, `data:` or an address.

    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:..."}}, {"type": "text", ...}]}
    {"role": "user", "content": "<image>\\n...", "images": [0]},  [Sent(data=b"data:...")]

No form names a file of the server, and text never stands for a picture: `<image>` that a user typed stays text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vl2_jax.errors import RequestError, shown
from vl2_jax.processing.messages import is_empty, picture_of, read_messages
from vl2_jax.serving.http.problems import Problem, refused

log = logging.getLogger("vl2_jax.serving")

_PICTURE_PARTS = ("image_url", "image", "input_image")
_DETAILS = ("auto", "low", "high", "original", None)
_told: set[str] = set()


@dataclass(frozen=True)
class Sent:
    """A picture as it was sent: the text of a `data:` address or of base64, or an address to fetch."""

    data: bytes = b""
    address: str = ""
    is_low: bool = False  # of little detail


@dataclass(frozen=True)
class Asked:
    """A conversation in the one form of `processing.messages`, whose images are numbers of `pictures`."""

    messages: list[dict[str, Any]]
    pictures: list[Sent]


def read_conversation(messages: Sequence[dict[str, Any]], most_pictures: int, honor_detail: bool = False) -> Asked:
    """A conversation that ends where the answer begins.

    Raises:
      Problem, ConversationError: no conversation, tools, more pictures than are taken, or one that is neither a `data:`
        address nor one of http or https.
    """
    pictures: list[Sent] = []

    def found(picture: Any) -> int:
        pictures.append(picture if isinstance(picture, Sent) else _sent(picture))  # whatever form it came in
        if len(pictures) > most_pictures:
            raise Problem(
                400,
                f"the messages hold more than {most_pictures} picture(s), which is what this server takes; send fewer.",
                param="messages",
                code="too_many_images",
            )
        return len(pictures) - 1

    read = read_messages([_message(message, honor_detail) for message in messages], found=found)
    if read[-1]["role"] == "system":
        raise Problem(400, "the messages hold no question; add a message with the role 'user'.", param="messages")
    if read[-1]["role"] == "user":
        read.append({"role": "assistant", "content": "", "images": []})
    return Asked(read, pictures)


def _message(message: dict[str, Any], honor_detail: bool) -> dict[str, Any]:
    """Role and content alone: whatever else other tools put into messages does not come over a network."""
    for field in ("tool_calls", "function_call"):
        if not is_empty(message.get(field)):
            raise refused("messages", f"a message has {field}, which this server cannot honour; leave it out.")
    content = message.get("content")
    if isinstance(content, str) and str(message.get("role")).lower() == "user":
        content = [{"type": "text", "text": content}]
    if isinstance(content, list):
        content = [_part(part, honor_detail) for part in content]
    return {"role": message.get("role"), "content": content, "refusal": message.get("refusal")}


def _part(part: Any, honor_detail: bool) -> Any:
    """A part whose picture, if it has one, is `Sent`."""
    if not isinstance(part, dict) or part.get("type") not in _PICTURE_PARTS:
        if isinstance(part, dict) and part.get("type") is None and "text" not in part:
            raise Problem(400, f"a part of a message has no type: {shown(part)}; use 'text' or 'image_url'.")
        return part
    inner = part.get("image_url")
    detail = inner.get("detail") if isinstance(inner, dict) else part.get("detail")
    if detail not in _DETAILS:
        raise RequestError(f"detail is {shown(detail)}; expected 'auto', 'low' or 'high'.")
    if detail == "low" and not honor_detail and "detail" not in _told:
        _told.add("detail")
        log.warning("pictures of detail 'low' are cut into tiles as all are; --honor-detail shows them as one tile")
    return {"type": "image", "image": _sent(picture_of(part), detail == "low" and honor_detail)}


def _sent(picture: Any, is_low: bool = False) -> Sent:
    if isinstance(picture, dict) and isinstance(picture.get("bytes"), str):
        return Sent(picture["bytes"].encode("ascii", "replace"), is_low=is_low)
    if isinstance(picture, str):
        start = picture[:16].lstrip().lower()
        if start.startswith("data:"):
            return Sent(picture.strip().encode("ascii", "replace"), is_low=is_low)
        if start.startswith(("http:", "https:")):
            return Sent(address=picture, is_low=is_low)
    raise Problem(
        400,
        f"a picture is sent as {shown(picture)}; send it in the request: data:image/png;base64,...",
        param="messages",
        code="invalid_image_url",
    )
