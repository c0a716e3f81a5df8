"""Data files by record: which kind a file is, and where in it each record stands.

    JSON lines, a JSON list, CSV   byte ranges in NumPy arrays; a record is read when it is asked for
    those as .gz, .bz2, .xz        unpacked beside the other temporary files for as long as the process lives
    Parquet, Arrow, Feather        parts of the table (`training.tables`)

A record is `{"where", "record", "folder"}`: where it stands, its bytes or its columns, and where its pictures are.
"""

from __future__ import annotations

import atexit
import bz2
import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from vl2_jax.errors import ConfigError, ConversationError, shown
from vl2_jax.files import is_remote, path_of
from vl2_jax.training.tables import ARROW_FILE, ARROW_STREAM, PARQUET, TableSource

KINDS = "JSON lines, a JSON list, CSV or TSV (also as .gz, .bz2 or .xz), Parquet, Arrow or Feather"
_PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_WINDOW = 1 << 20  # bytes of a JSON list that are looked at together
_LONGEST_RECORD = 1 << 28  # bytes
_HASHED_WHOLE = 1 << 28  # bytes; of larger files, this many blocks of a megabyte are:
_HASHED_BLOCKS = 64
_FIRST_LINES = 10
_BLANK = re.compile(r"[ \t\r\n]*")
csv.field_size_limit(2**31 - 1)  # a cell may hold a picture


def fingerprint(path: str | os.PathLike[str]) -> str:
    """What changes when a data file's content does: its size and a hash of it.

    Of more than 256 MB, 64 evenly spaced megabytes are hashed, the first and the last among them.

    Raises:
      ConfigError: there is no such file, or it cannot be read.
    """
    file = _existing(path)
    digest = xxhash.xxh3_64()
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            if size <= _HASHED_WHOLE:
                while block := stream.read(_WINDOW):
                    digest.update(block)
            else:
                for begin in np.linspace(0, size - _WINDOW, _HASHED_BLOCKS).astype(np.int64):
                    stream.seek(int(begin))
                    digest.update(stream.read(_WINDOW))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}).") from None
    return f"{size}-{digest.hexdigest()}"


def open_source(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> JsonSource | TableSource:
    """The records of a data file of any kind that is known.

    Args:
      path: the file; its content tells the kind, but for CSV and TSV, whose names do.
      images: where relative paths of pictures begin; `None` is the folder of the file.

    Raises:
      ConfigError: there is no such file or folder, the file's kind is not known, it is damaged or holds no record.
    """
    file = _existing(path)
    with _reading(file), file.open("rb") as stream:
        head = stream.read(8)
    if head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        return TableSource(file, _folder(file, images))
    return JsonSource(file, images)


class JsonSource:
    """Records of JSON lines, a JSON list or a CSV file, read when asked for, by number."""

    def __init__(self, path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None):
        self._path = _existing(path)
        self._folder = _folder(self._path, images)
        with _reading(self._path):
            self._file = _unpacked(self._path, fingerprint(self._path)) if _is_packed(self._path) else self._path
            _check_text(self._path, self._file)
            self._columns: list[str] | None = None
            self._lines: np.ndarray | None = None
            if self._file.suffix.lower() in (".csv", ".tsv"):
                self._delimiter, self._columns, ranges = _rows_of(self._path, self._file)
            elif _first_character(self._file) == b"[":
                ranges = _elements_of(self._path, self._file)
            else:
                self._lines, begins, ends = _lines_of(self._path, self._file)
                ranges = begins, ends
        self._begins, self._ends = ranges
        if not len(self._begins):
            raise ConfigError(f"{self._path} holds no record.")

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin, end = int(self._begins[index]), int(self._ends[index])
        with _reading(self._path), self._file.open("rb") as stream:
            stream.seek(begin)
            content = stream.read(end - begin)
        if self._lines is not None:
            return {"where": f"{self._path}:{self._lines[index]}", "record": content, "folder": self._folder}
        if self._columns is None:
            return {"where": f"{self._path}, record {index + 1}", "record": content, "folder": self._folder}
        cells = next(csv.reader(io.StringIO(content.decode("utf-8", "replace"), ""), delimiter=self._delimiter), [])
        row = {column: cell or None for column, cell in zip(self._columns, cells)}
        return {"where": f"{self._path}, row {index + 1}", "record": row, "folder": self._folder}


def parsed(content: Any) -> Any:
    """A record's value, from its bytes.

    Raises:
      ConversationError: they are not JSON.
    """
    if not isinstance(content, bytes):
        return content
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ConversationError(f"it is not valid JSON: {error.msg} at character {error.pos + 1}.") from None
    except RecursionError:
        raise ConversationError("it is not a record: lists in lists without end.") from None
    except ValueError as error:  # bytes that are not UTF-8, numbers of thousands of digits
        raise ConversationError(f"it is not valid JSON: {error}.") from None


def _existing(path: str | os.PathLike[str]) -> Path:
    if is_remote(path):
        raise ConfigError(f"the data file {shown(os.fspath(path))} is not on this machine; copy it here first.")
    file = path_of(path)
    try:
        if file.is_file():
            return file
        is_folder = file.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL character
        is_folder = False
    if is_folder:
        raise ConfigError(f"the data file {shown(str(file))} is a folder; give the files in it, a source each.")
    raise ConfigError(f"there is no data file {shown(str(file), 150)} (looked for in {Path.cwd()}); correct its path.")


def _folder(file: Path, images: str | os.PathLike[str] | None) -> Path:
    if images is None:
        return file.parent
    folder = path_of(images)
    if is_remote(images) or not folder.is_dir():
        raise ConfigError(f"there is no folder {shown(os.fspath(images))} for the pictures of {file}; correct it.")
    return folder


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever a file cannot be read for, in one sentence."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{file} cannot be read ({reason}); it may be damaged or incomplete.") from None


