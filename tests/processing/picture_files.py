"""Files of pictures that Pillow does not write: greys of any kind, metadata that is wrong, bombs."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def saved(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(width, height):
    """A tiny PNG file that decodes to `width` x `height` pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    row = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", row) + png_chunk(b"IEND", b"")


def exif(*entries, order="<", count=None):
    """An EXIF block of (tag, type, number of values, four bytes) each; `count` is what it says it holds."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    rows = [struct.pack(f"{order}HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries]
    number = struct.pack(f"{order}H", len(rows) if count is None else count)
    return b"Exif\0\0" + head + number + b"".join(rows) + b"\0\0\0\0"


def turned(order="<"):
    """The entry that asks for a quarter turn."""
    return (ORIENTATION, 3, 1, struct.pack(f"{order}H", 6))


def tiff(values, *, bits=None, photometric=1, sample_format=1, order="<", extra=()):
    """An uncompressed grey TIFF of an array; `extra` entries are (tag, type, number of values, value)."""
    height, width = values.shape
    data = values if isinstance(values, bytes) else values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = bits or values.dtype.itemsize * 8
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        data = b"".join(int(a << 12 | b).to_bytes(3) for a, b in pairs)
    entries = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, 0), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, len(data)), (339, 3, 1, sample_format), *extra,
    ]  # fmt: skip
    begin = 8 + 2 + 12 * len(entries) + 4
    rows = b""
    for tag, kind, number, value in sorted(entries):
        value = begin if tag == 273 else value
        packed = struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        rows += struct.pack(f"{order}HHI", tag, kind, number) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + rows + b"\0\0\0\0" + data


def several(kind):
    """A file of a red, a green and a blue picture."""
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind in ("AVIF", "MPO") else {}
    return saved(frames[0], format=kind, save_all=True, append_images=frames[1:], **options)
