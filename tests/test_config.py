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


def tiny(section=None, **changes):
    data = json.loads(json.dumps(VL2Config.preset("vl2-tiny").to_hf()))
    (data[section] if section else data).update(changes)
    return data


def without(data, *keys):
    return {key: value for key, value in data.items() if key not in keys}


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": "torch.bfloat16", "torch_dtype": None}, "bfloat16"),
        ({"dtype": None}, "bfloat16"),
    ],
)
def test_the_dtype_of_the_weights_has_two_names(spelled, expected):
    config = VL2Config.from_hf(without(tiny(), "torch_dtype") | spelled)
    assert config.torch_dtype == expected
    assert config.to_hf() == config.source


def test_a_dtype_of_the_language_model_alone_is_that_of_the_model():
    data = without(tiny("language_config", dtype="float32"), "torch_dtype")
    data["language_config"].pop("torch_dtype", None)
    assert VL2Config.from_hf(data).torch_dtype == "float32"


def test_a_dtype_is_written_under_the_name_it_was_read_from():
    config = VL2Config.from_hf(without(tiny(), "torch_dtype") | {"dtype": "float32"}).replace(torch_dtype="bfloat16")
    assert VL2Config.from_hf(config.to_hf()).torch_dtype == "bfloat16"


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default", "factor": None}},
        {"rope_scaling": {}},
        {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 1.0}},
    ],
)
def test_embeddings_that_are_not_scaled_are_said_in_many_ways(scaling):
    config = VL2Config.from_hf(tiny("language_config", **scaling)).language_config
    assert (config.rope_scaling, config.rope_theta) == (None, 10000.0)


def test_the_base_of_rotary_embeddings_stands_among_their_parameters():
    data = tiny("language_config", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    data["language_config"].pop("rope_theta", None)
    assert VL2Config.from_hf(data).language_config.rope_theta == 500000.0


def test_yarn_is_the_same_under_both_names():
    yarn = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.707}
    read = [
        VL2Config.from_hf(tiny("language_config", **described)).language_config
        for described in (
            {"rope_scaling": {"type": "yarn", **yarn}},
            {"rope_scaling": {"rope_type": "yarn", "type": "yarn", **yarn}},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **yarn}},
        )
    ]
    assert read[0].rope_scaling.factor == 40
    assert read[0] == read[1] == read[2]


def test_null_is_the_released_default_where_nothing_can_be_none():
    config = VL2Config.from_hf(tiny("language_config", bos_token_id=None, attention_bias=None, hidden_act=None))
    assert config.language_config.hidden_act == "silu"


def test_keys_that_mean_nothing_here_are_kept():
    data = tiny("language_config", use_cache=True, auto_map={"AutoConfig": "a.B"}, attention_dropout=0.0) | {"x": [1]}
    assert VL2Config.from_hf(data).to_hf() == data


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("language_config", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling type is 'llama3'"),
        ("language_config", {"rope_scaling": {"rope_type": "yarn", "attention_factor": 2}}, "attention_factor 2"),
        ("language_config", {"rope_parameters": {"full_attention": {}}}, "has no rope_type"),
        ("language_config", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ("language_config", {"sliding_window": 4096}, "sliding_window 4096"),
        ("language_config", {"attention_bias": True}, "attention_bias true"),
        ("language_config", {"mlp_bias": True}, "mlp_bias True"),
        ("language_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("language_config", {"tie_word_embeddings": True}, "tie_word_embeddings true"),
        ("language_config", {"hidden_size": "1280"}, "hidden_size is '1280'; expected a whole number"),
        ("language_config", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("vision_config", {"class_token": True}, "class_token True"),
        (None, {"dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
        (None, {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config .'bitsandbytes'"),
        ("language_config", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config .'fp8'"),
    ],
)
def test_what_would_change_the_model_is_refused_by_name(section, changes, message):
    with pytest.raises(ConfigError, match=message):
        VL2Config.from_hf(tiny(section, **changes))


@pytest.fixture
def small_files(tmp_path):
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((GOLDENS / "nano-tiny" / name).read_bytes())
    return tmp_path


def processor_json(directory):
    return json.loads((directory / "processor_config.json").read_text())


def test_a_newer_processor_file_that_says_as_much_is_read(small_files):
    expected, old = read_processor_config(small_files), processor_json(small_files)
    (small_files / "processor_config.json").unlink()
    newer = {"image_mean": old["image_mean"], "image_std": old["image_std"], "do_normalize": True}
    newer["mask_prompt"] = old["mask_prompt"]
    newer |= {"rescale_factor": 1 / 255, "image_processor_type": "DeepseekVLV2ImageProcessor"}
    (small_files / "preprocessor_config.json").write_text(json.dumps(newer))
    assert read_processor_config(small_files) == expected
    nested = without(old, "image_mean", "image_std") | {"image_processor": newer}
    (small_files / "processor_config.json").write_text(json.dumps(nested))
    assert read_processor_config(small_files) == expected


def test_a_newer_processor_file_that_says_less_is_named(small_files):
    (small_files / "processor_config.json").unlink()
    (small_files / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "size": 384}))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json does not say image_std; copy processor_config"):
        read_processor_config(small_files)


def test_pictures_that_are_scaled_otherwise_are_refused(small_files):
    (small_files / "processor_config.json").write_text(json.dumps(processor_json(small_files) | {"rescale_factor": 1}))
    with pytest.raises(ConfigError, match="rescale_factor 1"):
        read_processor_config(small_files)


def test_a_file_that_is_none_is_named(small_files, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (small_files / "config.json").write_text(pointer)
    with pytest.raises(ConfigError, match=r"Git LFS pointer.*git lfs pull"):
        read_config(small_files)
    (small_files / "config.json").unlink()
    (small_files / "config.json").symlink_to("../../blobs/00")
    with pytest.raises(ConfigError, match=r"is a link to \.\./\.\./blobs/00, which is not there"):
        read_config(small_files)
    with pytest.raises(ConfigError, match=r"processor_config\.json is a file; give the directory"):
        read_config(small_files / "processor_config.json")


def test_import_takes_less_than_two_seconds():
    """Of processor time, so that a busy machine does not fail it."""
    code = "import time, vl2_jax, jax; vl2_jax.load; print(time.process_time())"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 2
