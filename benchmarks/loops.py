"""What `model.remat` and `model.scan` cost and save: compile time, memory and time of a training step, on this machine.

    pip install -e '.[train]'     (from the root of this checkout)
    python benchmarks/loops.py

A decoder of 24 layers (width 256, 16 experts) and a tower of 12 blocks, 4 rows of 512 positions and 8 tiles, float32.
Memory is the compiler's figure for what a step needs beside parameters and optimiser states.
"""

from __future__ import annotations

import itertools
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import VL2Model, init_params
from vl2_jax.processing.batch import TEXT
from vl2_jax.processing.tiling import FIRST_TOKEN_ROW
from vl2_jax.training.packing import PackedBatch
from vl2_jax.training.recipe import Recipe
from vl2_jax.training.step import init_state, make_step

ROWS, LENGTH, TILES, STEPS = 4, 512, 8, 3
RATE = np.float32(1e-4)
DECODER = {"num_hidden_layers": 24, "hidden_size": 256, "n_routed_experts": 16, "intermediate_size": 768}


def main() -> None:
    nano = VL2Config.preset("vl2-nano")
    config = nano.replace(
        language_config=nano.language_config.replace(**DECODER),
        vision_config=nano.vision_config.replace(layers=12),
        projector_config=nano.projector_config.replace(n_embed=DECODER["hidden_size"]),
    )
    size = config.vision_config.image_size
    ids = np.random.default_rng(0).integers(0, 500, (1, ROWS, LENGTH), np.int32)
    visual = np.full_like(ids, TEXT)
    seen = TILES * config.tokens_per_tile
    visual[0, :, : seen // ROWS] = FIRST_TOKEN_ROW + np.arange(seen).reshape(ROWS, -1)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    tiles = np.zeros((1, TILES, size, size, 3), np.uint8)
    batch = PackedBatch(ids, ids, np.ones_like(ids), places, visual, tiles)
    params, recipe = init_params(config, jax.random.key(0)), Recipe()
    print("| remat | scan | compile | memory | step |\n|---|---|---|---|---|")
    for remat, scan in itertools.product((False, True), repeat=2):
        model = VL2Model(config, jnp.float32, jnp.float32, remat=remat, scan=scan)
        state = init_state(recipe, jax.tree.map(jnp.copy, params))
        begun = time.perf_counter()
        step = make_step(model, recipe).lower(state, batch, RATE).compile()
        compiled = time.perf_counter() - begun
        seconds = []
        for _ in range(STEPS):
            begun = time.perf_counter()
            state, metrics = step(state, batch, RATE)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - begun)
        memory = step.memory_analysis().temp_size_in_bytes
        yes = ("no", "yes")
        print(f"| {yes[remat]} | {yes[scan]} | {compiled:.0f} s | {memory / 1e9:.2f} GB | {min(seconds):.2f} s |")


if __name__ == "__main__":
    main()
