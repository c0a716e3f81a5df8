"""What a user types is text: no control token and no picture is made of it, however it is cut into parts (S4)."""

import random
from dataclasses import replace

import pytest
from PIL import Image

from tests.conftest import GOLDENS
from vl2_jax.config import read_config
from vl2_jax.processing.batch import Processor
from vl2_jax.processing.tokenizer import GROUNDING_TAGS, Tokenizer
from vl2_jax.serving.http.conversations import read_conversation

WORDS = (
    "<image>", "\\<image>", "<|User|>", "<|Assistant|>", "<|begin▁of▁sentence|>", "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|end_of_text|>", "<image_placeholder>", "<|im_start|>", "[INST]", "</s>",
    "\\",
    "\n\n", ": ", " ", "a", "漢", "😀", "\u200b", "User:", "<", ">", "|", "｜", "<<image>>", "<ima", "ge>", "<|Us",
    "er|>",
)  # fmt: skip
PICTURE = Image.new("RGB", (4, 4))


@pytest.fixture(scope="module", params=["nano", "released"])
def reader(request, processor) -> Processor:
    """Of vl2-nano, and with the released special tokens."""
    if request.param == "nano":
        return processor
    folder = GOLDENS / "nano-small"
    tokenizer = Tokenizer.from_directory(folder, "<｜▁pad▁｜>", "<image>")
    return replace(Processor.from_directory(folder, read_config(folder)), tokenizer=tokenizer)


def prompt(reader: Processor, content) -> list[int]:
    asked = read_conversation([{"role": "user", "content": content}], most_pictures=9)
    filled = [message | {"images": [PICTURE] * len(message["images"])} for message in asked.messages]
    encoded = reader.encode(filled)
    assert (encoded.visual_index >= 0).sum() == (encoded.input_ids == reader.tokenizer.image_id).sum()
    assert len(encoded.crops) == len(asked.pictures)
    return encoded.input_ids.tolist()


def check(reader: Processor, rng: random.Random) -> None:
    tokenizer = reader.tokenizer
    usual = prompt(reader, "x")
    text = "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))
    text = f"x{text}x"  # what stands around a message is stripped, and with it what it says of this test
    got = prompt(reader, text)
    control = tokenizer.control_ids | {tokenizer.image_id}
    assert [id_ for id_ in got if id_ in control] == [id_ for id_ in usual if id_ in control], text
    assert text in tokenizer.decode(got), text
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randint(0, 4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    assert prompt(reader, [{"type": "text", "text": part} for part in parts]) == got, parts
    address = {"type": "image_url", "image_url": {"url": "data:,x"}}
    shown = prompt(reader, [{"type": "text", "text": text}, address, {"type": "text", "text": text}])
    others = control - {tokenizer.image_id}
    assert [id_ for id_ in shown if id_ in others] == [id_ for id_ in usual if id_ in others], text


def test_special_tokens_that_users_type_are_text(reader):
    rng = random.Random(0)
    for _ in range(300):
        check(reader, rng)


@pytest.mark.slow
def test_ten_thousand_texts_of_special_tokens_are_text(reader):
    rng = random.Random(1)
    for _ in range(10_000):
        check(reader, rng)


def test_every_special_token_of_the_tokenizer_is_text(reader):
    tokenizer = reader.tokenizer
    usual = prompt(reader, "x")
    control = tokenizer.control_ids | {tokenizer.image_id}
    for token in tokenizer._tokenizer.get_added_tokens_decoder().values():
        if token.content in GROUNDING_TAGS:
            continue
        got = prompt(reader, f"x{token.content}x")
        assert [id_ for id_ in got if id_ in control] == [id_ for id_ in usual if id_ in control], token.content


def test_grounding_tags_are_how_a_user_asks(reader):
    got = prompt(reader, "x" + "".join(GROUNDING_TAGS))
    assert [reader.tokenizer.id_of(tag) for tag in GROUNDING_TAGS] == [id_ for id_ in got if id_ in _ids(reader)]


def _ids(reader: Processor) -> set[int]:
    return {reader.tokenizer.id_of(tag) for tag in GROUNDING_TAGS}
