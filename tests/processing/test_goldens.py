"""The processor equals the released one, id by id and pixel by pixel."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import CASES, CONFIGS, GOLDENS, load_case, with_pictures
from vl2_jax.config import read_processor_config
from vl2_jax.errors import ConversationError
from vl2_jax.processing.batch import Processor
from vl2_jax.processing.conversation import render
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.processing.tiling import select_best_resolution
from vl2_jax.processing.tokenizer import Tokenizer

TABLES = GOLDENS / "tables"


def read_table(name):
    return json.loads((TABLES / name).read_text())


def released_processor(config):
    return Processor.from_directory(GOLDENS / config).replace(as_released=True)


@pytest.mark.parametrize(("config", "case"), CASES)
def test_batches_equal_the_recorded_ones(config, case):
    info, arrays = load_case(config, case)
    processor = released_processor(config)
    conversations = [with_pictures(c) for c in info["conversations"]]
    batch = processor(conversations, inference=info["inference_mode"])
    np.testing.assert_array_equal(batch.input_ids, arrays["input_ids"])
    np.testing.assert_array_equal(batch.labels, arrays["labels"])
    np.testing.assert_array_equal(batch.attention_mask, arrays["attention_mask"])
    np.testing.assert_array_equal(batch.images_mask, arrays["images_seq_mask"])
    np.testing.assert_array_equal(batch.crops, arrays["images_spatial_crop"])
    np.testing.assert_array_equal(batch.lengths, info["seq_lens"])
    np.testing.assert_array_equal(processor.released_pixels(batch), arrays["images"])
    assert [render(c) for c in conversations] == info["sft_format"]


@pytest.mark.parametrize("row", read_table("prompts.json")["conversations"], ids=lambda row: row["name"])
def test_prompts_equal_the_recorded_ones(row):
    released = released_processor(read_table("prompts.json")["config"])
    conversation = with_pictures(row["conversations"])
    for key, expected in row.items():
        if key.startswith("format_messages/"):
            _, template, system = key.split("/")
            assert render(conversation, template, "SYS." if system == "sys" else "") == expected
        elif "/mask_prompt_" in key:
            mask = key.endswith("true")
            processor = released.replace(config=released.config.replace(mask_prompt=mask))
            inference = key.startswith("inference")
            if "exception" in expected:
                with pytest.raises(ConversationError):
                    processor.encode(conversation, inference=inference)
                continue
            encoded = processor.encode(conversation, inference=inference)
            assert encoded.input_ids.tolist() == expected["input_ids"]
            assert encoded.labels.tolist() == expected["target_ids"]
            assert (encoded.crops.tolist() or [[0, 0]]) == expected["images_spatial_crop"]
            batch = processor.collate([encoded])
            assert list(processor.released_pixels(batch)[0].shape) == expected["images_shape"]


@pytest.mark.parametrize("row", read_table("prompts.json")["prompts"])
def test_bare_prompts_equal_the_recorded_ones(row):
    processor = released_processor(read_table("prompts.json")["config"])
    images = [GOLDENS / "images" / row["image"]] * row["n_images"]
    if row["apply_sft_format"]:
        processor = processor.replace(config=processor.config.replace(mask_prompt=False))
        turns = [
            {"role": "user", "content": row["prompt"], "images": images},
            {"role": "assistant", "content": ""},
        ]
        encoded = processor.encode(turns, inference=row["inference_mode"])
    else:
        encoded = processor.encode_text(row["prompt"], images, inference=row["inference_mode"])
    assert encoded.input_ids.tolist() == row["input_ids"]
    assert encoded.labels.tolist() == row["target_ids"]


def test_right_padding_equals_the_recorded_batch():
    table = read_table("prompts.json")
    rows = {row["name"]: with_pictures(row["conversations"]) for row in table["conversations"]}
    expected = table["right_padded"]
    processor = released_processor(table["config"])
    batch = processor([rows["text_only"], rows["ground_one"]], padding="right")
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.labels.tolist() == expected["labels"]
    assert batch.attention_mask.tolist() == expected["attention_mask"]
    assert batch.images_mask.tolist() == expected["images_seq_mask"]
    assert batch.crops.tolist() == expected["images_spatial_crop"]


def test_best_resolution_equals_the_recorded_choice_for_500_sizes():
    table = read_table("select_best_resolution.json")
    for row in table["lists"].values():
        candidates = [tuple(c) for c in row["candidate_resolutions"]]
        assert [list(select_best_resolution(size, candidates)) for size in table["sizes"]] == row["best"]


def pattern_picture(row):
    """The synthetic picture of a row of `processor_full/sizes.json`, by its recorded formula."""
    width, height = row["size"]
    y, x = np.mgrid[:height, :width].astype(np.int64)
    channels = [
        (x * a // 8 + y * b // 8 + (((x // g) ^ (y // g)) & 1) * d + (x * y) // e) % 256
        for a, b, g, d, e in row["pattern"]
    ]
    picture = np.stack(channels, axis=-1).astype(np.uint8)
    assert hashlib.sha256(picture.tobytes()).hexdigest() == row["source_sha256"]
    return Image.fromarray(picture)


@pytest.mark.parametrize(
    "row",
    json.loads((GOLDENS / "processor_full/sizes.json").read_text())["rows"],
    ids=lambda row: f"{row['size'][0]}x{row['size'][1]}-{row['mode']}",
)
def test_full_size_tiles_equal_the_recorded_ones(row):
    processor = _full_processor()
    count = len(row["spatial_crop"])
    picture = pattern_picture(row)
    turns = [{"role": "user", "content": "<image>" * count, "images": [picture] * count}]
    encoded = processor.encode([*turns, {"role": "assistant", "content": ""}])
    assert encoded.crops.tolist() == row["spatial_crop"]
    assert (encoded.visual_index >= 0).sum() == sum(row["num_image_tokens"])
    pixels = processor.released_pixels(processor.collate([encoded]))[0][: row["tiles_shape"][0]]
    assert list(pixels.shape) == row["tiles_shape"]
    assert hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest() == row["tiles_sha256_float32"]


def _full_processor():
    directory = GOLDENS / "processor_full"
    config = read_processor_config(directory)
    tokenizer = Tokenizer.from_directory(directory, config.pad_token, config.image_token)
    return Processor(config, tokenizer, as_released=True)


@pytest.mark.parametrize("table", read_table("tokenizer.json"), ids=lambda table: table["config"])
def test_tokenizer_equals_the_recorded_one(table):
    tokenizer = Processor.from_directory(GOLDENS / table["config"]).tokenizer
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    assert special == {key: table[key] for key in special}
    assert len(tokenizer) == table["n_tokens"]
    assert {token: tokenizer.id_of(token) for token in table["special_ids"]} == table["special_ids"]
    for row in table["encode"]:
        assert tokenizer.encode_as_released(row["text"]) == row["ids"]
    for row in table["decode"]:
        assert tokenizer.decode(row["ids"]) == row["text"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=True) == row["text_skip_special"]


def test_missing_special_tokens_get_the_recorded_ids(tmp_path):
    expected = read_table("tokenizer_missing_specials.json")
    data = json.loads((GOLDENS / "nano-tiny/tokenizer.json").read_text())
    kept = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in kept]
    data["model"]["vocab"].pop("<｜▁pad▁｜>", None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = Tokenizer.from_directory(tmp_path, "<｜▁pad▁｜>", "<image>")
    assert {token: tokenizer.id_of(token) for token in expected["ids"]} == expected["ids"]


@pytest.mark.parametrize("row", read_table("parse_ref_bbox.json")["rows"], ids=lambda row: row["response"][:40])
def test_boxes_equal_the_recorded_ones(row):
    width, height = read_table("parse_ref_bbox.json")["image_size"]
    boxes = parse_boxes(row["response"], width, height, as_released=True)
    expected = [] if row["returns_none"] else row["boxes"]
    assert [[b.x1, b.y1, b.x2, b.y2] for b in boxes] == expected
    assert [b.label for b in boxes] == ([] if row["returns_none"] else row["labels"])


def test_released_pictures_equal_the_recorded_arrays():
    with np.load(TABLES / "loaded_images.npz") as arrays:
        for name, expected in arrays.items():
            image = load_image(GOLDENS / "images" / f"{name}.png", as_released=True)
            np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_plain_encoding_equals_the_released_one_for_text_without_control_tokens(config):
    tokenizer = Processor.from_directory(GOLDENS / config).tokenizer
    for row in read_table("tokenizer.json")[0]["encode"]:
        ids = tokenizer.encode_as_released(row["text"])
        if not tokenizer.control_ids.intersection(ids):
            assert tokenizer.encode(row["text"]) == ids
