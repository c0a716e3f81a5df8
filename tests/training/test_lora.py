"""Low-rank adapters: the same gradients as multiplied-out ones, PEFT's files, a merged export."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vl2_jax
from convert.adapters import can_be_adapted, merge
from convert.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapters, write_adapters
from convert.safetensors_files import layout_file
from convert.weight_map import flatten, plan, unflatten
from tests.conftest import GOLDENS
from vl2_jax.api import VL2
from vl2_jax.config import read_config
from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.model.layers import ADAPTERS
from vl2_jax.model.vl2 import apply
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.ops.narrow.product import widened
from vl2_jax.training.data import batches
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import train
from vl2_jax.training.lora import abstract_adapters, adapters_of, collection_of, init_adapters
from vl2_jax.training.objective import losses
from vl2_jax.training.recipe import LoraRecipe, Recipe

EVERYWHERE = ("language/*", "vision/blocks_*", "projector/*")
LORA = ["lora.rank=4", "lora.alpha=8", "optimizer.learning_rate=3e-3", f"lora.targets={json.dumps(EVERYWHERE)}"]


@pytest.fixture(scope="module")
def vl2(small_model):
    return vl2_jax.load(small_model, dtype="float32")


@pytest.fixture(scope="module")
def factors(vl2):
    """Adapters on everything that can have one, neither factor zero."""
    flat = flatten(vl2.params)
    drawn = init_adapters(abstract_adapters(Recipe(lora=LoraRecipe(4, 8.0, EVERYWHERE)), flat), 1)
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


def test_adapters_have_the_loss_and_gradients_of_their_products(vl2, factors, recipe):
    described = LoraRecipe(4, 8.0, EVERYWHERE)
    batch = next(iter(batches(recipe().data, vl2.processor)))
    flat = flatten(vl2.params)

    @partial(jax.jit, static_argnums=0)
    def beside(model, factors):
        adapters = collection_of(described, factors)
        return jax.value_and_grad(lambda f: losses(model, {**vl2.params, ADAPTERS: f}, batch).total)(adapters)

    @jax.jit
    def multiplied_out(factors):
        def loss(pairs):
            merged = {p: w + pairs[f"{p}/a"] @ pairs[f"{p}/b"] if f"{p}/a" in pairs else w for p, w in flat.items()}
            return losses(vl2.model, unflatten(merged), batch).total

        return jax.value_and_grad(loss)(flatten(collection_of(described, factors)))

    expected, wanted = multiplied_out(factors)
    for model in (vl2.model, vl2.model.clone(remat=True, scan=True)):
        loss, gradients = beside(model, factors)
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


@pytest.fixture(scope="module")
def small_updates(tmp_path_factory, vl2):
    """Adapters everywhere, each product less than half a step of bfloat16 weights of ordinary size."""
    flat = flatten(vl2.params)
    drawn = init_adapters(abstract_adapters(Recipe(lora=LoraRecipe(4, 8.0, EVERYWHERE)), flat), 1)
    random = np.random.default_rng(3)

    def small(path, leaf):
        return jnp.asarray(4e-4 * random.standard_normal(leaf.shape, np.float32)) if path.endswith("/b") else leaf

    factors = {path: small(path, leaf) for path, leaf in drawn.items()}
    directory = tmp_path_factory.mktemp("small") / "adapters"
    write_adapters(directory, adapters_of(LoraRecipe(4, 8.0, EVERYWHERE), factors), plan(vl2.config), "nano-base")
    return directory


@pytest.fixture(scope="module")
def question(vl2):
    picture = GOLDENS / "images" / "tiny.png"
    asked = {"role": "user", "content": "<image>\nAnd this?", "images": [picture]}
    return [asked, {"role": "assistant", "content": ""}]


@pytest.fixture(scope="module")
def beside(small_model, small_updates):
    return vl2_jax.load(small_model, dtype="float32", adapters=small_updates, merge=False)


def test_adapters_beside_the_weights_of_a_mesh_are_adapters_merged(small_model, small_updates, vl2, question):
    batch = vl2.processor(question)
    merged = vl2_jax.load(small_model, dtype="float32", adapters=small_updates).logits(batch)
    spread = vl2_jax.load(small_model, dtype="float32", adapters=small_updates, merge=False, mesh="expert=4,tensor=2")
    # float32 sums in another order, through all layers.
    np.testing.assert_allclose(spread.logits(batch), merged, atol=1e-4)
    assert np.abs(merged - vl2.logits(batch)).max() > 20 * 1e-4


def test_updates_below_a_step_of_bfloat16_are_kept_beside_and_lost_merged(small_model, small_updates, vl2, question):
    """In float32 arithmetic, so that only what happens to the weights differs."""
    batch, model = vl2.processor(question), vl2.model
    load = partial(vl2_jax.load, small_model, dtype="bfloat16", arrays=True)
    params = {
        "base": load().params,
        "merged": load(adapters=small_updates, merge=True).params,
        "beside": load(adapters=small_updates).params,  # what is chosen for bfloat16
    }
    narrow = flatten(params["base"])
    wide = {path: jnp.asarray(array, jnp.float32) for path, array in narrow.items()}
    exact = unflatten(merge(wide, read_adapters(small_updates, plan(vl2.config))))
    segments = batch.attention_mask.astype(np.int32)

    @jax.jit
    def logits(params):
        return apply(model, params, batch.input_ids, segments, batch.visual_index, batch.tiles).logits

    expected, base = logits(exact), logits(params["base"])
    moved = float(jnp.abs(expected - base).max())
    errors = {kind: float(jnp.abs(logits(params[kind]) - expected).max()) / moved for kind in ("merged", "beside")}
    assert errors["beside"] < 1e-3
    assert errors["merged"] > 0.2
    kept = vl2_jax.load(GOLDENS / "nano-base", dtype="bfloat16", adapters=small_updates).params  # as whole numbers
    np.testing.assert_allclose(logits(kept)[segments > 0], logits(params["beside"])[segments > 0], atol=1e-4)


def test_adapters_stand_beside_quantised_weights(small_updates, vl2, question):
    load = partial(vl2_jax.load, GOLDENS / "nano-base", dtype="float32", weights="int4", adapters=small_updates)
    with pytest.raises(VL2Error, match="adapters cannot be added to int4 weights; keep them beside"):
        load(merge=True)
    ours = load()
    batch = ours.processor(question)
    params = jax.tree.map(lambda leaf: widened(leaf, jnp.float32), ours.params, is_leaf=lambda x: isinstance(x, Narrow))
    exact = VL2(ours.config, params, ours.processor)
    np.testing.assert_allclose(ours.logits(batch), exact.logits(batch), atol=1e-4)
    alone = vl2_jax.load(GOLDENS / "nano-base", dtype="float32", weights="int4")
    assert np.abs(alone.logits(batch) - exact.logits(batch)).max() > 20 * 1e-4


def test_both_forms_of_latent_attention_have_the_same_adapters(beside, question):
    batch = beside.processor(question)
    segments = batch.attention_mask.astype(np.int32)

    @partial(jax.jit, static_argnums=0)
    def hidden(form):
        inputs = (batch.input_ids, segments, None, None, None, form)
        return apply(beside.model, beside.params, *inputs, method="hidden").hidden

    expanded, absorbed = hidden(False), hidden(True)
    np.testing.assert_allclose(absorbed, expanded, atol=1e-4)


def test_a_model_with_adapters_beside_it_answers(beside, question):
    (answer,) = beside.generate([question], max_tokens=2, ignore_eos=True)
    first = jax.nn.log_softmax(beside.logits(beside.processor(question))[0, -1])
    assert answer.token_ids[0] == int(first.argmax())
    np.testing.assert_allclose(answer.logprobs[0], first.max(), atol=1e-4)


def test_adapters_come_back_from_disk(vl2, factors, tmp_path):
    leaves, adapters = plan(vl2.config), adapters_of(LoraRecipe(4, 8.0, EVERYWHERE), factors)
    write_adapters(tmp_path / "adapters", adapters, leaves, "base")
    again = read_adapters(tmp_path / "adapters", leaves)
    assert again.pairs.keys() == adapters.pairs.keys()
    assert set(again.scales.values()) == {2.0}
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
