"""Records of the data sets that people have, to this project's conversations.

    LLaVA, ShareGPT   {"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image" | "images": ...}
    ms-swift          {"messages": [{"role", "content"}], "images": [...], "objects": {"ref", "bbox", ...}}
    OpenAI            {"messages": [{"role", "content": [{"type": "text", ...}, {"type": "image_url", ...}]}]}
    Hugging Face      {"messages" | "prompt" + "completion", "images" | "image"}, with {"type": "image"} parts
    columns           {"image", "question", "answer"}

Boxes in `objects` become the model's own tags and 0 to 999 coordinates (SPEC 4.10).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vl2_jax.errors import ConversationError
from vl2_jax.processing.conversation import IMAGE_TAG
from vl2_jax.processing.grounding import write_boxes
from vl2_jax.processing.images import load_image

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_BESIDE = 0.02  # of a side: boxes of many data sets go a little over the edge
_PLACEHOLDER = re.compile(r"<(ref-object|bbox)>")


def to_conversation(record: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Messages `{"role", "content", "images"}` of one record; relative picture paths start at `folder`.

    Raises:
      ConversationError: the record has none of the known forms, or its tags and pictures do not match.
    """
    if not isinstance(record, Mapping):
        raise ConversationError(f"a record must be a JSON object, got {type(record).__name__}.")
    unknown = [key for key in ("videos", "video", "audios", "audio") if record.get(key)]
    if unknown:
        raise ConversationError(f"a record has {unknown[0]}, which the model cannot take.")
    pictures = [_picture(item, folder) for item in _listed(record.get("images") or record.get("image"))]
    messages = [_message(message, pictures, folder) for message in _turns(record)]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": str(record["system"]), "images": []})
    _place_objects(messages, record.get("objects"), pictures)
    return _with_images(messages, pictures)


