"""Messages in every form that programs have are one conversation, and so they are in records of training."""

import base64
import io
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.conftest import GOLDENS
from vl2_jax.errors import ConversationError, ImageError
from vl2_jax.processing.batch import IGNORED, TEXT, Processor
from vl2_jax.processing.conversation import with_image_tags
from vl2_jax.processing.messages import pictures_of, read_messages
from vl2_jax.training.formats import to_conversation

PROCESSOR = Processor.from_directory(GOLDENS / "nano-tiny")
IMAGES = GOLDENS / "images"
PATH = str(IMAGES / "square.png")
BYTES = pathlib.Path(PATH).read_bytes()
BASE64 = base64.b64encode(BYTES).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
ANSWER = {"role": "assistant", "content": "a square"}
TEXT_PART = {"type": "text", "text": "What is it?"}
EXPECTED = [{"role": "user", "content": "<image>\nWhat is it?", "images": [PATH]}, ANSWER]


def parts(*content):
    return [{"role": "user", "content": list(content)}, ANSWER]


def tagged(**fields):
    return [{"role": "user", "content": "<image>\nWhat is it?", **fields}, ANSWER]


FORMS = {
    "openai address": parts({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "high"}}, TEXT_PART),
    "openai path": parts({"type": "image_url", "image_url": {"url": PATH}}, TEXT_PART),
    "address alone": parts({"type": "image_url", "image_url": PATH}, TEXT_PART),
    "openai responses": parts(
        {"type": "input_image", "image_url": DATA_URL}, {"type": "input_text", "text": "What is it?"}
    ),
    "anthropic": parts(
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}}, TEXT_PART
    ),
    "hugging face": parts({"type": "image", "image": PATH}, TEXT_PART),
    "dictionary": parts({"type": "image", "image": {"bytes": None, "path": PATH}}, TEXT_PART),
    "dictionary of bytes": parts({"type": "image", "image": {"bytes": BYTES, "path": "gone.png"}}, TEXT_PART),
    "dictionary of base64": parts({"type": "image", "image": {"bytes": BASE64, "path": None}}, TEXT_PART),
    "pillow": parts({"type": "image", "image": Image.open(PATH)}, TEXT_PART),
    "array": parts({"type": "image", "image": np.asarray(Image.open(PATH).convert("RGB"))}, TEXT_PART),
    "union of parts": parts(
        {"type": "image", "image": PATH, "image_url": None, "text": None},
        {"type": "text", "text": "What is it?", "image": None, "image_url": None},
    ),
    "null part and text": parts({"type": "image", "image": PATH}, None, TEXT_PART, {"type": "text", "text": None}),
    "parts without type": parts({"image": PATH}, {"text": "What is it?"}),
    "picture beside a part": [
        {"role": "user", "content": [{"type": "image"}, TEXT_PART], "images": [PATH]},
        ANSWER,
    ],
    "one part": [{"role": "user", "content": {"type": "text", "text": "What is it?"}}, ANSWER],
    "list": tagged(images=[PATH]),
    "one picture": tagged(images=PATH),
    "one picture, one key": tagged(image=PATH, images=None),
    "nulls in a list": tagged(images=[None, PATH]),
    "bytes": tagged(images=BYTES),
    "base64": tagged(images=BASE64),
    "tuple": tagged(images=(PATH,)),
    "array of objects": tagged(images=np.array([{"bytes": BYTES, "path": None}], dtype=object)),
    "messages as an array": np.array(tagged(images=[PATH]), dtype=object),
    "sharegpt": [
        {"from": "human", "value": "<image>\nWhat is it?", "images": [PATH], "role": None, "content": None},
        {"from": "gpt", "value": "a square"},
    ],
    "released roles": [
        {"role": "<|User|>", "content": "<image>\nWhat is it?", "images": [PATH]},
        {"role": "<|Assistant|>", "content": "a square"},
    ],
    "other roles": [
        {"role": "User", "content": "<image>\nWhat is it?", "images": [PATH]},
        {"role": "model", "content": "a square", "name": None, "refusal": None, "tool_calls": None},
    ],
    "answer in parts": [EXPECTED[0], {"role": "assistant", "content": [{"type": "text", "text": "a square"}]}],
    "a client's object": [EXPECTED[0], SimpleNamespace(model_dump=lambda: ANSWER)],
    "system": [{"role": "developer", "content": [{"type": "text", "text": "Be short."}]}, *EXPECTED],
}


