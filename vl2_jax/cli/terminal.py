"""What the command writes: answers to standard output, everything else to standard error, all of it as plain text.

Nothing that a user or a model wrote is markup here: `[INST]` and `:eyes:` stay as they are, and characters that would
steer a terminal are shown and not obeyed.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console

from vl2_jax import errors
from vl2_jax.progress import Display

messages = Console(stderr=True, highlight=False, markup=False, emoji=False)
_STEERING = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def accept_any_text() -> None:
    """Bytes that are no text are read as U+FFFD, and characters that the output's encoding lacks are written as `?`."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def tell(line: str, style: str = "") -> None:
    """One line about the work, to standard error."""
    messages.print(line.translate(_STEERING), style=style, soft_wrap=True)


def tell_warnings() -> None:
    """Warnings of ours are lines as others are, without the place in the code; those of others stay as they are."""
    show = warnings.showwarning

    def told(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if category.__module__ == errors.__name__:
            tell(on_one_line(f"vl2: {message}"))
        else:
            show(message, category, *where, **more)

    warnings.showwarning = told


def on_one_line(text: str) -> str:
    return " ".join(text.splitlines()).translate(_STEERING)


def streaming(display: Display) -> Callable[[int, str], None]:
    """Writes an answer's text as it comes; the first of it takes the progress bar away."""

    def show(_: int, text: str) -> None:
        display.close()
        write(text, end="")

    return show


def write(text: str, end: str = "\n") -> None:
    """Text of a model to standard output."""
    is_watched = sys.stdout is not None and sys.stdout.isatty()
    print(text.translate(_STEERING) if is_watched else text, end=end, flush=True)


def print_json(value: Any) -> None:
    """One object on one line, whatever the output's encoding."""
    has_all = "utf" in (getattr(sys.stdout, "encoding", None) or "utf").lower()
    print(json.dumps(value, ensure_ascii=not has_all))
