"""The documentation site: every page has its place, and links that lead to files lead to pages of them."""

from pathlib import Path

import pytest

from docs import website
from docs.links import ROOT
from vl2_jax.cli.parsing import COMMANDS

LISTED = {page for pages in website.TITLES.values() for page in pages}
MADE = {"reference/commands.md", "reference/python.md"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The site before it is built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(website, "OUT", tmp_path_factory.mktemp("website"))
        website.assemble()
        yield website.OUT / "pages"


def test_every_chapter_and_notebook_has_its_place():
    notebooks = {f"notebooks/{path.name}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    chapters = {page.as_posix() for page in website.PAGES}
    assert chapters | notebooks | MADE == LISTED


def test_modules_of_the_reference_are_there():
    files = {module: ROOT / f"{module.replace('.', '/')}.py" for module in website.API}
    assert [module for module, file in files.items() if not file.is_file()] == []


def test_a_link_to_a_line_of_code_leads_to_that_line_of_a_page(pages):
    linked = set()
    text = "[`Processor`](../vl2_jax/processing/batch.py#L108), [it](serving.md#routes)"
    changed = website._with_links(text, Path("docs/some.md"), linked)
    assert changed == "[`Processor`](../vl2_jax/processing/batch.py.md#__codelineno-0-108), [it](serving.md#routes)"
    assert linked == {Path("vl2_jax/processing/batch.py")}
    page = (pages / "vl2_jax/processing/batch.py.md").read_text()
    assert (ROOT / "vl2_jax/processing/batch.py").read_text() in page


def test_code_that_looks_like_a_link_stays_as_it_is():
    text = "```\n[a](../Makefile)\n```\n[b](../Makefile)"
    assert website._with_links(text, Path("docs/some.md"), set()) == "```\n[a](../Makefile)\n```\n[b](../Makefile.md)"


def test_a_notebook_is_shown_with_its_outputs(pages):
    page = (pages / "notebooks/quickstart.ipynb.md").read_text()
    assert "```text\n" in page
    assert "![output](quickstart-0.png)" in page
    assert (pages / "notebooks/quickstart-0.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_line_has_every_command(pages):
    page = (pages / "reference/commands.md").read_text()
    assert [command for command in COMMANDS if f"## vl2 {command}\n" not in page] == []
    assert "--max-num-seqs" in page
    assert "\x1b" not in page


def test_what_a_page_asks_other_hosts_for_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<link rel="canonical" href="https://x.org/a"><a href="https://x.org">x</a>')
    assert website.fetched_from_elsewhere(tmp_path) == []
    (tmp_path / "b.html").write_text('<script src="https://unpkg.com/shim"></script><img src=//x.org/a.png>')
    assert len(website.fetched_from_elsewhere(tmp_path)) == 2
