"""Draws the pictures of the documentation: `python docs/pictures.py` (needs the `notebooks` extra)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from vl2_jax.config import read_preset
from vl2_jax.processing.images import load_image
from vl2_jax.processing.tiling import FIRST_TOKEN_ROW, NEWLINE_ROW, cut_tiles, select_best_resolution, visual_rows
from vl2_jax.scenes.demo import demo_scene
from vl2_jax.scenes.drawing import render

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "pictures"
TILE, GRID = 384, 14


def draw_tiles(picture, resolution) -> None:
    """The picture, its global view and its local tiles, as the vision tower sees them."""
    across, down = resolution[0] // TILE, resolution[1] // TILE
    tiles = cut_tiles(picture, resolution, TILE)
    figure = plt.figure(figsize=(9, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1, 1, across / down])
    for part, title, image in ((left, f"picture {picture.size[0]} x {picture.size[1]}", picture),
                               (middle, "global view (tile 0)", tiles[0])):  # fmt: skip
        axes = part.subplots()
        axes.imshow(image)
        axes.set_axis_off()
        part.suptitle(title, fontsize=10)
    for number, axes in enumerate(np.ravel(right.subplots(down, across)), 1):
        axes.imshow(tiles[number])
        axes.set_axis_off()
        axes.set_title(f"tile {number}", fontsize=8)
    right.suptitle(f"local view, {resolution[0]} x {resolution[1]}", fontsize=10)
    figure.savefig(OUT / "tiles.png", dpi=80)


def draw_sequence(resolution) -> None:
    """Which row of the visual table every visual position takes, in reading order."""
    across, down = resolution[0] // TILE, resolution[1] // TILE
    rows = visual_rows((across, down), 0, GRID, global_view_first=True)
    tile_of = np.where(
        rows >= FIRST_TOKEN_ROW, (rows - FIRST_TOKEN_ROW) // GRID**2 + 2, np.where(rows == NEWLINE_ROW, 0, 1)
    )
    first = GRID * (GRID + 1)
    wide = GRID * across + 1
    canvas = np.full((GRID + 2 + GRID * down, wide), -1)
    canvas[:GRID, : GRID + 1] = tile_of[:first].reshape(GRID, -1)
    canvas[GRID, 0] = tile_of[first]
    canvas[GRID + 1 : -1] = tile_of[first + 1 :].reshape(-1, wide)
    colours = ["white", "black", "crimson", *matplotlib.colormaps["tab10"].colors]
    figure, axes = plt.subplots(figsize=(5, 5.6), layout="constrained")
    axes.imshow(canvas + 1, cmap=matplotlib.colors.ListedColormap(colours[: canvas.max() + 2]), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([0, GRID, GRID + 1], ["position 0", f"{first}", f"{first + 1}"])
    names = ["newline", "view separator", "global view", *(f"tile {n}" for n in range(1, across * down + 1))]
    axes.legend(handles=[Patch(color=c, label=n) for c, n in zip(colours[1:], names)], loc="upper right", fontsize=8)
    axes.set_title(f"{len(rows)} visual positions of a {across} x {down} raster, row by row")
    figure.savefig(OUT / "sequence.png", dpi=80)


def draw_training() -> None:
    """The loss of vl2-nano's stages, one after another, from the logs that its runs wrote."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    begin = 0
    for path in sorted((Path(__file__).parent / "logs").glob("nano-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        axes.plot([begin + row["step"] for row in rows], [row["loss"] for row in rows], label=path.stem, linewidth=1)
        begin += rows[-1]["step"]
    axes.set(xlabel="step", ylabel="loss of answers", yscale="log")
    axes.legend()
    figure.savefig(OUT / "nano-loss.png", dpi=80)


def draw_demo() -> None:
    """The scene of `make demo`."""
    render(demo_scene()).save(ROOT / "assets" / "scene.png")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    photograph = load_image(ROOT / "assets" / "grace_hopper.jpg")
    candidates = [tuple(c) for c in read_preset("vl2-tiny")["model"]["candidate_resolutions"]]
    best = select_best_resolution(photograph.size, candidates)
    draw_tiles(photograph, best)
    draw_sequence(best)
    draw_training()
    draw_demo()
