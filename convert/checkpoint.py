"""The converted checkpoint: an Orbax tree that is written and read piece by piece, and a manifest that vouches for it.

    DIR/config.json, tokenizer.json, ...    the source's small files, byte for byte
    DIR/params/                             Orbax, one folder a parameter, its bytes uncompressed
    DIR/manifest.json                       dtype, shape and checksum of every parameter; size and checksum of files

Orbax and safetensors restore a flipped bit without a word, so the manifest is checked at every load.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

from convert.safetensors_files import SUFFIX, has_weights, header_size
from convert.weight_map import Leaf, unflatten
from vl2_jax.errors import CheckpointError
from vl2_jax.files import is_remote, size_of
from vl2_jax.progress import Report, silent

MANIFEST_FILE = "manifest.json"
PARAMS_FOLDER = "params"
FILLED = "filled"  # in the manifest, of a parameter that the source did not have
_BLOCK = 1 << 24


def is_converted(directory: Path) -> bool:
    """Whether this is (what is left of) a converted checkpoint; an exported one has a manifest too, and its weights."""
    if (directory / PARAMS_FOLDER).is_dir():
        return True
    return (directory / MANIFEST_FILE).is_file() and not has_weights(directory)


def pieces(leaves: Iterable[Leaf]) -> list[list[Leaf]]:
    """Parameters in the groups that are written and read together: a layer, or a part of the model."""
    groups: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        groups.setdefault("/".join(leaf.path.split("/")[:2]), []).append(leaf)
    return list(groups.values())


def write_piece(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    ocp = orbax()
    with _context():
        ocp.partial.save(str((directory / PARAMS_FOLDER).absolute()), unflatten(arrays))


def finish(directory: Path, tensors: Mapping[str, dict[str, Any]]) -> None:
    """Closes the Orbax tree and writes the manifest."""
    ocp = orbax()
    with _context():
        ocp.partial.finalize(str((directory / PARAMS_FOLDER).absolute()))
    write_manifest(directory, tensors)


def write_manifest(directory: Path, tensors: Mapping[str, dict[str, Any]]) -> None:
    """`manifest.json` for the files that stand in `directory`; parameters' own bytes are vouched for by `tensors`."""
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "xxh3": _checksum_around_tensors(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    body = {"format": 1, "files": files, "tensors": dict(tensors)}
    body["xxh3"] = _checksum_of_json(body)
    temporary = directory / f".{MANIFEST_FILE}.new"
    temporary.write_text(json.dumps(body, indent=1))
    os.replace(temporary, directory / MANIFEST_FILE)


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after checking it against itself.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, so nothing vouches for this checkpoint; convert it again, or load with verify=False."
        )
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        stated = body.pop("xxh3")
        if stated != _checksum_of_json(body):
            raise ValueError("its checksum does not match")
    except (ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); convert the model again.") from None
    return body


def check_files(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Compares every file with the manifest, except for the bytes of tensors, which are compared as they are read.

    Raises:
      CheckpointError: naming every file that is missing or changed.
    """
    problems = []
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif size_of(path) != entry["size"]:
            problems.append(f"{name} has {size_of(path)} bytes, expected {entry['size']}")
        elif _checksum_around_tensors(path) != entry["xxh3"]:
            problems.append(f"{name} is damaged (its checksum does not match)")
    if problems:
        raise CheckpointError(listing(f"{directory} was damaged", problems))


def check_tensor(manifest: Mapping[str, Any], name: str, array: np.ndarray, where: Path) -> None:
    """Raises CheckpointError if an array is not the one that the manifest vouches for."""
    if checksum(array) != manifest["tensors"].get(name, {}).get("xxh3"):
        raise CheckpointError(
            f"{name} of {where} is damaged (its checksum does not match); convert, export or download the model again."
        )


def describe(array: np.ndarray) -> dict[str, Any]:
    """The manifest's entry of a parameter."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "xxh3": checksum(array)}


def checksum(array: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).view(np.uint8).data)


