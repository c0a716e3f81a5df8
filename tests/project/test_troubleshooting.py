"""docs/troubleshooting.md quotes messages of ours as the source has them."""

import ast
import re

import pytest

from docs.links import ROOT

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OF_OTHERS = ("JAX and the TPU", "No error, but not what was expected")
SECTIONS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n?)*)", TEXT, re.MULTILINE))
ROWS = {
    section: [row for row in re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", text, re.MULTILINE) if row[0] != "message"]
    for section, text in SECTIONS.items()
}
QUOTED = [message.strip("`") for name, rows in ROWS.items() if name not in OF_OTHERS for message, _, _ in rows]


@pytest.fixture(scope="module")
def messages() -> list[str]:
    """Every string of the source, `…` for the values in it."""
    found = []
    for path in (p for folder in ("vl2_jax", "convert") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
    return found


def is_in(quoted: str, message: str) -> bool:
    """Whether the parts of a quotation between its `…` stand in a message, in their order."""
    parts = [re.escape(part.strip(" ")) for part in quoted.split("…") if part.strip(" .;:()")]
    return re.search(".*".join(parts), message, re.DOTALL) is not None


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_message_that_is_quoted_is_in_the_source(messages, quoted):
    assert any(is_in(quoted, message) for message in messages)


def test_what_is_not_in_the_source_is_found(messages):
    assert not any(is_in("the prompt has … tokens of …; make it longer", message) for message in messages)


def test_there_are_enough_and_each_says_what_to_do():
    assert len(QUOTED) == len(set(QUOTED)) >= 25
    assert [row[0] for rows in ROWS.values() for row in rows if not row[1] or not row[2]] == []
    assert len(ROWS[OF_OTHERS[0]]) >= 8
