"""What a run has learned, from one of its checkpoints: a model in the released layout, or adapters on their own.

Nothing is held whole: parameters come from the checkpoint, or from the model that the run began with, a few at a time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from convert.adapters import Adapters, merge
from convert.checkpoint import dtype_of, pieces
from convert.from_torch import CORRECTION_BIAS
from convert.parts import Parts
from convert.peft import read_adapters, write_adapters
from convert.to_torch import write_released
from convert.weight_map import Leaf, plan
from vl2_jax.errors import CheckpointError, ConfigError
from vl2_jax.files import local_destination, local_source
from vl2_jax.training.checkpoints import Checkpoints, Reader, name_of
from vl2_jax.training.evaluation import best_step
from vl2_jax.training.folder import CHECKPOINTS, RECIPE_FILE
from vl2_jax.training.loop import described_model, kinds_of_base
from vl2_jax.training.lora import adapted_paths, adapters_of, whole_paths
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
      CheckpointError: there is no run, no checkpoint that can be read, or none of that step; or the adapters are to be
        merged, and there are only the quantised weights that they were trained beside.
    """
    folder = local_source(folder, "a run")
    destination = local_destination(destination, "adapters" if adapters else "the exported model")
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {RECIPE_FILE}; give the --out folder of `vl2 train`.")
    recipe = build_recipe(json.loads(path.read_text(encoding="utf-8")))
    step, read = _chosen(folder, Checkpoints(folder / CHECKPOINTS, recipe.loop.keep, tell), step)
    small_files, config = described_model(recipe)
    leaves = plan(config)
    paths = [leaf.path for leaf in leaves]
    if adapters:
        if not recipe.lora.rank:
            raise ConfigError(f"{folder} trained the parameters themselves and has no adapters; export the model.")
        base = recipe.model.path or recipe.model.preset or ""
        write_adapters(destination, _learned(recipe, paths, read, base), leaves, base)
        return step
    held, kind = kinds_of_base(recipe, small_files, config)
    if held is not None:
        raise CheckpointError(
            f"the adapters of {folder} cannot be added to the {held} weights of {small_files}; export them apart, and "
            "load them beside these (--adapters)."
        )
    if kind is not None:
        tell(
            f"adapters that were trained beside {kind} weights are added to those that {small_files} holds; apart "
            f"(--adapters), beside {kind} weights, they are the model that was trained"
        )
    wide, narrow = np.dtype(np.float32), dtype_of(dtype or config.torch_dtype)
    dtypes = {leaf.path: wide if leaf.path.endswith(CORRECTION_BIAS) else narrow for leaf in leaves}
    merged = _Merged()
    trained = _trained_pieces(recipe, small_files, leaves, read, dtypes, merged, tell)
    write_released(small_files, destination, leaves, dtypes, trained)
    if merged.lost:
        tell(
            f"{merged.lost / merged.weights:.0%} of the {merged.weights:,} weights with adapters are as before in "
            f"{narrow.name}, whose steps are larger than their updates; --dtype float32 keeps them, and so do the "
            "adapters apart (--adapters)"
        )
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


@dataclasses.dataclass
class _Merged:
    """What became of the weights that adapters were added to."""

    weights: int = 0
    lost: int = 0  # updated and yet as before, once they are narrow

    def count(self, before: np.ndarray, after: np.ndarray, dtype: np.dtype) -> None:
        self.weights += after.size
        self.lost += int(((before != after) & (before.astype(dtype) == after.astype(dtype))).sum())


def _trained_pieces(
    recipe: Recipe,
    base: Path,
    leaves: list[Leaf],
    read: Callable[[Iterable[str]], dict[str, np.ndarray]],
    dtypes: Mapping[str, np.dtype],
    merged: _Merged,
    tell: Callable[[str], None],
) -> Iterator[dict[str, np.ndarray]]:
    """The parameters of a trained model, a few at a time: what was saved, and from its base what never changed."""
    paths, has_adapters = [leaf.path for leaf in leaves], bool(recipe.lora.rank)
    adapted = set(adapted_paths(recipe, paths)) if has_adapters else set()
    learned = {path for path in paths if is_trained(path, recipe.optimizer.frozen)}
    learned = set(whole_paths(recipe, paths)) if has_adapters else learned
    unchanged = None if recipe.model.preset else Parts(base, leaves, verify=False)
    for line in unchanged.differences if unchanged is not None else []:
        tell(f"{base}: {line}")
    # Without adapters of its own, a run began with these merged; what it learned holds them already.
    begun = read_adapters(recipe.model.adapters, leaves) if recipe.model.adapters and not has_adapters else None
    for group in pieces(leaves):
        arrays: dict[str, Any] = {}
        saved: dict[str, str] = {}
        for leaf in group:
            if unchanged is None or leaf.path in learned or leaf.path.endswith(CORRECTION_BIAS):
                saved[name_of("trained" if leaf.path in learned else "kept", leaf.path)] = leaf.path
            else:
                whole = (slice(None),) * len(leaf.shape)
                arrays[leaf.path] = unchanged.read(leaf, whole, dtype_of(recipe.model.param_dtype))
        if begun is not None:
            arrays = jax.device_get(merge(arrays, begun.of(arrays)))
        arrays |= {saved[name]: array for name, array in read(saved).items()}
        here = [leaf.path for leaf in group if leaf.path in adapted]
        if here:
            wide = {path: arrays[path].astype(np.float32) for path in here}
            arrays |= jax.device_get(merge(wide, _pairs(recipe, here, read)))
            for path in here:
                merged.count(wide[path], arrays[path], dtypes[path])
        yield arrays


def _learned(
    recipe: Recipe, paths: list[str], read: Callable[[Iterable[str]], dict[str, np.ndarray]], base: str
) -> Adapters:
    """All that a run with adapters has learned."""
    pairs = _pairs(recipe, adapted_paths(recipe, paths), read)
    names = {name_of("trained", path): path for path in whole_paths(recipe, paths)}
    whole = {names[name]: array for name, array in read(names).items()}
    return dataclasses.replace(pairs, whole=whole, base=base)


def _pairs(recipe: Recipe, paths: list[str], read: Callable[[Iterable[str]], dict[str, np.ndarray]]) -> Adapters:
    """The factors of these parameters' adapters."""
    factors = [f"{path}/{half}" for path in paths for half in "ab"]
    found = read(name_of("trained", factor) for factor in factors)
    return adapters_of(recipe.lora, {factor: found[name_of("trained", factor)] for factor in factors})
