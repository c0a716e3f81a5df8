"""Adapters beside quantised weights: gradients of what these stand for, and nothing wide that is kept."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import vl2_jax
from convert.from_torch import convert
from convert.peft import CONFIG_FILE, WEIGHTS_FILE
from convert.quantise import abstract_quantised, is_quantised, quantised
from convert.weight_map import flatten, unflatten
from vl2_jax.cli.train import train as trained_by_command
from vl2_jax.config import VL2Config
from vl2_jax.errors import VL2Error
from vl2_jax.model.layers import ADAPTERS, ONE_DEVICE
from vl2_jax.model.vl2 import VL2Model, abstract_params, apply
from vl2_jax.ops.narrow.product import widened
from vl2_jax.progress import silent
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.rules import AXES
from vl2_jax.training import loop
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import _begin, train
from vl2_jax.training.lora import abstract_adapters, collection_of, init_adapters
from vl2_jax.training.objective import losses
from vl2_jax.training.recipe import LoraRecipe, Recipe, read_recipe

EVERYWHERE = ("language/layers_*",)
BESIDE_EXPERTS = ("language/layers_*/self_attn/*_proj*", "language/layers_*/mlp/shared_experts/*")
INT4 = ["model.weights=int4", "lora.rank=4", "lora.alpha=8", "optimizer.learning_rate=3e-3", "data.rows=4"]
INT4 += ["data.tiles=32", "data.sequence_length=384", "optimizer.epsilon=0.01", "loop.checkpoint_every=1"]


@pytest.mark.parametrize(
    ("family", "targets", "loops"),
    [
        ("nano-tiny", BESIDE_EXPERTS, {}),
        ("nano-small", BESIDE_EXPERTS, {"remat": True, "scan": True}),
        ("nano-base", EVERYWHERE, {"remat": True}),
    ],
)
def test_gradients_beside_quantised_weights_are_those_beside_the_numbers_they_stand_for(
    family, targets, loops, first_layers
):
    vl2 = vl2_jax.load(first_layers(family), dtype="float32", weights="int4")
    flat = flatten(vl2.params)
    described = LoraRecipe(4, 8.0, targets)
    drawn = init_adapters(abstract_adapters(Recipe(lora=described), flat), 1)
    random = np.random.default_rng(0)
    adapters = {
        path: jnp.asarray(0.05 * random.standard_normal(leaf.shape, np.float32)) for path, leaf in drawn.items()
    }
    batch = vl2.processor(
        [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two, at least."}]
    )

    @partial(jax.jit, static_argnums=0)
    def gradients(model, params):
        beside = collection_of(described, adapters)
        return jax.value_and_grad(lambda f: losses(model, {**params, ADAPTERS: f}, batch).total)(beside)

    loss, ours = gradients(vl2.model.clone(**loops), vl2.params)
    expected, wanted = gradients(
        vl2.model, unflatten({path: widened(leaf, jnp.float32) for path, leaf in flat.items()})
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, gradient in flatten(wanted).items():
        scale = float(jnp.abs(gradient).max())
        assert scale > 0, path
        np.testing.assert_allclose(flatten(ours)[path], gradient, rtol=1e-4, atol=3e-5 * scale, err_msg=path)


def test_no_wide_copy_of_the_experts_is_made():
    """Shapes alone: two layers of 8 experts, of which one projection of one expert takes 5 MB in float32."""
    config = VL2Config.preset("vl2-nano")
    language = config.language_config.replace(
        num_hidden_layers=3, hidden_size=1152, moe_intermediate_size=1152, n_routed_experts=8, num_experts_per_tok=2
    )
    config = config.replace(
        language_config=language, projector_config=config.projector_config.replace(n_embed=language.hidden_size)
    )
    flat = flatten(abstract_params(config, jnp.float32))
    experts = [4 * leaf.size for path, leaf in flat.items() if "/experts_" in path]
    narrow = {path: abstract_quantised(path, leaf.shape, "int4") for path, leaf in flat.items() if is_quantised(path)}
    described = Recipe(lora=LoraRecipe(4, 8.0, BESIDE_EXPERTS))
    factors = unflatten(abstract_adapters(described, flat))
    model = VL2Model(config, jnp.float32, jnp.float32)

    def loss(adapters, params, x, positions):
        return apply(model, {**params, ADAPTERS: adapters}, x, positions, method="decode").hidden.sum()

    x, positions = jax.ShapeDtypeStruct((1, 16, 1152), jnp.float32), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    program = jax.jit(jax.grad(loss)).lower(factors, unflatten(flat | narrow), x, positions).compile()
    assert len(experts) == 2 * 3
    assert program.memory_analysis().temp_size_in_bytes < experts[0]


def test_adapters_of_experts_are_cut_as_quantised_matrices_are():
    """Six experts, on two times two devices, whose width is three groups of rows: it stays whole."""
    random = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(random.standard_normal(shape, np.float32) / 8)

    shapes = [(6, 64, 24), (6, 64, 24), (6, 24, 64)]
    kernels = [quantised(drawn(*shape), "int4") for shape in shapes]
    factors = tuple((drawn(6, depth, 2), drawn(6, 2, width)) for _, depth, width in shapes)
    ids = jnp.asarray([random.permutation(6)[:2] for _ in range(8)]).reshape(2, 4, 2)
    inputs = drawn(2, 4, 64), *kernels, ids, drawn(2, 4, 2), factors
    many = MeshLayout(Mesh(np.asarray(jax.devices()[:4]).reshape(1, 1, 2, 2), AXES))
    with many.on_devices():
        ours = jax.jit(many.experts)(*inputs)
    np.testing.assert_allclose(ours, jax.jit(ONE_DEVICE.experts)(*inputs), atol=1e-5)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, small_model):
    directory = tmp_path_factory.mktemp("quantised") / "int4"
    convert(small_model, directory, weights="int4")
    return directory


@pytest.fixture(scope="module")
def run(write_recipe, tmp_path_factory):
    """Three steps on one device, the last two of which go on from a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    described = read_recipe(
        write_recipe(folder / "recipe.toml"), ["loop.steps=3", *INT4, f"lora.targets={json.dumps(EVERYWHERE)}"]
    )
    train(described, folder / "run", print, until=1)
    return folder / "run", train(described, folder / "run", print)


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_on_a_mesh_is_that_on_one_device(run, tmp_path):
    folder, one = run
    many = train(one.recipe, tmp_path / "many", print, mesh="fsdp=2,expert=2,tensor=2")
    np.testing.assert_allclose(losses_of(tmp_path / "many"), losses_of(folder), rtol=1e-5)
    for path, array in one.state.trained.items():
        np.testing.assert_allclose(many.state.trained[path], array, atol=1e-6, rtol=1e-5, err_msg=path)


