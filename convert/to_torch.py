"""A converted checkpoint back to the released Hugging Face layout, tensor for tensor."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from convert.checkpoint import (
    FILLED,
    checksum,
    dtype_of,
    is_converted,
    read_manifest,
    read_pieces,
    replace_directory,
    unfinished_directory,
    write_manifest,
)
from convert.from_torch import copy_small_files
from convert.quantise import check_not_quantised
from convert.safetensors_files import INDEX_FILE, SINGLE_FILE, layout_file, read_index
from convert.weight_map import Leaf, plan
from vl2_jax.config import read_config
from vl2_jax.errors import CheckpointError, VL2Warning
from vl2_jax.files import local_destination, local_source
from vl2_jax.progress import Report, silent

_LARGEST_FILE = 8 * 2**30


def export(source: Path, destination: Path, report: Report = silent) -> None:
    """Writes the released layout of a converted checkpoint: safetensors, index, configuration and tokenizer.

    The files are laid out as the index says that came with the checkpoint, or by size where it had none.

    Raises:
      CheckpointError: the source is not a converted checkpoint or was damaged, or the destination exists.
    """
    source = local_source(source, "a converted checkpoint")
    destination = local_destination(destination, "the exported model")
    if not is_converted(source):
        raise CheckpointError(f"{source} is not a converted checkpoint; `vl2 convert` makes one.")
    manifest = read_manifest(source)
    leaves = plan(read_config(source))
    check_not_quantised(source, leaves)
    dtypes = {leaf.path: dtype_of(manifest["tensors"][leaf.path]["dtype"]) for leaf in leaves}
    filled = [key for leaf in leaves if manifest["tensors"][leaf.path].get(FILLED) for key in leaf.keys]
    if filled:
        line = f"{len(filled)} tensors that the original did not have ({filled[0]} ...) are written as zeros"
        warnings.warn(f"{destination}: {line}; nothing executes them", VL2Warning, stacklevel=2)
    arrays = read_pieces(source, leaves, verify=True, report=report)
    write_released(source, destination, leaves, dtypes, arrays, report)


def write_released(
    small_files: Path,
    destination: Path,
    leaves: list[Leaf],
    dtypes: Mapping[str, np.dtype],
    pieces: Iterable[Mapping[str, np.ndarray]],
    report: Report = silent,
) -> None:
    """Parameters as they come, a few at a time, to the released layout.

    Args:
      small_files: directory with the configuration and tokenizer that go with them.
      dtypes: of every parameter on disk.
      pieces: parameters by path; together all of `leaves`.
    """
    destination = local_destination(destination, "the exported model")
    new = unfinished_directory(destination)
    copy_small_files(small_files, new)
    ranges = _create_files(new, leaves, dtypes)
    checksums = {}
    for arrays in pieces:
        for leaf in leaves:
            if leaf.path not in arrays:
                continue
            for key, tensor in leaf.split(arrays[leaf.path].astype(dtypes[leaf.path], copy=False)).items():
                contiguous = np.ascontiguousarray(tensor)
                file, offset = ranges[key]
                with file.open("r+b") as stream:
                    stream.seek(offset)
                    stream.write(contiguous.view(np.uint8).data if contiguous.size else b"")
                checksums[key] = {"xxh3": checksum(contiguous)}
    write_manifest(new, checksums)
    replace_directory(new, destination, report)


def _create_files(directory: Path, leaves: list[Leaf], dtypes: Mapping[str, np.dtype]) -> dict[str, tuple[Path, int]]:
    """Writes the headers of all files and tells where each tensor's bytes go."""
    tensors = {key: (dtypes[leaf.path], leaf.torch_shape) for leaf in leaves for key in leaf.keys}
    by_file: dict[str, dict[str, tuple[np.dtype, tuple[int, ...]]]] = defaultdict(dict)
    for key, file in _placement(directory, tensors).items():
        by_file[file][key] = tensors[key]
    places: dict[str, tuple[Path, int]] = {}
    for name, members in by_file.items():
        path = directory / name
        header, ranges = layout_file(members)
        with path.open("wb") as stream:
            stream.write(header)
            stream.truncate(max((begin + size for begin, size in ranges.values()), default=len(header)))
        places |= {key: (path, begin) for key, (begin, _) in ranges.items()}
    return places


def _placement(directory: Path, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, str]:
    """Released key -> file name."""
    index = directory / INDEX_FILE
    if index.is_file():
        placed = read_index(directory)
        if set(placed) == set(tensors):
            return placed
        index.unlink()
    sizes = {key: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for key, (dtype, shape) in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > _LARGEST_FILE:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    if len(shards) == 1:
        return dict.fromkeys(tensors, SINGLE_FILE)
    count = len(shards)
    placed = {
        key: f"model-{number:05d}-of-{count:06d}.safetensors" for number, keys in enumerate(shards, 1) for key in keys
    }
    body = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(placed.items()))}
    index.write_text(json.dumps(body, indent=2))
    return placed
