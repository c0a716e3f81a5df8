"""Training states on disk: written beside the work, vouched for by checksums, the newest good one found again.

    RUN/checkpoints/00000500/state/           Orbax: parameters, optimiser state, step
    RUN/checkpoints/00000500/run.json         place in the data; run-1-of-4.json where four processes share it
    RUN/checkpoints/00000500/manifest.json    size and checksum of every file

A checkpoint gets its name once all of it is on disk. Orbax restores a flipped bit without a word, and raises on a
missing file; so files are compared with the manifest first, and a damaged checkpoint is passed over.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import (
    check_files,
    orbax,
    partial_loading,
    read_manifest,
    replace_directory,
    unfinished_directory,
    unfinished_path,
    write_manifest,
)
from vl2_jax.errors import CheckpointError
from vl2_jax.sharding.processes import wait_for_all

_STATE, _RUN = "state", "run.json"
_FORMAT = 2  # of what is saved with a state
T = TypeVar("T")
Reader = Callable[[Iterable[str]], dict[str, np.ndarray]]


class FormatError(CheckpointError):
    """A good checkpoint of another version of this program."""


class Checkpoints:
    """The checkpoints of one run, in a folder of their own.

    Attributes:
      best: a step whose checkpoint is kept however old it is.
    """

    best: int | None = None

    def __init__(self, folder: Path, keep: int, tell: Callable[[str], None], share: tuple[int, int] = (0, 1)):
        self.folder, self._keep, self._tell = folder, keep, tell
        self._run_file = _RUN if share[1] == 1 else f"run-{share[0]}-of-{share[1]}.json"
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()  # what is being written is finished, whatever ends the run

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Begins to write; returns once the state may be changed. At most one is written at a time."""
        self.wait()
        new = unfinished_path(self._path(step))
        if jax.process_index() == 0:
            shutil.rmtree(self._path(step), ignore_errors=True)  # a damaged one that was passed over
            unfinished_directory(self._path(step))
        wait_for_all(f"checkpoint {step} begins")
        (new / self._run_file).write_text(json.dumps({"format": _FORMAT, **run}), encoding="utf-8")
        # The next update takes the buffers. Orbax returns once all is on the host, where a CPU's buffers are already.
        (device, *_) = jax.tree.leaves(state)[0].sharding.device_set
        mine = jax.tree.map(jnp.copy, state) if device.platform == "cpu" else state
        response = orbax().save_async(str((new / _STATE).absolute()), _named(mine))

        def finish() -> None:
            try:
                response.result()
                wait_for_all(f"checkpoint {step} is written")
                if jax.process_index() == 0:
                    write_manifest(new, {})
                    replace_directory(new, self._path(step))
                    for old in self.steps()[: -self._keep]:
                        if old != self.best:
                            shutil.rmtree(self._path(old), ignore_errors=True)
            except Exception as error:  # told by the next `wait`, in the thread that trains
                self._failure = error

        self._writer = threading.Thread(target=finish)
        self._writer.start()

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
          CheckpointError: the last checkpoint could not be written.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise CheckpointError(f"a checkpoint could not be written to {self.folder}: {failure}") from failure

    def restore(self, like: Any) -> tuple[Any, list[dict[str, Any]]] | None:
        """The newest good state and what each process saved with it, or None if there is none.

        Args:
          like: a state of the same structure; arrays arrive with its shapes, dtypes and shardings.

        Raises:
          CheckpointError: none can be read, or the newest was written by another version.
        """
        abstract = jax.tree.map(_abstract, _named(like))

        def read(path: Path) -> tuple[Any, list[dict[str, Any]]]:
            runs = _runs_of(path)
            names = orbax().load(str((path / _STATE).absolute()), abstract)
            return _restored(like, names), runs

        found = self._newest(read)
        return None if found is None else found[1]

    def newest(self) -> tuple[int, Reader] | None:
        """Step of the newest good checkpoint, and a reader of its arrays by name (`name_of`)."""
        return self._newest(_reader)

    def of_step(self, step: int) -> tuple[int, Reader]:
        """The checkpoint of a step, as `newest`.

        Raises:
          CheckpointError: there is none, or it is damaged.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; the steps that have one: {there}.")
        check_files(self._path(step), read_manifest(self._path(step)))
        return step, _reader(self._path(step))

    def _newest(self, read: Callable[[Path], T]) -> tuple[int, T] | None:
        """`read` of the newest checkpoint that is as its manifest says and that it can read."""
        steps = self.steps()
        for step in reversed(steps):
            path = self._path(step)
            try:
                check_files(path, read_manifest(path))
                return step, read(path)
            except FormatError:
                raise
            except Exception as error:  # a checkpoint may be damaged in ways that Orbax tells by any exception
                self._tell(f"checkpoint {path} is passed over: {str(error).splitlines()[0]}")
        if steps:
            raise CheckpointError(f"none of the {len(steps)} checkpoint(s) in {self.folder} can be read.")
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


def name_of(part: str, path: str) -> str:
    """What an array of a state's `part` ("trained" or "kept") is called; Orbax would make folders of "/"."""
    return f"{part}.{path}".replace("/", ".")


def _reader(path: Path) -> Reader:
    return partial(_read_arrays, str((path / _STATE).absolute()))


def _runs_of(path: Path) -> list[dict[str, Any]]:
    """What each process saved, in their order."""
    shares = len(list(path.glob("run-*-of-*.json")))
    files = [_RUN] if not shares else [f"run-{share}-of-{shares}.json" for share in range(shares)]
    runs = [json.loads((path / name).read_text(encoding="utf-8")) for name in files]
    if any(run.get("format") != _FORMAT for run in runs):
        raise FormatError(
            f"{path} was written by another version of vl2-jax, whose place in the data means something else; begin a "
            "new run (--out) from what `vl2 export` makes of this one."
        )
    return runs


def _read_arrays(root: str, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Some arrays of a checkpoint, on the host."""
    wanted = dict.fromkeys(names, np.ndarray)
    with partial_loading():
        return {name: np.asarray(array) for name, array in orbax().load(root, wanted).items()} if wanted else {}


def _named(state: Any) -> dict[str, Any]:
    """Leaves by name (`name_of`)."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    parts = ((jax.tree_util.keystr(path, simple=True, separator=".").partition("."), leaf) for path, leaf in leaves)
    return {name_of(part, rest) if dot else part: leaf for (part, dot, rest), leaf in parts}


def _restored(like: Any, names: dict[str, Any]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), [names[name] for name in _named(like)])


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
