"""`vl2 verify` passes on the recorded model and names what differs when a weight was touched."""

import shutil

import jax
import pytest

import vl2_jax
from tests.conftest import GOLDENS
from vl2_jax.cli import main
from vl2_jax.verification import verify


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
