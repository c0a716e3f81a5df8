"""Rows of the files that benchmarks are published in, as questions with their pictures and right answers.

    VLMEvalKit        TSV: index, image (base64, a list of it, or another row's index) or image_path, question, hint,
                      A, B, C, ..., answer, category, l2-category, split
    lmms-eval, HF     Parquet or Arrow: image or image_1, image_2, ..., question, options, answer or answers
    RefCOCO           JSON lines: image, sent, bbox [x1, y1, x2, y2] (Qwen-VL), or img_path, expression, bbox (Shikra)
                      Parquet: image, answer [expression, ...], bbox [x, y, width, height] (lmms-eval)

A row is one question, but in the last layout, where it is one for each expression.
"""

from __future__ import annotations

import ast
import functools
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vl2_jax.errors import ConfigError, VL2Error, shown
from vl2_jax.files import path_of
from vl2_jax.processing.messages import given, is_empty, plain
from vl2_jax.processing.sources import in_folder
from vl2_jax.training.sources import fingerprint, open_source, parsed

LETTERS = string.ascii_uppercase
GROUPS = ("split", "category", "l2-category", "l2_category", "question_type", "subfield", "type")
QUESTIONS = ("question", "query", "sent", "expression")
_ANSWERS = ("answers", "answer", "label")
_IDS = ("index", "question_id", "questionId", "id")
PICTURES = ("image", "images", "img_path", "image_path")
_TABLES = ("*.parquet", "*.arrow")
_SHORTEST_PICTURE = 65  # characters: what is shorter is the index of the row that holds the picture, as in VLMEvalKit


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
      key: the row, from 0, and the number of the question in it; what answers are known by.
      where: file and row, for messages.
      name: the benchmark's own number of the question.
      images: whatever `load_image` takes.
      answers: the right ones; none where the benchmark keeps them to itself.
      options: by their letters.
      box: (x1, y1, x2, y2) in pixels, of what is to be found.
      groups: what the row belongs to, by the column that says so.
      pair: what rows have in common that count together only.
      size: (width, height) of the last picture, once it has been read.
    """

    key: tuple[int, int]
    where: str
    name: str
    question: str
    images: tuple[Any, ...] = ()
    answers: tuple[str, ...] = ()
    options: Mapping[str, str] | None = None
    hint: str = ""
    box: tuple[float, float, float, float] | None = None
    groups: Mapping[str, str] | None = None
    pair: str = ""
    size: tuple[int, int] = (0, 0)


class Samples:
    """The questions of files of one benchmark, by row.

    Args:
      files: one after another.
      images: where relative paths of pictures begin; `None` is the folder of their file.

    Raises:
      ConfigError: there is no such file, or it is of no kind that is read.
    """

    def __init__(self, files: Sequence[Path], images: Path | None = None):
        self.files = list(files)
        self._sources = [open_source(file, images) for file in files]

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def __getitem__(self, row: int) -> list[Sample]:
        """What a row asks; nothing if it is one of a benchmark with pictures and has none.

        Raises:
          ConfigError: naming file and row: a column is missing, or holds what cannot be read.
        """
        record = self._record(row)
        try:
            return _read(row, record["where"], record["record"], record["folder"], self._picture)
        except VL2Error as error:
            raise ConfigError(f"{record['where']}: {error}") from None

    def fingerprints(self) -> dict[str, str]:
        """What changes when the content of a file does, by the file's name."""
        return {file.name: fingerprint(file) for file in self.files}

    def _record(self, row: int) -> dict[str, Any]:
        for source in self._sources:
            if row < len(source):
                record = source[row]
                return record | {"record": _columns(record["where"], record["record"])}
            row -= len(source)
        raise IndexError(row)

    def _picture(self, index: str) -> Any:
        """The picture of the row with this index."""
        row = self._rows_by_index.get(index)
        picture = None if row is None else self._record(row)["record"].get("image")
        if not isinstance(picture, str) or len(picture) < _SHORTEST_PICTURE:
            raise ConfigError(f"'image' is {shown(index)}, which is neither base64 nor the index of a row that has it.")
        return picture

    @functools.cached_property
    def _rows_by_index(self) -> dict[str, int]:
        rows = ((row, self._record(row)["record"]) for row in range(len(self)))
        return {str(record["index"]): row for row, record in rows if record.get("index") is not None}


def files_of(data: Sequence[str], known_folders: Sequence[Path]) -> list[Path]:
    """The files that are meant by files, folders of tables and names of benchmarks.

    Args:
      known_folders: where the file of a benchmark that is given by its name is looked for.

    Raises:
      ConfigError: nothing is there.
    """
    return [file for name in data for file in _files_of(name, known_folders)]


