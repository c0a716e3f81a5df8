"""Records of the data sets that people have, to this project's conversations.

    LLaVA, ShareGPT   {"conversations": [{"from": "human", "value": "<image>\\n..."}, ...], "image" | "images": ...}
    ms-swift          {"messages": [{"role", "content"}], "images": [...], "objects": {"ref", "bbox", ...}}
                      {"query", "response", "history": [[query, response], ...]}
    OpenAI            {"messages": [{"role", "content": [{"type": "text", ...}, {"type": "image_url", ...}]}]}
    Hugging Face      {"messages" | "prompt" + "completion", "images" | "image"}, with {"type": "image"} parts
                      {"images", "texts": [{"user", "assistant"}, ...]}
    Alpaca            {"instruction", "input", "output"}
    columns           {"image", "question", "answer"}

Messages are read as those of any conversation (`processing.messages`); boxes become the model's own (`training.boxes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vl2_jax.errors import ConversationError, shown
from vl2_jax.processing.messages import (
    SWITCHES,
    TAG,
    checked_text,
    given,
    is_empty,
    pictures_of,
    plain,
    read_messages,
    refuse_other_media,
    switch,
)
from vl2_jax.processing.sources import in_folder
from vl2_jax.training.boxes import place_objects, with_boxes_that_can_be_read

_LISTS = ("messages", "conversations", "conversation", "texts")
_QUESTIONS = ("question", "query", "instruction", "prompt", "input", "user")
_ANSWERS = ("answer", "response", "output", "completion", "assistant")


def to_conversation(record: Any, folder: Path) -> list[dict[str, Any]]:
    """Messages `{"role", "content", "images"}` of one record; relative picture paths start at `folder`.

    Answers that teach nothing have `"learn": False`: those that the record says are not to be learned, and empty ones.

    Raises:
      ConversationError: the record has none of the known forms, its tags and pictures do not match, or its boxes cannot
        be what the model writes.
      ImageError: a picture that boxes lie on cannot be read.
    """
    record = plain(record)
    if isinstance(record, list) and record and all(isinstance(message, Mapping) for message in record):
        record = {"messages": record}
    if not isinstance(record, Mapping):
        raise ConversationError(f"a record must be a JSON object, got {type(record).__name__}.")
    refuse_other_media(record, "record")
    found = partial(_in_folder, folder)
    pictures = pictures_of(_opened(record.get("images")), found) or pictures_of(_opened(record.get("image")), found)
    messages = read_messages([*_system(record), *_turns(record)], pictures, found)
    place_objects(messages, _opened(record.get("objects")), [image for m in messages for image in m["images"]])
    unlearned = _unlearned(record, messages)
    question = ""
    for number, message in enumerate(messages):
        if message["role"] == "user":
            question = message["content"]
        elif message["role"] == "assistant" and message.get("learn", True):
            if number in unlearned or not message["content"].strip():
                message["learn"] = False
            else:
                message["content"] = with_boxes_that_can_be_read(message["content"], question)
    return messages


def last_answer_only(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation of which no answer but the last is learned."""
    last = max((number for number, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    return [dict(message) | ({} if number == last else {"learn": False}) for number, message in enumerate(messages)]


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
    pictures, text = questions[0].get("images") or [], questions[0]["content"]
    end = max((tag.end() for tag in TAG.finditer(text)), default=0)
    before = text[:end] + "\n" if end else ""
    asked = [question | {"content": before + question["content"], "images": pictures} for question in questions[1:]]
    return [[*system, *pair] for pair in zip([questions[0], *asked], answers, strict=True)]


def _turns(record: Mapping[str, Any]) -> list[Any]:
    """The messages of a record, in whatever form they have."""
    for key in _LISTS:
        turns = _opened(record.get(key))
        if isinstance(turns, list) and turns:
            return [message for turn in turns for message in _of_turn(turn)]
    pair = _pair(record)
    if pair is None:
        raise ConversationError(
            f"a record with the keys {shown(', '.join(map(str, record)) or 'none')} is not understood; expected "
            "'messages', 'conversations', or a question and its answer, such as 'query' and 'response'."
        )
    history = [] if is_empty(record.get("history")) else _opened(record["history"])
    if not isinstance(history, list):
        raise ConversationError(f"'history' must be a list of pairs, got {shown(history)}.")
    return [*(message for turn in history for message in _of_turn(turn)), *pair]


def _of_turn(turn: Any) -> list[Any]:
    """One item of a list: a message, or a question and its answer as a pair or an object."""
    if isinstance(turn, list) and len(turn) == 2:
        return [*_as_messages(turn[0], "user"), *_as_messages(turn[1], "assistant")]
    pair = _pair(turn)
    if pair is None:
        return [turn]
    switches = {key: turn[key] for key in SWITCHES if key in turn}
    return [*_system(turn), *pair[:-1], {**pair[-1], **switches}]


def _pair(of: Any) -> list[Any] | None:
    """Question and answer as messages, of an object that has them as columns; None if it has not."""
    if not isinstance(of, Mapping) or given(of, "role", "from") is not None:
        return None
    asked = next((key for key in _QUESTIONS if of.get(key) is not None), None)
    answered = [key for key in _ANSWERS if key in of]
    if asked is None or not answered:
        return None
    question = of[asked]
    if asked == "instruction" and not is_empty(of.get("input")):
        texts = (checked_text(text, "an instruction and its input must be text") for text in (question, of["input"]))
        question = "\n".join(texts)
    return [*_as_messages(question, "user"), *_as_messages(given(of, *answered), "assistant")]


def _system(of: Mapping[str, Any]) -> list[Any]:
    return [{"role": "system", "content": of["system"]}] if not is_empty(of.get("system")) else []


def _as_messages(value: Any, role: str) -> list[Any]:
    """Messages as they are; text or parts as one message."""
    if isinstance(value, list) and value:
        if all(isinstance(item, Mapping) and given(item, "role", "from") is not None for item in value):
            return value
        if len(value) > 1 and all(isinstance(item, str) for item in value):
            raise ConversationError(f"{len(value)} texts where one is expected, {shown(value)}.")
    return [{"role": role, "content": value}]


def _opened(value: Any) -> Any:
    """A list or an object that a table holds as JSON text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return plain(json.loads(value))
        except (ValueError, RecursionError):
            return value
    return value


def _unlearned(record: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> set[int]:
    """Numbers of messages that a record says are not learned: with one word for all of them, or one for each."""
    everything = list(range(len(messages)))
    turns = [number for number in everything if messages[number]["role"] != "system"]
    answers = [number for number in everything if messages[number]["role"] == "assistant"]
    unlearned: set[int] = set()
    for key in SWITCHES:
        says = _opened(record.get(key))
        says = says if isinstance(says, list) else [says] * len(messages)
        places = next((places for places in (everything, turns, answers) if len(places) == len(says)), [])
        unlearned |= {place for place, value in zip(places, says) if _is_said(key, value) and not switch(key, value)}
    return unlearned


def _is_said(key: str, value: Any) -> bool:
    """Whether a record's own key is about learning; class labels, masks and weights of records have such names too."""
    is_number = isinstance(value, int | float) and value in (0, 1)
    return isinstance(value, bool) or (is_number and key not in ("label", "mask", "masked"))


def _in_folder(folder: Path, picture: Any) -> Any:
    if isinstance(picture, str) and picture.startswith(("http://", "https://")):
        raise ConversationError(f"{shown(picture)} is not fetched; download pictures and give their paths.")
    return in_folder(picture, folder)
