"""What every test shares: the recorded goldens, the pictures they were made from, and compiled programs.

Compiling is nearly all that these tests cost, so programs are compiled cheaply, and once a run: workers and the
processes that tests start find in one folder, which goes with the run, what another has compiled. A caller's own
XLA_FLAGS replace these: `XLA_FLAGS=--xla_force_host_platform_device_count=8 make test` compiles as users do.
"""

import ctypes
import functools
import gc
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

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

# Tracing makes objects by the million. Looking for cycles at every 700 of them took a sixth of its time.
gc.set_threshold(50_000)

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # it finds the folder of the process that started it
if not _IS_WORKER:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vl2-jax-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # below, reading a program costs what making it does
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

GOLDENS = Path(__file__).parent / "goldens"
CONFIGS = ("nano-tiny", "nano-small", "nano-base", "nano-base-groups", "nano-v2")
CASES = [(config, path.stem) for config in CONFIGS for path in sorted((GOLDENS / config / "cases").glob("*.json"))]
_MOST_MEMORY = 3e9  # a worker should take no more, so that two fit into a small machine
_MUCH_MEMORY = 2.0e9  # beyond, programs are given back between tests of a module too


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


@pytest.fixture(scope="session")
def first_layers(tmp_path_factory):
    """`first_layers(family)` is the folder of a recorded model with its first layers and blocks alone.

    Two layers are one dense and one of experts. What compiles costs what there are of them, and not more of a kind.
    """

    @functools.cache
    def cut(family: str, layers: int = 2, blocks: int = 1) -> Path:
        source, folder = GOLDENS / family, tmp_path_factory.mktemp("models") / family
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("cases", "*.safetensors*"))
        config = json.loads((source / "config.json").read_text())
        config["language_config"]["num_hidden_layers"], config["vision_config"]["layers"] = layers, blocks
        (folder / "config.json").write_text(json.dumps(config))

        def is_kept(name: str) -> bool:
            numbered = re.search(r"(language\.model\.layers|vision\.blocks)\.(\d+)\.", name)
            return not numbered or int(numbered[2]) < (layers if numbered[1].startswith("language") else blocks)

        tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
        save_file({name: t for name, t in tensors.items() if is_kept(name)}, folder / "model.safetensors")
        return folder

    return cut


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis draws the same in every run, unless a profile is chosen."""
    if config.pluginmanager.hasplugin("hypothesispytest") and not config.getoption("--hypothesis-profile"):
        from hypothesis import settings

        settings.load_profile("ci")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A compiled program holds megabytes, an interpreted kernel hundreds, and no other module's tests call it."""
    is_last = nextitem is None or nextitem.path != item.path
    if not is_last and psutil.Process().memory_info().rss < _MUCH_MEMORY:
        return
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
