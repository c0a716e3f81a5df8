"""Notebooks: what is written is what runs, and what they install. `make notebooks` runs all of them as readers do."""

import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import pytest

from docs.links import ROOT

FOLDER = ROOT / "notebooks"
BUILD = runpy.run_path(str(FOLDER / "build.py"))
NAMES = sorted(BUILD["NEEDS"])
MOST_BYTES = 100_000


def install_cell(name: str) -> str:
    (cell,) = (c for c in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"] if c["id"] == "install")
    return "".join(cell["source"])


def test_every_script_is_a_notebook():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted([*NAMES, "build", "check"])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_readable_script(name):
    stored, made = jupytext.read(FOLDER / f"{name}.ipynb"), BUILD["composed"](FOLDER / f"{name}.py")
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in made.cells]
    assert (FOLDER / f"{name}.ipynb").stat().st_size <= MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_was_run_without_an_error(name):
    cells = [c for c in json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    assert [o for c in cells for o in c["outputs"] if o["output_type"] == "error"] == []


def test_one_variable_says_where_notebooks_are_opened(monkeypatch):
    monkeypatch.setitem(BUILD["composed"].__globals__, "REPOSITORY", "somebody/something")
    badges = BUILD["composed"](FOLDER / "convert.py").cells[0].source
    assert badges.count("github.com/somebody/something/blob/main/notebooks/convert.ipynb") == 1
    assert "https://colab.research.google.com/github/somebody/something/blob/main/notebooks/convert.ipynb" in badges


@pytest.fixture
def empty_machine(monkeypatch):
    """One where no package is found; what would be run is listed."""
    commands: list[list[str]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.delenv("VL2_WHEEL", raising=False)
    return types.SimpleNamespace(commands=commands, monkeypatch=monkeypatch)


def test_a_notebook_without_a_wheel_says_what_to_set(empty_machine):
    with pytest.raises(SystemExit, match="vl2_jax, matplotlib is missing here: set WHEEL, at the top of this cell"):
        exec(compile(install_cell("quickstart"), "install", "exec"), {})
    assert empty_machine.commands == []


@pytest.mark.parametrize(
    ("wheel", "address"),
    [
        ("https://example.org/vl2_jax-1-py3-none-any.whl", "https://example.org/vl2_jax-1-py3-none-any.whl"),
        ("my folder/vl2_jax-1-py3-none-any.whl", (Path.cwd() / "my folder/vl2_jax-1-py3-none-any.whl").as_uri()),
    ],
)
def test_a_notebook_installs_its_wheel_with_the_extras_it_needs(empty_machine, wheel, address):
    cell = install_cell("serve").replace('WHEEL = ""', f'WHEEL = "{wheel}"')
    exec(compile(cell, "install", "exec"), {})
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    assert empty_machine.commands == [[*pip, f"vl2-jax[notebooks,serve] @ {address}"]]


def test_a_notebook_where_all_is_there_installs_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    for name in NAMES:
        exec(compile(install_cell(name), "install", "exec"), {})


def test_a_notebook_runs_where_nothing_lies_beside_it(tmp_path):
    """The one that takes least; `make notebooks` runs them all."""
    BUILD["run"](jupytext.read(FOLDER / "convert.ipynb"), tmp_path)
