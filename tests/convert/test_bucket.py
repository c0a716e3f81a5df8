"""A model on a bucket is read where it lies; the bucket here is fsspec's own, in memory."""

import fsspec
import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import vl2_jax
from convert.checkpoint import read_manifest
from convert.from_torch import convert
from tests.conftest import GOLDENS
from vl2_jax.errors import VL2Error

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
    with pytest.raises(VL2Error, match=r"s3://house/model needs another package"):
        vl2_jax.load("s3://house/model")
