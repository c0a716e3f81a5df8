"""Adapters as other tools write them: names, scales, patterns and whole parts; what cannot be read is named."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapters, write_adapters
from convert.weight_map import plan, torch_shapes
from tests.conftest import GOLDENS
from vl2_jax.config import read_config
from vl2_jax.errors import VL2Error, VL2Warning

Q, Q_KEY = "language/layers_1/self_attn/q_proj/kernel", "language.model.layers.1.self_attn.q_proj"
UP, UP_KEY = "language/layers_1/mlp/experts_up_proj", "language.model.layers.1.mlp.experts.{}.up_proj"
RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def leaves():
    return plan(read_config(GOLDENS / "nano-tiny"))


@pytest.fixture(scope="module")
def shapes(leaves):
    return torch_shapes(leaves)


@pytest.fixture
def halves(shapes):
    """The pair of a module, as PyTorch has it."""

    def make(module, rank=RANK, infix=""):
        rows, columns = shapes[f"{module}.weight"]
        random = np.random.default_rng(len(module) + rank)
        a = random.standard_normal((rank, columns), np.float32)
        b = random.standard_normal((rows, rank), np.float32)
        return {f"{module}.lora_A{infix}.weight": a, f"{module}.lora_B{infix}.weight": b}

    return make


@pytest.fixture
def files(tmp_path):
    def write(tensors, prefix="base_model.model.", **config):
        usual = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": ""}
        directory = tmp_path / "adapters"
        directory.mkdir()
        (directory / CONFIG_FILE).write_text(json.dumps(usual | config))
        save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, directory / WEIGHTS_FILE)
        return directory

    return write


def update_of(adapters, path):
    a, b = adapters.pairs[path]
    return adapters.scales[path] * (a @ b)


def product(tensors, module):
    return (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]).T


def test_adapters_on_all_linear_layers_are_read_those_of_the_pooling_aside(files, halves, shapes, leaves):
    linear = [key.removesuffix(".weight") for key, shape in shapes.items() if len(shape) == 2 and "norm" not in key]
    no_layer = (".mlp.gate", "embed_tokens", "lm_head", "pos_embed")
    modules = [name for name in linear if f"{name}.weight" in shapes and not name.endswith(no_layer)]
    tensors = {name: tensor for module in modules for name, tensor in halves(module).items()}
    pool = [module for module in modules if "attn_pool" in module]
    tensors |= {f"{module}.lora_B.weight": 0 * tensors[f"{module}.lora_B.weight"] for module in pool}
    assert len(pool) == 5
    assert any(module.startswith("projector.") for module in modules)
    adapters = read_adapters(files(tensors), leaves)
    read = {key for leaf in leaves if leaf.path in adapters.pairs for key in leaf.keys}
    assert {f"{module}.weight" for module in modules} - read == {f"{module}.weight" for module in pool}


@pytest.mark.parametrize(
    ("prefix", "infix"),
    [
        ("base_model.model.", ""),
        ("base_model.model.", ".default"),
        ("", ""),
        ("base_model.model.model.", ".vl2"),
        ("module.base_model.model.", ".default"),
        ("_orig_mod.base_model.model.", ""),
    ],
)
def test_names_may_have_other_prefixes_and_the_adapter_in_them(files, halves, leaves, prefix, infix):
    adapters = read_adapters(files(halves(Q_KEY, infix=infix), prefix), leaves)
    np.testing.assert_allclose(update_of(adapters, Q), 2 * product(halves(Q_KEY), Q_KEY), rtol=1e-5)


def test_rank_stabilised_adapters_are_scaled_by_the_root(files, halves, leaves):
    assert read_adapters(files(halves(Q_KEY), use_rslora=True), leaves).scales[Q] == ALPHA / math.sqrt(RANK)


@pytest.mark.parametrize(
    "pattern", ["q_proj", "self_attn.q_proj", r"layers\.1\..*q_proj", "layers.[0-9].self_attn.q_proj", f"^{Q_KEY}"]
)
def test_patterns_give_a_module_its_rank_and_alpha(files, halves, leaves, pattern):
    other = Q_KEY.replace("q_proj", "o_proj")
    tensors = halves(Q_KEY, rank=2) | halves(other)
    read = read_adapters(files(tensors, rank_pattern={pattern: 2}, alpha_pattern={pattern: 32}), leaves)
    assert read.scales == {Q: 16.0, Q.replace("q_proj", "o_proj"): 2.0}
    np.testing.assert_allclose(update_of(read, Q), 16 * product(tensors, Q_KEY), rtol=1e-5)


@pytest.mark.parametrize("pattern", ["proj", "self_attn", "layers.1"])
def test_patterns_fit_whole_parts_of_a_name_at_its_end(files, halves, leaves, pattern):
    assert read_adapters(files(halves(Q_KEY), alpha_pattern={pattern: 999}), leaves).scales[Q] == 2.0


def test_experts_may_differ_in_rank_and_scale(files, halves, leaves):
    first, third = UP_KEY.format(0), UP_KEY.format(2)
    tensors = halves(first) | halves(third, rank=2)
    read = read_adapters(files(tensors, rank_pattern={r"experts\.2\.up_proj": 2}), leaves)
    update = update_of(read, UP)
    np.testing.assert_allclose(update[0], 2 * product(tensors, first), rtol=1e-5)
    np.testing.assert_allclose(update[2], 4 * product(tensors, third), rtol=1e-5)
    assert not update[[1, 3]].any()


def test_different_ranks_and_scales_come_back_from_disk(files, halves, leaves, tmp_path):
    tensors = halves(Q_KEY, rank=2) | halves(Q_KEY.replace("q_proj", "o_proj"))
    read = read_adapters(files(tensors, rank_pattern={"q_proj": 2}, use_rslora=True), leaves)
    write_adapters(tmp_path / "again", read, leaves, "base")
    again = read_adapters(tmp_path / "again", leaves)
    assert again.scales == pytest.approx(read.scales)
    for path in read.pairs:
        np.testing.assert_allclose(update_of(again, path), update_of(read, path), rtol=1e-5)


@pytest.mark.parametrize("infix", ["", "modules_to_save.", "modules_to_save.default.", "base_layer."])
def test_parts_that_were_saved_whole_take_the_place_of_the_models(files, halves, leaves, shapes, infix):
    head = np.ones(shapes["language.lm_head.weight"], np.float32)
    tensors = halves(Q_KEY) | {f"language.lm_head.{infix}weight": head}
    read = read_adapters(files(tensors, modules_to_save=["lm_head"]), leaves)
    np.testing.assert_array_equal(read.whole["language/lm_head/kernel"], head.T)


def test_a_part_saved_inside_of_a_wrapper_is_found_and_its_original_is_not(files, halves, leaves, shapes):
    key = "projector.layers.0.weight"
    one, zero = np.ones(shapes[key], np.float32), np.zeros(shapes[key], np.float32)
    wrapped = {
        "projector.modules_to_save.default.layers.0.weight": one,
        "projector.original_module.layers.0.weight": zero,
    }
    read = read_adapters(files(halves(Q_KEY) | wrapped, modules_to_save=["projector"]), leaves)
    np.testing.assert_array_equal(read.whole["projector/layers_0/kernel"], one.T)


def test_trained_biases_are_whole_parts(files, halves, leaves, shapes):
    key = "vision.blocks.0.attn.qkv"
    bias = np.ones(shapes[f"{key}.bias"], np.float32)
    read = read_adapters(files(halves(key) | {f"{key}.bias": bias}, bias="lora_only"), leaves)
    np.testing.assert_array_equal(read.whole["vision/blocks_0/qkv/bias"], bias)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0, expected a number above 0"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has '\(', which is no pattern"),
        ({"rank_pattern": {"q_proj": 8}}, r"q_proj\.lora_A has shape \[4, .*\], expected \[8, "),
    ],
)
def test_another_computation_is_refused_by_name(files, halves, leaves, config, message):
    with pytest.raises(VL2Error, match=message):
        read_adapters(files(halves(Q_KEY), **config), leaves)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("language.model.layers.1.mlp.gate", "is no linear layer and cannot have an adapter"),
        ("language.model.layers.99.self_attn.q_proj", "belongs to nothing in the model"),
    ],
)
def test_adapters_of_other_things_are_named(files, halves, leaves, module, message):
    pair = {name.replace(Q_KEY, module): tensor for name, tensor in halves(Q_KEY).items()}
    with pytest.raises(VL2Error, match=message):
        read_adapters(files(halves(Q_KEY) | pair), leaves)


def test_several_adapters_in_one_file_are_named(files, halves, leaves):
    with pytest.raises(VL2Error, match=r"several adapters .*'default', 'other'"):
        read_adapters(files(halves(Q_KEY, infix=".default") | halves(Q_KEY, infix=".other")), leaves)


def test_adapters_in_another_format_are_named(files, halves, leaves):
    directory = files(halves(Q_KEY))
    (directory / WEIGHTS_FILE).rename(directory / "adapter_model.bin")
    with pytest.raises(VL2Error, match=r"adapter_model\.bin, which is not read.*safe_serialization=True"):
        read_adapters(directory, leaves)


def test_the_folder_above_adapters_names_those_in_it(files, halves, leaves):
    directory = files(halves(Q_KEY))
    with pytest.raises(VL2Error, match=r"there are some in \['adapters'\]"):
        read_adapters(directory.parent, leaves)


@pytest.mark.parametrize(
    "base", ["deepseek-ai/deepseek-vl2-small", "/models/other", "models--x--deepseek-vl2/snapshots/1"]
)
def test_a_base_of_another_name_is_told(files, halves, leaves, base):
    directory = files(halves(Q_KEY), base_model_name_or_path=base)
    with pytest.warns(VL2Warning, match="were made for '.*', and this is 'deepseek-ai/deepseek-vl2-tiny'"):
        read_adapters(directory, leaves, ["deepseek-ai/deepseek-vl2-tiny", "/here/model"])


@pytest.mark.parametrize(
    "base",
    [
        "",
        None,
        "deepseek-ai/DeepSeek-VL2-Tiny",
        "/data/deepseek-vl2-tiny/",
        "../model",
        "/root/.cache/huggingface/hub/models--deepseek-ai--deepseek-vl2-tiny/snapshots/66c54660eae7e90c9ba259bfdf92d07d6e3ce8aa",
    ],
)
def test_a_base_of_the_same_name_elsewhere_is_the_same(files, halves, leaves, base, recwarn):
    directory = files(halves(Q_KEY), base_model_name_or_path=base)
    read_adapters(directory, leaves, ["deepseek-ai/deepseek-vl2-tiny", "/here/model"])
    assert not recwarn.list