@pytest.mark.parametrize("form", FORMS)
def test_conversations_and_records_read_the_same_forms(form):
    given = PROCESSOR.encode(FORMS[form], inference=False)
    record = to_conversation({"messages": FORMS[form]}, pathlib.Path("/nowhere"))
    trained = PROCESSOR.encode(record, inference=False)
    np.testing.assert_array_equal(given.input_ids, trained.input_ids)
    np.testing.assert_array_equal(given.tiles, trained.tiles)
    if form not in ("one part", "system"):
        expected = PROCESSOR.encode(EXPECTED, inference=False)
        np.testing.assert_array_equal(given.input_ids, expected.input_ids)
        np.testing.assert_array_equal(given.tiles, expected.tiles)


def test_a_message_that_was_read_is_read_as_it_is():
    for form in FORMS.values():
        messages = read_messages(form)
        assert [m["content"] for m in read_messages(messages)] == [m["content"] for m in messages]


def test_pictures_stand_where_their_parts_do():
    small = IMAGES / "tiny.png"
    content = [{"type": "text", "text": "First"}, {"type": "image"}, {"type": "image", "image": small}, TEXT_PART]
    (message,) = read_messages([{"role": "user", "content": content, "images": PATH}])
    assert message["content"] == "First<image>\n<image>\nWhat is it?"
    assert message["images"] == [PATH, small]


def test_pictures_in_hand_become_a_list():
    picture, stream = Image.new("RGB", (2, 2)), io.BytesIO(BYTES)
    stack = np.zeros((3, 2, 2, 3), np.uint8)
    for value, count in ((None, 0), ("", 0), (picture, 1), (stream, 1), (stack, 3), (stack[0], 1), (iter([PATH]), 1)):
        assert len(pictures_of(value)) == count
    assert pictures_of([None, {"bytes": None, "path": None}, PATH]) == [PATH]


def text_of(content, images=(), role="user"):
    """Ids of one message's text, without those of pictures."""
    messages = [{"role": "user", "content": content, "images": list(images)}, {"role": "assistant", "content": ""}]
    encoded = PROCESSOR.encode(messages)
    assert not (encoded.input_ids[encoded.visual_index == TEXT] == PROCESSOR.tokenizer.image_id).any()
    return PROCESSOR.tokenizer.decode(encoded.input_ids[encoded.visual_index == TEXT])


def test_an_answer_may_speak_of_the_tag_and_the_conversation_goes_on():
    turns = [
        {"role": "user", "content": "<image>\nHow do I show a picture?", "images": [PATH]},
        {"role": "assistant", "content": "Use <image>."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": ""},
    ]
    encoded = PROCESSOR.encode(turns)
    assert (encoded.input_ids == PROCESSOR.tokenizer.image_id).sum() == (encoded.visual_index != TEXT).sum()
    assert "Use <image>." in PROCESSOR.tokenizer.decode(encoded.input_ids[encoded.visual_index == TEXT])
    with pytest.raises(ConversationError, match="only users send pictures"):
        PROCESSOR.replace(as_released=True).encode(turns)


def test_a_system_message_may_speak_of_the_tag():
    turns = [{"role": "system", "content": "<image> is a picture."}, {"role": "user", "content": "Hi"}, ANSWER]
    assert "<image> is a picture." in PROCESSOR.tokenizer.decode(PROCESSOR.encode(turns).input_ids)


def test_a_question_escapes_the_tag_and_an_error_says_how():
    assert "What does <image> mean?" in text_of(r"What does \<image> mean?")
    assert "What does <image> mean?" in text_of(r"<image>What does \<image> mean?", [PATH])
    with pytest.raises(ConversationError, match=r"in 'Does <image> mean <image>\?'; .* and \\<image> where the text"):
        text_of("Does <image> mean <image>?", [PATH])
    assert with_image_tags(r"What does \<image> mean?", 1) == "<image>\nWhat does \\<image> mean?"
    encoded = PROCESSOR.encode_text(r"<image>\<image>", PATH)
    assert "<image>" in PROCESSOR.tokenizer.decode(encoded.input_ids[encoded.visual_index == TEXT])


def test_the_released_processor_knows_no_escape():
    released = PROCESSOR.replace(as_released=True)
    turns = [{"role": "user", "content": r"a\<image>", "images": [PATH]}, {"role": "assistant", "content": ""}]
    assert (released.encode(turns).visual_index != TEXT).any()


def test_text_parts_are_text_whatever_they_say():
    part = {"type": "text", "text": r"What are <image> and \<image>?"}
    assert r"What are <image> and \<image>?" in text_of([part])
    assert r"What are <image> and \<image>?" in text_of([{"type": "image", "image": PATH}, part])
    backslash = [{"type": "text", "text": "C:\\"}, {"type": "image", "image": PATH}]
    assert "C:\\" in text_of(backslash)


@pytest.mark.parametrize(("text", "written"), [("a\ud800b", "a\ufffdb"), ("\udc80", "\ufffd"), ("\ud83d\ude00", "😀")])
def test_text_that_is_not_unicode_is_replaced_wherever_it_stands(text, written):
    tokenizer = PROCESSOR.tokenizer
    assert tokenizer.encode(text) == tokenizer.encode(written)
    assert tokenizer.encode_as_released(text) == tokenizer.encode_as_released(written)
    for processor in (PROCESSOR, PROCESSOR.replace(as_released=True)):
        a, b = (
            processor.encode(
                [
                    {"role": "system", "content": t},
                    {"role": "user", "content": [{"type": "text", "text": t}]},
                    {"role": "assistant", "content": t},
                ]
            )
            for t in (text, written)
        )
        assert a.input_ids.tolist() == b.input_ids.tolist()
        a.text.encode()
    assert PROCESSOR.encode_text(text).input_ids.tolist() == PROCESSOR.encode_text(written).input_ids.tolist()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"bytes", "must be text or parts, got bytes 5 bytes"),
        (3, "must be text or parts, got int 3"),
        (None, "must be text or parts, got NoneType"),
        ("a\0b", "holds a NUL character"),
        ([1], "a part of a message must be an object"),
        ([{"type": "input_audio", "input_audio": {}}], "unknown type 'input_audio'"),
        ([{"type": "video"}], "unknown type 'video'"),
        ([{}], "unknown type None"),
        ([{"type": "text", "text": b"x"}], "the text of a part must be text, got bytes"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,###"}}], "with valid base64"),
        ([{"type": "image"}], r"1 <image> tag\(s\) but 0 picture"),
    ],
)
def test_content_that_is_none_gets_one_sentence(content, message):
    messages = [{"role": "user", "content": content}, ANSWER]
    for read in (lambda: messages, lambda: to_conversation({"messages": messages}, IMAGES)):
        with pytest.raises((ConversationError, ImageError), match=message) as error:
            PROCESSOR.encode(read())
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "tool", "content": "x"}, "unknown role 'tool'"),
        ({"role": ["user"], "content": "x"}, "unknown role"),
        ({"content": "x"}, "unknown role None"),
        ({"role": "user", "text": "x"}, r"there is none in the keys \['role', 'text'\]"),
        ({"role": "user", "content": "x", "audio": "a.wav"}, "has audio, which the model cannot take"),
        ({"role": "assistant", "content": [{"type": "image", "image": PATH}]}, "only users send pictures"),
        ("hello", "a message must be an object"),
        (None, "a message must be an object"),
        ({"role": "user", "content": "x", "loss": "perhaps"}, "'loss' of a message is 'perhaps'"),
    ],
)
def test_what_is_no_message_gets_one_sentence(message, reason):
    with pytest.raises(ConversationError, match=reason):
        PROCESSOR.encode([message, ANSWER])


