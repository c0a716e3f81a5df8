"""Runs every notebook as somebody does who opens it from a link: an empty folder, and 12 GB of memory.

python notebooks/check.py [NAME ...]

What a notebook needs it installs itself, from the wheel that `VL2_WHEEL` names (`make notebooks`).
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat

MEMORY = 12_000_000_000  # bytes of addresses of a process: less than a free Colab has, and more than it uses
SECONDS = 120
HERE = Path(__file__).parent


def check(notebook: Path) -> list[str]:
    """What is wrong with a notebook; it is run, and its seconds are printed."""
    problems = []
    os.environ["VL2_COMPILATION_CACHE"] = "off"  # a reader has compiled nothing yet
    book = nbformat.read(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as empty:
        client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": empty}})
        with client.setup_kernel():
            begun = installed = time.perf_counter()
            for number, cell in enumerate(book.cells):
                client.execute_cell(cell, number)
                if cell.get("id") == "install":
                    installed = time.perf_counter()
    took = time.perf_counter() - installed
    print(f"{notebook.name:20} {took:5.0f} s, after {installed - begun:.0f} s of installing", flush=True)
    return problems + [f"{notebook.name} took {took:.0f} s; expected {SECONDS} at most."] * (took > SECONDS)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # kernels and what they start have it too
    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.ipynb"))
    sys.exit("\n".join(problem for name in names for problem in check(HERE / f"{name}.ipynb")) or 0)
