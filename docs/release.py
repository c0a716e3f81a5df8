"""Prints what a release says of itself: `python docs/release.py v1.2.3` the changelog's section of version 1.2.3.

Exits with one line if that is not the version of this checkout, or if its section is missing, empty or not yet cut.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version() -> str:
    """Of this checkout, from the one place where it is written; nothing is imported."""
    source = (ROOT / "vl2_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    assert found is not None
    return found[1]


def sections(changelog: str) -> dict[str, tuple[str, str]]:
    """Of each version: what follows it in its heading (a date), and its text."""
    found = re.findall(r"^## (\S+)(?: - (.+))?\n((?:(?!## ).*\n?)*)", changelog, re.MULTILINE)
    return {name: (told, text.strip()) for name, told, text in found}


def notes(tag: str, changelog: str) -> str:
    """The text of the section that a tag releases.

    Raises:
      ValueError: the tag is not that of this version, or the section is not there to be released.
    """
    if tag != f"v{version()}":
        raise ValueError(f"the tag is {tag}; the version of this checkout is {version()}: tag v{version()}.")
    told, text = sections(changelog).get(version(), ("", ""))
    if not text:
        raise ValueError(f"CHANGELOG.md has no section {version()}; add `## {version()} - DATE` and what changed.")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", told):
        raise ValueError(f"CHANGELOG.md says {version()} - {told or 'nothing'}; write the date of the release.")
    return text


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    except ValueError as error:
        sys.exit(str(error))