def test_lists_in_lists_without_end_are_no_conversation():
    endless = []
    endless.append(endless)
    with pytest.raises(ConversationError, match="lists in lists"):
        PROCESSOR.encode([{"role": "user", "content": endless}])


def test_an_answer_without_content_is_empty():
    question = {"role": "user", "content": "Hi"}
    empty = PROCESSOR.encode([question, {"role": "assistant", "content": ""}])
    for answer in ({"content": None}, {"content": None, "tool_calls": [{}]}, {"tool_calls": [{}]}, {"content": []}):
        assert PROCESSOR.encode([question, {"role": "assistant", **answer}]).input_ids.tolist() == (
            empty.input_ids.tolist()
        )


@pytest.mark.parametrize(
    "switch",
    [
        {"learn": False}, {"loss": False}, {"loss": 0}, {"loss": "false"}, {"weight": 0}, {"weight": 0.0},
        {"train": False}, {"trainable": False}, {"training": False}, {"label": False}, {"mask": True},
        {"loss_scale": 0}, {"loss": True, "weight": 0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_turn_that_must_not_be_learned_is_no_target_nor_is_its_end(switch, mask_prompt):
    processor = PROCESSOR.replace(config=PROCESSOR.config.replace(mask_prompt=mask_prompt))
    question, answer = {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "red"}
    turns = [question, {"role": "assistant", "content": "WRONG", **switch}, question, answer]
    encoded = processor.encode(turns, inference=False)
    learned = processor.tokenizer.decode(encoded.labels[1:][encoded.labels[1:] != IGNORED])
    eos = processor.tokenizer.decode([processor.tokenizer.eos_id])
    assert "WRONG" not in learned
    assert learned.count(eos) == 1
    assert learned.endswith("red" + eos)


@pytest.mark.parametrize(
    "switch", [{"loss": None}, {"loss": True}, {"weight": 1}, {"weight": 1.0}, {"mask": False}, {"label": "cat"}]
)
def test_an_answer_is_learned_by_default(switch):
    messages = read_messages([{"role": "user", "content": "?"}, {"role": "assistant", "content": "red", **switch}])
    assert "learn" not in messages[1]
