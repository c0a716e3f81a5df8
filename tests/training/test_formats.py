"""Records of the known data sets become the same conversation; what does not fit is refused by name."""

import base64
import json

import numpy as np
import pytest

from tests.conftest import GOLDENS
from vl2_jax.errors import ConversationError
from vl2_jax.processing.batch import IGNORED, Processor
from vl2_jax.processing.images import load_image
from vl2_jax.training.data import BadSample, Encoder
from vl2_jax.training.formats import last_answer_only, to_conversation

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
        {"image": "square.png", "query": "What is it?", "response": "a square", "history": None, "system": None},
        {"image": "square.png", "instruction": "What is it?", "input": "", "output": "a square"},
        {"image": "square.png", "prompt": "What is it?", "response": "a square"},
        {"images": "square.png", "texts": [{"user": "What is it?", "assistant": "a square", "source": "x"}]},
        {"image": "square.png", "conversation": [{"input": "What is it?", "output": "a square"}]},
        {"images": '["square.png"]', "messages": json.dumps(USER)},
        {"images": np.array(["square.png"], object), "messages": np.array(USER, object), "system": float("nan")},
        {"images": [None, {"bytes": None, "path": "square.png"}], "messages": USER, "conversations": None},
        {"image": "", "images": ["square.png"], "messages": USER, "objects": {"ref": [], "bbox": []}},
        [USER[0] | {"image": "square.png"}, USER[1]],
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
    (picture,) = messages[0]["images"]
    assert load_image(picture) == load_image(content)


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
        ({"question": "?", "answers": ["a", "b"]}, "is not understood"),
        ({"question": "?", "answer": ["a", "b"]}, "2 texts where one is expected"),
        ({"question": "?", "answer": "a", "history": 3}, "'history' must be a list"),
        ({"question": "?", "answer": "a", "system": 3}, "must be text or parts, got int"),
        ({"messages": [{"role": "user", "content": "<bbox>"}], "objects": {"ref": ["a"]}}, "more <bbox> placeholders"),
        (BOXED | {"question": "<ref-object>", "objects": {"ref": [3]}}, "a label of a box must be text, got int"),
        (BOXED | {"question": "<ref-object>", "objects": {"ref": ["<|det|>"]}}, "holds a tag of boxes"),
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


def test_instructions_and_history_become_turns():
    record = {
        "instruction": "Add.",
        "input": "1 and 2",
        "output": "3",
        "history": [["Hi", "Hello"]],
        "system": "Be kind.",
    }
    contents = [(message["role"], message["content"]) for message in to_conversation(record, IMAGES)]
    assert contents == [
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add.\n1 and 2"), ("assistant", "3"),
    ]  # fmt: skip


def test_the_tag_in_an_answer_is_text_and_takes_no_picture():
    record = {"image": "square.png", "question": "How?", "answer": "Write <image>."}
    user, assistant = to_conversation(record, IMAGES)
    assert user["content"] == "<image>\nHow?"
    assert assistant == {"role": "assistant", "content": "Write <image>.", "images": []}


PROCESSOR = Processor.from_directory(GOLDENS / "nano-tiny")
PROCESSOR = PROCESSOR.replace(config=PROCESSOR.config.replace(mask_prompt=True))


def learned(record, **options):
    """What training learns of a record, the end of a sentence as a full stop; or why it is left out."""
    made = Encoder(PROCESSOR, 2000, 20)({"where": "here", "record": record, "folder": IMAGES, **options})
    if isinstance(made, BadSample):
        return made
    end = PROCESSOR.tokenizer.decode([PROCESSOR.tokenizer.eos_id])
    return PROCESSOR.tokenizer.decode(made.labels[1:][made.labels[1:] != IGNORED]).replace(end, ".")


