"""Rows of Parquet, Arrow and Feather files, a part of the table at a time.

A part is a row group or a record batch. Those that were read last are kept, up to 256 MB, so that a file of one part is
read once and one of many is never held as a whole. pyarrow is imported where there is such a file.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vl2_jax.errors import ConfigError
from vl2_jax.installation import install_line

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"  # how these files begin
_KEPT = 1 << 28  # bytes


class TableSource:
    """Records of a table, by row number."""

    def __init__(self, path: Path, folder: Path):
        self._path, self._folder = path, folder
        self._begin()
        with _reading(path):
            parts, rows_of, _ = self._open()
            self._ends = np.cumsum([rows_of(part) for part in range(parts)], dtype=np.int64)
        if not len(self):
            raise ConfigError(f"{path} holds no record.")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = int(np.searchsorted(self._ends, index, "right"))
        row = index - (int(self._ends[part - 1]) if part else 0)
        with self._lock, _reading(self._path):
            (record,) = self._part(part).slice(row, 1).to_pylist()
        return {"where": f"{self._path}, row {index + 1}", "record": record, "folder": self._folder}

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_folder": self._folder, "_ends": self._ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()  # Grain's threads share a source
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._opened: tuple[int, Callable[[int], int], Callable[[int], Any]] | None = None

    def _part(self, part: int) -> Any:
        if part not in self._kept:
            self._kept[part] = self._open()[2](part)
            while len(self._kept) > 1 and sum(rows.nbytes for rows in self._kept.values()) > _KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(part)
        return self._kept[part]

    def _open(self) -> tuple[int, Callable[[int], int], Callable[[int], Any]]:
        """How many parts there are, what tells the rows of one, and what reads one."""
        if self._opened is None:
            self._opened = _opened(self._path)
        return self._opened


def _opened(path: Path) -> tuple[int, Callable[[int], int], Callable[[int], Any]]:
    pyarrow = _pyarrow(path)
    with path.open("rb") as stream:
        head = stream.read(8)
    if head.startswith(PARQUET):
        file = importlib.import_module("pyarrow.parquet").ParquetFile(path)
        return file.num_row_groups, lambda part: file.metadata.row_group(part).num_rows, file.read_row_group
    mapped = pyarrow.memory_map(str(path))
    if head.startswith(ARROW_FILE):
        batches = pyarrow.ipc.open_file(mapped)
        return batches.num_record_batches, lambda part: batches.get_batch(part).num_rows, batches.get_batch
    read = list(pyarrow.ipc.open_stream(mapped))  # of which nothing is copied
    return len(read), lambda part: read[part].num_rows, read.__getitem__


def _pyarrow(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise ConfigError(f"reading {path} needs pyarrow: {install_line('train')}") from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.startswith("pyarrow"):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{path} cannot be read ({reason:.150}); it may be damaged or incomplete.") from None
        raise
