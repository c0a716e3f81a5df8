"""A plan as a picture: what fills a device's memory, and what takes the time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vl2_jax.errors import VL2Error, shown
from vl2_jax.installation import install_line
from vl2_jax.planning.plan import Plan

_MS = 1e3


def check(path: Path) -> None:
    """Whether a plan can be drawn and written, asked before the work rather than after it.

    Raises:
      VL2Error: matplotlib is missing, there is no such folder, or no format of that name.
    """
    kinds = _pyplot().figure().canvas.get_supported_filetypes()
    _pyplot().close()
    folder = path.absolute().parent
    if not folder.is_dir() or path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise VL2Error(f"--save {shown(str(path))} cannot be written; give a file in a folder that exists.")
    if path.suffix[1:].lower() not in kinds:
        raise VL2Error(f"--save {shown(str(path))}: expected the name of a picture: {', '.join(sorted(kinds))}.")


def draw(plan: Plan, path: Path) -> None:
    """Writes two charts side by side.

    Raises:
      VL2Error: matplotlib is missing.
    """
    pyplot = _pyplot()
    figure, (memory, times) = pyplot.subplots(1, 2, figsize=(10, 3.2), width_ratios=(3, 2), layout="constrained")
    _memory_bar(memory, plan)
    kinds = list(plan.seconds)
    values = [plan.seconds[kind] * _MS for kind in kinds]
    bars = times.barh(kinds, values, color=["#4c78a8" if kind != plan.bound else "#e45756" for kind in kinds])
    times.bar_label(bars, [f"{value:.2f} ms" for value in values], padding=3)
    times.margins(x=0.25)
    times.set_title("at best (estimated)", fontsize=10)
    times.set_xlabel("ms")
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    title = f"{plan.model}, {plan.purpose} of {plan.batch} x {plan.context}, {plan.topology} ({mesh})"
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise VL2Error(f"--save needs matplotlib: {install_line('plan')}") from None
    return pyplot


def _memory_bar(axis: Any, plan: Plan) -> None:
    begin = 0.0
    for kind, size in plan.memory.items():
        axis.barh([0], [size / 1e9], left=begin, label=f"{kind}, {size / 1e9:.2f} GB")
        begin += size / 1e9
    axis.axvline(plan.limit / 1e9, color="black", linestyle="--", label=f"limit, {plan.limit / 1e9:.1f} GB")
    axis.set_yticks([])
    axis.set_title("memory of a device" + ("" if plan.fits else f": {plan.over / 1e9:.1f} GB too little"), fontsize=10)
    axis.set_xlabel("GB")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=2, frameon=False)
