"""Reading pictures safely: formats by an allow-list, size checked from the header before anything is decoded.

Beyond the released code, which takes what Pillow gives: the camera's orientation is applied, transparency is laid on
white, deep greys are scaled instead of clipped. `as_released=True` reproduces the released bytes (SPEC 10.3, 24).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vl2_jax.errors import ImageError, one_line
from vl2_jax.installation import install_line
from vl2_jax.processing.metadata import orientation_in, orientation_of, without_metadata
from vl2_jax.processing.pixels import picture_of_array, upright_rgb
from vl2_jax.processing.sources import content_of, format_of

Picture = Any  # whatever `load_image` takes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # and HEIC, with its package
MAX_PIXELS = 100_000_000

_DECODED_AT_ONCE = ("WEBP", "HEIF")  # plugins that list no tiles; once decoded, `fp` is no longer their file

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of a damaged file is not for the terminal


def load_image(
    source: Picture, *, max_pixels: int = MAX_PIXELS, as_released: bool = False, allow_urls: bool = False
) -> Image.Image:
    """An RGB picture, the right way up, of whatever a program has in hand, which is left as it was.

    Args:
      source: a path or a `file:` address; the bytes of a file, as they are, as base64 or in a `data:` address; an
        open file or anything else with `read()`; a Pillow image, of which the selected frame is taken (of a file, the
        first); an array (see `pixels.picture_of_array`), also of jax or torch; Hugging Face's `{"bytes", "path"}`.
      max_pixels: of the frame that is read.
      as_released: as the released code does: no turning, transparency dropped, deep greys clipped.
      allow_urls: fetch `http:` and `https:` addresses (see `fetching.fetch`).

    Raises:
      ImageError: it does not exist, has a format outside of `FORMATS`, holds more than `max_pixels` (which the
        header tells; nothing is decoded), its data is damaged, or nothing tells which of its values is white.
    """
    try:
        name, content = content_of(source, allow_urls)
        read = _Reading(name, max_pixels, as_released)
        if isinstance(content, np.ndarray):
            read.check_size(content.shape[1::-1] if content.ndim > 1 else (content.size, 1))
            return read.finished(picture_of_array(content, name))
        with _silent_pillow:
            if isinstance(content, Image.Image):
                return read.image(content)
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as stream:
                return read.file(stream)
    except ImageError:
        raise
    except Exception as error:  # of a foreign object's own methods
        raise ImageError(f"cannot read an image from a {type(source).__name__} ({one_line(error)}).") from None


@dataclass(frozen=True)
class _Reading:
    """How one picture is read, and its name in messages."""

    name: str
    max_pixels: int
    as_released: bool

    def file(self, stream: IO[bytes], frame: int | None = None, like: Image.Image | None = None) -> Image.Image:
        """As it is; where that fails, without the metadata, which is not needed and often what is broken."""
        try:
            return self.finished(self._opened(stream, frame), like=like)
        except ImageError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them raise
            problem = error
        stream.seek(0)
        data = stream.read()
        with contextlib.suppress(Exception):
            bare, dropped = without_metadata(data, format_of(data))
            if bare != data:
                turn = next(filter(None, map(orientation_in, dropped)), None)
                return self.finished(self._opened(io.BytesIO(bare), frame), turn)
        raise self._unreadable(problem, format_of(data))

    def image(self, image: Image.Image) -> Image.Image:
        """The frame that the caller selected. Of a file that is not decoded yet, another view is opened."""
        self.check_size(image.size)
        stream = getattr(image, "fp", None)
        if stream is not None:
            with contextlib.suppress(Exception), _one_at_a_time, _unmoved(stream):
                if getattr(image, "tile", None) or image.format in _DECODED_AT_ONCE:
                    return self.file(stream, image.tell(), like=image)
                return self.finished(image)
        try:
            return self.finished(image)
        except ImageError:
            raise
        except Exception as error:
            raise self._unreadable(error, "picture") from None

    def finished(self, image: Image.Image, turn: int | None = None, like: Image.Image | None = None) -> Image.Image:
        """Decoded, upright RGB, without metadata: read again, it stays the same."""
        self.check_size(image.size)
        if like is not None and _looks(image) != _looks(like):
            raise ImageError(f"{self.name} is not as its file is.")  # a draft, or turned by the caller
        image.load()
        if self.as_released:
            found = image.convert("RGB")
        else:
            found = upright_rgb(image, turn or orientation_of(image), self.name)
        found.info = {}
        return found

    def check_size(self, size: tuple[int, ...]) -> None:
        width, height = size
        if width * height == 0:
            raise ImageError(f"{self.name} is empty ({width} x {height} pixels).")
        if width * height > self.max_pixels:
            raise ImageError(
                f"{self.name} has {width} x {height} = {width * height:,} pixels, more than the limit of "
                f"{self.max_pixels:,}; scale it down, or raise max_pixels if you trust its source."
            )

    def _opened(self, stream: IO[bytes], frame: int | None) -> Image.Image:
        """The picture of a file, with nothing decoded; without a frame, the one that it begins with.

        HEIC is read by `pillow-heif`'s class itself, so that Pillow's list of formats, which is the program's, stays.
        """
        stream.seek(0)
        is_heif = format_of(stream.read(64)) == "HEIF"
        stream.seek(0)
        if is_heif:
            try:
                plugin: Any = importlib.import_module("pillow_heif")
            except ImportError:
                raise ImageError(f"{self.name} is HEIC; to read it: {install_line('heif')}") from None
            image: Image.Image = plugin.HeifImageFile(stream)
        else:
            image = Image.open(stream, formats=FORMATS)
        if frame is not None:
            image.seek(frame)
        return image

    def _unreadable(self, error: Exception, kind: str) -> ImageError:
        if isinstance(error, Image.DecompressionBombError):
            return ImageError(
                f"{self.name} is too large ({one_line(error)}); scale it down, or raise Image.MAX_IMAGE_PIXELS."
            )
        if not kind:
            return ImageError(f"{self.name} is not one of the accepted formats: {', '.join(FORMATS)}, HEIC.")
        if isinstance(error, UnidentifiedImageError):
            return ImageError(f"{self.name} is a damaged {kind} file, or one of a rare kind; save it again, as PNG.")
        return ImageError(f"{self.name} cannot be decoded ({one_line(error)}); the file is damaged or incomplete.")


def _looks(image: Image.Image) -> tuple[Any, ...]:
    return image.size, image.mode, image.info.get("exif")


@contextlib.contextmanager
def _unmoved(stream: IO[bytes]) -> Iterator[None]:
    position = stream.tell()
    try:
        yield
    finally:
        stream.seek(position)


class _SilentPillow:
    """Pillow's warnings are kept back while any thread is inside; `catch_warnings` alone is not made for threads."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._filters.__exit__(None, None, None)


_silent_pillow = _SilentPillow()
_one_at_a_time = threading.Lock()  # pictures that callers have opened: threads may share one, and so its file
