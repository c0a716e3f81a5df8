"""Pictures are read from whatever a program has in hand, rightly or with a sentence, and left as they were."""

import io
import struct
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image, PngImagePlugin

from tests.processing.picture_files import exif, png_bomb, png_chunk, saved, several, tiff, turned
from vl2_jax.errors import ImageError
from vl2_jax.processing.images import load_image

WHITE = (255, 255, 255)


def ramp(dtype, last):
    """`[16, 64]` from 0 to `last` in equal steps."""
    return (np.arange(1024, dtype=np.float64).reshape(16, 64) * last / 1023).round(0 if last > 1 else 9).astype(dtype)


def is_ramp(picture):
    expected = np.arange(1024).reshape(16, 64) * 255 / 1023
    return np.abs(np.asarray(picture) - expected[..., None]).max() <= 1


def half_red(mode="RGB"):
    """The upper half is red: its sides tell how it was turned."""
    image = Image.new("RGB", (40, 20), "white")
    image.paste("red", (0, 0, 40, 10))
    return image.convert(mode)


def is_turned(picture):
    """By a quarter, clockwise: what was above is on the right."""
    right, left = picture.getpixel((15, 20)), picture.getpixel((4, 20))
    return picture.size == (20, 40) and right[0] > 200 > right[1] and min(left) > 200


# Sizes


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(ImageError, match="more than the limit"):
        load_image(png_bomb(13_000, 13_000))
    with pytest.raises(ImageError, match=r"too large|more than the limit"):
        load_image(png_bomb(60_000, 60_000))


def test_the_size_is_that_of_the_frame_that_is_read():
    pages = saved(Image.new("L", (40, 40)), format="TIFF", save_all=True, append_images=[Image.new("L", (10, 10))])
    image = Image.open(io.BytesIO(pages))
    image.seek(1)
    assert load_image(image, max_pixels=400).size == (10, 10)
    with pytest.raises(ImageError, match="40 x 40"):
        load_image(pages, max_pixels=400)


def test_a_large_array_is_refused_before_it_is_converted():
    with pytest.raises(ImageError, match="more than the limit"):
        load_image(np.broadcast_to(np.uint8(0), (100_000, 100_000)))


# Frames


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG", "MPO", "AVIF"])
@pytest.mark.parametrize("as_released", [False, True])
def test_a_frame_the_caller_selected_is_read_and_the_first_of_a_file(kind, as_released):
    data = several(kind)
    image = Image.open(io.BytesIO(data))
    image.seek(2)
    for source, colour in ((image, (0, 0, 255)), (data, (255, 0, 0))):
        found = load_image(source, as_released=as_released).getpixel((8, 4))
        assert max(abs(a - b) for a, b in zip(found, colour)) < 8


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG", "MPO"])
def test_a_callers_picture_stays_as_it_was(kind):
    stream = io.BytesIO(several(kind))
    image = Image.open(stream)
    image.seek(1)
    before = image.tell(), dict(image.info), image.mode, image.size, stream.tell()
    load_image(image)
    assert (image.tell(), dict(image.info), image.mode, image.size, stream.tell()) == before


def test_threads_that_share_an_opened_picture_all_read_it():
    image = Image.open(io.BytesIO(several("TIFF")))
    image.seek(2)
    with ThreadPoolExecutor(8) as pool:
        assert {load.getpixel((8, 4)) for load in pool.map(lambda _: load_image(image), range(100))} == {(0, 0, 255)}


def test_what_a_caller_drew_on_a_frame_is_read():
    image = Image.open(io.BytesIO(several("GIF")))
    image.seek(1)
    image.paste((9, 8, 7), (0, 0, 16, 8))
    assert load_image(image).getpixel((3, 3)) == (9, 8, 7)


def test_a_draft_is_read_as_the_caller_made_it():
    image = Image.open(io.BytesIO(saved(Image.new("RGB", (64, 64)), format="JPEG")))
    image.draft("RGB", (16, 16))
    assert load_image(image).size == image.size == (16, 16)


