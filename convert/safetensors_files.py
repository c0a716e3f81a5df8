"""Reading and writing of safetensors directories a tensor at a time, without holding a file in memory.

The format is an 8-byte header length, a JSON header with each tensor's dtype, shape and byte range, then the bytes. We
read the header ourselves because a truncated file must be reported tensor by tensor, and write it ourselves because
the library can only write a file whose tensors are all in memory.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vl2_jax.errors import CheckpointError, shown
from vl2_jax.files import read_range, size_of, why_not_whole

INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
SINGLE_FILE = "model.safetensors"
_WEIGHTS = {"BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}
_OTHERS = {
    "F64": np.float64, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
_DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in (_WEIGHTS | _OTHERS).items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
WEIGHT_DTYPES = tuple(_DTYPES[name] for name in _WEIGHTS)
# Beside a model's weights: adapters, other layouts of the same weights, states of optimisers. Hidden files too.
_NOT_THE_MODEL = re.compile(r"\..*|(adapter|consolidated|ema|optimizer|scheduler|rng_state|training_args)[^A-Za-z].*")
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are; one without bytes is filled with zeros."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    size: int

    def read(self) -> np.ndarray:
        """The tensor; of a local file it is mapped, and its pages can be dropped again."""
        if self.size == 0:
            return np.zeros(self.shape, self.dtype)
        return read_range(self.file, self.offset, self.size).view(self.dtype).reshape(self.shape)


def has_weights(directory: Path) -> bool:
    """Whether there is any file that may hold a model's weights."""
    return any(not _NOT_THE_MODEL.fullmatch(path.name) for path in directory.glob(f"*{SUFFIX}"))


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a model's weights, of all that are in its directory.

    Those that the index lists, or the one file that has them all, or whatever is no other thing by its name.

    Raises:
      CheckpointError: a file that the index lists is missing, the index is damaged, or a file is not what it seems.
    """
    present = {path.name: path for path in sorted(directory.glob(f"*{SUFFIX}")) if not path.is_dir()}
    listed = sorted({*read_index(directory).values()}) if (directory / INDEX_FILE).is_file() else []
    missing = [name for name in listed if name not in present]
    if missing and SINGLE_FILE not in present:
        raise CheckpointError(
            f"{len(missing)} of the {len(listed)} weight files that {directory / INDEX_FILE} lists are missing "
            f"({shown(', '.join(missing), 120)}): the download is not complete; download the model again."
        )
    single = [SINGLE_FILE] if SINGLE_FILE in present else []
    others = [name for name in present if not _NOT_THE_MODEL.fullmatch(name)]
    files = [present[name] for name in (listed if listed and not missing else single or others)]
    for path in files:
        if reason := why_not_whole(path):
            raise CheckpointError(reason)
    return files


def read_index(directory: Path) -> dict[str, str]:
    """Tensor -> file, of a directory with an index.

    Raises:
      CheckpointError: it is damaged.
    """
    path = directory / INDEX_FILE
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not placed or not all(isinstance(name, str) for name in placed.values()):
            raise ValueError("it must name a file for every tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            why_not_whole(path) or f"{path} is damaged ({type(error).__name__}: {error}); download it again."
        ) from None
    return placed


def scan(directory: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Every tensor of a directory's weight files, and what is wrong with them.

    Raises:
      CheckpointError: see `weight_files`.
    """
    problems: list[str] = []
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(directory):
        found, troubles = scan_file(file)
        for name in found.keys() & entries.keys():
            problems.append(f"{name} stands in both {entries[name].file.name} and {file.name}")
        entries |= found
        problems += troubles
    return entries, problems


def header_size(file: Path) -> int:
    """Bytes before the first tensor, as the file states them."""
    with file.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def scan_file(file: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Every tensor of one file, and what is wrong with them."""
    size = size_of(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            return {}, [f"{file.name} is truncated or not a safetensors file ({size} bytes)"]
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries, problems = {}, []
            expected_end = start = 8 + length
            for name, info in header.items():
                begin, end = info["data_offsets"]
                shape = tuple(info["shape"])
                if not all(isinstance(n, int) and n >= 0 for n in (begin, end, *shape)):
                    raise ValueError(f"{shown(name)} has the entry {shown(info)}")
                expected_end = max(expected_end, start + end)
                if info["dtype"] not in _DTYPES:
                    problems.append(
                        f"{name} in {file.name} has dtype {shown(info['dtype'])}; expected one of {[*_WEIGHTS]}"
                    )
                    continue
                dtype = _DTYPES[info["dtype"]]
                if end - begin != math.prod(shape) * dtype.itemsize:
                    problems.append(f"{name} in {file.name} has a damaged header entry {shown(info)}")
                elif start + end > size:
                    problems.append(f"{name} is truncated: {file.name} ends {start + end - size} bytes too early")
                else:
                    entries[name] = TensorEntry(file, dtype, shape, start + begin, end - begin)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return {}, [f"{file.name} has a damaged header ({type(error).__name__}: {shown(str(error), 200)})"]
    if size > expected_end:
        problems.append(f"{file.name} is {size - expected_end} bytes longer than its header says")
    return entries, problems


def layout_file(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Header bytes of a new file and each tensor's absolute (offset, size), laid out as the library does it:

    wider dtypes first, then by name; the header padded with blanks to 8 bytes.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ranges: dict[str, tuple[int, int]] = {}
    position = 0
    for name, (dtype, shape) in ordered:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        ranges[name] = (position, size)
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: (len(head) + begin, size) for name, (begin, size) in ranges.items()}
