"""Runs the readable scripts of this folder and writes each beside itself as a notebook with its outputs.

python notebooks/build.py [NAME ...]
"""

import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

HERE = Path(__file__).parent


def build(script: Path) -> None:
    book = jupytext.read(script)
    nbclient.NotebookClient(book, timeout=1800, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of day would change the file at every run
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(book, script.with_suffix(".ipynb"))


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.py")):
        if path.name != Path(__file__).name and (len(sys.argv) == 1 or path.stem in sys.argv):
            build(path)
            print(path.with_suffix(".ipynb"))
