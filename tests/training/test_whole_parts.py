"""Adapters and whole parts together: trained, exported in both layouts, read back, gone on from."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import vl2_jax
from convert.adapters import merge
from convert.peft import CONFIG_FILE, read_adapters, write_adapters
from convert.weight_map import flatten, plan
from vl2_jax.config import read_config
from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.model.layers import ADAPTERS
from vl2_jax.progress import silent
from vl2_jax.training import evaluation
from vl2_jax.training.checkpoints import name_of
from vl2_jax.training.export import _Merged, _trained_pieces, export_run
from vl2_jax.training.loop import _begin, train
from vl2_jax.training.lora import adapted_paths, adapters_of, whole_paths
from vl2_jax.training.recipe import build_recipe
from vl2_jax.training.step import params_of

HEAD, Q = "projector/layers_0/kernel", "language/layers_1/self_attn/q_proj/kernel"
LORA = {"rank": 4, "alpha": 8.0, "targets": ["language/*_proj/kernel", "vision/blocks_*"], "whole": ["projector/*"]}
FROZEN = ["vision/*", "language/layers_0/*"]


@pytest.fixture(scope="module")
def base(first_layers):
    return first_layers("nano-tiny")


@pytest.fixture(scope="module")
def recipe(base, data_file):
    def build(lora=LORA, frozen=FROZEN, **model):
        return build_recipe(
            {
                "model": {"path": str(base), "scan": True} | model,
                "data": {
                    "sources": [{"path": str(data_file)}], "sequence_length": 256, "rows": 1, "tiles": 12, "workers": 0,
                },
                "optimizer": {"learning_rate": 1e-3, "frozen": frozen},
                "lora": lora,
                "loop": {"steps": 2},
            }
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def leaves(base):
    return plan(read_config(base))


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(recipe(), folder, print)


@pytest.fixture(scope="module")
def exported(run):
    """Adapters and the model they are merged into, in float32 and in bfloat16, and what was told."""
    folder, _ = run
    told = []
    for dtype in ("float32", "bfloat16"):
        export_run(folder, folder / dtype, told.append, dtype=dtype)
    export_run(folder, folder / "adapters", told.append, adapters=True)
    return folder, told


def changed(before, after):
    return {path for path, array in before.items() if not np.array_equal(array, after[path])}


def test_frozen_parts_stay_and_whole_parts_move_beside_adapters(base, run, recipe):
    begun = flatten(vl2_jax.load(base, dtype="float32").params)
    moved = changed(begun, flatten(run[1].params))
    targets = set(adapted_paths(recipe(), begun))
    assert {path for path in begun if path.startswith("projector/")} <= moved
    assert Q in targets
    assert moved <= {path for path in begun if path.startswith("projector/")} | targets
    assert not any(path.startswith(("vision/", "language/layers_0/")) for path in moved | targets)


def test_the_merged_export_is_the_trained_model(run, exported):
    learned, export = flatten(run[1].params), flatten(vl2_jax.load(exported[0] / "float32", dtype="float32").params)
    for path, array in learned.items():
        np.testing.assert_allclose(export[path], array, atol=1e-7, err_msg=path)


def test_whole_parts_are_exported_as_peft_names_them_and_come_back(base, run, exported, leaves):
    config = json.loads((exported[0] / "adapters" / CONFIG_FILE).read_text())
    assert config["modules_to_save"] == ["projector.layers.0", "projector.layers.2"]
    assert config["base_model_name_or_path"] == str(base)
    read = read_adapters(exported[0] / "adapters", leaves)
    merged = merge(flatten(vl2_jax.load(base, dtype="float32").params), read)
    assert not changed(flatten(run[1].params), merged)


def test_what_a_narrow_export_loses_is_told(exported):
    assert len(exported[1]) == 1
    assert "weights with adapters are as before in bfloat16" in exported[1][0]
    assert "--dtype float32" in exported[1][0]


def test_a_run_goes_on_from_adapters(run, exported, recipe):
    begun = _begin(recipe(adapters=str(exported[0] / "adapters")), None, silent)
    assert not changed(flatten(run[1].params), flatten(begun.params))
    for path, array in run[1].state.trained.items():
        np.testing.assert_allclose(begun.state.trained[path], array, rtol=1e-6)


def test_a_higher_rank_goes_on_from_the_same_model(run, exported, recipe):
    begun = _begin(recipe(LORA | {"rank": 6, "alpha": 3.0}, adapters=str(exported[0] / "adapters")), None, silent)
    for path, array in flatten(run[1].params).items():
        np.testing.assert_allclose(flatten(begun.params)[path], array, atol=1e-6, err_msg=path)
    assert np.asarray(begun.state.trained[f"{Q}/a"])[:, 4:].any()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 2}, r"model\.adapters have rank 4 .*more than lora\.rank 2"),
        ({"targets": ["language/layers_1/self_attn/o_proj/*"]}, r"model\.adapters has .*which lora\.targets leave out"),
        ({"whole": []}, r"model\.adapters has .projector/.*whole, which lora\.whole leaves out"),
    ],
)
def test_nothing_of_the_adapters_is_lost_on_the_way(exported, recipe, lora, message):
    with pytest.raises(VL2Error, match=message):
        _begin(recipe(LORA | lora, adapters=str(exported[0] / "adapters")), None, silent)


def test_a_run_without_adapters_of_its_own_begins_with_them_merged(base, run, exported, recipe, leaves):
    adapters = str(exported[0] / "adapters")
    described = recipe({}, ["vision/*", "language/*", "projector/*"], adapters=adapters)
    begun = _begin(described, None, silent)
    assert not changed(flatten(run[1].params), flatten(begun.params))
    # What such a run never changes is exported as it began, and not as its base has it.
    saved = {name_of("trained", path): np.asarray(array) for path, array in begun.state.trained.items()}
    dtypes = {leaf.path: np.dtype(np.float32) for leaf in leaves}
    groups = _trained_pieces(
        described, base, leaves, lambda names: {name: saved[name] for name in names}, dtypes, _Merged(), print
    )
    written = {path: array for group in groups for path, array in group.items()}
    assert not changed(flatten(run[1].params), written)


@pytest.mark.parametrize(
    ("lora", "frozen", "message"),
    [
        ({"targets": ["vision/*"]}, FROZEN, "leaves no adapter to train"),
        ({"whole": ["projektor/*"]}, FROZEN, r"lora\.whole has 'projektor/\*', which fits no parameter"),
        ({}, ["visoin/*"], r"optimizer\.frozen has 'visoin/\*'"),
    ],
)
def test_patterns_that_fit_nothing_are_named(recipe, lora, frozen, message):
    with pytest.raises(ConfigError, match=message):
        _begin(recipe(LORA | lora, frozen), None, silent)


def test_what_is_trained_whole_has_no_adapter_too(recipe, leaves):
    paths = [leaf.path for leaf in leaves]
    both = recipe(LORA | {"targets": ["projector/*", "language/layers_1/*"]})
    assert set(whole_paths(both, paths)) == {path for path in paths if path.startswith("projector/")}
    assert not any(path.startswith("projector/") for path in adapted_paths(both, paths))


def test_samples_of_an_evaluation_are_answered_with_adapters_beside(run, recipe, monkeypatch, tmp_path):
    asked = []

    class Model:
        def __init__(self, config, params, *_, **__):
            asked.append(params)

        def generate(self, turns, **_):
            return [SimpleNamespace(text="yes", boxes=[]) for _ in turns]

    monkeypatch.setattr(evaluation, "VL2", Model)
    look = object.__new__(evaluation.Evaluation)
    look._recipe, look._model, look._processor, look._folder = recipe(), run[1].model, run[1].processor, tmp_path
    look._questions = [([{"role": "user", "content": "?"}], "yes")]
    look._ask(2, run[1].state, lambda line: None, lambda: None)
    assert f"{Q}/a" in flatten(asked[0][ADAPTERS])
    np.testing.assert_array_equal(flatten(asked[0])[Q], run[1].state.kept[Q])
    np.testing.assert_array_equal(flatten(asked[0])[HEAD], run[1].state.trained[HEAD])


def test_parameters_of_no_module_are_written_and_read(run, recipe, leaves, tmp_path):
    newline = np.arange(64, dtype=np.float32)
    learned = adapters_of(recipe().lora, run[1].state.trained)
    whole = {"image_newline": newline}
    write_adapters(tmp_path / "adapters", type(learned)(learned.pairs, learned.scales, whole), leaves, "x")
    assert json.loads((tmp_path / "adapters" / CONFIG_FILE).read_text())["modules_to_save"] is None
    np.testing.assert_array_equal(read_adapters(tmp_path / "adapters", leaves).whole["image_newline"], newline)


def test_merged_parameters_of_a_state_have_whole_parts(run, recipe):
    assert not changed(params_of(recipe(), run[1].state), flatten(run[1].params))
