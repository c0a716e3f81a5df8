"""`vl2 verify` passes on the recorded model and names what differs when a weight was touched."""

import shutil

import jax
import numpy as np
import pytest

import vl2_jax
from tests.conftest import GOLDENS
from vl2_jax.cli import main
from vl2_jax.verification import ABSOLUTE, of_rows, verify


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """One inference and one training case of nano-small: enough to see a touched weight."""
    directory = tmp_path_factory.mktemp("goldens")
    (directory / "cases").mkdir()
    for case in ("ground_one", "train_batch"):
        for suffix in (".json", ".npz"):
            shutil.copy(GOLDENS / "nano-small" / "cases" / f"{case}{suffix}", directory / "cases")
    shutil.copytree(GOLDENS / "images", directory / "images")
    return directory


@pytest.fixture(scope="module")
def vl2():
    return vl2_jax.load(GOLDENS / "nano-small", dtype="float32")


def failures(vl2, goldens):
    return {check.quantity for check in verify(vl2, goldens) if not check.passed}


def touched(vl2, change):
    params = jax.tree.map(lambda a: a, vl2.params)
    change(params)
    return vl2_jax.VL2(vl2.config, params, vl2.processor, "float32")


def test_the_recorded_model_passes_gradients_included(vl2, goldens):
    checks = list(verify(vl2, goldens))
    assert [check for check in checks if not check.passed] == []
    assert sum(check.quantity.startswith("grad/") for check in checks) > 20


def test_one_perturbed_weight_is_named_by_its_layer(vl2, goldens):
    def perturb(params):
        kernel = params["language"]["layers_2"]["self_attn"]["o_proj"]["kernel"]
        params["language"]["layers_2"]["self_attn"]["o_proj"]["kernel"] = kernel.at[3, 5].add(0.02)

    failed = failures(touched(vl2, perturb), goldens)
    assert {"layer_out[2]", "logits"} <= failed
    assert "layer_out[1]" not in failed


def test_two_swapped_experts_are_named_by_their_layer(vl2, goldens):
    def swap(params):
        experts = params["language"]["layers_3"]["mlp"]
        experts["experts_up_proj"] = experts["experts_up_proj"][jax.numpy.asarray([1, 0, *range(2, 8)])]

    failed = failures(touched(vl2, swap), goldens)
    assert {"layer_out[3]", "logits"} <= failed
    assert "layer_out[2]" not in failed


def test_the_command_fails_with_the_quantities(tmp_path, goldens, capsys):
    shutil.copytree(GOLDENS / "nano-base", tmp_path / "other", ignore=shutil.ignore_patterns("cases"))
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(tmp_path / "other"), str(tmp_path)])
    assert caught.value.code == 1
    assert "holds no cases" in capsys.readouterr().err


def test_rows_are_held_to_their_size():
    recorded = np.ones((3, 4), np.float32) * np.asarray([[1], [20], [98]])
    off = np.zeros_like(recorded)
    off[:, 1] = 1.9e-4, 1.9e-4, 9.7e-4
    assert of_rows(recorded + off, recorded) <= ABSOLUTE
    for row, least in enumerate((2.1e-4, 2.1e-4, 9.9e-4)):
        beyond = np.zeros_like(recorded)
        beyond[row, 2] = least
        assert of_rows(recorded + beyond, recorded) > ABSOLUTE


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A case of nano-v2, whose rows reach 98: layers are computed from the recorded rows before them."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "cases").mkdir()
    for suffix in (".json", ".npz"):
        shutil.copy(GOLDENS / "nano-v2" / "cases" / f"ground_one{suffix}", directory / "cases")
    shutil.copytree(GOLDENS / "images", directory / "images")
    return vl2_jax.load(GOLDENS / "nano-v2", dtype="float32"), directory


PLACES = {
    "layers_0/mlp/up_proj/kernel": {"layer_out[0]"},
    "layers_1/self_attn/o_proj/kernel": {"layer_out[1]"},
    "layers_1/input_layernorm/scale": {"layer_out[1]"},
    "layers_2/mlp/experts_down_proj": {"layer_out[2]"},
    "norm/scale": {"final_norm_out", "logits"},
    "lm_head/kernel": {"logits"},
}


def test_large_rows_pass_and_say_how_they_were_measured(large):
    vl2, directory = large
    checks = {check.quantity: check for check in verify(vl2, directory)}
    assert [check for check in checks.values() if not check.passed] == []
    assert "from the recorded rows" in checks["layer_out[2]"].measured
    assert "rows beyond 20" in checks["layer_out[2]"].measured
    assert checks["logits"].tolerance == ABSOLUTE
    assert checks["logits_argmax"].measured == "values that differ"


@pytest.mark.parametrize("place", PLACES)
def test_a_perturbed_weight_fails_where_it_is_also_in_large_rows(large, place):
    vl2, directory = large

    def perturb(params):
        node = params["language"]
        *parents, name = place.split("/")
        for parent in parents:
            node = node[parent]
        node[name] = node[name] * 1.02

    failed = {c.quantity for c in verify(touched(vl2, perturb), directory) if not c.passed}
    rows = {quantity for quantity in failed if quantity.startswith(("layer_out", "final_norm", "logits"))}
    assert PLACES[place] <= rows
    assert {quantity for quantity in rows if quantity.startswith("layer_out")} <= PLACES[place]