def test_a_loaded_picture_is_loaded_again_without_change():
    data = saved(half_red(), format="JPEG", exif=exif(turned()))
    for as_released in (False, True):
        once = load_image(data, as_released=as_released)
        assert load_image(once).tobytes() == once.tobytes()


# Greys deeper than eight bits

U16 = ramp(np.uint16, 65535)
DEEP = {
    "PGM of 65535": b"P5 64 16 65535\n" + U16.astype(">u2").tobytes(),
    "PGM of 4095": b"P5 64 16 4095\n" + ramp(">u2", 4095).tobytes(),
    "PGM of 4095 in text": b"P2 64 16 4095\n" + b" ".join(b"%d" % value for value in ramp(int, 4095).ravel()),
    "PNG": saved(Image.fromarray(U16), format="PNG"),
    "JPEG 2000": saved(Image.fromarray(U16), format="JPEG2000"),
    "TIFF": tiff(U16),
    "TIFF of the other byte order": tiff(U16, order=">"),
    "TIFF of 12 bits": tiff(ramp(np.uint16, 4095), bits=12),
    "TIFF where white is zero": tiff(65535 - U16, photometric=0),
    "TIFF of floats": tiff(ramp(np.float32, 1), sample_format=3),
    "TIFF of floats where white is zero": tiff(1 - ramp(np.float32, 1), sample_format=3, photometric=0),
    "PFM": b"Pf\n64 16\n-1.0\n" + ramp("<f4", 1)[::-1].tobytes(),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_greys_are_scaled_as_their_format_says(kind):
    assert is_ramp(load_image(DEEP[kind]))
    assert is_ramp(load_image(Image.open(io.BytesIO(DEEP[kind]))))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (tiff(ramp(np.float32, 65535), sample_format=3), "float32 from 0 to 6.55"),
        (tiff(np.full((2, 2), np.nan, np.float32), sample_format=3), "from nan"),
        (tiff(ramp(np.uint32, 2**32 - 1)), "32 bits, unsigned"),
        (tiff(ramp(np.int32, 2**31 - 1), sample_format=2), "32 bits, signed"),
        (tiff(ramp(np.int16, 2**15 - 1), sample_format=2), "16 bits, signed"),
        (tiff(ramp(np.int8, 127), sample_format=2), "signed pixels"),
        (b"Pf\n2 2\n-2.0\n" + bytes(16), "PFM scale of 2"),
        (Image.fromarray(ramp(np.int32, 65535)), "int32 from 0 to 65535"),
        (Image.fromarray(ramp(np.float32, 255)), "float32 from 0 to 255"),
    ],
)
def test_greys_whose_white_nothing_tells_are_refused_by_name(source, message):
    with pytest.raises(ImageError, match=f"{message}.*which value is white"):
        load_image(source)


def test_sixteen_bits_are_clipped_as_released():
    assert load_image(DEEP["PNG"], as_released=True).getpixel((20, 0)) == WHITE


# Colours and transparency


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "La", "RGBa"])
def test_transparency_is_laid_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    for step in {"La": ("LA", "La"), "PA": ("P", "PA")}.get(mode, (mode,)):
        image = image.convert(step)
    if mode in ("P", "PA"):
        image = Image.open(io.BytesIO(saved(Image.new("P", (4, 4)), format="PNG", transparency=0)))
    assert load_image(image).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(("mode", "level"), [("1", 0), ("L", 7), ("RGB", (7, 8, 9)), ("I;16", 700)])
