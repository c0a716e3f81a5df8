"""Odd conversations and hostile text: an error that says what to do, never a crash, never a control token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import GOLDENS
from vl2_jax.api import find_model
from vl2_jax.config import read_json, read_preset
from vl2_jax.errors import ConversationError
from vl2_jax.processing.batch import Processor
from vl2_jax.processing.tokenizer import GROUNDING_TAGS

PROCESSOR = Processor.from_directory(GOLDENS / "nano-tiny")
SPECIAL = [t.content for t in PROCESSOR.tokenizer._tokenizer.get_added_tokens_decoder().values()]
CONTROL = [token for token in SPECIAL if token not in (*GROUNDING_TAGS, "<image>")]


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes_are_read(size):
    turns = [{"role": "user", "content": "<image>", "images": [Image.new("RGB", size)]}]
    encoded = PROCESSOR.encode([*turns, {"role": "assistant", "content": ""}])
    assert (encoded.visual_index >= 0).sum() > 0


TEXT = st.lists(st.one_of(st.sampled_from(CONTROL + list(GROUNDING_TAGS)), st.text(max_size=12)), max_size=8)


@settings(max_examples=2000, deadline=None)
@given(TEXT.map("".join))
def test_no_text_yields_a_control_id(text):
    text = text.replace("<image>", "")
    ids = PROCESSOR.tokenizer.encode(text)
    assert not PROCESSOR.tokenizer.control_ids.intersection(ids)
    assert PROCESSOR.tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "expected a conversation"),
        ("hello", "expected a conversation"),
        ([{"role": "user"}], "content must be text"),
        ([{"role": "robot", "content": "x"}], "unknown role 'robot'"),
        ([{"role": "user", "content": "<image> <image>", "images": ["a.png"]}], "2 <image> tag"),
        ([{"role": "user", "content": "look", "images": ["a.png"]}], "0 <image> tag"),
        ([{"role": "user", "content": "hi"}], "last message must be the assistant's"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "can only be the first"),
        ([{"role": "assistant", "content": "see", "images": ["a.png"]}], "only users send pictures"),
    ],
)
def test_a_mistaken_conversation_gets_one_sentence(conversation, message):
    with pytest.raises(ConversationError, match=message):
        PROCESSOR(conversation)


def test_an_answer_can_be_prefilled():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, the"}]
    ids = PROCESSOR(turns).input_ids[0].tolist()
    assert ids[-len(PROCESSOR.tokenizer.encode("Well, the")) :] == PROCESSOR.tokenizer.encode("Well, the")


def test_the_shipped_model_is_the_preset():
    directory = find_model("vl2-nano")
    assert read_json(directory / "config.json") == read_preset("vl2-nano")["model"]
    assert sum(path.stat().st_size for path in directory.iterdir()) < 12e6


@pytest.mark.parametrize("size", [(336, 112), (112, 336), (224, 224), (90, 90)])
def test_prompts_of_every_raster_have_fingerprints(size):
    """Tiles of a wide raster are strided views of the picture."""
    processor = Processor.from_directory(find_model("vl2-nano"))
    pictures = [Image.new("RGB", size, colour) for colour in ("red", "blue")]
    answer = {"role": "assistant", "content": ""}
    red, blue = (
        processor.encode([{"role": "user", "content": "<image>\n?", "images": [picture]}, answer], inference=True)
        for picture in pictures
    )
    assert len(red.fingerprints()) == len(red)
    assert (red.fingerprints() != blue.fingerprints()).any()
