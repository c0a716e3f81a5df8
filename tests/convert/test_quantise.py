"""Quantised weights: how they are rounded, what stands on disk, and that a model computes with what they stand for."""

import json
import shutil
from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import pytest

import vl2_jax
from convert.checkpoint import MANIFEST_FILE
from convert.from_torch import convert
from convert.quantise import is_quantised, quantised
from convert.random_checkpoint import create, create_quantised
from convert.to_torch import export
from convert.weight_map import flatten, unflatten
from tests.conftest import GOLDENS
from vl2_jax.config import read_preset
from vl2_jax.errors import VL2Error
from vl2_jax.ops.narrow.kinds import Int4, Int8, Narrow
from vl2_jax.ops.narrow.product import widened

TURN = {"role": "user", "content": "<image>\nWhat is it?", "images": [str(GOLDENS / "images" / "tiny.png")]}
TALK = [TURN, {"role": "assistant", "content": "Nothing much."}]


def drawn(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def test_int8_rounds_each_column_to_whole_steps_of_its_largest():
    array = drawn(3, 96, 40)
    array[1, :, 7] = 0
    found = quantised(array, "int8")
    step = np.abs(array).max(axis=1, keepdims=True) / 127
    ours = np.asarray(found.widened(jnp.float32))
    assert (np.abs(ours - array) <= step / 2 * (1 + 1e-5)).all()
    assert np.abs(found.values).max() == 127


def test_int4_keeps_two_rows_in_a_byte():
    array = drawn(256, 40)
    found = quantised(array, "int4")
    bytes_, scales = np.asarray(found.nibbles), np.asarray(found.scales)
    assert (bytes_.shape, scales.shape) == ((128, 40), (2, 1, 40))
    decoded = np.empty((256, 40), np.float32)
    for row in range(256):
        half = bytes_[row // 2] >> 4 if row % 2 else bytes_[row // 2] & 15
        decoded[row] = (half.astype(np.float32) - 8) * scales[row // 128, 0]
    np.testing.assert_array_equal(found.widened(jnp.float32), decoded)


def test_no_group_is_further_away_than_rounded_to_the_nearest_of_its_largest():
    groups = drawn(512, 40).reshape(4, 128, 40)
    groups[2, :, 7] = 0
    step = np.maximum(np.abs(groups).max(axis=1, keepdims=True), 1e-9) / 7
    nearest = np.square(np.rint(groups / step) * step - groups).sum(axis=1)
    ours = np.asarray(quantised(groups.reshape(512, 40), "int4").widened(jnp.float32)).reshape(groups.shape)
    errors = np.square(ours - groups).sum(axis=1)
    assert (errors <= nearest * (1 + 1e-5)).all()
    assert errors.sum() < 0.9 * nearest.sum()
    assert not ours[2, :, 7].any()


@pytest.mark.parametrize(("depth", "group"), [(1408, 128), (10944, 64), (96, 32), (24, 8), (12, None)])
def test_groups_are_what_divides_the_rows_and_matrices_of_no_group_are_int8(depth, group):
    found = quantised(drawn(depth, 6), "int4")
    assert isinstance(found, Int8 if group is None else Int4)
    assert group is None or 2 * found.alike == group


@pytest.fixture(scope="module")
def converted(tmp_path_factory, first_layers):
    """`converted(kind)`: a recorded model of two layers in so many bits."""

    @cache
    def made(kind):
        directory = tmp_path_factory.mktemp("quantised") / kind
        convert(first_layers("nano-base"), directory, weights=kind)
        return directory

    return made


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float32"), ("int4", "bfloat16")])
def test_a_model_of_quantised_weights_is_that_of_the_numbers_they_stand_for(kind, dtype, converted, first_layers):
    vl2 = vl2_jax.load(converted(kind), dtype=dtype)
    flat = flatten(vl2.params)
    assert {path for path, leaf in flat.items() if isinstance(leaf, Int8 | Int4)} == set(filter(is_quantised, flat))
    four_bits = {path for path, leaf in flat.items() if isinstance(leaf, Int4)}
    assert all("/mlp/" in path for path in four_bits)
    assert bool(four_bits) == (kind == "int4")
    batch = vl2.processor(TALK)
    ours = vl2.logits(batch)
    exact = vl2_jax.load(first_layers("nano-base"), dtype="float32")
    original = exact.logits(batch)
    exact.params = unflatten({path: widened(leaf, jnp.float32) for path, leaf in flat.items()})
    np.testing.assert_allclose(ours, exact.logits(batch), atol=1e-4)  # the order of float32 sums
    assert np.abs(ours - original).max() > 1e-2
    (answer,) = vl2.generate([TURN], max_tokens=4, ignore_eos=True)
    assert answer.token_ids == exact.generate([TURN], max_tokens=4, ignore_eos=True)[0].token_ids


def test_what_is_quantised_when_it_is_loaded_is_what_convert_writes(converted, first_layers):
    there = flatten(vl2_jax.load(converted("int4")).params)
    here = flatten(vl2_jax.load(first_layers("nano-base"), weights="int4").params)
    for path, leaf in there.items():
        parts = vars(leaf) if isinstance(leaf, Narrow) else {"": leaf}
        for name, part in parts.items():
            np.testing.assert_array_equal(part, getattr(here[path], name) if name else here[path], err_msg=path)


@pytest.mark.parametrize("mesh", ["expert=4,tensor=2", "fsdp=4,tensor=2"])
def test_quantised_weights_are_the_same_on_a_mesh(mesh, converted):
    load = partial(vl2_jax.load, converted("int4"), dtype="float32")
    one, many = load(), load(mesh=mesh)
    np.testing.assert_allclose(many.logits(one.processor(TALK)), one.logits(one.processor(TALK)), atol=1e-4)


def test_a_damaged_scale_is_named(converted, tmp_path):
    directory = tmp_path / "int4"
    shutil.copytree(converted("int4"), directory)
    name = "language/layers_0/self_attn/o_proj/kernel/scales"
    assert name in json.loads((directory / MANIFEST_FILE).read_text())["tensors"]
    (chunk,) = (directory / "params" / "state" / name.replace("/", ".")).glob("[0-9]*")
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(VL2Error, match=f"{name} of .* is damaged"):
        vl2_jax.load(directory)


def test_what_cannot_be_is_said_in_a_sentence(converted, first_layers, tmp_path):
    source, there = first_layers("nano-base"), tmp_path / "there"
    with pytest.raises(VL2Error, match="kind 'int3' are not known; choose one of int8, int4"):
        convert(source, there, weights="int3")
    with pytest.raises(VL2Error, match="kind 'int3' are not known; choose one of int8, int4"):
        vl2_jax.load(source, weights="int3")
    with pytest.raises(VL2Error, match="are int4 already; give the model in bfloat16 or float32"):
        convert(converted("int4"), there, weights="int8")
    with pytest.raises(VL2Error, match="are int4 already; give the model in bfloat16 or float32"):
        export(converted("int4"), there)
    with pytest.raises(VL2Error, match="are int4 and cannot become int8"):
        vl2_jax.load(converted("int4"), weights="int8")
    assert not there.exists()


def test_a_converted_checkpoint_can_be_quantised(first_layers, converted, tmp_path):
    convert(first_layers("nano-base"), tmp_path / "floats")
    convert(tmp_path / "floats", tmp_path / "int8", weights="int8")
    tensors = [json.loads((d / MANIFEST_FILE).read_text())["tensors"] for d in (tmp_path / "int8", converted("int8"))]
    assert tensors[0] == tensors[1]


def test_a_random_model_is_quantised_as_it_is_drawn(tmp_path, monkeypatch):
    tables = read_preset("vl2-nano")
    tables["model"]["language_config"]["num_hidden_layers"] = 2
    tables["model"]["vision_config"]["layers"] = 1
    monkeypatch.setattr("convert.random_checkpoint.read_preset", lambda name: tables)
    create("vl2-nano", tmp_path / "released", seed=3)
    convert(tmp_path / "released", tmp_path / "converted", weights="int4")
    create_quantised("vl2-nano", tmp_path / "drawn", "int4", seed=3)
    shapes = [
        {path: (entry["dtype"], entry["shape"]) for path, entry in json.loads(file.read_text())["tensors"].items()}
        for file in (tmp_path / "converted" / MANIFEST_FILE, tmp_path / "drawn" / MANIFEST_FILE)
    ]
    assert shapes[0] == shapes[1]
    scales = flatten(vl2_jax.load(tmp_path / "drawn").params)["language/layers_1/mlp/experts_up_proj"].scales
    assert 0.02 * 2 / 8 < float(abs(scales).mean()) < 0.02 * 4 / 7  # the largest of a group is 2 to 4 deviations
