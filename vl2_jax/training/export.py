"""What a run has learned, from one of its checkpoints: a model in the released layout, or adapters on their own.

Nothing is held whole: parameters come from the checkpoint, or from the model that the run began with, a few at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from convert.adapters import Adapters, merge, write_adapters
from convert.checkpoint import dtype_of, pieces
from convert.from_torch import CORRECTION_BIAS
from convert.parts import Parts
from convert.to_torch import write_released
from convert.weight_map import Leaf, plan
from vl2_jax.errors import CheckpointError, ConfigError
from vl2_jax.training.checkpoints import Checkpoints, Reader, name_of
from vl2_jax.training.evaluation import best_step
from vl2_jax.training.folder import CHECKPOINTS, RECIPE_FILE
from vl2_jax.training.loop import described_model
from vl2_jax.training.lora import adapted_paths
from vl2_jax.training.optimizer import is_trained
from vl2_jax.training.recipe import Recipe, build_recipe


def export_run(
    folder: Path,
    destination: Path,
    tell: Callable[[str], None],
    dtype: str | None = None,
    adapters: bool = False,
    step: int | Literal["best"] | None = None,
) -> int:
    """A checkpoint of a run in the released layout.

    Args:
      dtype: of the weights on disk; `None` is that of the model's configuration.
      step: whose checkpoint; "best" is that of the lowest evaluation loss, `None` the newest.
      adapters: write the low-rank adapters alone, in PEFT's layout, instead of the model they are merged into.

    Returns:
      The step it was saved at.

    Raises:
      CheckpointError: there is no run, no checkpoint that can be read, or none of that step.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {RECIPE_FILE}; give the --out folder of `vl2 train`.")
    recipe = build_recipe(json.loads(path.read_text(encoding="utf-8")))
    step, read = _chosen(folder, Checkpoints(folder / CHECKPOINTS, recipe.loop.keep, tell), step)
    small_files, config = described_model(recipe)
    leaves = plan(config)
    if adapters:
        if not recipe.lora.rank:
            raise ConfigError(f"{folder} trained the parameters themselves and has no adapters; export the model.")
        pairs = _pairs(read, adapted_paths(recipe.lora, [leaf.path for leaf in leaves]))
        base = recipe.model.path or recipe.model.preset or ""
        write_adapters(destination, Adapters(pairs, recipe.lora.rank, recipe.lora.alpha), leaves, base)
        return step
    wide, narrow = np.dtype(np.float32), dtype_of(dtype or config.torch_dtype)
    dtypes = {leaf.path: wide if leaf.path.endswith(CORRECTION_BIAS) else narrow for leaf in leaves}
    write_released(small_files, destination, leaves, dtypes, _trained_pieces(recipe, small_files, leaves, read))
    return step


def _chosen(folder: Path, checkpoints: Checkpoints, step: int | Literal["best"] | None) -> tuple[int, Reader]:
    if step == "best":
        _, step = best_step(folder, checkpoints.steps())
        if step is None:
            raise CheckpointError(
                f"{folder} has no checkpoint of a step that was evaluated; give evaluation.sources and "
                "loop.keep_best = true to a run, or export another step."
            )
    if step is not None:
        return checkpoints.of_step(step)
    found = checkpoints.newest()
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet.")
    return found


def _trained_pieces(
    recipe: Recipe, base: Path, leaves: list[Leaf], read: Callable[[Iterable[str]], dict[str, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """The parameters of a trained model, a few at a time: what was saved, and from its base what never changed."""
    lora = recipe.lora
    adapted = adapted_paths(lora, [leaf.path for leaf in leaves]) if lora.rank else []
    unchanged = None if recipe.model.preset else Parts(base, leaves, verify=False)
    for group in pieces(leaves):
        arrays: dict[str, Any] = {}
        saved: dict[str, str] = {}
        for leaf in group:
            is_learned = not lora.rank and is_trained(leaf.path, recipe.optimizer.frozen)
            if unchanged is None or is_learned or leaf.path.endswith(CORRECTION_BIAS):
                saved[name_of("trained" if is_learned else "kept", leaf.path)] = leaf.path
            else:
                whole = (slice(None),) * len(leaf.shape)
                arrays[leaf.path] = unchanged.read(leaf, whole, dtype_of(recipe.model.param_dtype))
        arrays |= {saved[name]: array for name, array in read(saved).items()}
        pairs = _pairs(read, [leaf.path for leaf in group if leaf.path in adapted])
        if pairs:
            arrays = jax.device_get(merge(arrays, Adapters(pairs, lora.rank, lora.alpha)))
        yield arrays


def _pairs(
    read: Callable[[Iterable[str]], dict[str, np.ndarray]], paths: list[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors of these parameters' adapters."""
    names = {path: (name_of("trained", f"{path}/a"), name_of("trained", f"{path}/b")) for path in paths}
    found = read(name for pair in names.values() for name in pair)
    return {path: (found[a], found[b]) for path, (a, b) in names.items()}
