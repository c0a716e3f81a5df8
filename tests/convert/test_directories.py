"""Directories as people have them: files beside the weights, tensors that nobody uses, things that are no model."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

import vl2_jax
from convert.checkpoint import MANIFEST_FILE, is_converted, read_manifest
from convert.from_torch import checked_entries, convert
from convert.safetensors_files import INDEX_FILE, layout_file, scan, weight_files
from convert.to_torch import export
from convert.weight_map import UNUSED_POOLING, plan
from tests.conftest import GOLDENS
from vl2_jax.api import find_model
from vl2_jax.config import read_config
from vl2_jax.errors import VL2Error, VL2Warning

NANO = GOLDENS / "nano-tiny"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def write_tensors(path, tensors):
    header, ranges = layout_file({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    ordered = sorted(tensors, key=lambda name: ranges[name])
    path.write_bytes(header + b"".join(tensors[name].tobytes() for name in ordered))


@pytest.fixture(scope="module")
def leaves():
    return plan(read_config(NANO))


@pytest.fixture(scope="module")
def tensors():
    return {name: entry.read() for name, entry in scan(NANO)[0].items()}


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    for path in NANO.iterdir():
        if path.is_file():
            shutil.copy(path, directory)
    return directory


@pytest.fixture
def with_other_tensors(model, tensors):
    """Writes the model with these tensors more or (None) fewer."""

    def write(**changes):
        changed = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
        write_tensors(model / "model.safetensors", changed)
        return model

    return write


def test_a_model_without_the_pooling_that_nothing_executes_loads(with_other_tensors, tensors):
    model = with_other_tensors(**{name: None for name in tensors if name.startswith(UNUSED_POOLING)})
    vl2 = vl2_jax.load(model)
    assert not np.asarray(vl2.params["vision"]["attn_pool"]["q"]["kernel"]).any()
    expected = vl2_jax.load(NANO).params["language"]["norm"]["scale"]
    np.testing.assert_array_equal(vl2.params["language"]["norm"]["scale"], expected)


def test_what_is_filled_in_and_left_out_is_told(with_other_tensors, tensors, tmp_path):
    pooling = {name: None for name in tensors if name.startswith(UNUSED_POOLING)}
    computed = {"language.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    model = with_other_tensors(**pooling, **computed)
    with pytest.warns(VL2Warning) as told:
        convert(model, tmp_path / "converted")
    lines = [str(warning.message) for warning in told]
    assert any("13 tensors are missing (vision.attn_pool." in line and "filled with zeros" in line for line in lines)
    assert any("1 tensors are left out" in line and "inv_freq" in line for line in lines)
    with pytest.warns(VL2Warning, match="13 tensors that the original did not have .* are written as zeros"):
        export(tmp_path / "converted", tmp_path / "exported")
    again, problems = scan(tmp_path / "exported")
    assert not problems
    assert again.keys() == tensors.keys()


def test_a_missing_tensor_that_is_executed_is_missing(with_other_tensors, leaves):
    with pytest.raises(VL2Error, match=r"vision\.norm\.weight is missing"):
        checked_entries(with_other_tensors(**{"vision.norm.weight": None}), leaves)


@pytest.mark.parametrize("name", ["vision.embeddings.position_ids", "language.model.rotary_emb.inv_freq"])
def test_tensors_that_are_computed_may_stand_there(with_other_tensors, leaves, name):
    checked_entries(with_other_tensors(**{name: np.arange(9)}), leaves)


def test_files_beside_the_weights_are_not_the_weights(model, leaves):
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    for name in ("._model-00001-of-00001", "adapter_model", "consolidated", "consolidated.00", "optimizer-00001"):
        (model / f"{name}.safetensors").write_bytes(weights)
    (model / ".ipynb_checkpoints").mkdir()
    for name in ("training_args.bin", "optimizer.pt", ".ipynb_checkpoints/model-checkpoint.safetensors"):
        (model / name).write_bytes(b"something else")
    assert [path.name for path in weight_files(model)] == ["model-00001-of-00001.safetensors"]
    checked_entries(model, leaves)


def test_files_of_other_things_are_not_taken_along(model, tmp_path):
    for name in ("._config.json", "adapter_config.json", "trainer_state.json", "pytorch_model.bin.index.json"):
        (model / name).write_text("{}")
    convert(model, tmp_path / "converted")
    kept = {path.name for path in (tmp_path / "converted").iterdir()}
    assert kept == {path.name for path in NANO.iterdir() if path.suffix == ".json"} | {"params", MANIFEST_FILE}


def test_adapters_beside_a_converted_model_do_not_make_it_another(tmp_path):
    convert(NANO, tmp_path / "converted")
    (tmp_path / "converted" / "adapter_model.safetensors").write_bytes(b"")
    assert is_converted(tmp_path / "converted")
    assert read_manifest(tmp_path / "converted")["tensors"]


def test_the_single_file_is_taken_where_the_index_is_of_files_that_are_gone(model, leaves):
    index = {"weight_map": {"vision.norm.weight": "model-00001-of-00002.safetensors"}}
    (model / INDEX_FILE).write_text(json.dumps(index))
    checked_entries(model, leaves)


def test_shards_that_are_missing_are_counted_and_named(model, leaves):
    (model / "model.safetensors").rename(model / "model-00001-of-00003.safetensors")
    files = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    (model / INDEX_FILE).write_text(json.dumps({"weight_map": dict(zip("abc", files))}))
    message = r"2 of the 3 weight files .* are missing \('model-00002-of-00003.safetensors, model-00003"
    with pytest.raises(VL2Error, match=message):
        checked_entries(model, leaves)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "no", '{"weight_map": {}}']
)
def test_a_damaged_index_is_named(model, leaves, content):
    (model / INDEX_FILE).write_text(content)
    with pytest.raises(VL2Error, match=r"model\.safetensors\.index\.json is damaged"):
        checked_entries(model, leaves)


def test_a_pointer_of_git_lfs_is_named(model, leaves):
    (model / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(VL2Error, match=r"model\.safetensors is a Git LFS pointer.*git lfs pull"):
        checked_entries(model, leaves)


def test_a_link_to_nothing_is_named(model, leaves):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../blobs/5f3a")
    with pytest.raises(VL2Error, match=r"is a link to \.\./blobs/5f3a, which is not there; copy"):
        checked_entries(model, leaves)


@pytest.mark.parametrize(
    "more",
    [
        {"language.model.layers.0.self_attn.q_proj.weight.absmax": np.ones(4, np.float32)},
        {"language.model.layers.0.self_attn.q_proj.qweight": np.ones((4, 4), np.int32)},
        {"language.model.layers.0.self_attn.q_proj.weight_scale_inv": np.ones((1, 1), np.float32)},
    ],
)
def test_quantised_weights_are_named(with_other_tensors, leaves, more):
    with pytest.raises(VL2Error, match=r"are quantised .* give the model in bfloat16, float16 or float32"):
        checked_entries(with_other_tensors(**more), leaves)


def test_weights_of_one_byte_are_named(with_other_tensors, leaves, tensors):
    name = "language.lm_head.weight"
    narrow = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    with pytest.raises(VL2Error, match=r"lm_head\.weight has dtype float8_e4m3fn.*quantised"):
        checked_entries(with_other_tensors(**{name: narrow}), leaves)


def test_weights_in_another_format_are_named(model, leaves):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(VL2Error, match=r"only as 'pytorch_model\.bin'.* save them as \*\.safetensors"):
        checked_entries(model, leaves)


def test_a_file_is_no_directory(model):
    with pytest.raises(VL2Error, match=r"model\.safetensors is a file; give the directory that holds it"):
        find_model(model / "model.safetensors")


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json"])
def test_a_model_that_could_not_answer_is_not_converted(model, tmp_path, name):
    (model / name).unlink()
    with pytest.raises(VL2Error, match=rf"{name} does not exist"):
        convert(model, tmp_path / "converted")
    with pytest.raises(VL2Error, match=rf"{name} does not exist"):
        vl2_jax.load(model)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
