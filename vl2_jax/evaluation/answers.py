"""Answers on disk: a line each, written as soon as it is there, so that a run that was killed goes on.

FOLDER/settings.json          what the answers depend on: model, data, benchmark, ...
FOLDER/answers.jsonl          of one process; of several that share the work, answers-2-of-4.jsonl
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from vl2_jax.errors import ConfigError, shown
from vl2_jax.training.folder import rows_of

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Scored:
    """A question that was answered.

    Attributes:
      row, number: its key; `of` so many questions of the row.
      expected: what would have been right, as the page shows it.
      score: 0 to 1; means nothing where the right answer is a server's.
      error: why there is no answer, "" if there is.
    """

    row: int
    number: int = 0
    of: int = 1
    name: str = ""
    question: str = ""
    expected: str = ""
    text: str = ""
    score: float = 0.0
    is_scored: bool = True
    groups: Mapping[str, str] = field(default_factory=dict)
    pair: str = ""
    finish_reason: str = ""
    new_tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Share:
    """Which rows are one of several processes' to ask: every `of`th, from the `number`th, counted from 1."""

    number: int = 1
    of: int = 1

    def has(self, row: int) -> bool:
        return row % self.of == self.number - 1

    @property
    def file(self) -> str:
        return "answers.jsonl" if self.of == 1 else f"answers-{self.number}-of-{self.of}.jsonl"


EVERYTHING = Share()
_FIELDS = Scored.__dataclass_fields__.keys()


def settings_hash(settings: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())


def begin(folder: Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of an evaluation, or finds it as it was.

    Raises:
      ConfigError: it cannot be made, or holds answers that depend on something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{shown(str(folder))} cannot be a folder of answers ({error.strerror}); choose another --out."
        ) from None
    file = folder / SETTINGS_FILE
    if not file.is_file():  # other processes may be writing the same
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False) as new:
            json.dump(settings, new, indent=2)
        Path(new.name).replace(file)
        return
    try:
        old = dict(json.loads(file.read_bytes()))
    except (ValueError, TypeError):
        raise ConfigError(f"{file} is damaged; choose another --out, or remove it with its answers.") from None
    changed = sorted(name for name in {*old, *settings} if old.get(name) != settings.get(name))
    if changed:
        raise ConfigError(
            f"{shown(str(folder))} holds answers of another {' and '.join(changed)} "
            f"({shown(old.get(changed[0]))}, now {shown(settings.get(changed[0]))}); choose another --out."
        )


def read(folder: Path, settings: str) -> dict[tuple[int, int], Scored]:
    """What has been answered under these settings, by whichever process. Lines that were never finished are none."""
    found = {}
    for file in sorted(folder.glob("answers*.jsonl")):
        for line in rows_of(file):
            if line.pop("settings", None) == settings and line.keys() == _FIELDS:
                answer = Scored(**line)
                found[answer.row, answer.number] = answer
    return found


def rows_done(known: Mapping[tuple[int, int], Scored]) -> set[int]:
    """Rows all of whose questions are answered."""
    left = {answer.row: answer.of for answer in known.values()}
    for row, _ in known:
        left[row] -= 1
    return {row for row, missing in left.items() if missing <= 0}


class AnswerFile:
    """Lines to the end of a file; each is on the disk when `write` returns."""

    def __init__(self, file: Path, settings: str):
        self._settings = settings
        self._stream = file.open("ab")
        if self._stream.tell() and not _ends_with_line(file):
            self._stream.write(b"\n")  # after what a kill cut off

    def write(self, answer: Scored) -> None:
        line = json.dumps({"settings": self._settings} | asdict(answer), ensure_ascii=False)
        self._stream.write(line.encode("utf-8", "backslashreplace") + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _ends_with_line(file: Path) -> bool:
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
