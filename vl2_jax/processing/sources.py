"""What programs have in hand for a picture, to the bytes of a file, its path, a Pillow image or an array."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from vl2_jax.errors import ImageError, shown
from vl2_jax.processing.fetching import fetch

Content = bytes | Path | Image.Image | np.ndarray

_SIGNATURES = {  # how files begin
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "BMP": rb"BM.{12}[\x0c-\x7c]\0\0\0",
    "PPM": rb"P[1-7fF]\s",
    "AVIF": rb"....ftyp(?:avi[fs]|(?:mi[af][1f]|msf1).{4}(?:.{4}){0,8}?avi[fs])",
    "HEIF": rb"....ftyp(?:hei[cxms]|hev[cxms]|mi[af][1f]|msf1)",
    "JPEG2000": rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n",
}
_SIGNATURE = re.compile(b"|".join(b"(?P<%s>%s)" % (k.encode(), v) for k, v in _SIGNATURES.items()), re.DOTALL)
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{16,}")
_SCHEME = re.compile(r"(data|file|[a-z][a-z0-9+.-]+(?=://)):", re.IGNORECASE)


def format_of(data: bytes) -> str:
    """The format that the first bytes of a file tell, "" where they tell none."""
    found = _SIGNATURE.match(data[:64])
    return str(found.lastgroup) if found else ""


def content_of(source: Any, allow_urls: bool = False) -> tuple[str, Content]:
    """A picture's name in messages, and where it is. What is open is read from its beginning and left where it was.

    Raises:
      ImageError: it is nothing that can hold a picture, does not exist, or is an address that is not fetched.
    """
    if isinstance(source, Image.Image):
        return "the image", source
    if isinstance(source, str):
        return _of_text(source, allow_urls)
    if isinstance(source, bytes | bytearray | memoryview):
        return _of_bytes(bytes(source))
    if isinstance(source, os.PathLike):
        return _of_path(os.fsdecode(source))
    if isinstance(source, Mapping):
        return _of_mapping(source, allow_urls)
    if hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        array = np.asarray(source)
        return f"the array of {array.dtype} {list(array.shape)}", array
    if hasattr(source, "read"):
        return _of_stream(source)
    raise ImageError(
        f"cannot read an image from a {type(source).__name__}; give a path, the bytes of a file, an open file, a "
        "Pillow image or an array."
    )


def in_folder(source: Any, folder: Path) -> Any:
    """The source, of which a relative path begins at `folder`."""
    if not isinstance(source, str) or _SCHEME.match(source.strip()):
        return source
    path = str(folder / source)
    try:
        _of_path(path)
    except ImageError:
        if _picture_in_base64(source.encode("ascii", "replace")):
            return source
    return path


def _of_text(text: str, allow_urls: bool) -> tuple[str, Content]:
    """A path, an address or base64, in the order in which they can be told apart."""
    address = text.strip()
    found = _SCHEME.match(address)
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        return _of_data_address(address)
    if scheme == "file":
        return _of_path(url2pathname(re.sub(r"(?i)^file:(//(localhost(?=/))?)?", "", address)))
    if scheme in ("http", "https"):
        if not allow_urls:
            raise ImageError(
                f"{shown(address)} is not fetched: download it and give its path, or allow it (allow_urls=True, "
                "--allow-urls)."
            )
        return f"image {shown(address)}", fetch(address)
    try:
        return _of_path(text)
    except ImageError:
        if scheme:
            raise ImageError(f"{shown(address)}: {scheme}: is not read; download it and give its path.") from None
        if data := _picture_in_base64(text.encode("ascii", "replace")):
            return _of_bytes(data)
        raise


def _of_path(text: str) -> tuple[str, Content]:
    path, name = Path(text), f"image {shown(text)}"
    try:
        if path.is_file():
            return name, path
        if path.is_fifo():
            return name, path.read_bytes()
    except OSError:  # too long for a name
        pass
    raise ImageError(f"{name} does not exist or is not a file.")


def _of_bytes(data: bytes) -> tuple[str, Content]:
    """The bytes of a file, or of its base64."""
    if data[:5].lower() == b"data:":
        return _of_data_address(data.decode("latin-1"))
    if not format_of(data):
        data = _picture_in_base64(data) or data
    return f"the image of {len(data):,} bytes", data


def _of_data_address(address: str) -> tuple[str, Content]:
    header, comma, text = address.partition(",")
    data = unquote_to_bytes(text)
    if header.lower().rstrip().endswith(";base64"):
        data = _from_base64(data)
    if not comma or not data:
        raise ImageError(f"{shown(address)} holds no picture: expected data:image/png;base64,... with valid base64.")
    return f"the image of {len(data):,} bytes", data


def _picture_in_base64(text: bytes) -> bytes:
    data = _from_base64(text)
    return data if format_of(data) else b""


def _from_base64(text: bytes) -> bytes:
    """The bytes of base64 of either alphabet, broken into lines or not, padded or not; empty if it is none."""
    text = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    if not _BASE64.fullmatch(text) or len(text) % 4 == 1:
        return b""
    return base64.b64decode(text + b"=" * (-len(text) % 4))


def _of_mapping(source: Mapping[str, Any], allow_urls: bool) -> tuple[str, Content]:
    """Of Hugging Face data sets: `bytes` are the file's, or base64 where they went through JSON."""
    data = source.get("bytes")
    if isinstance(data, str):
        return _of_bytes(data.encode("ascii", "replace"))
    for found in (data, source.get("path"), source.get("url")):
        if found is not None and not isinstance(found, Mapping):
            return content_of(found, allow_urls)
    keys = ", ".join(map(shown, list(source)[:4]))
    raise ImageError(f"a picture given as a dictionary needs its 'bytes' or its 'path', got {keys or 'an empty one'}.")


def _of_stream(stream: Any) -> tuple[str, Content]:
    try:
        position = stream.tell()
        stream.seek(0)
    except Exception:  # a pipe, or whatever has no position
        position = None
    try:
        data = stream.read()
    finally:
        if position is not None:
            stream.seek(position)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ImageError(
            f"read() of a {type(stream).__name__} gives {type(data).__name__}, expected bytes; open the file as 'rb'."
        )
    return _of_bytes(bytes(data))