def read_pieces(directory: Path, leaves: list[Leaf], verify: bool, report: Report) -> Iterator[dict[str, np.ndarray]]:
    """The parameters of a converted checkpoint, a piece at a time, in the order of `leaves`.

    Raises:
      CheckpointError: a file or a parameter differs from the manifest, naming it.
    """
    manifest = read_manifest(directory) if verify else None
    if manifest is not None:
        check_files(directory, manifest)
    ocp = orbax()
    folder = directory / PARAMS_FOLDER
    root = str(folder if is_remote(folder) else folder.absolute())
    total, done = sum(int(np.prod(leaf.shape)) for leaf in leaves), 0
    for group in pieces(leaves):
        wanted = unflatten({leaf.path: np.ndarray for leaf in group})
        try:
            with _context():
                tree = ocp.load(root, wanted)
        except Exception as error:  # whatever Orbax meets in a damaged tree
            raise CheckpointError(
                f"{directory} cannot be read ({str(error).splitlines()[0]}); convert it again."
            ) from None
        arrays = {leaf.path: _at(tree, leaf.path) for leaf in group}
        for leaf in group:
            array = arrays[leaf.path]
            if tuple(array.shape) != leaf.shape:
                raise CheckpointError(
                    f"{leaf.path} has shape {list(array.shape)}, expected {list(leaf.shape)}; "
                    f"config.json and the parameters of {directory} do not belong together."
                )
            if manifest is not None:
                check_tensor(manifest, leaf.path, array, directory)
            done += array.size
        report("reading weights", done, total)
        yield arrays


def replace_directory(new: Path, final: Path, report: Report = silent) -> None:
    """Gives a finished directory its name, all of it on disk first: a crash leaves either nothing or everything."""
    files = [path for path in new.rglob("*") if path.is_file()]
    for number, path in enumerate(files):
        report("writing to disk", number, len(files))
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    os.rename(new, final)


def unfinished_path(final: Path) -> Path:
    """Where what will become `final` is written."""
    return final.with_name(f".{final.name}.unfinished")


def unfinished_directory(final: Path) -> Path:
    """A fresh place to write what will become `final`; what an interrupted run left there is removed.

    Raises:
      CheckpointError: `final` exists already.
    """
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise CheckpointError(f"{final} exists already; remove it or choose another destination.")
    if final.exists():
        final.rmdir()
    new = unfinished_path(final)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def listing(heading: str, problems: list[str], most: int = 50) -> str:
    rest = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([f"{heading} ({len(problems)} problem(s)):", *problems[:most], *rest])


def dtype_of(name: str) -> np.dtype:
    """A NumPy dtype by name, bfloat16 included.

    Raises:
      CheckpointError: a dtype that weights cannot have.
    """
    names = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float16": np.float16}
    if name not in names:
        raise CheckpointError(f"dtype {name!r} is not supported; choose one of {', '.join(names)}.")
    return np.dtype(names[name])


def _holds_tensor(path: Path) -> bool:
    """A chunk of a parameter: Orbax names it by its place, "0.0.0", beside the array's `.zarray`."""
    return (path.parent / ".zarray").is_file() and path.name.replace(".", "").isdigit()


def _checksum_around_tensors(path: Path) -> str:
    """Checksum of what a file holds besides tensors: all of it, a safetensors header, or nothing of an Orbax chunk."""
    left = size_of(path)
    if path.suffix == SUFFIX:
        left = min(left, header_size(path))
    elif _holds_tensor(path):
        left = 0
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(min(left, _BLOCK)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _checksum_of_json(body: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())


def _at(tree: Mapping[str, Any], path: str) -> np.ndarray:
    node: Any = tree
    for name in path.split("/"):
        node = node[name]
    return np.asarray(node)


def orbax() -> Any:
    from absl import logging
    from orbax.checkpoint import v1

    logging.set_verbosity(logging.ERROR)
    return v1


def partial_loading() -> Any:
    """A context in which some arrays of a tree may be loaded without the others."""
    context = orbax().Context()
    context.pytree.loading.partial_load = True
    return context


def _context() -> Any:
    """Raw bytes, one folder a parameter: what is on disk is what the manifest's checksums are of."""
    context = partial_loading()
    saving = context.array.saving
    saving.use_ocdbt = saving.use_zarr3 = saving.use_compression = False
    context.memory.deepcopy_host_arrays = False
    return context
