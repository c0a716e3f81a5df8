"""What files say beside their pixels: which way is up, and the same file without all the rest.

Cameras, editors and messengers write metadata that is often wrong, and Pillow reads it while it opens a file. So the
orientation is looked up here, entry by entry, in whatever is left of it; and where a file cannot be read, it is read
again with nothing in it but what its pixels need.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import struct
from collections.abc import Iterator
from typing import Any

from PIL import Image

_ORIENTATION = 0x0112
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I"}
_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\b")

_TIFF_TAGS = (
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338,
    339, 347, 530, 531, 532,
)  # fmt: skip
_PNG_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")  # beside those that the format itself calls critical
_WEBP_CHUNKS = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
_ITEM_OF_EXIF = re.compile(rb"(infe\x02.{7}|infe\x03.{9})Exif", re.DOTALL)


def orientation_of(image: Image.Image) -> int:
    """1 to 8 as EXIF counts them, 1 where nothing tells it. Of a TIFF, Pillow applies it while decoding."""
    blocks: list[bytes] = []
    with contextlib.suppress(Exception):  # whatever a caller holds in `info`
        blocks += [block for key in ("exif", "xmp") if isinstance(block := image.info.get(key), bytes)]
        blocks += [str(image.info.get("XML:com.adobe.xmp", "")).encode("utf-8", "replace")]
        profiles = [image.info.get(f"Raw profile type {name}", "") for name in ("exif", "APP1")]  # of ImageMagick
        blocks += [bytes.fromhex("".join(profile.split("\n")[3:])) for profile in profiles]
    with contextlib.suppress(Exception):  # Pillow on EXIF that is broken
        found: Any = image.getexif().get(_ORIENTATION)
        if found in range(1, 9):
            return int(found)
    return next(filter(None, map(orientation_in, blocks)), 1)


def orientation_in(block: bytes) -> int | None:
    """1 to 8 of an EXIF block or an XMP packet; None where it tells none that makes sense."""
    header = re.match(rb"(?:Exif\0.){0,2}(?=II\*\0|MM\0\*)", block, re.DOTALL)
    if header is None:
        packet = _XMP.search(block)
        return int(packet[1]) if packet else None
    exif = block[header.end() :]
    order = "<" if exif[:1] == b"I" else ">"
    with contextlib.suppress(struct.error):  # where it was cut off
        start, entries = _directory(exif, order)
        for at in range(start, start + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", exif, at)
            if tag == _ORIENTATION:
                return _orientation_value(exif, order, kind, count, at + 8)
    return None


def _directory(exif: bytes, order: str) -> tuple[int, int]:
    """Where its first directory's entries begin, and how many there are."""
    (at,) = struct.unpack_from(f"{order}I", exif, 4)
    (entries,) = struct.unpack_from(f"{order}H", exif, at)
    return at + 2, entries


def _orientation_value(exif: bytes, order: str, kind: int, count: int, at: int) -> int | None:
    """As a short, as it should be, or as any other number or digit."""
    value: Any
    if kind in (5, 10):
        (at,) = struct.unpack_from(f"{order}I", exif, at)
        above, below = struct.unpack_from(f"{order}{'II' if kind == 5 else 'ii'}", exif, at)
        value = above / below if below else 0
    elif kind in _TYPES:
        if struct.calcsize(f"={_TYPES[kind]}") * count > 4:
            (at,) = struct.unpack_from(f"{order}I", exif, at)
        (value,) = struct.unpack_from(f"{order}{_TYPES[kind]}", exif, at)
        value = int(value) if isinstance(value, bytes) and value.isdigit() else value
    else:
        return None
    return int(value) if value in range(1, 9) else None


