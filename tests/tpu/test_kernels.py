"""The TPU compiler accepts every kernel for every size, chip and number of tokens: `make tpu`."""

from functools import partial

import jax
import pytest

from tests.tpu.compiling import SIZES, TARGETS, compile_for, expert_shapes, one_chip
from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import VL2Model, abstract_params, apply
from vl2_jax.ops.chips import CHIPS
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.expert_ffn.backward import backward
from vl2_jax.ops.flash_attention.api import flash_attention
from vl2_jax.ops.latent_attention.prefill import latent_prefill, supports

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
    compiled = compile_for(target, backward, *shapes, shapes[0])
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 8  # five products, three transposed


HEADS = {"tiny": (10, 128), "small": (16, 192), "base": (32, 192)}  # of attention, and the width of keys


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_attention_of_packed_rows_and_its_gradients_compile(target, size, length):
    heads, width = HEADS[size]
    rows = jax.ShapeDtypeStruct((1, length, heads, width), jax.numpy.bfloat16)
    values = jax.ShapeDtypeStruct((1, length, heads, 128), jax.numpy.bfloat16)

    def gradients(queries, keys, values, segments, dout):
        attend = partial(flash_attention, segments=segments, scale=0.1)
        return jax.vjp(attend, queries, keys, values)[1](dout)

    segments = jax.ShapeDtypeStruct((1, length), jax.numpy.int32)
    compiled = compile_for(target, gradients, rows, rows, values, segments, values)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * heads * length * length


@pytest.mark.parametrize("queries", [17, 512, 2048])
@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_chunk_over_latent_pages_compiles(target, size, queries):
    heads, shape, bf16 = HEADS[size][0], jax.ShapeDtypeStruct, jax.numpy.bfloat16
    pages = (shape((32, 128, 512), bf16), shape((32, 64, 128), bf16))
    q_nope, q_rotated = (shape((1, queries, heads, width), bf16) for width in (128, 64))
    kv_b = shape((512, heads, 256), bf16)
    assert supports(q_nope, q_rotated, kv_b, pages, 4096, CHIPS[one_chip(target).devices.flat[0].device_kind])

    def attended(q_nope, q_rotated, kv_b, latents, rotated, table, positions):
        return latent_prefill(q_nope, q_rotated, kv_b, (latents, rotated), table, positions, 0.1)

    numbers = (shape((1, 32), jax.numpy.int32), shape((1,), jax.numpy.int32))
    assert "tpu_custom_call" in compile_for(target, attended, q_nope, q_rotated, kv_b, *pages, *numbers).as_text()


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
