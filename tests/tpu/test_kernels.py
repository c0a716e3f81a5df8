"""The TPU compiler accepts every kernel for every size, chip and number of tokens: `make tpu`."""

import re

import jax
import pytest

from tests.tpu.compiling import SIZES, TARGETS, compile_for, expert_shapes
from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import VL2Model, abstract_params, apply
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.expert_ffn.backward import backward

TOKENS = (1, 64, 512, 4096)
KERNEL = 'custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_routed_experts_compile(target, size, tokens):
    compiled = compile_for(target, expert_ffn, *expert_shapes(size, tokens))
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize("tokens", [4096])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_their_gradients_compile(target, size, tokens):
    shapes = expert_shapes(size, tokens)
    text = compile_for(target, backward, *shapes, shapes[0]).as_text()
    assert "expert_ffn_rows_gradients" in text
    assert "expert_ffn_weights_gradients" in text


@pytest.mark.parametrize("scan", [False, True])
def test_layers_computed_again_for_gradients_do_not_run_the_experts_again(scan):
    """Nothing in the backward pass needs the experts' output: what computes it again is dead code."""
    config = VL2Config.preset("vl2-tiny")
    config = config.replace(language_config=config.language_config.replace(num_hidden_layers=2))
    model = VL2Model(config, jax.numpy.bfloat16, jax.numpy.bfloat16, remat=True, scan=scan)
    leaves, tree = jax.tree.flatten(abstract_params(config))

    def gradients(ids, *leaves):
        def loss(leaves):
            return jax.numpy.sin(apply(model, jax.tree.unflatten(tree, leaves), ids).logits).sum()

        return jax.value_and_grad(loss)(leaves)

    text = compile_for("v5e", gradients, jax.ShapeDtypeStruct((1, 256), jax.numpy.int32), *leaves).as_text()
    kernels = [re.findall(r"([a-z_]+)/pallas_call", line)[-1] for line in text.splitlines() if KERNEL in line]
    assert sorted(kernels) == ["expert_ffn", "expert_ffn_rows_gradients", "expert_ffn_weights_gradients"]


def test_a_whole_layer_of_small_uses_the_kernel_and_a_float32_one_does_not():
    config = VL2Config.preset("vl2-small")
    config = config.replace(language_config=config.language_config.replace(num_hidden_layers=2))
    for dtype, calls in ((jax.numpy.bfloat16, 1), (jax.numpy.float32, 0)):
        model = VL2Model(config, dtype, dtype)
        params = abstract_params(config, dtype)
        leaves, tree = jax.tree.flatten(params)

        def logits(ids, *leaves, model=model, tree=tree):
            return apply(model, jax.tree.unflatten(tree, leaves), ids).logits

        compiled = compile_for("v5e", logits, jax.ShapeDtypeStruct((1, 256), jax.numpy.int32), *leaves)
        assert compiled.as_text().count(KERNEL) == calls