def without_metadata(data: bytes, kind: str) -> tuple[bytes, list[bytes]]:
    """A file's data with nothing but what its pixels need, and what was taken out of it.

    Of formats that hold none, and of what has not the structure of its format, the data as it is.
    """
    if kind == "JPEG":
        return _bare_jpeg(data)
    if kind == "PNG":
        return _bare_png(data)
    if kind == "WEBP":
        return _bare_webp(data)
    if kind == "TIFF":
        return _bare_tiff(data), []
    if kind in ("AVIF", "HEIF"):  # offsets stay: the item is only called something else
        return _ITEM_OF_EXIF.sub(rb"\1free", data), []
    if kind == "JPEG2000":
        header, begin, pixels = data.partition(b"jp2c")
        return header.replace(b"res ", b"free") + begin + pixels, []
    return data, []


def _bare_jpeg(data: bytes) -> tuple[bytes, list[bytes]]:
    kept, dropped, at = [data[:2]], [], 2
    while data[at : at + 1] == b"\xff" and len(data) > at + 4:
        marker = data[at + 1]
        size = 0 if marker == 0xFF or 0xD0 <= marker <= 0xD9 else int.from_bytes(data[at + 2 : at + 4])
        segment = data[at : at + (2 + size if marker != 0xFF else 1)]
        if marker == 0xDA:  # the pixels
            break
        content = segment[4:]
        of_colours = (content.startswith(b"JFIF\0") and size >= 16) or (content.startswith(b"Adobe") and size >= 14)
        if (0xE0 <= marker <= 0xEF and not of_colours) or marker == 0xFE:
            dropped.append(content)
        else:
            kept.append(segment)
        at += len(segment)
    return b"".join([*kept, data[at:]]), dropped


def _bare_png(data: bytes) -> tuple[bytes, list[bytes]]:
    kept, dropped, at = [data[:8]], [], 8
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name[:1].isupper() or name in _PNG_CHUNKS:
            kept.append(data[at : at + 12 + size])
        else:
            dropped.append(data[at + 8 : at + 8 + size])
        at += 12 + size
    return b"".join(kept), dropped


def _bare_webp(data: bytes) -> tuple[bytes, list[bytes]]:
    kept, dropped, at = [], [], 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        chunk = data[at : at + 8 + size + size % 2]
        if name == b"VP8X":
            kept.append(chunk[:8] + bytes([chunk[8] & 0x12]) + chunk[9:])  # says that there is alpha and animation
        elif name in _WEBP_CHUNKS:
            kept.append(chunk)
        else:
            dropped.append(chunk[8:])
        at += len(chunk)
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body, dropped


def _bare_tiff(data: bytes) -> bytes:
    """Entries that pixels do not need are taken out of every directory, and the others moved up: offsets stay."""
    order, big = ("<" if data[:2] == b"II" else ">"), data[2:4] in (b"+\0", b"\0+")
    count_format, offset_format, entry_size = ("Q", "Q", 20) if big else ("H", "I", 12)
    bare = bytearray(data)
    with contextlib.suppress(struct.error):
        for start, entries, end in itertools.islice(_tiff_directories(data, order, big), 10_000):
            rows = [data[start + entry_size * n : start + entry_size * (n + 1)] for n in range(entries)]
            needed = [row for row in rows if struct.unpack(f"{order}H", row[:2])[0] in _TIFF_TAGS]
            following = data[end : end + struct.calcsize(f"={offset_format}")]
            content = struct.pack(f"{order}{count_format}", len(needed)) + b"".join(needed) + following
            begin = start - struct.calcsize(f"={count_format}")
            bare[begin : begin + len(content)] = content
    return bytes(bare)


def _tiff_directories(data: bytes, order: str, big: bool) -> Iterator[tuple[int, int, int]]:
    """(first entry, number of entries, the end of the last one) of one directory after another."""
    count_format, offset_format, entry_size = ("Q", "Q", 20) if big else ("H", "I", 12)
    (at,) = struct.unpack_from(f"{order}{offset_format}", data, 8 if big else 4)
    seen: set[int] = set()
    while at and at not in seen:
        seen.add(at)
        (entries,) = struct.unpack_from(f"{order}{count_format}", data, at)
        start = at + struct.calcsize(f"={count_format}")
        end = start + entry_size * entries
        if end > len(data):
            return
        yield start, entries, end
        (at,) = struct.unpack_from(f"{order}{offset_format}", data, end)
