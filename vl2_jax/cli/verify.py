"""`vl2 verify`: a model against numbers recorded from the official release."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import tyro

from vl2_jax.cli.flags import ONE_DEVICE, ModelFlags, ModelName, OnDevices, Place, in_all_processes
from vl2_jax.cli.terminal import messages, print_json
from vl2_jax.errors import VerificationError
from vl2_jax.progress import Display


@in_all_processes
def verify(
    model: ModelName,
    goldens: Annotated[tyro.conf.Positional[Place], tyro.conf.arg(metavar="GOLDENS")],
    json: bool = False,
    devices: OnDevices = ONE_DEVICE,
) -> None:
    """Compare a model with numbers recorded from the official release; exit 1 past a tolerance.

    Example: vl2 verify tests/goldens/nano-small tests/goldens/nano-small

    Args:
        model: Directory of a released or converted model.
        goldens: A directory with recorded cases in cases/.
        json: Print one object.
    """
    from vl2_jax.verification import verify as run

    vl2, _ = ModelFlags(model, dtype="float32").load(devices)
    largest: dict[str, Any] = {}
    with Display(messages) as report:
        for check in run(vl2, goldens, report):
            held = largest.get(check.quantity)
            if held is None or not check.error <= held.error:
                largest[check.quantity] = check
    failed = [check for check in largest.values() if not check.passed]
    if json:
        quantities = {name: asdict(check) | {"passed": check.passed} for name, check in largest.items()}
        print_json({"passed": not failed, "quantities": quantities})
    else:
        for name, check in largest.items():
            mark = "ok    " if check.passed else "FAILED"
            print(f"{mark} {name:60} {check.error:9.2e} of {check.tolerance:.0e}  ({check.case}; {check.measured})")
    if failed:
        names = ", ".join(check.quantity for check in failed)
        raise VerificationError(f"{len(failed)} quantities differ from the recorded ones: {names}")