def test_one_transparent_level_is_laid_on_white(mode, level):
    image = Image.new(mode, (4, 4), level)
    image.putpixel((1, 1), 1 if mode == "1" else 0)
    picture = load_image(saved(image, format="PNG", transparency=level))
    assert picture.getpixel((0, 0)) == WHITE
    assert picture.getpixel((1, 1)) == (WHITE if mode == "1" else (0, 0, 0))


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_colour_mode_keeps_its_colour(mode):
    colour = (200, 40, 90)
    image = Image.new("RGB", (4, 4), colour)
    if mode == "LAB":
        image = Image.new("LAB", (4, 4), (255, 128, 128))
        colour = WHITE
    elif mode == "L":
        image, colour = Image.new("L", (4, 4), 90), (90, 90, 90)
    found = load_image(image.convert(mode, palette=Image.Palette.ADAPTIVE)).getpixel((2, 2))
    assert max(abs(a - b) for a, b in zip(found, colour)) <= 4


HAND_MADE = [
    (kind, mode, size)
    for kind, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "GIF": ("1", "L", "P", "RGB"),
        "BMP": ("1", "L", "P", "RGB"),
        "WEBP": ("L", "RGB", "RGBA"),
        "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"),
        "PPM": ("1", "L", "RGB"),
        "AVIF": ("L", "RGB", "RGBA"),
        "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    }.items()
    for mode in modes
    for size in ((1, 1), (3, 500))
]


@pytest.mark.parametrize(("kind", "mode", "size"), HAND_MADE)
def test_every_format_and_mode_becomes_rgb_of_its_size(kind, mode, size):
    picture = load_image(saved(Image.new(mode, size), format=kind))
    assert (picture.mode, picture.size) == ("RGB", size)


# Formats of phones and browsers


def heic(image, **options):
    stream = io.BytesIO()
    pillow_heif.from_pillow(image).save(stream, quality=95, **options)
    return stream.getvalue()


def test_a_phones_heic_is_read():
    picture = load_image(heic(half_red()))
    assert picture.size == (40, 20)
    assert picture.getpixel((20, 4))[0] > 200 > picture.getpixel((20, 4))[1]


def test_heic_without_its_package_gets_the_line_that_adds_it(monkeypatch):
    data = heic(half_red())
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC; to read it: pip install .*heif"):
        load_image(data)


def test_reading_heic_leaves_pillows_list_of_formats_as_it_is():
    before = set(Image.OPEN)
    load_image(heic(half_red()))
    assert set(Image.OPEN) == before


# Metadata that is not needed

