"""Thousands of damaged pictures, odd objects and answers: a picture, boxes, or our own error in a short line."""

import io
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from tests.processing.picture_files import exif, saved, several, tiff, turned
from vl2_jax.errors import ImageError
from vl2_jax.processing.grounding import draw_boxes, parse_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.processing.labels import place_labels

COUNT = 2000
NOISE = Image.effect_noise((24, 18), 50)
RGB = NOISE.convert("RGB")
EXIF = exif(
    (0x010E, 2, 3, b"abc"), turned(), (0x011A, 5, 1, struct.pack("<I", 16)), (0x0213, 3, 1, b"\1"),
)  # fmt: skip
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("a", "b" * 100, zip=True)
TEXT.add_itxt("c", "d" * 50, zip=True)


def heic():
    stream = io.BytesIO()
    pillow_heif.from_pillow(RGB).save(stream, exif=EXIF[6:])
    return stream.getvalue()


FILES = {
    "PNG": saved(RGB, format="PNG", exif=EXIF, icc_profile=ICC, pnginfo=TEXT),
    "PNG of a palette": saved(RGB.convert("P"), format="PNG", transparency=3),
    "APNG": several("PNG"),
    "JPEG": saved(RGB, format="JPEG", exif=EXIF, icc_profile=ICC, comment=b"a comment"),
    "JPEG of CMYK": saved(RGB.convert("CMYK"), format="JPEG", exif=EXIF),
    "MPO": several("MPO"),
    "WEBP": saved(RGB, format="WEBP", exif=EXIF, icc_profile=ICC),
    "GIF": several("GIF"),
    "BMP": saved(RGB, format="BMP"),
    "TIFF": saved(RGB, format="TIFF", icc_profile=ICC, description="words", dpi=(72, 72)),
    "TIFF of 16 bits": tiff(np.arange(400, dtype=np.uint16).reshape(20, 20)),
    "TIFF of floats": tiff(np.random.default_rng(0).random((20, 20), np.float32), sample_format=3),
    "PPM": saved(RGB, format="PPM"),
    "PGM": b"P5 20 20 4095\n" + np.arange(400, dtype=">u2").tobytes(),
    "PGM in text": b"P2 # a comment\n3 3 9\n1 2 3 4 5 6 7 8 9\n",
    "PFM": b"Pf\n20 20\n-1.0\n" + bytes(1600),
    "JPEG 2000": saved(RGB, format="JPEG2000"),
    "AVIF": saved(RGB, format="AVIF", exif=EXIF),
    "HEIC": heic(),
}


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def is_read(source):
    try:
        load_image(source, max_pixels=1_000_000)
    except ImageError as error:
        message = str(error)
    else:
        return True
    assert len(message) < 400
    assert "\n" not in message
    return False


def changed(rng, data, places):
    data = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place = rng.choice(places)
        data[place] = rng.choice((0, 255, rng.randrange(256), data[place] ^ 1 << rng.randrange(8)))
    return data


def test_damaged_files_are_read_or_refused():
    rng = random.Random(0)
    read = 0
    for number in range(COUNT):
        original = list(FILES.values())[number % len(FILES)]
        data = changed(rng, original, range(len(original) if number % 2 else min(len(original), 400)))
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        if rng.random() < 0.1:
            place = rng.randrange(len(data) + 1)
            data[place:place] = rng.randbytes(rng.randint(1, 20))
        read += is_read(bytes(data))
    assert 0 < read < COUNT


def metadata_of(kind, data):
    """Where the bytes of a file are that its pixels do not need."""
    places, at = [], {"JPEG": 2, "PNG": 8, "WEBP": 12}.get(kind, 0)
    if kind in ("AVIF", "HEIC"):
        begin = max(data.find(b"II*\0"), data.find(b"MM\0*"))
        return range(begin, begin + 40)
    while at + 8 < len(data):
        if kind == "JPEG":
            marker, size = struct.unpack_from(">HH", data, at)
            needed, begin, end = marker not in (0xFFE1, 0xFFE2, 0xFFFE), at + 4, at + 2 + size
            if marker == 0xFFDA:
                break
        elif kind == "PNG":
            size, name = struct.unpack_from(">I4s", data, at)
            needed, begin, end = name[:1].isupper(), at + 8, at + 12 + size  # the checksum is one of them
        else:
            name, size = struct.unpack_from("<4sI", data, at)
            needed, begin, end = name not in (b"EXIF", b"ICCP"), at + 8, at + 8 + size + size % 2
        places += [] if needed else range(begin, end)
        at = end
    return places


