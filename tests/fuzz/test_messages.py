"""Thousands of messages and records that are nearly right: they are read, or refused in one short line."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from tests.conftest import GOLDENS
from vl2_jax.errors import ImageError, VL2Error
from vl2_jax.processing.batch import Encoded, Processor
from vl2_jax.training.data import BadSample, Encoder
from vl2_jax.training.formats import to_conversation

INPUTS = 2000
PROCESSOR = Processor.from_directory(GOLDENS / "nano-tiny")
PICTURE = Image.new("RGB", (3, 2))
TAGS = (
    "<image>",
    r"\<image>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<bbox>",
    "<ref-object>",
    "<|User|>",
    "\\",
)
VALUES = (
    None, True, False, 0, -1, 10**400, 0.5, float("nan"), float("inf"), "", "x", "\0", "\ud800", "a" * 9999, " " * 9999,
    b"bytes", [], {}, [[]], [None], [[[[1]]]], [1, 2, 3, 4], {"url": None}, {"bytes": None, "path": None},
    {"bytes": "###"}, "data:,", "data:image/png;base64,AAAA", "http://x", "gone.png", "user", "assistant", "image_url",
    np.zeros(3), np.array([None, "x"], object), np.float32(2), np.zeros((2, 2, 3), np.uint8), PICTURE, "[{", '["x"]',
)  # fmt: skip
KEYS = (
    "role", "content", "type", "text", "image", "images", "image_url", "from", "value", "loss", "weight", "bytes",
    "objects", "ref", "bbox", "bbox_type", "image_id", "history", "system", "messages", "question", "answer", "videos",
)  # fmt: skip
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "<image>\nWhat is <|ref|>it<|/ref|>?", "images": [PICTURE]},
    {"role": "assistant", "content": "<|ref|>it<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", "weight": 1},
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "And this?"}]},
    {"role": "assistant", "content": "a square"},
]
RECORDS = [
    {"messages": TALK},
    {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object>"},
            {"role": "assistant", "content": "<bbox><bbox>", "loss": True},
        ],
        "images": [PICTURE],
        "objects": {"ref": ["it"], "bbox": [[0, 0, 1, 1], [1, 1, 2, 2]], "bbox_type": "real", "image_id": [0, 0]},
    },
    {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}], "image": PICTURE},
    {"query": "?", "response": "yes", "history": [["a", "b"]], "system": "Be short.", "images": [PICTURE]},
    {"texts": [{"user": "?", "assistant": "yes"}], "images": [{"bytes": None, "path": "gone.png"}]},
    {"prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "yes"}]},
]


def mutated(value, rng, rate):
    """A copy in which some things are left out, renamed, replaced, doubled or laid into lists."""

    def happens():
        return rng.random() < rate

    if happens():
        return rng.choice((rng.choice(VALUES), [value], [value, value], {"content": value}, json.dumps("x")))
    if isinstance(value, str) and happens():
        place = rng.randrange(len(value) + 1)
        return rng.choice((value[:place] + rng.choice(TAGS) + value[place:], value[:place]))
    if isinstance(value, list):
        value = [mutated(item, rng, rate) for item in value if not happens()]
        return [*value, rng.choice(value)] if value and happens() else value
    if isinstance(value, dict):
        value = {rng.choice(KEYS) if happens() else key: mutated(v, rng, rate) for key, v in value.items()}
        return value | {rng.choice(KEYS): rng.choice(VALUES)} if happens() else value
    return value


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Only Pillow's are found: how files are read is a matter of other tests."""

    def load_image(source, **_):
        if isinstance(source, Image.Image):
            return source
        raise ImageError("there is no such picture.")

    for module in ("vl2_jax.processing.batch", "vl2_jax.training.boxes"):
        monkeypatch.setattr(f"{module}.load_image", load_image)


def told(error):
    """A message of ours: one line, and nothing long of the user's."""
    text = str(error)
    text.encode()
    assert text
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize("inference", [True, False])
def test_conversations_that_are_nearly_right(inference):
    rng, read = random.Random(inference), 0
    for _ in range(INPUTS // 2):
        try:
            read += isinstance(PROCESSOR.encode(mutated(TALK, rng, 0.02), inference=inference), Encoded)
        except VL2Error as error:
            told(error)
    assert INPUTS / 20 < read < INPUTS / 2


def test_texts_that_are_nearly_right():
    rng, read = random.Random(0), 0
    for _ in range(INPUTS):
        text = mutated("<image>\nThe <image> of a \\<image>.", rng, 0.3)
        images = mutated([PICTURE, PICTURE], rng, 0.1)
        try:
            read += isinstance(PROCESSOR.encode_text(text, images), Encoded)
        except VL2Error as error:
            told(error)
    assert INPUTS / 10 < read < INPUTS


def test_records_that_are_nearly_right(tmp_path):
    encode, rng, read = Encoder(PROCESSOR, 2000, 20), random.Random(0), 0
    for number in range(INPUTS):
        record = mutated(RECORDS[number % len(RECORDS)], rng, 0.02)
        try:
            to_conversation(record, tmp_path)
        except VL2Error as error:
            told(error)
        options = {"apart": rng.random() < 0.2, "last_answer_only": rng.random() < 0.2}
        made = encode({"where": "here", "record": record, "folder": tmp_path, **options})
        if isinstance(made, BadSample):
            told(made.reason)
        else:
            read += 1
    assert INPUTS / 20 < read < INPUTS


def test_lines_that_are_nearly_records(tmp_path):
    encode, rng, read = Encoder(PROCESSOR, 2000, 20), random.Random(0), 0
    line = json.dumps({"messages": [TALK[0], {"role": "user", "content": "?"}, TALK[2]], "loss": None}).encode()
    for _ in range(INPUTS):
        content = bytearray(line)
        for _ in range(rng.randint(0, 3)):
            content[rng.randrange(len(content))] = rng.choice(b'\0\xff"\\[]{},:0e-nullA')
        made = encode({"where": "here", "record": bytes(content), "folder": tmp_path})
        told(made.reason) if isinstance(made, BadSample) else None
        read += not isinstance(made, BadSample)
    assert INPUTS / 4 < read < INPUTS
