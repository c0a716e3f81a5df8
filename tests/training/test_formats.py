"""Records of the known data sets become the same conversation; what does not fit is refused by name."""

import base64

import pytest

from tests.conftest import GOLDENS
from vl2_jax.errors import ConversationError
from vl2_jax.training.formats import to_conversation

IMAGES = GOLDENS / "images"
EXPECTED = [
    {"role": "user", "content": "<image>\nWhat is it?", "images": [str(IMAGES / "square.png")]},
    {"role": "assistant", "content": "a square", "images": []},
]
HUMAN = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a square"}]
USER = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "a square"}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a square"}]},
]
BOXED = {"image": "square.png", "question": "<bbox>", "answer": "!"}
URL = {"type": "image_url", "image_url": {"url": "square.png"}}


@pytest.mark.parametrize(
    "record",
    [
        {"image": "square.png", "conversations": HUMAN},
        {"images": ["square.png"], "conversations": HUMAN},
        {"images": ["square.png"], "messages": USER},
        {"images": [{"path": "square.png"}], "messages": PARTS},
        {"image": "square.png", "prompt": PARTS[:1], "completion": PARTS[1:]},
        {"image": "square.png", "prompt": "What is it?", "completion": "a square"},
        {"image": "square.png", "question": "What is it?", "answer": "a square"},
        {"messages": [{"role": "user", "content": [URL, {"type": "text", "text": "What is it?"}]}, PARTS[1]]},
    ],
)
def test_every_known_form_gives_the_same_conversation(record):
    assert to_conversation(record, IMAGES) == EXPECTED


def test_a_system_text_beside_the_turns_comes_first():
    system, *rest = to_conversation({"system": "Be short.", "conversations": HUMAN, "image": "square.png"}, IMAGES)
    assert system == {"role": "system", "content": "Be short.", "images": []}
    assert rest == EXPECTED
    assert to_conversation({"images": None, "image": "square.png", "conversations": HUMAN}, IMAGES) == EXPECTED


def test_a_data_url_is_the_picture_itself():
    content = (IMAGES / "square.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    messages = to_conversation({"messages": [{"role": "user", "content": [part]}, PARTS[1]]}, IMAGES)
    assert messages[0]["images"] == [content]


def test_boxes_of_objects_become_tags_in_the_models_coordinates():
    record = {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object>."},
            {"role": "assistant", "content": "<ref-object><bbox>"},
        ],
        "images": ["square.png"],
        "objects": {"ref": ["cat", "cat"], "bbox": [[0, 0.5, 1, 1]], "bbox_type": "norm1"},
    }
    user, assistant = to_conversation(record, IMAGES)
    assert user["content"] == "<image>Find <|ref|>cat<|/ref|>."
    assert assistant["content"] == "<|ref|>cat<|/ref|><|det|>[[0, 500, 999, 999]]<|/det|>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "is not understood"),
        ({"videos": ["a.mp4"], "messages": USER}, "has videos, which the model cannot take"),
        ([1], "must be a JSON object"),
        ({"messages": ["hello"]}, "a message must be an object"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be text or parts"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "unknown type 'video'"),
        ({"images": ["a.png", "b.png"], "messages": USER}, r"1 <image> tag\(s\) but 2 picture"),
        ({"image": "https://example.com/a.png", "question": "?", "answer": "!"}, "is not fetched"),
        ({"image": "data:image/png;base64,###", "question": "?", "answer": "!"}, "not valid base64"),
        ({"messages": [{"role": "user", "content": "<bbox>"}], "objects": {"ref": ["a"]}}, "more <bbox> placeholders"),
        (BOXED | {"objects": {"bbox": [[0, 0, 9, 9]], "image_id": [1]}}, "belongs to picture 1, but there are 1"),
        (BOXED | {"objects": {"bbox": [[0, 0, 9, 9]], "image_id": [-1]}}, "belongs to picture -1"),
        (BOXED | {"objects": {"bbox": [[0, 0, 9, 9]], "image_id": [0, 0]}}, "1 boxes and 2 image_id"),
        (BOXED | {"objects": {"bbox": [[5, 5]]}}, r"\[5, 5\] of 'objects' is not four numbers"),
        (BOXED | {"objects": {"bbox": [[0, 0, "9", 9]]}}, "is not four numbers"),
        (BOXED | {"objects": {"bbox": [[9, 0, 5, 9]]}}, r"\[9, 0, 5, 9\] is not inside of its picture"),
        (BOXED | {"objects": {"bbox": [[0, 0, 9000, 9]]}}, "is not inside of its picture"),
        (BOXED | {"objects": {"bbox": [[0, 0, 9, 9]], "bbox_type": "norm9"}}, "bbox_type is 'norm9'"),
        (BOXED | {"objects": {"bbox": [[0, 0, 9, 9]] * 2}}, "0 ref and 2 bbox, of which 0 and 1 have"),
        (BOXED | {"objects": [[0, 0, 9, 9]]}, "must hold 'ref' and 'bbox', got list"),
    ],
)
def test_what_does_not_fit_is_refused(record, message):
    with pytest.raises(ConversationError, match=message):
        to_conversation(record, IMAGES)
