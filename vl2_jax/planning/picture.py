"""A plan as a picture: what fills a device's memory, and what takes the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vl2_jax.errors import VL2Error
from vl2_jax.planning.plan import Plan

_MS = 1e3


def draw(plan: Plan, path: Path) -> None:
    """Writes two charts side by side.

    Raises:
      VL2Error: matplotlib is missing.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ModuleNotFoundError:
        raise VL2Error("--save needs matplotlib: pip install 'vl2-jax[plan]'.") from None
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