def _files_of(name: str, known_folders: Sequence[Path]) -> Iterator[Path]:
    path = path_of(name)
    if path.is_dir():
        tables = sorted(table for pattern in _TABLES for table in path.glob(pattern))
        if not tables:
            raise ConfigError(f"the folder {shown(name)} holds no {' or '.join(_TABLES)}; give the file itself.")
        yield from tables
        return
    if path.is_file() or path.suffix or len(path.parts) > 1:
        yield path  # whether it can be read is told by what reads it
        return
    places = [folder / f"{name}.tsv" for folder in known_folders]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        looked = ", ".join(str(place) for place in places)
        raise ConfigError(
            f"there is no data {shown(name)} (looked for {looked}); download the benchmark's file, nothing is "
            "downloaded here, and give its path."
        )
    yield found


def _columns(where: str, record: Any) -> dict[str, Any]:
    try:
        columns = plain(parsed(record))
    except VL2Error as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(columns, dict):
        raise ConfigError(f"{where}: a row must be an object with a column for the question, got {shown(columns)}.")
    return columns


def _read(row: int, where: str, columns: dict[str, Any], folder: Path, picture_at: Any) -> list[Sample]:
    pictures = tuple(_found(picture, folder) for picture in _pictures(columns, picture_at))
    if not pictures and any(name in columns for name in (*PICTURES, "image_1")):
        return []  # as VLMEvalKit leaves them out
    box = _box(columns)
    expressions = _listed(columns.get("answer")) if box and not columns.keys() & {"sent", "expression"} else []
    question = given(columns, *QUESTIONS)
    if question is None and not expressions:
        raise ConfigError(f"there is no column of the question among {_names(columns)}; expected 'question'.")
    options = _options(columns)
    id_ = given(columns, *_IDS)
    name = str(row if id_ is None else id_)
    common = Sample(
        key=(row, 0),
        where=where,
        name=name,
        question=_text(question),
        images=pictures,
        answers=() if box else _answers(columns, options),
        options=options or None,
        hint=_text(columns.get("hint")),
        box=box,
        groups={name: _text(columns[name]) for name in GROUPS if not is_empty(columns.get(name))},
        pair=_pair(columns, name),
    )
    if not expressions:
        return [common]
    return [replace(common, key=(row, number), question=text) for number, text in enumerate(expressions)]


def _pictures(columns: dict[str, Any], picture_at: Any) -> list[Any]:
    numbered = [name for name in columns if re.fullmatch(r"image_\d", name) and columns[name] is not None]
    if numbered:
        return [columns[name] for name in sorted(numbered)]
    value = given(columns, *PICTURES)
    if is_empty(value):
        return []
    if "index" not in columns or not isinstance(value, str) or columns.get("image") is None:
        return _as_list(value)
    return [picture_at(cell) if len(cell) < _SHORTEST_PICTURE else cell for cell in map(str, _as_list(value))]


def _found(picture: Any, folder: Path) -> Any:
    found = in_folder(picture, folder)
    if isinstance(found, str) and found != picture and not path_of(found).is_file():
        raise ConfigError(f"the picture {shown(picture)} is neither base64 of a picture nor a file in {folder}.")
    return found


def _options(columns: dict[str, Any]) -> dict[str, str]:
    """Of columns A, B, ..., or of a list; empty where nothing is to be chosen."""
    lettered = {letter: _text(columns[letter]) for letter in LETTERS if not is_empty(columns.get(letter))}
    if lettered:
        return lettered
    return dict(zip(LETTERS, _listed(given(columns, "options", "choices"))))


def _answers(columns: dict[str, Any], options: dict[str, str]) -> tuple[str, ...]:
    answers = _listed(given(columns, *_ANSWERS))
    lettered = bool(columns.keys() & set(options))
    if options and not lettered:  # AI2D and ScienceQA count the options of their lists
        answers = [LETTERS[int(a)] if a.isdecimal() and int(a) < len(options) else a for a in answers]
    return tuple(answers)


def _box(columns: dict[str, Any]) -> tuple[float, float, float, float] | None:
    value = columns.get("bbox")
    if is_empty(value):
        return None
    numbers = _as_list(value)
    if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
        raise ConfigError(f"'bbox' must be four numbers, got {shown(value)}.")
    a, b, c, d = map(float, numbers)
    corners = (a, b, c, d) if columns.keys() & {"sent", "expression"} else (a, b, a + c, b + d)
    if not (corners[0] < corners[2] and corners[1] < corners[3]):
        raise ConfigError(f"'bbox' {shown(value)} is no rectangle.")
    return corners


def _pair(columns: dict[str, Any], name: str) -> str:
    """Rolled options of one question have indices a million apart (MMBench); pairs of MME share a picture's path."""
    if not is_empty(columns.get("image_path")):
        return str(columns["image_path"])
    return str(int(name) % 1_000_000) if name.isdecimal() else name


def _listed(value: Any) -> list[str]:
    """The texts of a list, which may be written as Python writes it; of anything else, itself."""
    if is_empty(value) and value != 0:
        return []
    return [_text(item.get("answer") if isinstance(item, dict) else item) for item in _as_list(value)]


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [value]
    return list(value) if isinstance(value, list | tuple) else [value]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _names(columns: dict[str, Any]) -> str:
    return shown(", ".join(map(str, columns)))
