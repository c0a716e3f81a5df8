"""PEFT reads the adapters that are written here, and adds the same products; what PEFT writes is read here."""

import dataclasses

import jax
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from convert.adapters import merge
from convert.peft import read_adapters, write_adapters
from convert.weight_map import flatten, plan
from tests.peers.transformers_models import released_tensors
from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import init_params
from vl2_jax.training.lora import abstract_adapters, adapters_of, init_adapters
from vl2_jax.training.recipe import LoraRecipe, Recipe


def modules_named(tensors):
    """Linear layers under the released names, nothing else of the model."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        if not name.endswith(".weight") or tensor.ndim != 2:
            continue
        *parents, last = name.removesuffix(".weight").split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, torch.nn.Module())
            node = node._modules[parent]
        linear = torch.nn.Linear(*tensor.shape[::-1], bias=False)
        linear.weight = torch.nn.Parameter(tensor.clone())
        node.add_module(last, linear)
    return root


def test_peft_merges_the_same_weights(tmp_path):
    config = VL2Config.preset("vl2-nano")
    params = flatten(init_params(config, jax.random.key(0)))
    recipe = LoraRecipe(rank=4, alpha=8.0, targets=("language/layers_*/*_proj*", "vision/blocks_*", "projector/*"))
    factors = init_adapters(abstract_adapters(Recipe(lora=recipe), params), seed=1)
    factors = {path: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape) for path, leaf in factors.items()}
    adapters = adapters_of(recipe, factors)
    write_adapters(tmp_path / "adapters", adapters, plan(config), "vl2-nano")

    def released(flat):
        return released_tensors(config, flat)

    base = released(params)
    model = PeftModel.from_pretrained(modules_named(base), str(tmp_path / "adapters"))
    for dtype, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 0.01)):
        model.to(dtype).save_pretrained(tmp_path / str(dtype))
        again = read_adapters(tmp_path / str(dtype), plan(config))
        assert (again.pairs.keys(), again.scales) == (adapters.pairs.keys(), adapters.scales)
        for path, pair in adapters.pairs.items():
            for theirs, ours in zip(again.pairs[path], pair, strict=True):
                np.testing.assert_allclose(theirs, ours, rtol=tolerance)
    model = PeftModel.from_pretrained(modules_named(base), str(tmp_path / "adapters"))
    theirs = dict(model.merge_and_unload().named_parameters())
    ours = released(merge(params, adapters))
    changed = {name for name, tensor in ours.items() if not torch.equal(tensor, base[name])}
    assert {name.removesuffix(".weight") for name in changed} == {
        key.removesuffix(".weight") for leaf in plan(config) if leaf.path in adapters.pairs for key in leaf.keys
    }
    for name in changed:
        np.testing.assert_allclose(theirs[name].detach().numpy(), ours[name].numpy(), atol=1e-6)


def test_peft_takes_whole_parts_from_where_they_are_written(tmp_path):
    config = VL2Config.preset("vl2-nano")
    params = flatten(init_params(config, jax.random.key(0)))
    recipe = LoraRecipe(rank=4, alpha=8.0, targets=("language/layers_*/self_attn/*_proj*",))
    factors = init_adapters(abstract_adapters(Recipe(lora=recipe), params), seed=1)
    head = "language/lm_head/kernel"
    adapters = dataclasses.replace(adapters_of(recipe, factors), whole={head: np.asarray(params[head]) + 1})
    write_adapters(tmp_path / "adapters", adapters, plan(config), "vl2-nano")
    model = PeftModel.from_pretrained(modules_named(released_tensors(config, params)), str(tmp_path / "adapters"))
    theirs = dict(model.merge_and_unload().named_parameters())["language.lm_head.weight"]
    np.testing.assert_array_equal(theirs.detach().numpy(), adapters.whole[head].T)


def test_scales_and_patterns_are_read_as_peft_means_them(tmp_path):
    config = VL2Config.preset("vl2-nano")
    params = flatten(init_params(config, jax.random.key(0)))
    base = released_tensors(config, params)
    described = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=r"language\.model\.layers\.\d+\..*(q_proj|o_proj|up_proj)",
        rank_pattern={r"self_attn\.q_proj": 2, r"experts\.[02]\.up_proj": 3},
        alpha_pattern={r"layers\.1\..*o_proj": 12, "up_proj": 3},
        modules_to_save=["lm_head"],
    )
    model = get_peft_model(modules_named(base), described)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    ours = released_tensors(config, merge(params, read_adapters(tmp_path / "theirs", plan(config))))
    for name, tensor in model.merge_and_unload().named_parameters():
        np.testing.assert_allclose(ours[name].numpy(), tensor.detach().numpy(), atol=1e-6, err_msg=name)
