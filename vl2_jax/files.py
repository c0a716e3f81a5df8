"""Files of a model, in a directory or on a bucket (`gs://bucket/model`): what `pathlib` does not do there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


def path_of(name: str | os.PathLike[str]) -> Path:
    """A path that reads as `pathlib.Path` does, wherever its files are."""
    if not is_remote(name):
        return Path(name).expanduser()
    from etils import epath

    remote: Any = epath.Path(name)
    return remote


def is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def size_of(path: Path) -> int:
    status: Any = path.stat()
    return status.length if is_remote(path) else status.st_size


def read_range(path: Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes: mapped from a local file, so that pages come in as they are used; one request to a bucket."""
    if not is_remote(path):
        return np.asarray(np.memmap(path, np.uint8, "r", offset, size))
    with path.open("rb") as stream:
        stream.seek(offset)
        return np.frombuffer(stream.read(size), np.uint8)
