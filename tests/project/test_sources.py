"""Rules about the source tree itself."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("vl2_jax", "convert") for path in (ROOT / folder).rglob("*.py")]


def test_nothing_executes_data():
    dangerous = re.compile(r"\bpickle\b|(?<![.\w])eval\(|torch\.load|\bexec\(|allow_pickle=True")
    assert [str(path) for path in SOURCES if dangerous.search(path.read_text())] == []


def test_imports_run_one_way():
    """processing does not need jax; ops know nothing of ours; the model knows nothing of what is built on it."""
    rules = {
        "vl2_jax/processing": r"^(import|from) (jax|flax)\b",
        "vl2_jax/ops": r"^from vl2_jax\.(?!ops)",
        "vl2_jax/training": r"^from vl2_jax\.(serving|planning|evaluation|cli)",
        "vl2_jax/scenes": r"^from vl2_jax\.(serving|planning|evaluation|cli)",
        "vl2_jax/model": r"^from vl2_jax\.(inference|training|serving|planning|evaluation|api|cli)",
    }
    for folder, pattern in rules.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(pattern, path.read_text(), re.MULTILINE), path


def test_what_loads_a_model_does_not_import_pallas():
    """It takes a third of a second, and only programs that may hold a kernel need it."""
    code = "import sys, vl2_jax.api; print('jax.experimental.pallas' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout == "False\n"
