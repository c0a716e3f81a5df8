"""Reading pictures safely: formats by an allow-list, size checked from the header before anything is decoded.

Beyond the released code, which takes what Pillow gives: the camera's orientation is applied, transparency is laid on
white, 16-bit greys are scaled instead of clipped. `as_released=True` reproduces the released bytes (SPEC 10.3, 24).
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vl2_jax.errors import ImageError

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 100_000_000


def load_image(source: Picture, *, max_pixels: int = MAX_PIXELS, as_released: bool = False) -> Image.Image:
    """An RGB picture from a path, the bytes of a file, a Pillow image or an array `[height, width, 3]` of uint8.

    Raises:
      ImageError: it does not exist, has a format outside of `FORMATS`, holds more than `max_pixels` (which the
        header tells; nothing is decoded), or its data is damaged.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(
                f"an image array must be uint8 [height, width, 3], got {source.dtype} {list(source.shape)}."
            )
        source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        name, image = "the image", source
    else:
        name, image = _open(source)
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} is empty ({width} x {height} pixels).")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width} x {height} = {width * height:,} pixels, more than the limit of {max_pixels:,}; "
            f"scale it down, or raise max_pixels if you trust its source."
        )
    try:
        return image.convert("RGB") if as_released else _upright_rgb(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, MemoryError) as error:
        raise ImageError(f"{name} cannot be decoded ({error}); the file is damaged or incomplete.") from None


def _open(source: str | os.PathLike | bytes) -> tuple[str, Image.Image]:
    stream: Path | io.BytesIO
    if isinstance(source, bytes):
        name, stream = f"the image of {len(source)} bytes", io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        stream = Path(source)
        name = f"image {str(source)!r}"
        if not stream.is_file():
            raise ImageError(f"{name} does not exist or is not a file.")
    else:
        raise ImageError(
            f"cannot read an image from a {type(source).__name__}; give a path, bytes, a Pillow image or an array."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return name, Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:
            raise ImageError(f"{name} is not one of the accepted formats: {', '.join(FORMATS)}.") from None
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name} is too large ({error}); scale it down.") from None
        except (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError) as error:
            raise ImageError(f"{name} cannot be read ({error}).") from None


def _upright_rgb(image: Image.Image) -> Image.Image:
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
