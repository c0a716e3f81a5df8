"""The TPU compiler accepts every kernel for every size, chip and number of tokens: `make tpu`."""

import jax
import pytest

from tests.tpu.compiling import SIZES, TARGETS, compile_for, expert_shapes
from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import VL2Model, abstract_params, apply
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.expert_ffn.backward import backward

TOKENS = (1, 64, 512, 4096)


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
        assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == calls
