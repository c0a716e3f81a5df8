"""What every test shares: the recorded goldens, the pictures they were made from, and compiled programs.

Compiling is nearly all that these tests cost, so programs are compiled cheaply, and once a run: workers and the
processes that tests start find in one folder, which goes with the run, what another has compiled. A caller's own
XLA_FLAGS replace these: `XLA_FLAGS=--xla_force_host_platform_device_count=8 make test` compiles as users do.
"""

import ctypes
import gc
import json
import os
import resource
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = [
    "--xla_force_host_platform_device_count=8",  # meshes need devices
    # Eight on two busy cores may meet late in a collective: XLA would abort all after 40 seconds.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    # An update of nano-base compiles in 6 s of processor time, not in 20, and runs at half the speed.
    "--xla_backend_optimization_level=0",
]
if version("jaxlib").startswith("0.10."):  # a flag that XLA does not know would end the process
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # it finds the folder of the process that started it
if not _IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vl2-jax-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # below, reading a program costs what making it does
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

GOLDENS = Path(__file__).parent / "goldens"
CONFIGS = ("nano-tiny", "nano-small", "nano-base", "nano-base-groups", "nano-v2")
CASES = [(config, path.stem) for config in CONFIGS for path in sorted((GOLDENS / config / "cases").glob("*.json"))]
_MOST_MEMORY = 3e9  # a worker should take no more, so that two fit into a small machine


def load_case(config: str, case: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The description and the arrays of one recorded case."""
    directory = GOLDENS / config / "cases"
    with np.load(directory / f"{case}.npz") as arrays:
        return json.loads((directory / f"{case}.json").read_text()), dict(arrays)


def with_pictures(conversation: list[dict]) -> list[dict]:
    """A recorded conversation with picture names made into paths."""
    images = GOLDENS / "images"
    return [
        message | {"images": [str(images / name) for name in message.get("images", ())]} for message in conversation
    ]


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="module", autouse=True)
def _programs_are_given_back():
    """A compiled program holds some megabytes, and no other module's tests call it."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _costs() -> tuple[float, float]:
    """Seconds of processor time, of ended children too, and the most bytes of memory that this process ever took."""
    unit = 1 if sys.platform == "darwin" else 1024
    return sum(os.times()[:4]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _IS_WORKER:
        session.config.workeroutput["costs"] = _costs()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    if "costs" in getattr(node, "workeroutput", {}):
        node.config.stash.setdefault(_COSTS, {})[node.gateway.id] = node.workeroutput["costs"]


_COSTS = pytest.StashKey[dict[str, tuple[float, float]]]()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for name, (seconds, memory) in sorted(config.stash.get(_COSTS, {"the process": _costs()}).items()):
        too_much = f", more than {_MOST_MEMORY / 1e9:g} GB" if memory > _MOST_MEMORY else ""
        terminalreporter.write_line(
            f"{name} took {seconds:.0f} s of processor time and {memory / 1e9:.1f} GB at most{too_much}",
            yellow=bool(too_much),
        )


def pytest_unconfigure() -> None:
    if not _IS_WORKER:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
