"""The folder of a run: what it was begun with, and rows of numbers that hold every step once, whatever ended the run.

RUN/recipe.json    the recipe
RUN/data.json      a fingerprint of every file that it learns from
RUN/*.jsonl        rows, in the order of steps
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vl2_jax.errors import ConfigError
from vl2_jax.training.recipe import Recipe, build_recipe
from vl2_jax.training.sources import fingerprint

RECIPE_FILE, DATA_FILE, CHECKPOINTS = "recipe.json", "data.json", "checkpoints"
_MAY_CHANGE = {
    "objective.loss_chunk", "model.remat", "model.scan", "optimizer.learning_rate", "optimizer.clip",
    "data.on_bad_sample", "data.workers",
}  # fmt: skip


def check_run(folder: Path, recipe: Recipe, is_begun: bool, tell: Callable[[str], None]) -> dict[str, str]:
    """Whether a run can be in this folder: one that is begun goes on as it was, but for its length and its habits.

    Returns:
      A fingerprint of every file that it learns from, for `keep_recipe`.

    Raises:
      ConfigError: another recipe, or another content of a data file.
    """
    paths = {source.path for source in recipe.data.sources if source.path is not None}
    files = {path: fingerprint(path) for path in sorted(paths) if Path(path).is_file()}
    if is_begun:
        _check_recipe(folder, _as_json(recipe), tell)
        _check_files(folder, files)
    return files


def keep_recipe(folder: Path, recipe: Recipe, files: dict[str, str]) -> None:
    """Writes down what a run is.

    Raises:
      ConfigError: a folder that cannot be one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be the folder of a run ({error.strerror}); choose another --out.") from None
    if jax.process_index() == 0:
        write(folder / RECIPE_FILE, json.dumps(_as_json(recipe), indent=2))
        write(folder / DATA_FILE, json.dumps(files, indent=2))


def write(path: Path, content: str | bytes) -> None:
    """A file's new content, at once: others may be reading it, and a crash leaves the old one."""
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    new.replace(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last one that was never finished is none."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def keep_rows(path: Path, last: int) -> None:
    """Drops the rows of steps after `last`, which are made again."""
    if path.is_file():
        rows = [row for row in rows_of(path) if row.get("step", last) <= last]
        write(path, "".join(json.dumps(row) + "\n" for row in rows))


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _check_recipe(folder: Path, new: dict[str, Any], tell: Callable[[str], None]) -> None:
    path = folder / RECIPE_FILE
    if not path.is_file():
        return
    old = _as_json(build_recipe(json.loads(path.read_text(encoding="utf-8"))))  # with keys that are newer than the run
    tables = [table for table in new if table not in ("loop", "evaluation")]
    changed = {f"{t}.{key}" for t in tables for key in new[t] if old[t][key] != new[t][key]}
    passes = [old["data"]["epochs"], new["data"]["epochs"]]
    same_order = len(new["data"]["sources"]) == 1 or None not in passes
    refused = changed - _MAY_CHANGE - ({"data.epochs"} if same_order else set())
    if refused:
        raise ConfigError(
            f"{folder} holds a run with another recipe ({', '.join(sorted(refused))}); choose another --out, or the "
            "old values."
        )
    if changed:
        tell(f"going on with other values of {', '.join(sorted(changed))}")


def _check_files(folder: Path, files: dict[str, str]) -> None:
    path = folder / DATA_FILE
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    changed = [name for name, print_ in files.items() if old.get(name, print_) != print_]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} changed since {folder} was begun: its place in the data would be among other "
            "records, some learned twice and some never. Put the old content back, or begin another run (--out) from "
            "what `vl2 export` makes of this one."
        )
