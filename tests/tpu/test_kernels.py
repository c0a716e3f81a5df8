"""The TPU compiler accepts every kernel for every size, chip and number of tokens: `make tpu`."""

import itertools
import re
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.quantise import put_together
from convert.weight_map import unflatten
from tests.tpu.compiling import (
    LARGE,
    LATENT_HEADS,
    SIZES,
    TARGETS,
    compile_for,
    copies,
    devices_of,
    expert_shapes,
    latent_shapes,
    multi_head_shapes,
    one_chip,
)
from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import VL2Model, abstract_params, apply
from vl2_jax.ops.chips import CHIPS
from vl2_jax.ops.expert_ffn.api import expert_ffn
from vl2_jax.ops.expert_ffn.backward import backward
from vl2_jax.ops.flash_attention.api import flash_attention
from vl2_jax.ops.latent_attention.api import latent_attention
from vl2_jax.ops.latent_attention.prefill import latent_prefill, supports
from vl2_jax.ops.multi_head_attention.api import multi_head_attention
from vl2_jax.ops.paging.pages import LatentPages
from vl2_jax.ops.vision_attention.api import vision_attention
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.rules import AXES, abstract_sharded_params

TOKENS = (1, 64, 512, 4096)
CACHES = [(1, False, 32, 4096), (1, True, 1, 4096), (4, True, 8, 1024)]  # new rows, with a table, sequences, slots
KERNEL = 'custom_call_target="tpu_custom_call"'


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("target", TARGETS)
def test_routed_experts_compile(target, size, tokens):
    compiled = compile_for(target, expert_ffn, *expert_shapes(size, tokens))
    assert "tpu_custom_call" in compiled.as_text()


# Of many tokens, the most that int4 weights leave room for beside two experts of the largest size.
NARROW = [*itertools.product(SIZES, ["int8", "int4"], [64]), ("base", "int4", 4096)]


@pytest.mark.parametrize(("size", "kind", "tokens"), NARROW)
@pytest.mark.parametrize("target", TARGETS)
def test_narrow_experts_compile_and_lie_as_the_kernel_reads_them(target, size, kind, tokens):
    text = compile_for(target, expert_ffn, *expert_shapes(size, tokens, kind)).as_text()
    assert KERNEL in text
    x = 2 * tokens * SIZES[size][0]
    assert not [copy for copy in copies(text) if copy[1] > max(x, LARGE)]


def test_narrow_experts_spread_over_a_mesh_are_multiplied_by_the_kernel():
    config = VL2Config.preset("vl2-small")
    config = config.replace(language_config=config.language_config.replace(num_hidden_layers=2))
    layout = MeshLayout(Mesh(np.asarray(devices_of("v5e")).reshape(1, 1, 4, 1), AXES))
    model = VL2Model(config, jax.numpy.bfloat16, jax.numpy.bfloat16, layout=layout)
    flat = abstract_sharded_params(config, layout.mesh, jax.numpy.bfloat16, "int4")
    ids = jax.ShapeDtypeStruct((4, 8), jax.numpy.int32, sharding=NamedSharding(layout.mesh, PartitionSpec()))
    with layout.on_devices():
        compiled = jax.jit(partial(apply, model)).lower(unflatten(put_together(dict(flat))), ids).compile()
    text = compiled.as_text()
    [call] = [line for line in text.splitlines() if KERNEL in line]
    assert "u8[16,1024,1408]" in call
    assert "f32[16,11,1,2048]" in call
    held = {part.size * part.dtype.itemsize // 4 for path, part in flat.items() if "/experts_" in path}
    assert not [copy for copy in copies(text) if copy[1] in held]


# They take most of a minute each: every size, every chip, and the largest size where there is the least room.
@pytest.mark.parametrize(
    ("target", "size"),
    [("v5e", "tiny"), ("v5e", "small"), ("v5e", "base"), ("v5p", "small"), ("v6e", "base"), ("tpu7x", "base")],
)
def test_their_gradients_compile(target, size):
    shapes = expert_shapes(size, tokens=4096)
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


@pytest.mark.parametrize("target", TARGETS)
def test_vision_attention_compiles(target):
    qkv = jax.ShapeDtypeStruct((2, 729, 3 * 1152), jax.numpy.bfloat16)
    compiled = compile_for(target, partial(vision_attention, heads=16), qkv)
    assert compiled.as_text().count(KERNEL) == 1


def test_the_tower_on_a_mesh_attends_where_its_tiles_are():
    config = VL2Config.preset("vl2-small")
    config = config.replace(vision_config=config.vision_config.replace(layers=1))
    devices = np.asarray(devices_of("v5e"))
    layout = MeshLayout(Mesh(devices.reshape(1, 2, 2, 1), AXES))
    model = VL2Model(config, jax.numpy.bfloat16, jax.numpy.bfloat16, layout=layout)
    params = unflatten(abstract_sharded_params(config, layout.mesh, jax.numpy.bfloat16))
    whole = NamedSharding(layout.mesh, PartitionSpec())
    tiles = jax.ShapeDtypeStruct((8, 384, 384, 3), jax.numpy.uint8, sharding=whole)
    with layout.on_devices():
        compiled = jax.jit(partial(apply, model, method="encode_tiles")).lower(params, tiles).compile()
    [call] = re.findall(r"= (\S+) custom-call\(.*tpu_custom_call", compiled.as_text())
    assert call.startswith("bf16[2,729,1152]")


def assert_pages_stay(compiled, pages):
    """The kernel is there, and the pages are updated where they are: nothing of their shape is copied."""
    text = compiled.as_text()
    assert text.count(KERNEL) == 1
    for array in pages:
        shape = f"bf16[{','.join(map(str, array.shape))}]"
        assert not [line for line in text.splitlines() if f"= {shape}" in line and " copy(" in line]
    assert compiled.memory_analysis().alias_size_in_bytes == sum(2 * array.size for array in pages)


@pytest.mark.parametrize(("length", "paged", "batch", "context"), CACHES)
@pytest.mark.parametrize("size", LATENT_HEADS)
@pytest.mark.parametrize("target", TARGETS)
def test_latent_attention_compiles(target, size, length, paged, batch, context):
    shapes = latent_shapes(size, batch, context, length, paged)
    compiled = compile_for(target, partial(latent_attention, scale=0.1), *shapes, donated=(4,))
    assert_pages_stay(compiled, shapes[4])


@pytest.mark.parametrize(("length", "paged", "batch", "context"), CACHES)
@pytest.mark.parametrize("target", TARGETS)
def test_multi_head_attention_compiles(target, length, paged, batch, context):
    shapes = multi_head_shapes(batch, context, length, paged)
    compiled = compile_for(target, partial(multi_head_attention, scale=0.1), *shapes, donated=(3,))
    assert_pages_stay(compiled, shapes[3])


HEADS = {"tiny": (10, 128), "small": (16, 192), "base": (32, 192)}  # of attention, and the width of keys


@pytest.mark.parametrize("length", [4096])  # of which scores would be far more than what attention holds
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
    assert compiled.as_text().count(KERNEL) == 2
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
        return latent_prefill(q_nope, q_rotated, kv_b, LatentPages(latents, rotated), table, positions, 0.1)

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
        assert compiled.as_text().count(KERNEL) == calls
