"""Bad pictures and hostile text: an error that says what to do, never a crash, never a control token."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import GOLDENS
from vl2_jax.api import find_model
from vl2_jax.config import read_json, read_preset
from vl2_jax.errors import ConversationError, ImageError
from vl2_jax.processing.batch import Processor
from vl2_jax.processing.grounding import COLOURS, draw_boxes, parse_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.processing.tokenizer import GROUNDING_TAGS

PROCESSOR = Processor.from_directory(GOLDENS / "nano-tiny")
SPECIAL = [t.content for t in PROCESSOR.tokenizer._tokenizer.get_added_tokens_decoder().values()]
CONTROL = [token for token in SPECIAL if token not in (*GROUNDING_TAGS, "<image>")]


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def png_bomb(width, height):
    """A tiny PNG file that decodes to `width` x `height` pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(ImageError, match="more than the limit"):
        load_image(png_bomb(13_000, 13_000))
    with pytest.raises(ImageError, match=r"too large|more than the limit"):
        load_image(png_bomb(60_000, 60_000))


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1)])
def test_extreme_shapes_are_read(size):
    turns = [{"role": "user", "content": "<image>", "images": [saved(Image.new("RGB", size), format="PNG")]}]
    encoded = PROCESSOR.encode([*turns, {"role": "assistant", "content": ""}])
    assert (encoded.visual_index >= 0).sum() > 0


def test_camera_orientation_is_applied():
    image = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn
    data = saved(image, format="JPEG", exif=exif)
    assert load_image(data).size == (20, 40)
    assert load_image(data, as_released=True).size == (40, 20)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    options = {"transparency": 0} if mode == "P" else {}
    assert load_image(saved(image, format="PNG", **options)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled():
    image = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert load_image(saved(image, format="PNG")).getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_and_animated_pictures_are_read():
    assert load_image(saved(Image.new("CMYK", (4, 4)), format="JPEG")).mode == "RGB"
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    animated = saved(frames[0], format="GIF", save_all=True, append_images=frames[1:])
    assert load_image(animated).getpixel((0, 0)) == (255, 0, 0)


HAND_MADE = [
    (kind, mode, size)
    for kind, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "GIF": ("1", "L", "P", "RGB"),
        "BMP": ("1", "L", "P", "RGB"),
        "WEBP": ("L", "RGB", "RGBA"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"),
        "PPM": ("1", "L", "RGB"),
    }.items()
    for mode in modes
    for size in ((1, 1), (3, 500))
]


@pytest.mark.parametrize(("kind", "mode", "size"), HAND_MADE)
def test_every_format_and_mode_becomes_rgb_of_its_size(kind, mode, size):
    picture = load_image(saved(Image.new(mode, size), format=kind))
    assert (picture.mode, picture.size) == ("RGB", size)


def test_what_is_not_an_accepted_picture_is_named(tmp_path):
    for source, message in (
        (tmp_path / "none.png", "does not exist"),
        (b"", "accepted formats"),
        (b"hello", "accepted formats"),
        (b"%PDF-1.4", "accepted formats"),
        (3.5, "cannot read an image from a float"),
        (np.zeros((4, 4), np.float32), "uint8"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(source)


def test_a_thousand_mutated_pictures_never_crash():
    rng = random.Random(0)
    originals = [
        saved(Image.effect_noise((24, 18), 50).convert("RGB"), format=f)
        for f in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
    ]
    read = 0
    for number in range(1000):
        data = bytearray(originals[number % len(originals)])
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            data = data[: rng.randrange(len(data))]
        try:
            load_image(bytes(data), max_pixels=1_000_000)
            read += 1
        except ImageError:
            pass
    assert 0 < read < 1000


TEXT = st.lists(st.one_of(st.sampled_from(CONTROL + list(GROUNDING_TAGS)), st.text(max_size=12)), max_size=8)


@settings(max_examples=5000, deadline=None)
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


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*GROUNDING_TAGS, "[[1, 2, 3, 4]]", "[", "]", "x", "9" * 400, "1,", "\n"]), max_size=12)
)
def test_any_answer_can_be_parsed_and_drawn(parts):
    boxes = parse_boxes("".join(parts), 64, 48)
    assert draw_boxes(Image.new("RGB", (64, 48)), boxes).size == (64, 48)


def test_boxes_are_drawn_where_they_are():
    boxes = parse_boxes("<|ref|>cat<|/ref|><|det|>[[250, 250, 750, 750]]<|/det|>", 200, 200)
    drawn = draw_boxes(Image.new("RGB", (200, 200), "white"), boxes)
    assert drawn.getpixel((100, 150)) == COLOURS[0]
    assert drawn.getpixel((100, 100)) == (255, 255, 255)


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