def _is_packed(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(6).startswith(tuple(_PACKED))


@functools.cache
def _unpacked(file: Path, _fingerprint: str) -> Path:
    """A compressed file's content in a file of its own, where any record can be reached; gone with the process."""
    folder = Path(tempfile.mkdtemp(prefix="vl2-jax-data-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with file.open("rb") as stream:
        start = stream.read(6)
    unpack = next(opened for magic, opened in _PACKED.items() if start.startswith(magic))
    unpacked = folder / file.stem
    with unpack(file, "rb") as source, unpacked.open("wb") as target:
        shutil.copyfileobj(source, target, _WINDOW)
    return unpacked


def _check_text(path: Path, file: Path) -> None:
    """Raises ConfigError for what is not made of records of text, before each of its lines is found to be none."""
    with file.open("rb") as stream:
        head = stream.read(4096)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{path} is UTF-16; save it as UTF-8.")
    if head.startswith(b"version https://git-lfs"):
        raise ConfigError(f"{path} is a pointer of Git LFS and not the data; fetch it with `git lfs pull`.")
    if b"\0" in head:
        raise ConfigError(f"{path} is of a kind that is not read; expected {KINDS}.")


def _first_character(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _lines_of(path: Path, file: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 line number, begin and end of every line that is not empty."""
    numbers, begins, ends = array("q"), array("q"), array("q")
    first: list[bytes] = []
    begin = 0
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            if line[mark:].strip():
                numbers.append(number)
                begins.append(begin + mark)
                ends.append(begin + len(line))
                if len(first) < _FIRST_LINES:
                    first.append(line[mark:])
            begin += len(line)
    if first:
        _check_lines(path, first)
    return np.asarray(numbers, np.int64), np.asarray(begins, np.int64), np.asarray(ends, np.int64)


def _check_lines(path: Path, first: list[bytes]) -> None:
    if not any(line.lstrip()[:1] == b"{" for line in first):
        raise ConfigError(f"no line at the beginning of {path} is a JSON object; expected {KINDS}.")
    if len(first) > 1 and first[0][:1] == b"{" and not any(line[:1] == b"{" for line in first[1:]):
        try:
            json.loads(first[0])
        except (ValueError, RecursionError):
            raise ConfigError(
                f"{path} is one JSON object over several lines; expected a list of records, or a record a line."
            ) from None


def _elements_of(path: Path, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """int64 begin and end of every element of a JSON list, of which no more than a window is held.

    Bytes are looked at as Latin-1: JSON's own characters are those of ASCII, and a character is a byte.
    """
    begins, ends = array("q"), array("q")
    decode = json.JSONDecoder(parse_int=len, parse_float=len, strict=False).raw_decode
    with file.open("rb") as stream:
        text = stream.read(_WINDOW).decode("latin-1")
        base, place = 0, text.index("[") + 1
        while True:
            try:
                place = _after_blanks(text, place)
                if text[place] == "]" and not begins:
                    place += 1
                    break
                _, end = decode(text, place)
                mark = text[after := _after_blanks(text, end)]
                if mark not in ",]":
                    raise ConfigError(
                        f"{path} begins like a JSON list and is not one: no comma at byte {base + after}."
                    )
            except RecursionError:
                raise ConfigError(f"{path} has lists in lists without end at byte {base + place}.") from None
            except (IndexError, json.JSONDecodeError) as error:  # not yet whole, or not JSON
                more = stream.read(max(_WINDOW, len(text) - place)).decode("latin-1")
                if not more or len(text) - place > _LONGEST_RECORD:
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else "it ends too early"
                    raise ConfigError(
                        f"{path} begins like a JSON list and is not one: {reason}, from byte {base + place}."
                    ) from None
                text, base, place = text[place:] + more, base + place, 0
                continue
            begins.append(base + place)
            ends.append(base + end)
            place = after + 1
            if mark == "]":
                break
        if text[place:].strip() or stream.read().strip():
            raise ConfigError(f"{path} begins like a JSON list and goes on behind its end, at byte {base + place}.")
    return np.asarray(begins, np.int64), np.asarray(ends, np.int64)


def _after_blanks(text: str, place: int) -> int:
    return _BLANK.match(text, place).end()  # type: ignore[union-attr]  # it matches nothing at all too


def _rows_of(path: Path, file: Path) -> tuple[str, list[str], tuple[np.ndarray, np.ndarray]]:
    """The delimiter and columns of a table of text, and int64 begin and end of every row that is not empty."""
    begins, ends = array("q"), array("q")
    place = 0

    def lines() -> Iterator[str]:
        nonlocal place
        for line in stream:
            place += len(line)
            yield line.decode("utf-8")

    with file.open("rb") as stream:
        header = stream.readline().decode("utf-8-sig", "replace")
        delimiter = max("\t,;", key=header.count)
        stream.seek(0)
        rows = csv.reader(lines(), delimiter=delimiter)
        try:
            columns = [column.removeprefix("\ufeff").strip() for column in next(rows, [])]
            begin = place
            for row in rows:
                if row:
                    begins.append(begin)
                    ends.append(place)
                begin = place
        except csv.Error as error:
            raise ConfigError(f"{path} is not a table of columns ({error}, near byte {place}).") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not UTF-8 near byte {place}; save it as UTF-8.") from None
    return delimiter, columns, (np.asarray(begins, np.int64), np.asarray(ends, np.int64))