OTHER = 0x010E, 2  # an ImageDescription, text
BROKEN = {
    "text for a resolution": exif(turned(), (0x011A, 2, 4, b"abc")),
    "text for a position": exif(turned(), (0x0213, 2, 1, b"a")),
    "an offset beyond the end": exif((*OTHER, 900, struct.pack("<I", 10**6)), turned()),
    "an offset of all bits": exif((*OTHER, 2**32 - 1, b"\xff" * 4), turned()),
    "an unknown type": exif((0x010F, 99, 1, b""), turned()),
    "a resolution over zero": exif(turned(), (0x011A, 5, 1, struct.pack("<I", 0))),
    "a part that is not there": exif(turned(), (0x8769, 4, 1, struct.pack("<I", 10**6)), (0x8825, 2, 4, b"abc")),
    "more entries than there are": exif(turned(), count=60_000),
    "entries out of order": exif((0x0213, 3, 1, b"\1"), turned()),
    "the other byte order": exif(turned(">"), (0x011A, 2, 4, b"abc"), order=">"),
    "cut after the orientation": exif(turned(), (0x011A, 2, 4, b"abc"))[: 6 + 8 + 2 + 12 + 5],
    "twice its name": b"Exif\0\0" + exif(turned()),
    "another block before it": b"Exif\0\0MM\0*\0\0",
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("problem", BROKEN)
def test_broken_exif_does_not_stop_a_picture_and_its_orientation_is_kept(kind, problem):
    picture = load_image(saved(half_red(), format=kind, exif=BROKEN[problem]))
    if problem == "another block before it":
        assert picture.size == (40, 20)
    else:
        assert is_turned(picture)


def test_broken_exif_as_released_leaves_the_picture_as_it_lies():
    data = saved(half_red(), format="JPEG", exif=BROKEN["text for a resolution"])
    assert load_image(data, as_released=True).size == (40, 20)


@pytest.mark.parametrize(
    ("kind", "number", "value", "turns"),
    [
        (3, 1, struct.pack("<H", 6), True),
        (4, 1, struct.pack("<I", 6), True),
        (1, 1, b"\6", True),
        (7, 1, b"\6", True),
        (2, 2, b"6\0", True),
        (11, 1, struct.pack("<f", 6.0), True),
        (3, 2, struct.pack("<HH", 6, 6), True),
        (11, 1, struct.pack("<f", 6.5), False),
        (11, 1, struct.pack("<f", float("nan")), False),
        (2, 4, b"top\0", False),
        (3, 1, struct.pack("<H", 0), False),
        (3, 1, struct.pack("<H", 9), False),
        (9, 1, struct.pack("<i", -6), False),
        (5, 1, struct.pack("<I", 10**6), False),
        (3, 100, struct.pack("<I", 10**6), False),
        (99, 1, b"\6", False),
    ],
)
def test_an_orientation_of_any_type_is_taken_where_it_makes_sense(kind, number, value, turns):
    picture = load_image(saved(half_red(), format="JPEG", exif=exif((0x0112, kind, number, value))))
    assert is_turned(picture) if turns else picture.size == (40, 20)


def test_an_orientation_may_stand_in_xmp():
    packet = b"<x:xmpmeta><rdf:Description tiff:Orientation='6'/></x:xmpmeta>"
    assert is_turned(load_image(saved(half_red(), format="JPEG", xmp=packet)))


@pytest.mark.parametrize("name", ["exif", "APP1"])
def test_an_orientation_may_stand_in_the_text_of_a_png(name):
    info, block = PngImagePlugin.PngInfo(), exif(turned())
    info.add_text(f"Raw profile type {name}", f"\n{name}\n{len(block):8}\n{block.hex()}\n", zip=True)
    assert is_turned(load_image(saved(half_red(), format="PNG", pnginfo=info)))


def test_an_orientation_a_program_has_set_is_taken():
    image = half_red()
    image.getexif()[0x0112] = 6
    assert is_turned(load_image(image))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "AVIF"])
def test_all_eight_orientations_are_those_of_pillow(kind, orientation):
    image = half_red()
    image.paste("blue", (0, 0, 20, 10))
    block = Image.Exif()
    block[0x0112] = orientation
    options = {} if kind == "TIFF" else {"quality": 100, "subsampling": "4:4:4"}
    picture = load_image(saved(image, format=kind, exif=block, **options))
    upright = load_image(image)
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    if orientation > 1:
        upright = upright.transpose(turn[orientation])
    assert picture.size == upright.size
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(upright)).mean() < 8


def with_segments(*segments):
    """A JPEG file with (marker, content) before all others."""
    data = saved(half_red(), format="JPEG", exif=exif(turned()))
    added = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(s)) + s for marker, s in segments)
    return data[:2] + added + data[2:]


@pytest.mark.parametrize(
    "segment",
    [
        (0xE0, b"JFIF\0"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe not XMP"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\1\2 half of it"),
        (0xE2, b"MPF\0II*\0\xff\xff"),
        (0xE2, b"MPF\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI4s", 0xB001, 2, 4, b"abc") + b"\0" * 4),
        (0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff"),
        (0xEE, b"Adobe"),
        (0xFE, b"\xff\xd8\xff a comment"),
    ],
)
def test_broken_segments_of_a_jpeg_are_left_out(segment):
    assert is_turned(load_image(with_segments(segment)))


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"iCCP", b"name\0\7garbage"),
        png_chunk(b"iCCP", b"name"),
        png_chunk(b"tEXt", b"transparency\0none"),
        png_chunk(b"zTXt", b"a\0\7b"),
        png_chunk(b"iTXt", b"a\0\1\0\0\0" + b"not zlib"),
        png_chunk(b"pHYs", b"\1"),
        png_chunk(b"gAMA", b""),
        png_chunk(b"tEXt", b"a\0b")[:-4] + b"oops",  # a wrong checksum
    ],
)
@pytest.mark.parametrize("comes", ["before the pixels", "after them"])
def test_broken_chunks_of_a_png_are_left_out(chunk, comes):
    data = saved(half_red(), format="PNG", exif=exif(turned()))
    at = 33 if comes == "before the pixels" else data.index(b"IEND") - 4
    data = data[:at] + chunk + data[at:]
    assert is_turned(load_image(data))
    if comes == "after them":  # Pillow opens it
        assert is_turned(load_image(Image.open(io.BytesIO(data))))