def questions_apart(messages: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Every question and its answer as a conversation of its own, about the pictures that the first question shows.

    Raises:
      ConversationError: a later question shows pictures, or questions and answers do not alternate.
    """
    system = [dict(message) for message in messages if message["role"] == "system"]
    turns = [dict(message) for message in messages if message["role"] != "system"]
    questions, answers = turns[0::2], turns[1::2]
    roles = [message["role"] for message in turns]
    if roles != ["user", "assistant"] * len(answers) or not answers:
        raise ConversationError(f"questions apart need pairs of user and assistant, got {', '.join(roles) or 'none'}.")
    if any(question.get("images") for question in questions[1:]):
        raise ConversationError("questions apart need all pictures in the first question; a later one shows some.")
    pictures, end = questions[0].get("images") or [], questions[0]["content"].rfind(IMAGE_TAG)
    shown = questions[0]["content"][: end + len(IMAGE_TAG)] + "\n" if end >= 0 else ""
    asked = [question | {"content": shown + question["content"], "images": pictures} for question in questions[1:]]
    return [[*system, *pair] for pair in zip([questions[0], *asked], answers, strict=True)]


def _turns(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    for key in ("messages", "conversations"):
        if isinstance(record.get(key), Sequence) and not isinstance(record[key], str):
            return list(record[key])
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return [*prompt, *completion]
    if "question" in record and "answer" in record:
        return [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": record["answer"]}]
    raise ConversationError(
        f"a record with the keys {', '.join(map(repr, record)) or 'none'} is not understood; expected 'messages', "
        "'conversations', 'prompt' and 'completion', or 'question' and 'answer'."
    )


def _message(message: Any, pictures: list[Any], folder: Path) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ConversationError(f"a message must be an object, got {message!r:.80}.")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value", ""))
    images = [_picture(item, folder) for item in _listed(message.get("images"))]
    if isinstance(content, Sequence) and not isinstance(content, str):
        text = ""
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                text += part.get("text", "")
            elif kind in ("image", "image_url"):
                text += IMAGE_TAG + "\n"
                inline = part.get("image_url", part.get("image", part.get("path", part.get("url"))))
                inline = inline.get("url") if isinstance(inline, Mapping) else inline
                if inline is not None:
                    images.append(_picture(inline, folder))
            else:
                raise ConversationError(f"a part of a message has the unknown type {kind!r}; use text or image_url.")
        content = text
    if not isinstance(content, str):
        raise ConversationError(f"a message's content must be text or parts, got {type(content).__name__}.")
    return {"role": _ROLES.get(role, role), "content": content, "images": images}


def _with_images(messages: list[dict[str, Any]], pictures: list[Any]) -> list[dict[str, Any]]:
    """Gives each message the pictures of its tags; pictures without any tag stand before the first question."""
    if pictures and not any(IMAGE_TAG in message["content"] for message in messages):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = f"{IMAGE_TAG}\n" * len(pictures) + first["content"]
    left = list(pictures)
    for message in messages:
        missing = message["content"].count(IMAGE_TAG) - len(message["images"])
        if 0 < missing <= len(left):
            message["images"] += left[:missing]
            left = left[missing:]
    if left:
        tags = sum(message["content"].count(IMAGE_TAG) for message in messages)
        raise ConversationError(
            f"{tags} {IMAGE_TAG} tag(s) but {len(pictures)} picture(s); write one for each picture."
        )
    return messages


def _place_objects(messages: list[dict[str, Any]], objects: Any, pictures: list[Any]) -> None:
    """`<ref-object>` and `<bbox>` placeholders to the model's tags, in the order they stand."""
    if not objects:
        return
    if not isinstance(objects, Mapping):
        raise ConversationError(f"'objects' must hold 'ref' and 'bbox', got {type(objects).__name__}.")
    refs, rows = list(objects.get("ref") or ()), list(objects.get("bbox") or ())
    of_picture = list(objects.get("image_id") or [0] * len(rows))
    if len(of_picture) != len(rows):
        raise ConversationError(f"'objects' has {len(rows)} boxes and {len(of_picture)} image_id.")
    kind_of_box = objects.get("bbox_type", "real")
    if kind_of_box not in ("real", "norm1"):
        raise ConversationError(f"bbox_type is {kind_of_box!r}; expected 'real' (pixels) or 'norm1' (0 to 1).")
    taken = {"ref-object": 0, "bbox": 0}

    def replaced(match: re.Match[str]) -> str:
        kind = match.group(1)
        number = taken[kind]
        taken[kind] += 1
        if number >= len(refs if kind == "ref-object" else rows):
            raise ConversationError(f"more <{kind}> placeholders than entries in 'objects'.")
        if kind == "ref-object":
            return f"<|ref|>{refs[number]}<|/ref|>"
        if not 0 <= of_picture[number] < len(pictures):
            raise ConversationError(f"a box belongs to picture {of_picture[number]}, but there are {len(pictures)}.")
        size = (1, 1) if kind_of_box == "norm1" else load_image(pictures[of_picture[number]]).size
        _check_box(rows[number], *size)
        return write_boxes([rows[number]], *size)

    for message in messages:
        message["content"] = _PLACEHOLDER.sub(replaced, message["content"])
    if taken != {"ref-object": len(refs), "bbox": len(rows)}:
        raise ConversationError(
            f"'objects' has {len(refs)} ref and {len(rows)} bbox, of which {taken['ref-object']} and {taken['bbox']} "
            "have a placeholder <ref-object> or <bbox>."
        )


def _check_box(box: Any, width: float, height: float) -> None:
    """Raises ConversationError for what is no rectangle of the picture; edges may lie outside by a little."""
    if not (isinstance(box, Sequence) and len(box) == 4 and all(type(edge) in (int, float) for edge in box)):
        raise ConversationError(f"the box {box!r:.80} of 'objects' is not four numbers x1, y1, x2, y2.")
    x1, y1, x2, y2 = box
    x, y = _BESIDE * width, _BESIDE * height
    if not (-x <= x1 <= x2 <= width + x and -y <= y1 <= y2 <= height + y):
        raise ConversationError(f"the box {box} is not inside of its picture of {width} x {height}; see bbox_type.")


def _picture(item: Any, folder: Path) -> Any:
    """A path, the bytes of a data URL, or what Pillow and NumPy hold already."""
    if isinstance(item, Mapping):  # Hugging Face: {"bytes", "path"}
        return item["bytes"] if item.get("bytes") else _picture(item.get("path"), folder)
    if not isinstance(item, str):
        return item
    if item.startswith("data:"):
        try:
            return base64.b64decode(item.partition(",")[2], validate=True)
        except ValueError:
            raise ConversationError("a picture's data URL is not valid base64.") from None
    if item.startswith(("http://", "https://")):
        raise ConversationError(f"{item!r:.80} is not fetched; download pictures and give their paths.")
    return str(folder / item.removeprefix("file://"))


def _listed(value: Any) -> list[Any]:
    return (
        []
        if value is None
        else list(value)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes)
        else [value]
    )
