"""Links from the documentation to the code: `[`symbol`](../file.py#L10)` must lead to the line that defines it.

python docs/links.py          lists links that lead elsewhere; exit 1 if there are any
python docs/links.py --fix    writes the right line numbers
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
_LINK = re.compile(r"\[`(?P<symbol>[\w.]+)`\]\((?P<file>[^)#]+\.py)#L(?P<line>\d+)\)")


def wrong_links(page: Path, fix: bool = False) -> list[str]:
    """What is wrong with a page's links; with `fix`, what cannot be mended."""
    problems = []

    def check(match: re.Match[str]) -> str:
        symbol, file, line = match["symbol"], (page.parent / match["file"]).resolve(), int(match["line"])
        found = _line_of(file, symbol.split(".")[-1]) if file.is_file() else None
        if found is None:
            problems.append(f"{page.name}: {match['file']} defines no {symbol}")
        elif found != line and not fix:
            problems.append(f"{page.name}: {symbol} is on line {found} of {match['file']}, not {line}")
        return f"[`{symbol}`]({match['file']}#L{found or line})"

    text = page.read_text(encoding="utf-8")
    mended = _LINK.sub(check, text)
    if fix and mended != text:
        page.write_text(mended, encoding="utf-8")
    return problems


def _line_of(file: Path, name: str) -> int | None:
    definition = re.compile(rf"\s*(?:def|class) {name}\b|{name}\s*[:=]")
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if definition.match(line)), None)


if __name__ == "__main__":
    found = [problem for page in PAGES for problem in wrong_links(page, fix="--fix" in sys.argv)]
    sys.exit("\n".join(found) or 0)
