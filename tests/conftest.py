"""What every test shares: the recorded goldens and the pictures they were made from."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Meshes need devices. Eight on two busy cores may meet late in a collective: XLA would abort all after 40 seconds.
_DEVICES = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ.setdefault("XLA_FLAGS", _DEVICES)

GOLDENS = Path(__file__).parent / "goldens"
CONFIGS = ("nano-tiny", "nano-small", "nano-base", "nano-base-groups", "nano-v2")
CASES = [(config, path.stem) for config in CONFIGS for path in sorted((GOLDENS / config / "cases").glob("*.json"))]


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
