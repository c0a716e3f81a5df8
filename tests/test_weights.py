"""What a model is loaded as: bfloat16 weights on a CPU are kept in two bytes and multiplied in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vl2_jax
from convert.weight_map import flatten, unflatten
from tests.conftest import GOLDENS
from vl2_jax.errors import RequestError
from vl2_jax.ops.narrow.kinds import Bits

TURN = {"role": "user", "content": "<image>\nWhat is it?", "images": [str(GOLDENS / "images" / "tiny.png")]}


@pytest.mark.parametrize(
    ("family", "mesh"), [("nano-tiny", None), ("nano-base", None), ("nano-base", "expert=4,tensor=2")]
)
def test_a_cpu_computes_in_float32_with_the_rounded_weights(family, mesh, first_layers):
    narrow = vl2_jax.load(first_layers(family), dtype="bfloat16", mesh=mesh)
    wide = vl2_jax.load(first_layers(family), dtype="float32")
    rounded = {path: leaf.astype(jnp.bfloat16).astype(jnp.float32) for path, leaf in flatten(wide.params).items()}
    bias = [path for path in rounded if path.endswith("correction_bias")]
    wide.params = unflatten(rounded | {path: flatten(wide.params)[path] for path in bias})
    batch = narrow.processor([TURN, {"role": "assistant", "content": "Nothing much."}])
    np.testing.assert_allclose(narrow.logits(batch), wide.logits(batch), atol=1e-4)  # the order of float32 sums
    if mesh is None:
        asked = [[TURN], [{"role": "user", "content": "And this?"}]]
        ours, theirs = ([a.token_ids for a in v.generate(asked, max_tokens=5, ignore_eos=True)] for v in (narrow, wide))
        assert ours == theirs


def test_weights_of_a_cpu_are_two_bytes_each_and_none_is_a_narrow_float():
    vl2 = vl2_jax.load("vl2-nano")  # whose checkpoint is bfloat16
    leaves = jax.tree.leaves(vl2.params)
    assert {leaf.dtype.name for leaf in leaves} == {"uint16", "float32"}
    assert vl2.model.dtype == jnp.float32
    bits = [leaf for leaf in flatten(vl2.params).values() if isinstance(leaf, Bits)]
    numbers = sum(leaf.size for leaf in leaves)
    assert sum(leaf.bits.size for leaf in bits) > 0.9 * numbers


def test_training_takes_arrays():
    arrays = vl2_jax.load("vl2-nano", arrays=True)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(arrays.params)} <= {"bfloat16", "float32"}
    assert arrays.model.dtype == jnp.bfloat16


def test_a_cache_of_no_known_kind_is_refused_before_anything_is_read():
    with pytest.raises(RequestError, match="a cache of kind 'int3' is not known; choose int8, or none"):
        vl2_jax.load("nowhere", cache="int3")
