"""Pictures to tiles: one global view of the whole picture, then local tiles of its best-fitting raster (SPEC 4).

    picture 1024 x 768, tile 384                      visual tokens of its 3 x 2 raster

      +-----------+   global     +---+                g g g g . . n    14 rows of 14 tokens + newline
      |           |  --------->  | g |                        s        one view separator
      |           |   view       +---+                a a a b b b c c c n
      |           |                                   a a a b b b c c c n    28 rows of 42 tokens + newline:
      +-----------+   local      +---+---+---+        d d d e e e f f f n    the tiles stitched together again
                     --------->  | a | b | c |
                      tiles      +---+---+---+
                                 | d | e | f |
                                 +---+---+---+

The device never sees this layout: for every position of the sequence the host computes one row number of the
visual table `[newline; separator; tokens of tile 0; tokens of tile 1; ...]`, and merging is one gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from einops import rearrange
from PIL import Image, ImageOps

NEWLINE_ROW = 0
SEPARATOR_ROW = 1
FIRST_TOKEN_ROW = 2
PADDING_COLOUR = (127, 127, 127)  # int(0.5 * 255): the mean the pictures are normalised with


def select_best_resolution(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate (width, height) that keeps most of the picture's pixels, then wastes fewest (SPEC 4.1)."""
    width, height = size
    best, most_kept, least_wasted = candidates[0], 0, float("inf")
    for candidate_width, candidate_height in candidates:
        scale = min(candidate_width / width, candidate_height / height)
        scaled_pixels = int(width * scale) * int(height * scale)
        kept = min(scaled_pixels, width * height)
        wasted = candidate_width * candidate_height - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (candidate_width, candidate_height), kept, wasted
    return best


def cut_tiles(image: Image.Image, resolution: tuple[int, int], tile_size: int) -> np.ndarray:
    """uint8 `[tiles, size, size, 3]`: the global view, then the local tiles row by row (SPEC 4.3).

    A raster of a single tile equals the global view pixel by pixel, so it is not stored a second time.
    """
    global_view = np.asarray(ImageOps.pad(image, (tile_size, tile_size), color=PADDING_COLOUR))[None]
    if resolution == (tile_size, tile_size):
        return global_view
    raster = np.asarray(ImageOps.pad(image, resolution, color=PADDING_COLOUR))
    local = rearrange(raster, "(th h) (tw w) c -> (th tw) h w c", h=tile_size, w=tile_size)
    return np.concatenate([global_view, local])


def visual_rows(crop: tuple[int, int], first_tile: int, token_grid: int, global_view_first: bool) -> np.ndarray:
    """Rows of the visual table that one picture takes, in sequence order (SPEC 3.4).

    Args:
      crop: local tiles (across, down).
      first_tile: position of the picture's global view among all tiles.
      token_grid: tokens along one side of a tile.
      global_view_first: the configuration's `global_view_pos` is "head".

    Returns:
      int32 `[14 * 15 + 1 + 14 * down * (14 * across + 1)]`, for a token grid of 14.
    """
    across, down = crop

    def raster(first: int, across: int, down: int) -> np.ndarray:
        tiles = across * down
        rows = FIRST_TOKEN_ROW + first * token_grid**2 + np.arange(tiles * token_grid**2)
        grid = rearrange(rows, "(th tw h w) -> (th h) (tw w)", th=down, tw=across, h=token_grid)
        return np.pad(grid, ((0, 0), (0, 1)), constant_values=NEWLINE_ROW).ravel()

    global_view = raster(first_tile, 1, 1)
    local = global_view if crop == (1, 1) else raster(first_tile + 1, across, down)
    first, second = (global_view, local) if global_view_first else (local, global_view)
    return np.concatenate([first, [SEPARATOR_ROW], second]).astype(np.int32)


def after_tiles(rows: np.ndarray, tokens: int) -> np.ndarray:
    """The same visual rows where `tokens` tokens of other conversations' tiles stand before them in the table."""
    return np.where(rows >= FIRST_TOKEN_ROW, rows + tokens, rows)


def released_tiles(crops: np.ndarray) -> np.ndarray:
    """Which stored tile each tile of the released processor is: a picture of one tile stands there twice.

    Args:
      crops: int `[images, 2]`, local tiles (across, down); (0, 0) is no picture.
    """
    order: list[int] = []
    first = 0
    for tiles in crops.reshape(-1, 2).prod(axis=1).tolist():
        if tiles == 1:
            order += [first, first]
        elif tiles:
            order += range(first, first + 1 + tiles)
        first = order[-1] + 1 if order else 0
    return np.asarray(order, int)


def tiles_of(across: int, down: int) -> int:
    """How many tiles are stored of a picture with so many local ones (see `cut_tiles`)."""
    return 1 if (across, down) == (1, 1) else 1 + across * down


def visual_token_count(crop: tuple[int, int], token_grid: int) -> int:
    """Positions one picture takes in the sequence (SPEC 3.5)."""
    across, down = crop
    return token_grid * (token_grid + 1) + 1 + token_grid * down * (token_grid * across + 1)


def largest_raster(rasters: Iterable[tuple[int, int]], token_grid: int) -> tuple[int, int]:
    """The raster (across, down) whose pictures take the most positions."""
    return max(rasters, key=lambda raster: visual_token_count(raster, token_grid))


def normalise(tiles: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 `[..., 3]` to float32 in [-1, 1] for the released mean and std, with the released rounding."""
    scaled = tiles.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