def test_text_of_a_bomb_is_left_out():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "b" * 3_000_000, zip=True)
    assert load_image(saved(half_red(), format="PNG", pnginfo=info)).size == (40, 20)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    "entry",
    [
        (270, 2, 500, 10**8),  # a description beyond the end
        (282, 2, 2, 0),  # a resolution in text
        (306, 99, 1, 0),
        (34665, 4, 1, 10**8),  # EXIF beyond the end
        (34853, 2, 4, 0),
        (700, 7, 10**6, 8),
        (33723, 13, 3, 1),
        (34377, 7, 2**32 - 1, 2**32 - 1),
        (34675, 7, 100, 10**8),
    ],
)
def test_broken_entries_of_a_tiff_are_left_out(entry, order):
    data = tiff(ramp(np.uint8, 255), order=order, extra=[(274, 3, 1, 6), (296, 3, 1, 3), entry])
    assert load_image(data).size == (16, 64)


def test_a_webp_whose_last_block_was_cut_off_is_read():
    data = saved(half_red(), format="WEBP", lossless=True, exif=exif(turned()) + bytes(200))
    assert load_image(data[:-100]).size == (20, 40)


def test_broken_exif_of_avif_is_left_out():
    data = saved(half_red(), format="AVIF", exif=exif(turned(), (0x010F, 2, 4, b"abc")))
    at = data.index(b"II*\0")
    assert load_image(data[:at] + b"????" + data[at + 4 :]).size == (20, 40)  # its own box says how it is turned


def test_pillows_warnings_do_not_leak():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(saved(half_red(), format="JPEG", exif=BROKEN["an offset beyond the end"]))
        load_image(with_segments((0xE2, b"MPF\0II*\0\xff\xff")))
        load_image(tiff(ramp(np.uint8, 255), extra=[(270, 2, 500, 10**8)]))
        with pytest.raises(ImageError, match="decoded"):
            load_image(png_bomb(10_000, 9_900), max_pixels=10**8)


def test_reading_in_threads_leaves_the_programs_own_warnings_as_they_are():
    data = saved(half_red(), format="JPEG", exif=BROKEN["an offset beyond the end"])
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: is_turned(load_image(data)), range(200)))
    assert warnings.filters == before


# Files that are no pictures


def test_what_is_not_an_accepted_picture_is_named(tmp_path):
    for source, message in (
        (tmp_path / "none.png", "does not exist"),
        (tmp_path, "is not a file"),
        (b"", "accepted formats"),
        (b"hello", "accepted formats"),
        (b"%PDF-1.4", "accepted formats"),
        (b"P7\nWIDTH 1\n", "PPM file, or one of a rare kind"),
        (3.5, "cannot read an image from a float"),
        (None, "cannot read an image from a NoneType"),
        ([half_red()], "cannot read an image from a list"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(source)


def test_no_message_repeats_a_long_value():
    for source in (
        "x" * 10**6,
        "QUJD" * 10**5,
        b"x" * 10**6,
        Path("y" * 10**5),
        "data:image/png;base64," + "!" * 10**6,
    ):
        with pytest.raises(ImageError) as caught:
            load_image(source)
        assert len(str(caught.value)) < 300
