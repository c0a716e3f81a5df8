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


def draw_flow(name: str, boxes: dict[str, tuple[float, float, str]], arrows: list[tuple[str, str, str]]) -> None:
    """Boxes at (column, row) with a text each, and arrows between them with what they carry."""
    columns, rows = (max(place[axis] for place in boxes.values()) for axis in (0, 1))
    figure, axes = plt.subplots(figsize=(2.1 * columns + 1.6, 1.05 * rows + 0.8))
    frame = {"boxstyle": "round,pad=0.45", "facecolor": "#eef2fb", "edgecolor": "#5b74b8"}
    placed = {
        key: axes.text(x, -y, text, ha="center", va="center", fontsize=9, bbox=frame)
        for key, (x, y, text) in boxes.items()
    }
    axes.set(xlim=(-0.55, columns + 0.55), ylim=(-rows - 0.5, 0.5))
    axes.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    figure.canvas.draw()
    for begin, end, carried in arrows:
        style = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 3, "shrinkB": 3}
        ends = {"patchA": placed[begin].get_bbox_patch(), "patchB": placed[end].get_bbox_patch()}
        (x1, y1, _), (x2, y2, _) = boxes[begin], boxes[end]
        axes.annotate("", (x2, -y2), (x1, -y1), arrowprops=style | ends)
        middle, white = ((x1 + x2) / 2, -(y1 + y2) / 2), {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        if carried:
            axes.text(*middle, carried, ha="center", va="center", fontsize=7, color="#333333", bbox=white)
    figure.savefig(OUT / f"{name}.png", dpi=110)


def draw_flows() -> None:
    draw_flow(
        "model",
        {
            "messages": (0, 1, "messages,\npictures"),
            "processor": (1, 1, "Processor\n(host: NumPy, Pillow)"),
            "tower": (2.2, 0, "vision tower"),
            "projector": (3.1, 0, "projector"),
            "table": (4, 0, "visual table:\nnewline, separator,\ntokens of tiles"),
            "embedding": (2.6, 2, "embedding"),
            "gather": (4, 1.5, "gather"),
            "decoder": (5, 1.5, "decoder"),
            "sampling": (6, 1.5, "sampling:\ntext, boxes"),
        },
        [
            ("messages", "processor", ""),
            ("processor", "tower", "tiles [I, 384, 384, 3]"),
            ("tower", "projector", "[I, 729, 1152]"),
            ("projector", "table", "[I, 196, D]"),
            ("processor", "embedding", "ids [B, T]"),
            ("processor", "gather", "visual index [B, T]"),
            ("table", "gather", ""),
            ("embedding", "gather", ""),
            ("gather", "decoder", "[B, T, D]"),
            ("decoder", "sampling", "[B, T, V]"),
        ],
    )
    draw_flow(
        "server",
        {
            "client": (0, 1, "client"),
            "door": (1, 1, "Door: keys,\nhosts, ids, log"),
            "bodies": (2, 1, "routes, bodies:\nJSON, bounds"),
            "service": (3, 1, "Service:\nconversations"),
            "threads": (4.3, 0, "threads:\ntokens"),
            "decoders": (4.3, 1, "processes: decoding,\ntiles, tokens"),
            "fetcher": (3, 1.9, "Fetcher"),
            "engine": (5.6, 1, "engine: one thread,\nthe device"),
            "answers": (5.6, 2, "Answers: a queue\nin the loop"),
            "replies": (4.3, 3, "replies,\nstreams"),
        },
        [
            ("client", "door", "HTTP"),
            ("door", "bodies", ""),
            ("bodies", "service", ""),
            ("service", "threads", "text"),
            ("service", "decoders", "pictures"),
            ("service", "fetcher", "addresses"),
            ("fetcher", "decoders", ""),
            ("threads", "engine", ""),
            ("decoders", "engine", ""),
            ("engine", "answers", "events"),
            ("answers", "replies", ""),
            ("replies", "client", ""),
        ],
    )


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
    draw_flows()
    draw_demo()
