"""A released Hugging Face directory to a converted checkpoint, or straight into memory, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from convert.checkpoint import (
    MANIFEST_FILE,
    check_files,
    check_tensor,
    describe,
    dtype_of,
    finish,
    listing,
    pieces,
    read_manifest,
    replace_directory,
    unfinished_directory,
    write_piece,
)
from convert.safetensors_files import SUFFIX, TensorEntry, scan
from convert.weight_map import Leaf, plan, torch_shapes
from vl2_jax.config import read_config
from vl2_jax.errors import CheckpointError
from vl2_jax.progress import Report, silent

_KEPT_SUFFIXES = (".json", ".txt", ".md", ".model", ".jinja")
_KEPT_NAMES = ("LICENSE", "NOTICE")
CORRECTION_BIAS = "correction_bias"  # stays float32: rounding it changes routing


def convert(source: Path, destination: Path, dtype: str | None = None, report: Report = silent) -> None:
    """Writes the converted checkpoint of a released directory.

    Args:
      source: `config.json`, `*.safetensors`, tokenizer and processor files.
      destination: a directory that does not exist yet.
      dtype: of the parameters; `None` keeps the checkpoint's.

    Raises:
      CheckpointError: tensors are missing, unexpected, misshaped or truncated (all of them named), or the destination
        exists; nothing is written.
    """
    leaves = plan(read_config(source))
    entries = checked_entries(source, leaves)
    wanted = None if dtype is None else dtype_of(dtype)
    new = unfinished_directory(destination)
    tensors: dict[str, dict] = {}
    for arrays in read_pieces(source, leaves, entries, wanted, verify=True, report=report):
        write_piece(new, arrays)
        tensors |= {path: describe(array) for path, array in arrays.items()}
    copy_small_files(source, new)
    finish(new, tensors)
    replace_directory(new, destination, report)


def checked_entries(source: Path, leaves: list[Leaf]) -> dict[str, TensorEntry]:
    """Every tensor of a released directory, after comparing all of them with what the configuration needs.

    Raises:
      CheckpointError: listing every difference.
    """
    if not any(source.glob(f"*{SUFFIX}")):
        raise CheckpointError(f"{source} holds no *{SUFFIX} file; give the directory of a released model.")
    entries, problems = scan(source)
    expected = torch_shapes(leaves)
    blamed = " ".join(problems)
    problems += [f"{key} is missing" for key in expected if key not in entries and key not in blamed]
    problems += [f"{key} is unexpected" for key in entries if key not in expected]
    problems += [
        f"{key} has shape {list(entries[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if key in entries and entries[key].shape != shape
    ]
    if problems:
        raise CheckpointError(listing(f"the weights of {source} do not fit its config.json", problems))
    return entries


def read_pieces(
    source: Path,
    leaves: list[Leaf],
    entries: Mapping[str, TensorEntry],
    dtype: np.dtype | None,
    verify: bool,
    report: Report,
) -> Iterator[dict[str, np.ndarray]]:
    """The parameters of a released directory, a piece at a time; checked against its manifest where it has one."""
    manifest = None
    if verify and (source / MANIFEST_FILE).is_file():
        manifest = read_manifest(source)
        check_files(source, manifest)
    total, done = sum(entry.size for entry in entries.values()), 0
    for group in pieces(leaves):
        arrays = {}
        for leaf in group:
            tensors = [entries[key].read() for key in leaf.keys]
            if manifest is not None:
                for key, tensor in zip(leaf.keys, tensors):
                    check_tensor(manifest, key, tensor, entries[key].file)
            kept = tensors[0].dtype if dtype is None or leaf.path.endswith(CORRECTION_BIAS) else dtype
            arrays[leaf.path] = leaf.assemble(tensors, kept)
            done += sum(entries[key].size for key in leaf.keys)
        report("reading weights", done, total)
        yield arrays


def copy_small_files(source: Path, destination: Path) -> None:
    """Configuration, tokenizer and documents, byte for byte; the weight index tells an export the file layout."""
    for path in sorted(source.iterdir()):
        is_small = path.suffix in _KEPT_SUFFIXES or path.name in _KEPT_NAMES
        if path.is_file() and is_small and path.name != MANIFEST_FILE:
            (destination / path.name).write_bytes(path.read_bytes())
