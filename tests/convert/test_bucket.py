"""A model on a bucket is read where it lies, and nothing is written there; the bucket is fsspec's own, in memory."""

from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import vl2_jax
from convert.adapters import Adapters
from convert.checkpoint import read_manifest
from convert.from_torch import convert
from convert.peft import read_adapters, write_adapters
from convert.random_checkpoint import create
from convert.to_torch import export
from convert.weight_map import plan
from tests.conftest import GOLDENS
from vl2_jax.config import read_config
from vl2_jax.errors import VL2Error
from vl2_jax.files import is_remote, local_destination, path_of
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import train
from vl2_jax.training.recipe import Recipe

MODEL = "nano-tiny"


class Bucket(MemoryFileSystem):
    protocol = "gcs"
    store, pseudo_dirs = {}, [""]

    def __init__(self, **_):
        super().__init__()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))


@pytest.fixture
def bucket():
    Bucket.store.clear()
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    yield Bucket()
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)


def put(bucket, directory, name):
    for path in directory.rglob("*"):
        if path.is_file():
            bucket.pipe_file(f"gs://house/{name}/{path.relative_to(directory).as_posix()}", path.read_bytes())
    return f"gs://house/{name}"


@pytest.mark.parametrize("mesh", [None, "data=2,expert=4"])
def test_a_released_model_loads_from_a_bucket(bucket, mesh):
    here = vl2_jax.load(GOLDENS / MODEL)
    there = vl2_jax.load(put(bucket, GOLDENS / MODEL, "released"), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)


def test_a_bucket_is_converted(bucket, tmp_path):
    convert(vl2_jax.api.find_model(put(bucket, GOLDENS / MODEL, "released")), tmp_path / "there")
    convert(GOLDENS / MODEL, tmp_path / "here")
    here, there = (read_manifest(tmp_path / name) for name in ("here", "there"))
    assert there["tensors"] == here["tensors"]
    assert there["files"].keys() == here["files"].keys()


def test_a_converted_model_loads_from_a_bucket_onto_a_mesh(bucket, tmp_path):
    convert(GOLDENS / MODEL, tmp_path / "converted")
    here = vl2_jax.load(tmp_path / "converted")
    there = vl2_jax.load(put(bucket, tmp_path / "converted", "converted"), mesh="data=2,expert=4")
    jax.tree.map(np.testing.assert_array_equal, here.params, there.params)


def test_what_is_not_there_or_damaged_is_named(bucket):
    with pytest.raises(VL2Error, match=r"gs://house/nothing holds no config\.json"):
        vl2_jax.load("gs://house/nothing")
    url = put(bucket, GOLDENS / MODEL, "cut")
    weights = f"{url}/model.safetensors"
    bucket.pipe_file(weights, bucket.cat_file(weights)[:-100])
    with pytest.raises(VL2Error, match="truncated"):
        vl2_jax.load(url)
    with pytest.raises(VL2Error, match=r"s3://house/model/config\.json needs another package \(.*s3fs"):
        vl2_jax.load("s3://house/model")


WRITERS = {
    "convert": lambda there: convert(GOLDENS / MODEL, there),
    "export": lambda there: export(GOLDENS / MODEL, there),
    "export_run": lambda there: export_run(GOLDENS / MODEL, there, print),
    "adapters": lambda there: export_run(GOLDENS / MODEL, there, print, adapters=True),
    "train": lambda there: train(Recipe(), there, print),
    "random": lambda there: create("vl2-nano", there),
}


@pytest.mark.parametrize("address", ["gs://b/x", Path("gs://b/x"), "s3://b/x", "hf://datasets/x", "https://host/x"])
@pytest.mark.parametrize("writer", WRITERS)
def test_an_address_is_refused_as_a_destination_before_the_work(tmp_path, monkeypatch, writer, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VL2Error, match=r"cannot be written to '\w+://[\w/]+'; give a folder here, then"):
        WRITERS[writer](address)
    assert not list(tmp_path.iterdir())


def test_the_line_that_copies_to_a_bucket_is_given():
    with pytest.raises(VL2Error, match=r"then `gcloud storage cp -r FOLDER gs://b/x`\.$"):
        local_destination(Path("gs://b/x"), "a run")
    with pytest.raises(VL2Error, match=r"then `aws s3 cp --recursive FOLDER s3://b/x`\.$"):
        local_destination("s3://b/x", "a run")


@pytest.mark.parametrize(
    ("name", "path"),
    [("file:///tmp/a%20b", "/tmp/a b"), ("file:/tmp/a", "/tmp/a"), ("a/b", "a/b"), ("C:/b", "C:/b"), ("a:b", "a:b")],
)
def test_a_place_here_stays_a_place_here(name, path):
    assert local_destination(name, "a run") == Path(path)
    assert not is_remote(name)


def test_a_run_on_a_bucket_is_copied_first(tmp_path):
    with pytest.raises(VL2Error, match=r"copy it here first: `gcloud storage cp -r gs://b/run FOLDER`"):
        export_run(Path("gs://b/run"), tmp_path / "x", print)


def test_adapters_are_read_from_a_bucket(bucket, tmp_path):
    leaves = plan(read_config(GOLDENS / MODEL))
    path = "language/layers_1/self_attn/o_proj/kernel"
    rows, columns = next(leaf.shape for leaf in leaves if leaf.path == path)
    pair = np.ones((rows, 2), np.float32), np.full((2, columns), 0.5, np.float32)
    write_adapters(tmp_path / "adapters", Adapters({path: pair}, {path: 1.0}), leaves, "base")
    there = read_adapters(Path(put(bucket, tmp_path / "adapters", "adapters")), leaves)
    np.testing.assert_array_equal(there.pairs[path][1], pair[1])
    with pytest.raises(VL2Error, match=r"gs://house/none/adapter_config\.json does not exist"):
        read_adapters("gs://house/none", leaves)


def test_a_bucket_keeps_its_address_as_a_path():
    assert str(path_of(Path("gs://house/model"))) == "gs://house/model"