def test_damaged_metadata_never_stops_a_picture():
    rng = random.Random(0)
    kinds = ("JPEG", "PNG", "WEBP", "AVIF", "HEIC")
    places = {kind: metadata_of(kind, FILES[kind]) for kind in kinds}
    pixels = {kind: load_image(FILES[kind]) for kind in kinds}
    turns = {k: {p.tobytes(), *(p.transpose(t).tobytes() for t in Image.Transpose)} for k, p in pixels.items()}
    for number in range(COUNT):
        kind = kinds[number % len(kinds)]
        picture = load_image(bytes(changed(rng, FILES[kind], places[kind])))
        assert picture.tobytes() in turns[kind]


class Odd:
    """An object that has some of what a picture has, and answers with anything."""

    def __init__(self, names, answer):
        self.names, self.answer = names, answer

    def __getattr__(self, name):
        if name not in self.__dict__["names"]:
            raise AttributeError(name)
        return self.respond

    def respond(self, *arguments, **options):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


VALUES = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=40), st.binary(max_size=40), st.complex_numbers(),
    st.sampled_from([ValueError("x" * 1000), KeyError(), RuntimeError("a\nb"), RecursionError(), TypeError()]),
    st.builds(Path, st.text("abc/.\\", max_size=9)),
    st.sampled_from(["data:", "file:", "http://", "data:;base64,", "\0", "P5 1 1 1 ", "iVBORw0KGgo="]).flatmap(
        lambda begin: st.text(max_size=20).map(lambda rest: begin + rest)
    ),
    st.builds(
        lambda dtype, shape: np.zeros(shape, dtype),
        st.sampled_from(["?", "u1", "i1", "u2", ">u2", "i4", "u8", "f2", "f4", "f8", "c8", "O", "U2", "S2", "M8[s]"]),
        st.lists(st.integers(0, 5), max_size=5),
    ),
)  # fmt: skip
NAMES = ("read", "tell", "seek", "__array__", "__fspath__", "size", "mode", "fp")
OBJECTS = st.recursive(
    st.one_of(VALUES, st.builds(Odd, st.frozensets(st.sampled_from(NAMES)), VALUES)),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["bytes", "path", "url", "x", 3]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=COUNT, deadline=None)
@given(OBJECTS)
def test_odd_objects_are_read_or_refused(source):
    is_read(source)


PIECES = [
    "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "[[1, 2, 3, 4]]", "[[999,0", "[", "]", ",", "\n",
    "-5.5", "9" * 400, "1,", "cat", "图", "\ud800", " " * 30,
]  # fmt: skip


@settings(max_examples=COUNT, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=20).map("".join),
    st.integers(0, 10**6), st.integers(0, 10**6), st.booleans(),
)  # fmt: skip
def test_any_answer_gives_boxes_in_order(text, width, height, as_released):
    for box in parse_boxes(text, width, height, as_released=as_released):
        assert box.x1 <= box.x2
        assert box.y1 <= box.y2
        assert "<|ref|>" not in box.label
        assert len(box.raw) == 4


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, "<|ref|>a<|/ref|><|det|>[[-9999999, 5, 9999999, 9]]<|/det|>"]), max_size=12))
def test_any_answer_can_be_drawn(parts):
    boxes = parse_boxes("".join(parts), 64, 48)
    assert draw_boxes(Image.new("RGB", (64, 48)), boxes).size == (64, 48)
    assert len(place_labels([b.label for b in boxes], [(b.x1, b.y1, b.x2, b.y2) for b in boxes], (64, 48))) == len(
        boxes
    )
