"""Many processes, one program: JAX's own runtime, found by itself on Cloud TPU, by flags elsewhere.

A failure of one process ends all of them with its message: it is left in the runtime's key-value store, which a thread
of every process watches. A process that dies without a word is missed by the runtime after `_SECONDS_UNTIL_MISSED`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vl2_jax.errors import MeshError, VL2Error
from vl2_jax.sharding.devices import Devices

_FAILURE_KEY = "vl2/failure"
_SECONDS_UNTIL_MISSED = 30
_SECONDS_TO_READ = 2  # that others have to read a failure before the process that serves the store ends


@contextmanager
def running_together(where: Devices) -> Iterator[int]:
    """Joins the other processes and gives this one's number.

    Inside, only process 0 writes to standard output, and nobody fails alone.

    Raises:
      MeshError: flags that do not belong together, or processes that do not come.
    """
    _join(where)
    if jax.process_count() == 1:
        yield 0
        return
    _keep_output_for_answers()
    ended = threading.Event()
    watch = threading.Thread(target=_end_with_others, args=(ended,), daemon=True)
    watch.start()
    try:
        yield jax.process_index()
    except BaseException as error:
        message = str(error) if isinstance(error, VL2Error) else f"{type(error).__name__}: {error}"
        _store().key_value_set(_FAILURE_KEY, f"process {jax.process_index()}: {message}", allow_overwrite=True)
        print(f"vl2: process {jax.process_index()}: {message}", file=sys.stderr, flush=True)
        time.sleep(_SECONDS_TO_READ)
        os._exit(1)  # the usual way out waits for processes that have ended
    ended.set()
    watch.join()
    jax.distributed.shutdown()  # waits for all


def _join(where: Devices) -> None:
    given = [where.coordinator, where.processes, where.process_id]
    if all(value is None for value in given):
        if _on_tpu_machine():
            jax.distributed.initialize(heartbeat_timeout_seconds=_SECONDS_UNTIL_MISSED)
        return
    if any(value is None for value in given):
        raise MeshError("--coordinator, --processes and --process-id are given together, or none of them.")
    assert where.processes is not None
    assert where.process_id is not None
    if not 0 <= where.process_id < where.processes:
        raise MeshError(f"--process-id is {where.process_id}; expected 0 to {where.processes - 1}.")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            where.coordinator,
            where.processes,
            where.process_id,
            initialization_timeout=120,
            heartbeat_timeout_seconds=_SECONDS_UNTIL_MISSED,
        )
    except (RuntimeError, ValueError) as error:
        raise MeshError(
            f"process {where.process_id} of {where.processes} did not meet the others at {where.coordinator} "
            f"({str(error).splitlines()[0]}); start all of them, with the same coordinator."
        ) from None


def _keep_output_for_answers() -> None:
    """Standard output is Python's in process 0 and nobody's elsewhere: the collectives' library writes to it too."""
    sys.stdout.flush()
    to = os.dup(1) if jax.process_index() == 0 else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(to, "w")


def _on_tpu_machine() -> bool:
    return any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def wait_for_all(what: str) -> None:
    """Returns once every process has come here; from any thread, as no device takes part."""
    if jax.process_count() > 1:
        _store().wait_at_barrier(f"vl2/{what}", 3_600_000)


def most_of_all(number: int) -> int:
    """The largest of all processes' numbers, agreed on by the devices."""
    return int(np.max(of_all([number])))


def of_all(numbers: Sequence[int]) -> np.ndarray:
    """Every process's numbers, a row each."""
    mine = np.asarray(numbers, np.int32)
    return mine[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(mine))


def chosen_by_one(number: int) -> int:
    """Process 0's number, of up to 62 bits, in every process."""
    if jax.process_count() == 1:
        return number
    halves = np.asarray(divmod(number, 2**31), np.int32)
    upper, lower = np.asarray(multihost_utils.broadcast_one_to_all(halves)).tolist()
    return upper * 2**31 + lower


def _store() -> Any:
    """The key-value store of JAX's runtime, for which it has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def _end_with_others(ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            message = _store().blocking_key_value_get(_FAILURE_KEY, 500)
        except Exception:  # nothing came in these milliseconds; the runtime has a type of its own for that
            continue
        if not message.startswith(f"process {jax.process_index()}:"):
            print(f"vl2: {message}", file=sys.stderr, flush=True)
            time.sleep(0 if jax.process_index() else _SECONDS_TO_READ + 1)
            os._exit(1)
