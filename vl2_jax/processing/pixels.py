"""Pixels of any kind to eight bits of red, green and blue: deep greys, transparency, arrays.

Which value is white is taken from what tells it: the format of the file, the type of the array. Where nothing tells
it the picture is refused, for whatever would be guessed, some pictures would come out white or black.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from vl2_jax.errors import ImageError

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2


def upright_rgb(image: Image.Image, orientation: int, name: str) -> Image.Image:
    """A decoded picture as RGB, turned as its orientation says, what is transparent laid on white.

    Raises:
      ImageError: its greys are deeper than eight bits, and nothing tells which of them is white.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _grey(image, name)
    elif _tag(image, _SAMPLE_FORMAT) == _SIGNED:
        raise _unscaled(name, "signed pixels")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    rgb = image.convert("RGB")
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def picture_of_array(array: np.ndarray, name: str) -> Image.Image:
    """`[height, width]` or `[height, width, 1, 2, 3 or 4]`: greys, greys and alpha, RGB, RGBA.

    Black to white is False to True, 0 to 65535 of uint16, 0 to 1 of floats, and 0 to 255 of every other integer.

    Raises:
      ImageError: it has another shape (channels first, a batch), or values outside of that range.
    """
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (1, 2, 3, 4)):
        hint = "give one picture of the batch" if array.ndim == 4 else ""
        if array.ndim == 3 and array.shape[0] in (1, 2, 3, 4):
            hint = "its channels come first; transpose(1, 2, 0) puts them last"
        expected = "an image array must be [height, width] or [height, width, 1 to 4]"
        raise ImageError(f"{expected}, got {array.dtype} {list(array.shape)}{hint and ': ' + hint}.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, name)))


def _grey(image: Image.Image, name: str) -> Image.Image:
    """A picture of 16 or 32 bits a pixel as one of 8, with what is transparent as alpha."""
    values, white = np.asarray(image), None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        white = 2**16 - 1
    elif image.mode == "F" and image.info.get("scale", 1.0) != 1.0:
        raise _unscaled(name, f"a PFM scale of {image.info['scale']:g}, which programs understand in different ways,")
    if image.format == "TIFF":
        bits = _tag(image, _BITS_PER_SAMPLE)
        if image.mode == "I" or _tag(image, _SAMPLE_FORMAT) == _SIGNED:
            kind = "signed" if _tag(image, _SAMPLE_FORMAT) == _SIGNED else "unsigned"
            raise _unscaled(name, f"greys of {bits} bits, {kind},")
        if image.mode != "F":
            white = 2**bits - 1
    grey = _eight_bits(values, name, white)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.fromarray(np.stack([grey, alpha], axis=-1))


def _eight_bits(values: np.ndarray, name: str, white: int | None = None) -> np.ndarray:
    """uint8 of values whose white is given, or is that of their type."""
    kind = values.dtype.kind
    if kind == "b":
        return values * np.uint8(255)
    if kind in "ui":
        if white is None and values.dtype.itemsize == 2 and kind == "u":
            white = 2**16 - 1
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > (white or 255):
            raise _unscaled(name, f"{values.dtype.name} from {low} to {high}")
        if not white:
            return values.astype(np.uint8)
        return ((values.astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if kind == "f" or (kind == "V" and values.dtype.names is None and np.can_cast(values.dtype, np.float32)):
        scaled = np.round(values.astype(np.float32) * 255)
        low, high = scaled.min(), scaled.max()
        if not (low >= 0 and high <= 255):  # also not a number
            raise _unscaled(name, f"{values.dtype.name} from {low / 255:.4g} to {high / 255:.4g}")
        return scaled.astype(np.uint8)
    raise ImageError(f"{name} holds {values.dtype}; expected integers, floats from 0 to 1 or booleans.")


def _unscaled(name: str, what: str) -> ImageError:
    return ImageError(
        f"{name} holds {what}, and nothing tells which value is white; scale it to 8 bits (0 to 255), to 16 bits "
        "(0 to 65535) or to floats from 0 to 1."
    )


def _tag(image: Image.Image, number: int) -> Any:
    """The (first) value of a TIFF's tag; None of other pictures."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value
