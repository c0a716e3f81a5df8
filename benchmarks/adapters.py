"""What adapters learn beside quantised weights: the notebook's task and evaluation, on more pictures.

python benchmarks/adapters.py --pictures 160 --seeds 0 1 2

vl2-nano ships in bfloat16, and computes in float32 here: "bfloat16" is the notebook's own run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jupytext

import vl2_jax
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import train

_NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "finetune.py"
_RUN = "\nrun = train(adapters"  # stands after the recipe of adapters, the last thing that is needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=160, help="that are asked about, beside the notebook's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="orders of the data and first adapters")
    parser.add_argument("--kinds", nargs="+", default=["bfloat16", "int8", "int4"])
    given = parser.parse_args()
    names = _run_notebook()
    notebooks_own, more = names["held_out"], names["draw"]("more", given.pictures, seed=3)

    def shares(vl2: Any) -> str:
        found = []
        for file in (notebooks_own, more):
            names["held_out"] = file
            found.append(f"{100 * names['share_right'](vl2):5.1f} %")
        return ", ".join(found)

    print("right of the notebook's pictures and of the others")
    for name in given.kinds:
        kind = None if name == "bfloat16" else name
        for seed in given.seeds:
            recipe = names["adapters"]
            recipe = dataclasses.replace(
                recipe,
                model=dataclasses.replace(recipe.model, weights=kind, seed=seed),
                data=dataclasses.replace(recipe.data, seed=seed),
            )
            folder = names["folder"] / f"{name}-{seed}"
            run = train(recipe, folder / "run", lambda _: None)
            export_run(folder / "run", folder / "adapters", lambda _: None, adapters=True)
            load = partial(vl2_jax.load, "vl2-nano", dtype="float32", adapters=folder / "adapters")
            told = f"{name:9} seed {seed}, {run.state.step} steps   beside {shares(load(weights=kind, merge=False))}"
            if kind is not None:
                told += f"   added to the bfloat16 weights {shares(load())}"
            print(told, flush=True)


def _run_notebook() -> dict[str, Any]:
    """The names that the notebook has before it trains adapters."""
    names: dict[str, Any] = {}
    for cell in jupytext.read(_NOTEBOOK).cells:
        if cell.cell_type == "code":
            exec(cell.source.partition(_RUN)[0], names)
        if _RUN in cell.source:
            break
    return names


if __name__ == "__main__":
    main()
