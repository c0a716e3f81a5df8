"""What a user asks, as shells, pipes and terminals give it: the prompt, and the pictures."""

from __future__ import annotations

import codecs
import os
import re
import shlex
import sys
from collections.abc import Sequence

from PIL import Image

from vl2_jax.errors import RequestError, shown
from vl2_jax.files import is_remote, path_of
from vl2_jax.processing.images import load_image

STANDARD_INPUT = "-"
_LONGEST_PROMPT = 10_000_000  # bytes
_LARGEST_FILE = 1 << 30  # bytes of a picture
_SURROGATES = re.compile("[\ud800-\udfff]")
_BYTE_ORDERS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|[^\s'"\\])+""")  # of a shell
_DRIVE = re.compile(r"""["']?[A-Za-z]:\\""")


def read_prompt(prompt: str, file: str | None) -> str:
    """The question of `--prompt` or `--prompt-file`; `-` is standard input. Bytes that are no text become U+FFFD.

    Raises:
      RequestError: both or neither are given, the file cannot be read or holds no text, or nothing is asked.
    """
    if file is not None and prompt:
        raise RequestError("give the question with --prompt or with --prompt-file, not with both.")
    if STANDARD_INPUT in (prompt, file):
        where, text = " in standard input", _decoded(_standard_input(_LONGEST_PROMPT), "standard input")
    elif file is not None:
        where, text = f" in {shown(file)}", _decoded(_content_of(file), shown(file))
    else:
        where, text = "", readable(prompt)
    if not text.strip():
        raise RequestError(f"there is no question{where}; give the question with --prompt or --prompt-file.")
    return text


def readable(text: str) -> str:
    """Text of a command line, with U+FFFD for bytes that are none."""
    return _SURROGATES.sub("\ufffd", text)


def read_pictures(names: Sequence[str], allow_urls: bool = False) -> list[Image.Image]:
    """The pictures of these paths, pipes, `file://` and, where allowed, other addresses; `-` is standard input.

    Raises:
      ImageError: one of them cannot be read.
    """
    return [load_image(_source(name), allow_urls=allow_urls) for name in names]


def names_in(line: str) -> list[str]:
    """The pictures named in a line, as people write them and as terminals write what is dropped on them.

    my photo.png                     a file that exists needs no quotes
    'my photo.png' "it's.png"        quotes, and several of them
    my\\ photo.png ~/b.png            escaped blanks, home
    file:///home/me/my%20photo.png   from a file manager
    "C:\\Users\\me\\a.png"              backslashes of Windows are none of a shell
    """
    line = line.strip()
    if _is_file(line):
        return [line]
    try:
        words = shlex.split(line, posix=not _DRIVE.match(line))
    except ValueError:  # a quotation mark that is not closed, as in it's.png
        words = line.split(" ")
    words = [word.strip("\"'") if _DRIVE.match(word) else word for word in words if word]
    names = []
    while words:
        # As many words as together are a file: names with blanks that nobody quoted.
        count = next((n for n in range(len(words), 1, -1) if _is_file(" ".join(words[:n]))), 1)
        names.append(" ".join(words[:count]))
        words = words[count:]
    return names


def dropped_files(line: str) -> tuple[list[str], str]:
    """Files at the beginning of a line, named in full as terminals name what is dropped on them; and what follows."""
    if _is_named_in_full(line):
        return [line], ""
    names: list[str] = []
    while (word := _WORD.match(line)) and len(named := names_in(word[0])) == 1 and _is_named_in_full(named[0]):
        names += named
        line = line[word.end() :].lstrip()
    return names, line


def _source(name: str) -> str | bytes:
    if name == STANDARD_INPUT:
        return _standard_input(_LARGEST_FILE)
    return name if is_remote(name) or name.startswith("data:") else os.fspath(path_of(name))


def _standard_input(limit: int) -> bytes:
    if sys.stdin is None:
        raise RequestError("`-` reads standard input, which is closed.")
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise RequestError(f"standard input goes on after {limit:,} bytes; give a file.")
    return data


def _content_of(file: str) -> bytes:
    try:
        with path_of(file).open("rb") as stream:
            return stream.read(_LONGEST_PROMPT + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise RequestError(f"--prompt-file {shown(file)} cannot be read ({why}); give a file of text.") from None


def _decoded(data: bytes, name: str) -> str:
    encoding = next((kind for mark, kind in _BYTE_ORDERS.items() if data.startswith(mark)), "utf-8")
    text = data.decode(encoding, "replace")
    if len(data) > _LONGEST_PROMPT or "\0" in text:
        raise RequestError(f"{name} does not hold the text of a question; give a file of text.")
    return text.rstrip("\r\n")


def _is_named_in_full(name: str) -> bool:
    return _is_file(name) and path_of(name).is_absolute()


def _is_file(name: str) -> bool:
    try:
        return not is_remote(name) and path_of(name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
