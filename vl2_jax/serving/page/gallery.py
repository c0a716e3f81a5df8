"""Files of pictures that the page shows: small and upright, the tiles that the model sees, and boxes drawn to keep."""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vl2_jax.processing.batch import Encoded
from vl2_jax.processing.grounding import Box, draw_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.processing.sources import content_of
from vl2_jax.processing.tiling import tiles_of, visual_token_count
from vl2_jax.serving.page.talk import Picture, Turn

_LONGEST_SIDE = 1280  # of a picture on the page, in pixels; what is saved has all of them
_GAP = 32  # parts of a tile's side that one part lies between two tiles


class Gallery:
    """A folder of pictures with names that nobody can guess; those of a conversation have a folder of their own in it,
    whose name is the conversation's salt.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, pictures: Sequence[Picture], prompt: Encoded, of: str) -> None:
        """Makes what the page shows of the pictures of a prompt, those that are new.

        They are decoded here a second time, in the server's process: the prompt was made of the same files, so a
        process of its own has decoded them, within the limits of the service.
        """
        grid = math.isqrt(prompt.tokens_per_tile)
        first = 0
        for picture, size, (across, down) in zip(pictures, prompt.image_sizes, prompt.crops.tolist(), strict=True):
            count = tiles_of(across, down)
            tiles = prompt.tiles[first : first + count]
            first += count
            if picture.crop == (across, down):
                continue  # more than two pictures are not cut into tiles, so that of an older one may have changed
            picture.size, picture.crop, picture.tokens = size, (across, down), visual_token_count((across, down), grid)
            picture.overview = self.keep(Image.fromarray(tiles[0]), of)
            picture.raster = self.keep(_raster(tiles[1:], across), of) if count > 1 else None
            if picture.preview is None:
                image = _decoded(picture)
                image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
                picture.preview = self.keep(image, of)

    def draw(self, picture: Picture, boxes: Sequence[Box], of: str) -> Path:
        """The whole picture with its boxes and their labels, as a file to keep, whose name says what it is."""
        return self.keep(draw_boxes(_decoded(picture), boxes), of, "boxes.png")

    def tidy(self, turns: Sequence[Turn], of: str) -> None:
        """Removes what none of a conversation's turns shows any more: they were asked again, or cut otherwise."""
        made = [file for turn in turns for p in turn.pictures for file in (p.preview, p.overview, p.raster)]
        shown = {file.parent for file in (*made, *(turn.saved for turn in turns)) if file is not None}
        for folder in set((self.folder / of).glob("*")) - shown:
            shutil.rmtree(folder)

    def forget(self, of: str) -> None:
        """Removes the files of a conversation; one without a name has none."""
        if of:
            shutil.rmtree(self.folder / of, ignore_errors=True)

    def keep(self, image: Image.Image, of: str = "examples", name: str = "picture.png") -> Path:
        """A picture as a file of a conversation, alone in a folder that nobody can guess."""
        path = self.folder / of / secrets.token_hex(16) / name
        path.parent.mkdir(parents=True)
        image.save(path, compress_level=1)
        return path


def side_by_side(images: Iterable[Image.Image]) -> Image.Image:
    """Pictures in one row, of one height, on nothing."""
    images = list(images)
    height = max(image.height for image in images)
    images = [image.resize((image.width * height // image.height, height)) for image in images]
    gap = height // _GAP * 2
    row = Image.new("RGBA", (sum(image.width + gap for image in images) - gap, height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width + gap
    return row


def _decoded(picture: Picture) -> Image.Image:
    _, content = content_of(picture.address)
    return load_image(content)


def _raster(tiles: np.ndarray, across: int) -> Image.Image:
    """Local tiles in their places, with transparent gaps between them."""
    size = tiles.shape[1]
    step = size + max(1, size // _GAP)
    down = len(tiles) // across
    canvas = np.zeros((down * step - step + size, across * step - step + size, 4), np.uint8)
    for number, tile in enumerate(tiles):
        y, x = (step * place for place in divmod(number, across))
        canvas[y : y + size, x : x + size, :3] = tile
        canvas[y : y + size, x : x + size, 3] = 255
    return Image.fromarray(canvas)
