"""`vl2 eval`: how often a model is right about scenes it has not seen."""

from __future__ import annotations

from vl2_jax.cli.flags import ONE_DEVICE, Model, OnDevices, in_all_processes
from vl2_jax.cli.terminal import messages, print_json
from vl2_jax.errors import RequestError
from vl2_jax.progress import Display
from vl2_jax.scenes import SceneSizes


@in_all_processes
def evaluate(
    model: Model,
    count: int = 100,
    seed: int = 1_000_000,
    longest_side: int = SceneSizes.longest_side,
    json: bool = False,
    devices: OnDevices = ONE_DEVICE,
) -> None:
    """Ask a model about drawn scenes it has not seen, and print how often it is right.

    In float32, unless --dtype is given.

    Example: vl2 eval --model vl2-nano --count 20

    Args:
        count: Conversations to draw; each holds about six questions, asked one by one.
        seed: Of the scenes.
        longest_side: Of the pictures, in pixels.
        json: Print one object.
    """
    from vl2_jax.scenes.evaluation import ask_all, table

    if count < 1:
        raise RequestError(f"--count is {count}; expected at least 1.")
    sizes = SceneSizes(longest_side=longest_side)
    vl2, _ = model.load(devices, dtype=model.dtype or "float32")
    with Display(messages) as report:
        rows = table(ask_all(vl2, count, seed, sizes, report))
    if json:
        print_json({row.skill: {"questions": row.questions, "score": row.score} for row in rows})
        return
    for row in rows:
        print(f"{row.skill:22} {row.questions:6} questions {100 * row.score:6.1f} %")
