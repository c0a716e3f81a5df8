"""The documentation is true: links lead where they say, and every notebook runs."""

import ast
import re
from pathlib import Path

import jupytext
import nbclient
import pytest

from docs.links import PAGES, ROOT, wrong_links

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRAINS = "finetune"  # it computes for a minute and a half


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_the_lines_that_do_it(page):
    assert wrong_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_and_pictures_that_are_linked_exist(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_headings_that_are_linked_exist(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    pages = [(page.parent / file if file else page, anchor) for file, anchor in targets if not file.endswith(".py")]
    assert [(to.name, anchor) for to, anchor in pages if anchor not in anchors(to)] == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_readable_script(notebook):
    paired = jupytext.read(notebook.with_suffix(".py"))
    stored = jupytext.read(notebook)
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in paired.cells]
    ast.parse(notebook.with_suffix(".py").read_text())


@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if path.stem != TRAINS], ids=lambda path: path.stem)
def test_a_notebook_runs(notebook):
    run(notebook)


@pytest.mark.slow
def test_the_notebook_that_trains_runs():
    run(ROOT / "notebooks" / f"{TRAINS}.ipynb")


def run(notebook: Path) -> None:
    book = jupytext.read(notebook)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(Path(notebook).parent)}}).execute()