def turns(first, second):
    question = {"role": "user", "content": "Sure?"}
    return [question, {"role": "assistant", **first}, question, {"role": "assistant", **second}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": turns({"content": "WRONG", "loss": False}, {"content": "red"})},
        {"messages": turns({"content": "WRONG", "weight": 0}, {"content": "red", "weight": 1})},
        {"conversations": turns({"value": "WRONG", "train": False}, {"value": "red", "train": None})},
        {"messages": turns({"content": "WRONG"}, {"content": "red"}), "loss": [False, True]},
        {"messages": turns({"content": "WRONG"}, {"content": "red"}), "weight": [1, 0, 1, 1]},
        {"messages": turns({"content": ""}, {"content": "red"}), "label": 0, "mask": "mask.png", "weight": 0.7},
        {"messages": turns({"content": None}, {"content": "red"})},
        {"texts": [{"user": "?", "assistant": "WRONG", "loss": False}, {"user": "?", "assistant": "red"}]},
    ],
)
def test_turns_that_must_not_be_learned_are_not(record):
    assert learned(record) == "red."


def test_only_the_last_answer_is_learned_where_asked_for():
    record = {"messages": turns({"content": "blue"}, {"content": "red"})}
    assert learned(record) == "blue.red."
    assert learned(record, last_answer_only=True) == "red."
    assert [m.get("learn", True) for m in last_answer_only(record["messages"])] == [False, False, False, True]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"messages": [{"role": "user", "text": "?"}, {"role": "assistant", "text": "red"}]},
            "there is none in the keys",
        ),
        ({"messages": [USER[0], {"role": "assistant", "text": "red"}], "image": "square.png"}, "none in the keys"),
        ({"question": "?", "answer": ""}, "no answer to learn"),
        ({"question": "?", "answer": " \n"}, "no answer to learn"),
        ({"query": "?", "response": None}, "no answer to learn"),
        ({"prompt": "?", "completion": []}, "no answer to learn"),
        ({"instruction": "?", "output": ""}, "no answer to learn"),
        ({"messages": [{"role": "user", "content": "?"}]}, "no answer to learn"),
        ({"question": "?", "answer": "red", "loss": False}, "no answer to learn"),
        ({"question": "?", "answer": "red", "weight": 0}, "no answer to learn"),
        ({"messages": turns({"content": "red", "weight": 0.5}, {"content": "red"})}, "'weight' of a message is 0.5"),
        ({"question": "?", "reply": "red"}, "is not understood"),
    ],
)
def test_a_record_that_teaches_silence_is_left_out(record, reason):
    assert reason in learned(record).reason


@pytest.mark.parametrize(
    "record",
    [
        {"image": "data:image/png;base64," + "A" * 100_000, "question": "?", "answer": "!"},
        {"image": {"bytes": "iVBORw0KGgo" + "A" * 100_000}, "question": "?", "answer": "!"},
        {"image": "B" * 100_000, "question": "?", "answer": "!"},
        {"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]},
        {"A" * 100_000: 1},
        {"question": "?" * 100_000 + "<image>", "answer": "!"},
    ],
)
def test_a_reason_is_one_short_line_without_what_was_given(record):
    reason = learned(record).reason
    assert len(reason) <= 240
    assert "\n" not in reason
    assert "AAAA" * 30 not in reason


@pytest.mark.parametrize("image", ["bytes", "base64"])
def test_pictures_inside_of_records_are_read(image):
    content = (IMAGES / "square.png").read_bytes()
    content = content if image == "bytes" else base64.b64encode(content).decode()
    record = {"images": [{"bytes": content, "path": None}], "question": "?", "answer": "red"}
    assert learned(record) == "red."
    assert learned({"image": content, "question": "?", "answer": "red"}) == "red."


def test_nulls_of_objects_are_what_is_left_out():
    record = {
        "messages": [
            {"role": "user", "content": "<image>Find <ref-object>"},
            {"role": "assistant", "content": "<ref-object><bbox>"},
        ],
        "images": ["square.png"],
        "objects": {"ref": ["cat"], "bbox": [[0, 0.5, 1, 1]], "bbox_type": None, "image_id": None},
    }
    assert "<|ref|>cat<|/ref|><|det|>" in learned(record)  # the only label is that of both placeholders
    record["objects"] = [{"ref": "cat", "bbox": np.array([0, 0.5, 1, 1])}]
    assert "<|ref|>cat<|/ref|><|det|>" in learned(record)
