"""Converting there and back changes nothing, damage is noticed by name, interruption leaves nothing half done."""

import filecmp
import random
import shutil

import jax
import numpy as np
import pytest

import vl2_jax
from convert.checkpoint import MANIFEST_FILE
from convert.from_torch import convert
from convert.safetensors_files import scan
from convert.to_torch import export
from tests.conftest import CONFIGS, GOLDENS
from vl2_jax.errors import VL2Error


@pytest.fixture(scope="module")
def source(first_layers):
    return first_layers("nano-base")


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    directory = tmp_path_factory.mktemp("converted") / "nano-base"
    convert(source, directory)
    return directory


@pytest.mark.parametrize("config", CONFIGS)
def test_an_export_is_the_source_byte_for_byte(config, tmp_path):
    source = GOLDENS / config
    convert(source, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "exported")
    names = [path.name for path in source.iterdir() if path.is_file()]
    _, different, missing = filecmp.cmpfiles(source, tmp_path / "exported", names, shallow=False)
    assert (different, missing) == ([], [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_layouts_load_the_same_parameters(source, converted, tmp_path, dtype):
    export(converted, tmp_path / "exported")
    released = vl2_jax.load(source, dtype=dtype)
    for layout in (converted, tmp_path / "exported"):
        ours = vl2_jax.load(layout, dtype=dtype)
        assert jax.tree.map(lambda a: a.dtype, ours.params) == jax.tree.map(lambda a: a.dtype, released.params)
        jax.tree.map(np.testing.assert_array_equal, ours.params, released.params)


def test_every_mismatch_is_listed_before_anything_is_written(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDENS / "nano-tiny", source)
    weights = source / "model.safetensors"
    data = weights.read_bytes()
    data = data.replace(b"language.model.norm.weight", b"language.model.nurm.weight")
    weights.write_bytes(data[:-1000])
    with pytest.raises(VL2Error) as caught:
        convert(source, tmp_path / "destination")
    message = str(caught.value)
    assert "language.model.norm.weight is missing" in message
    assert "language.model.nurm.weight is unexpected" in message
    assert "is truncated: model.safetensors ends 1000 bytes too early" in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_an_interrupted_conversion_left_is_replaced(tmp_path):
    left = tmp_path / ".destination.unfinished"
    left.mkdir()
    (left / "rubbish").write_text("half")
    convert(GOLDENS / "nano-tiny", tmp_path / "destination")
    assert [path.name for path in tmp_path.iterdir()] == ["destination"]
    assert not (tmp_path / "destination" / "rubbish").exists()


def test_an_existing_destination_is_left_alone(source, converted):
    with pytest.raises(VL2Error, match="exists already"):
        convert(source, converted)


def corrupt(path, kind, rng):
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if kind == "deletion":
        path.unlink()
        return
    if kind == "bit flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "truncation":
        data = data[:place]
    else:
        block = data[place : place + 64]
        data[place : place + len(block)] = bytes(255 - byte if byte == 0 else 0 for byte in block)
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["bit flip", "zeroed block", "truncation", "deletion"])
def test_every_corruption_is_noticed_and_named(converted, tmp_path, kind):
    rng = random.Random(kind)
    victim = tmp_path / "victim"
    shutil.copytree(converted, victim)
    files = [path for path in sorted(victim.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in rng.sample(files, 25):
        saved = path.read_bytes()
        corrupt(path, kind, rng)
        with pytest.raises(VL2Error) as caught:
            vl2_jax.load(victim)
        parameter = path.parent.name.replace(".", "/")
        assert path.name in str(caught.value) or parameter in str(caught.value) or path.name == MANIFEST_FILE
        path.write_bytes(saved)
    vl2_jax.load(victim)


def test_the_weight_reader_agrees_with_the_library():
    from safetensors.numpy import load_file

    entries, problems = scan(GOLDENS / "nano-tiny")
    assert not problems
    for key, expected in load_file(GOLDENS / "nano-tiny" / "model.safetensors").items():
        np.testing.assert_array_equal(entries[key].read(), expected)
