"""What is installed: the extras, the wheel, and what the texts of the project tell people to install."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from vl2_jax.installation import install_line

ROOT = Path(__file__).parents[2]
TEXTS = {".py", ".md", ".ipynb", ".yaml", ".yml", ".toml", ".txt", ".sh", ""}


def test_a_checkout_that_was_never_installed_is_named(monkeypatch):
    def missing(_):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "distribution", missing)
    assert install_line("train") == f"pip install -e '{ROOT}[train]'"


def test_messages_name_extras_that_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for text in _texts("vl2_jax", "convert") for name in re.findall(r"install_line\([\"'](\w+)", text)}
    assert named >= {"train", "plan", "tpu", "gcs"}
    assert named <= set(extras)


def test_no_text_installs_a_bare_name_or_clones_an_address_that_is_not_ours():
    """The name is not registered on any index, nor the account: whoever takes them could run anything on our users."""
    bare = (
        r"(?:install|add|--with|uvx)\b[^\n]*?(?<![\w./*-])vl2[-_]jax(?![\w./*-])(?:\[[^\]\n]*\])?+(?!\s*@|[^\n]*\.whl)"
    )
    address = r"github\.com[/:]vl2-jax|githubusercontent\.com/vl2-jax|pypi\.org/project/vl2|//vl2-jax\."
    wrong = re.compile(f"{bare}|{address}")
    assert wrong.search("pip install 'vl2-" + "jax[train]'")
    assert wrong.search("%pip install -U vl2" + "_jax")
    assert wrong.search("git clone https://github.com/" + "vl2-jax/vl2-jax")
    assert not wrong.search("pip install './vl2_jax-0.1.0-py3-none-any.whl[train]'")
    assert [found[0] for text in _texts(".") for found in wrong.finditer(text)] == []


@pytest.mark.slow
def test_a_wheel_carries_all_that_it_runs_with_and_knows_where_it_came_from(tmp_path):
    dist, target, elsewhere = tmp_path / "my dist", tmp_path / "site", tmp_path / "empty"
    elsewhere.mkdir()
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", dist, ROOT], elsewhere)
    (wheel,) = dist.iterdir()
    _run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, wheel], elsewhere)
    # As `pip install --target` leaves it; the rest of the environment is that of the tests.
    python = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); "]

    def run(code: str) -> str:
        return _run([*python[:-1], python[-1] + code], elsewhere)

    assert run("import vl2_jax; print(vl2_jax.__file__)").startswith(str(target))
    assert "16,148,349,504" in run("from vl2_jax.cli import main; main(['info', 'vl2-small'])")
    answer = run("from vl2_jax.cli import main; main('generate --model vl2-nano --prompt Hi --max-tokens 2'.split())")
    assert answer
    recipe = "from vl2_jax.training.recipe import read_recipe; print(read_recipe('sft-nano').loop.steps)"
    assert int(run(recipe)) > 0
    line = run("from vl2_jax.installation import install_line; print(install_line('train'))").strip()
    assert shlex.split(line) == ["pip", "install", f"{wheel}[train]"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["-e"]], ids=["directory", "editable"])
def test_pip_records_a_checkout_as_the_line_expects(tmp_path, options):
    _run([sys.executable, "-m", "venv", tmp_path / "venv"], tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    _run([python, "-m", "pip", "install", "-q", "--no-deps", *options, ROOT], tmp_path)
    line = _run([python, "-c", "from vl2_jax.installation import install_line; print(install_line('train'))"], tmp_path)
    assert shlex.split(line) == ["pip", "install", *options, f"{ROOT}[train]"]


def _texts(*folders: str) -> list[str]:
    """Of every file of the project that people read, but for what was built or downloaded beside it."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    kept = (p for p in paths if not any(_is_made(part) for part in p.relative_to(ROOT).parts))
    return [p.read_text(encoding="utf-8") for p in kept if p.is_file() and p.suffix in TEXTS]


def _is_made(part: str) -> bool:
    is_hidden = part.startswith(".") and part not in (".ci", ".github")
    return is_hidden or part in ("out", "dist", "build", "runs", "evaluations")


def _run(command: list, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
