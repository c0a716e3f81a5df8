"""Makes a notebook of each readable script of this folder, and runs it so that its outputs are in it.

python notebooks/build.py [NAME ...]

A notebook is opened from a link, with nothing beside it. So it has two cells that no script has: where it can be
opened, and what installs the package where it is missing.
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat
from PIL import Image

HERE = Path(__file__).parent
REPOSITORY = "OWNER/REPOSITORY"  # on GitHub, as soon as the project has its place there
BRANCH = "main"
NEEDS = {  # what a notebook imports beside the package, and the extras that have it
    "quickstart": ("notebooks", ("matplotlib",)),
    "quantise": ("notebooks", ("matplotlib",)),
    "sharding": ("notebooks", ("matplotlib",)),
    "convert": ("", ()),
    "evaluate": ("notebooks", ("matplotlib",)),
    "finetune": ("notebooks,train", ("matplotlib", "grain")),
    "serve": ("notebooks,serve", ("matplotlib", "fastapi")),
}
INSTALL = """\
# vl2-jax is on no package index yet: set this to the path or address of its wheel, which `make wheel` builds.
WHEEL = ""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

wheel = WHEEL or os.environ.get("VL2_WHEEL", "")
missing = [name for name in {modules!r} if importlib.util.find_spec(name) is None]
if missing and not wheel:
    raise SystemExit(f"{{', '.join(missing)}} is missing here: set WHEEL, at the top of this cell, and run it again.")
if missing:
    address = wheel if "://" in wheel else Path(wheel).resolve().as_uri()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"vl2-jax[{extras}] @ {{address}}"], check=True)
"""


def composed(script: Path) -> nbformat.NotebookNode:
    """The notebook of a script, not run: its cells behind those that open and install it."""
    book = jupytext.read(script)
    extras, modules = NEEDS[script.stem]
    first = [
        nbformat.v4.new_markdown_cell(_badges(script.stem), id="badges"),
        nbformat.v4.new_code_cell(INSTALL.format(modules=("vl2_jax", *modules), extras=extras).rstrip(), id="install"),
    ]
    for number, cell in enumerate(book.cells):
        cell["id"] = f"cell-{number}"  # else a new one at every run
    book.cells = [first[0], *book.cells[:1], first[1], *book.cells[1:]]
    return book


def _badges(name: str) -> str:
    path = f"{REPOSITORY}/blob/{BRANCH}/notebooks/{name}.ipynb"
    colab = f"[Open in Colab](https://colab.research.google.com/github/{path})"
    return f"{colab} · [Open in Kaggle](https://kaggle.com/kernels/welcome?src=https://github.com/{path})"


def run(book: nbformat.NotebookNode, folder: Path | str, seconds: int = 600) -> None:
    nbclient.NotebookClient(book, timeout=seconds, resources={"metadata": {"path": str(folder)}}).execute()


def build(script: Path) -> None:
    book = composed(script)
    with tempfile.TemporaryDirectory() as empty:
        run(book, empty)
    nbformat.write(slimmed(book), script.with_suffix(".ipynb"))


def slimmed(book: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what a reader does not see: times of day, which would change the file at every run, and progress."""
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                data = output.get("data", {})
                data.pop("image/jpeg", None)  # of a Pillow picture, beside the same as PNG
                if "image/png" in data:
                    data["image/png"] = _in_few_colours(data["image/png"])
    return book


def _in_few_colours(png: str) -> str:
    """A picture in base64, in a third of the bytes."""
    picture, file = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(NEEDS):
        build(HERE / f"{name}.py")
        print(HERE / f"{name}.ipynb")
