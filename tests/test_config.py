"""Configurations round-trip the official files, and the sizes are exactly the released ones."""

import json
import subprocess
import sys

import numpy as np
import pytest

from convert.weight_map import plan, torch_shapes
from tests.conftest import CONFIGS, GOLDENS
from vl2_jax.config import VL2Config, read_config, read_preset, read_processor_config
from vl2_jax.errors import ConfigError

SIZES = {"vl2-tiny": (3_370_501_440, 2582), "vl2-small": (16_148_349_504, 5639), "vl2-base": (27_480_134_248, 6973)}
UNUSED_POOLING = 15_238_352


@pytest.mark.parametrize("config", CONFIGS)
def test_official_files_survive_a_round_trip(config):
    model = json.loads((GOLDENS / config / "config.json").read_text())
    processor = json.loads((GOLDENS / config / "processor_config.json").read_text())
    assert json.dumps(read_config(GOLDENS / config).to_hf()) == json.dumps(model)
    assert json.dumps(read_processor_config(GOLDENS / config).to_hf()) == json.dumps(processor)


@pytest.mark.parametrize("size", SIZES)
def test_presets_survive_a_round_trip(size):
    assert VL2Config.preset(size).to_hf() == read_preset(size)["model"]


def test_a_changed_field_is_written_and_nothing_else_changes():
    config = VL2Config.preset("vl2-small")
    language = config.language_config.replace(max_position_embeddings=8192, rms_norm_eps=1e-5)
    before, after = config.to_hf(), config.replace(language_config=language).to_hf()
    assert after["language_config"] == before["language_config"] | {
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }


@pytest.mark.parametrize(("size", "expected"), SIZES.items())
def test_parameter_counts_and_keys_are_the_released_ones(size, expected):
    parameters, keys = expected
    leaves = plan(VL2Config.preset(size))
    counts = {leaf.path: int(np.prod(leaf.shape)) for leaf in leaves}
    assert sum(counts.values()) == parameters
    used = sum(n for path, n in counts.items() if "attn_pool" not in path)
    assert used == parameters - UNUSED_POOLING
    assert len(torch_shapes(leaves)) == keys
    assert torch_shapes(leaves)["vision.patch_embed.proj.weight"] == (1152, 3, 14, 14)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("language_config", "topk_method", "gready", "topk_method is 'gready'"),
        ("language_config", "num_experts_per_tok", 65, "num_experts_per_tok 65"),
        ("language_config", "rope_scaling", {"type": "longrope"}, "rope_scaling type is 'longrope'"),
        ("projector_config", "projector_type", "perceiver", "projector_type is 'perceiver'"),
        ("vision_config", "heads", 7, "does not divide into 7 heads"),
        (None, "tile_tag", "1D", "tile_tag is '1D'"),
    ],
)
def test_an_impossible_value_is_named(section, field, value, message):
    data = json.loads(json.dumps(VL2Config.preset("vl2-tiny").to_hf()))
    (data[section] if section else data)[field] = value
    with pytest.raises(ConfigError, match=message):
        VL2Config.from_hf(data)


def test_import_takes_less_than_two_seconds():
    """Of processor time, so that a busy machine does not fail it."""
    code = "import time, vl2_jax, jax; vl2_jax.load; print(time.process_time())"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 2
