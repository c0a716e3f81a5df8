"""Whatever stands in a configuration or in adapters, it is read, or refused by an error of ours."""

import copy
import json
import math
from contextlib import suppress
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from convert.peft import CONFIG_FILE as ADAPTER_FILE
from convert.peft import WEIGHTS_FILE, read_adapters
from convert.weight_map import plan
from tests.conftest import GOLDENS
from vl2_jax.config import CONFIG_FILE, PREPROCESSOR_FILE, PROCESSOR_FILE, read_config, read_processor_config
from vl2_jax.errors import VL2Error

MANY = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**64 - 1)  # mutations are drawn from `random`: hypothesis alone would take minutes
MODEL = json.loads((GOLDENS / "nano-v2" / CONFIG_FILE).read_text())
PROCESSOR = json.loads((GOLDENS / "nano-v2" / PROCESSOR_FILE).read_text())
MODULE = "language.model.layers.1.self_attn.o_proj"
ADAPTERS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {},
    "use_rslora": False, "bias": "none", "modules_to_save": None, "base_model_name_or_path": "x",
}  # fmt: skip

NEWER = (
    "dtype", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "layer_types", "quantization_config",
    "use_mla", "image_processor", "rescale_factor", "n_group", "topk_group", "init_lora_weights", "use_dora",
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**30, -(10**400), 0.5, 1e308, math.nan, math.inf, "", "yarn", "\ud800", "4",
    [], [[]], [1, 2], [[56, 56], [0, 0]], {}, {"a": 1}, {"rope_type": "yarn"}, {"type": "linear", "factor": -2},
    {"quant_method": [1]}, [None] * 3, {"rope_type": ["default"], "type": {}}, {"(": 4}, {"a{9999999999}": 1},
)  # fmt: skip


def places_in(value):
    """Every object and list in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(p for item in inner if isinstance(item, dict | list) and item for p in places_in(item))]


def mutated(random, data):
    """JSON with some values others, gone or new, at any depth; at times cut short or with bytes changed."""
    data = json.loads(json.dumps(data))
    for _ in range(random.randint(1, 4)):
        place = random.choice(places_in(data))
        keys = [*place, *random.sample(NEWER, 2)] if isinstance(place, dict) else [*range(len(place))]
        key = random.choice(keys) if keys else None
        if random.random() < 0.2 and key in (place if isinstance(place, dict) else range(len(place))):
            del place[key]
        elif key is not None:
            place[key] = copy.deepcopy(random.choice(VALUES))
    text = bytearray(json.dumps(data).encode())
    if random.random() < 0.1:
        text = text[: random.randint(0, len(text))]
    if random.random() < 0.2 and text:
        text[random.randrange(len(text))] = random.randrange(256)
    if random.random() < 0.01:
        text = bytearray(b"[" * 100_000)
    return bytes(text)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def leaves():
    return plan(read_config(GOLDENS / "nano-tiny"))


@MANY
@given(seed=seeds)
def test_any_model_configuration_is_read_or_refused(directory, seed):
    (directory / CONFIG_FILE).write_bytes(mutated(Random(seed), MODEL))
    with suppress(VL2Error):
        config = read_config(directory)
        assert type(config).from_hf(config.to_hf()) == config


@MANY
@given(seed=seeds)
def test_any_processor_configuration_is_read_or_refused(directory, seed):
    random = Random(seed)
    for other in (PROCESSOR_FILE, PREPROCESSOR_FILE):
        (directory / other).unlink(missing_ok=True)
    (directory / random.choice([PROCESSOR_FILE, PREPROCESSOR_FILE])).write_bytes(mutated(random, PROCESSOR))
    (directory / CONFIG_FILE).write_bytes(mutated(random, MODEL))
    with suppress(VL2Error):
        read_processor_config(directory)


@MANY
@given(seed=seeds)
def test_any_description_of_adapters_is_read_or_refused(directory, leaves, seed):
    shape = next(leaf.torch_shape for leaf in leaves if f"{MODULE}.weight" in leaf.keys)
    a, b = np.zeros((2, shape[1]), np.float32), np.zeros((shape[0], 2), np.float32)
    tensors = {f"base_model.model.{MODULE}.lora_A.weight": a, f"base_model.model.{MODULE}.lora_B.weight": b}
    (directory / WEIGHTS_FILE).write_bytes(save(tensors))
    (directory / ADAPTER_FILE).write_bytes(mutated(Random(seed), ADAPTERS))
    with suppress(VL2Error):
        read_adapters(directory, leaves)


@MANY
@given(seed=seeds)
def test_any_header_of_adapters_is_read_or_refused(directory, leaves, seed):
    random = Random(seed)
    (directory / ADAPTER_FILE).write_text(json.dumps(ADAPTERS))
    entry = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
    text = mutated(random, {f"{MODULE}.lora_{half}.weight": entry for half in "AB"})
    length = random.choice([len(text)] * 9 + [random.getrandbits(64)])
    (directory / WEIGHTS_FILE).write_bytes(length.to_bytes(8, "little") + text + bytes(random.choice([0, 31, 32, 64])))
    with suppress(VL2Error):
        read_adapters(directory, leaves)
