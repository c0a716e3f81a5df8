"""Reading and writing of safetensors directories a tensor at a time, without holding a file in memory.

The format is an 8-byte header length, a JSON header with each tensor's dtype, shape and byte range, then the bytes. We
read the header ourselves because a truncated file must be reported tensor by tensor, and write it ourselves because
the library can only write a file whose tensors are all in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vl2_jax.files import read_range, size_of

INDEX_FILE = "model.safetensors.index.json"
SUFFIX = ".safetensors"
_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are."""

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


def scan(directory: Path) -> tuple[dict[str, TensorEntry], list[str]]:
    """Every tensor of a directory's safetensors files, and what is wrong with them."""
    problems: list[str] = []
    files = sorted(directory.glob(f"*{SUFFIX}"))
    placed: Mapping[str, str] = {}
    if (directory / INDEX_FILE).is_file():
        try:
            placed = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            problems.append(f"{INDEX_FILE} is damaged ({type(error).__name__}: {error})")
        present = {file.name for file in files}
        problems += [f"{name} is missing (listed in {INDEX_FILE})" for name in sorted({*placed.values()} - present)]
        files = [file for file in files if not placed or file.name in set(placed.values())]
    entries: dict[str, TensorEntry] = {}
    for file in files:
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
                shape = tuple(int(n) for n in info["shape"])
                expected_end = max(expected_end, start + end)
                if info["dtype"] not in _DTYPES:
                    problems.append(f"{name} in {file.name} has dtype {info['dtype']}; expected one of {[*_DTYPES]}")
                    continue
                dtype = _DTYPES[info["dtype"]]
                if end - begin != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize or begin < 0:
                    problems.append(f"{name} in {file.name} has a damaged header entry {info}")
                elif start + end > size:
                    problems.append(f"{name} is truncated: {file.name} ends {start + end - size} bytes too early")
                else:
                    entries[name] = TensorEntry(file, dtype, shape, start + begin, end - begin)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [f"{file.name} has a damaged header ({type(error).__name__}: {error})"]
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