def test_adapters_alone_learn_and_are_saved(run, small_model):
    folder, trained = run
    assert losses_of(folder)[-1] < losses_of(folder)[0]
    begun = flatten(vl2_jax.load(small_model, dtype="float32", weights="int4").params)
    for path, leaf in trained.state.kept.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, leaf, begun[path])), path
    saved = loop._changing(trained.recipe, trained.state)
    assert all(path.endswith("correction_bias") for path in saved.kept)
    assert all(path.endswith(("/a", "/b")) for path in saved.trained)


def test_the_adapters_apart_are_the_model_that_was_trained(run, small_model, tmp_path):
    folder, trained = run
    told = []
    export_run(folder, tmp_path / "adapters", told.append, adapters=True)
    loaded = vl2_jax.load(small_model, dtype="float32", weights="int4", adapters=tmp_path / "adapters")
    answered = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This."}]
    batch = loaded.processor(answered)
    ours = vl2_jax.VL2(trained.model.config, trained.params, trained.processor, "float32")
    np.testing.assert_array_equal(ours.logits(batch), loaded.logits(batch))
    assert told == []
    export_run(folder, tmp_path / "merged", told.append, dtype="float32")
    assert "adapters that were trained beside int4 weights are added to those that" in told[0]


def test_the_command_leaves_the_adapters_and_says_how_to_use_them(run, small_model, monkeypatch, capsys):
    folder, trained = run
    monkeypatch.setattr(loop, "train", lambda *_, **__: trained)
    trained_by_command("sft-nano", folder)
    assert f"--model {small_model} --weights int4 --adapters {folder / 'adapters'}" in capsys.readouterr().err
    assert {path.name for path in (folder / "adapters").iterdir()} >= {CONFIG_FILE, WEIGHTS_FILE}
    assert not (folder / "model").exists()


def test_quantised_checkpoints_are_a_base_for_adapters(converted, recipe, run, tmp_path):
    lora = ["lora.rank=4", f"lora.targets={json.dumps(BESIDE_EXPERTS)}"]
    for asked in ([], ["model.weights=int4"]):
        begun = _begin(recipe(*lora, *asked, model=converted), None, silent)
        assert begun.is_quantised
    with pytest.raises(VL2Error, match="are int4 and cannot become int8"):
        _begin(recipe(*lora, "model.weights=int8", model=converted), None, silent)
    with pytest.raises(VL2Error, match=r"are int4, which gradients cannot change; train adapters \(lora\.rank\)"):
        _begin(recipe(model=converted), None, silent)
    (folder := tmp_path / "run").mkdir()
    (folder / "checkpoints").symlink_to(run[0] / "checkpoints")
    described = json.loads((run[0] / "recipe.json").read_text())
    described["model"]["path"] = str(converted)
    (folder / "recipe.json").write_text(json.dumps(described))
    with pytest.raises(VL2Error, match=r"cannot be added to the int4 weights of .*; export them apart"):
        export_run(folder, tmp_path / "model", print)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.weights=int4"],
            r"model\.weights is 'int4', which gradients cannot change; train adapters \(lora\.rank\)",
        ),
        (["model.weights=int3", "lora.rank=4"], r"model\.weights is 'int3'; expected int8 or int4"),
        (["model.weights=int4", "lora.rank=4", "model.path="], r"model\.weights needs model\.path"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe, changes, message):
    with pytest.raises(VL2Error, match=message):
        recipe(*changes)


def test_quantised_matrices_are_not_trained_whole(recipe):
    whole = 'lora.whole=["language/layers_1/self_attn/o_proj/*"]'
    with pytest.raises(
        VL2Error, match=r"lora\.whole has 'language/.*', which is quantised and cannot be trained itself"
    ):
        _begin(recipe("model.weights=int4", "lora.rank=4", whole), None, silent)
