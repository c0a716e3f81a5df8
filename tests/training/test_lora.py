"""Low-rank adapters: the same gradients as multiplied-out ones, PEFT's files, a merged export."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vl2_jax
from convert.adapters import CONFIG_FILE, WEIGHTS_FILE, can_be_adapted, merge, read_adapters, write_adapters
from convert.safetensors_files import layout_file
from convert.weight_map import flatten, plan, unflatten
from tests.conftest import GOLDENS
from vl2_jax.config import read_config
from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.training.data import batches
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import train
from vl2_jax.training.lora import abstract_adapters, adapters_of, collection_of, init_adapters
from vl2_jax.training.objective import losses
from vl2_jax.training.recipe import LoraRecipe

EVERYWHERE = ("language/*", "vision/blocks_*", "projector/*")
LORA = ["lora.rank=4", "lora.alpha=8", "optimizer.learning_rate=3e-3", f"lora.targets={json.dumps(EVERYWHERE)}"]


@pytest.fixture(scope="module")
def vl2(small_model):
    return vl2_jax.load(small_model, dtype="float32")


@pytest.fixture
def factors(vl2):
    """Adapters on everything that can have one, neither factor zero."""
    flat = flatten(vl2.params)
    drawn = init_adapters(abstract_adapters(LoraRecipe(4, 8.0, EVERYWHERE), flat), 1)
    random = np.random.default_rng(0)

    def normal(leaf):
        return jnp.asarray(0.05 * random.standard_normal(leaf.shape, np.float32))

    return {path: normal(leaf) if path.endswith("/b") else leaf for path, leaf in drawn.items()}


def test_what_can_have_an_adapter_is_every_linear_layer(vl2):
    paths = [leaf.path for leaf in plan(vl2.config)]
    able = {path for path in paths if can_be_adapted(path)}
    assert {path.rsplit("/", 1)[-1] for path in able} == {
        "kernel", "kv_b_proj", "experts_gate_proj", "experts_up_proj", "experts_down_proj",
    }  # fmt: skip
    assert not any("/mlp/gate/" in path or "attn_pool" in path or "patch_embed" in path for path in able)
    assert "language/lm_head/kernel" in able
    assert "language/layers_0/mlp/gate_proj/kernel" in able


@pytest.mark.parametrize("loops", [{}, {"remat": True, "scan": True}])
def test_adapters_have_the_loss_and_gradients_of_their_products(vl2, factors, recipe, loops):
    described = LoraRecipe(4, 8.0, EVERYWHERE)
    batch = next(iter(batches(recipe().data, vl2.processor)))
    model, flat = vl2.model.clone(**loops), flatten(vl2.params)

    @jax.jit
    def beside(factors):
        adapters = collection_of(described, factors)
        return jax.value_and_grad(lambda f: losses(model, vl2.params, batch, adapters=f).total)(adapters)

    @jax.jit
    def multiplied_out(factors):
        def loss(pairs):
            merged = {p: w + pairs[f"{p}/a"] @ pairs[f"{p}/b"] if f"{p}/a" in pairs else w for p, w in flat.items()}
            return losses(vl2.model, unflatten(merged), batch).total

        return jax.value_and_grad(loss)(flatten(collection_of(described, factors)))

    (loss, gradients), (expected, wanted) = beside(factors), multiplied_out(factors)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, gradient in flatten(gradients).items():
        scale = float(jnp.abs(wanted[path]).max())
        np.testing.assert_allclose(gradient, wanted[path], rtol=1e-4, atol=3e-5 * scale, err_msg=path)


def test_a_run_trains_adapters_alone_and_exports_them_merged_and_apart(recipe, tmp_path, vl2, small_model):
    told = []
    run = train(recipe(*LORA), tmp_path / "run", told.append)
    assert set(run.state.kept) == set(flatten(vl2.params))
    for path, array in flatten(vl2.params).items():
        np.testing.assert_array_equal(run.state.kept[path], array)
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]

    assert export_run(tmp_path / "run", tmp_path / "merged", told.append, dtype="float32") == 8
    assert export_run(tmp_path / "run", tmp_path / "adapters", told.append, adapters=True) == 8
    picture = GOLDENS / "images" / "tall.png"
    question = {"role": "user", "content": "<image>\nAnd this?", "images": [picture]}
    batch = vl2.processor([question, {"role": "assistant", "content": ""}])
    merged = vl2_jax.load(tmp_path / "merged", dtype="float32").logits(batch)
    beside = vl2_jax.load(small_model, dtype="float32", adapters=tmp_path / "adapters")
    np.testing.assert_array_equal(merged, beside.logits(batch))
    assert np.abs(merged - vl2.logits(batch)).max() > 1e-3
    on_mesh = vl2_jax.load(small_model, dtype="float32", adapters=tmp_path / "adapters", mesh="expert=8")
    np.testing.assert_allclose(on_mesh.logits(batch), merged, atol=1e-5)


def test_adapters_come_back_from_disk(vl2, factors, tmp_path):
    leaves, adapters = plan(vl2.config), adapters_of(LoraRecipe(4, 8.0, EVERYWHERE), factors)
    write_adapters(tmp_path / "adapters", adapters, leaves, "base")
    again = read_adapters(tmp_path / "adapters", leaves)
    assert again.pairs.keys() == adapters.pairs.keys()
    assert again.scale == 2.0
    for path, (a, b) in adapters.pairs.items():
        np.testing.assert_array_equal(again.pairs[path][0], a)
        np.testing.assert_array_equal(again.pairs[path][1], b)
    merged = merge(flatten(vl2.params), again)
    path = "language/layers_1/mlp/experts_up_proj"
    expected = flatten(vl2.params)[path] + 2.0 * again.pairs[path][0] @ again.pairs[path][1]
    np.testing.assert_allclose(merged[path], expected, atol=1e-6)


def test_wrong_adapters_are_refused(vl2, factors, tmp_path, recipe):
    leaves, adapters = plan(vl2.config), adapters_of(LoraRecipe(4, 8.0, EVERYWHERE), factors)
    write_adapters(tmp_path / "adapters", adapters, leaves, "base")
    with pytest.raises(VL2Error, match="do not fit the model"):
        read_adapters(tmp_path / "adapters", plan(read_config(GOLDENS / "nano-tiny")))
    with pytest.raises(VL2Error, match="exists already"):
        write_adapters(tmp_path / "adapters", adapters, leaves, "base")
    config = json.loads((tmp_path / "adapters" / CONFIG_FILE).read_text())
    (tmp_path / "adapters" / CONFIG_FILE).write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(VL2Error, match="use_dora = True"):
        read_adapters(tmp_path / "adapters", leaves)
    (tmp_path / "adapters" / CONFIG_FILE).write_text(json.dumps(config))
    half = load_file(tmp_path / "adapters" / WEIGHTS_FILE)
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in half.items()}
    header, ranges = layout_file({name: (tensor.dtype, tensor.shape) for name, tensor in narrow.items()})
    tensors = sorted(narrow, key=lambda name: ranges[name])
    (tmp_path / "adapters" / WEIGHTS_FILE).write_bytes(header + b"".join(narrow[name].tobytes() for name in tensors))
    again = read_adapters(tmp_path / "adapters", leaves)
    for path, (a, _) in adapters.pairs.items():
        np.testing.assert_allclose(again.pairs[path][0], a, rtol=0.01)
    half.pop(next(name for name in half if name.endswith("lora_B.weight")))
    save_file(half, tmp_path / "adapters" / WEIGHTS_FILE)
    with pytest.raises(VL2Error, match="has one of lora_A and lora_B"):
        read_adapters(tmp_path / "adapters", leaves)
    (tmp_path / "adapters" / WEIGHTS_FILE).write_bytes(b"short")
    with pytest.raises(VL2Error, match="cannot be read"):
        read_adapters(tmp_path / "adapters", leaves)
    with pytest.raises(VL2Error, match="does not exist"):
        read_adapters(tmp_path / "nothing", leaves)
    with pytest.raises(ConfigError, match=r"lora\.targets has 'language/\*/gate/\*'"):
        train(recipe("lora.rank=4", 'lora.targets=["language/*/gate/*"]'), tmp_path / "run", print)
