"""A step of each real size compiles for TPUs with vLLM's attention kernels and ours for experts, without a TPU."""

import os

import pytest

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no Cloud TPU metadata to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vl2_jax.config import VL2Config
from vl2_jax.model.layers import ONE_DEVICE
from vl2_jax.model.vl2 import VL2Model, abstract_params
from vl2_jax.serving.vllm.model import decode, own_mesh
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.rules import abstract_sharded_params

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
NAMES = ("data", "attn_dp", "attn_dp_expert", "expert", "model", "dcp", "pcp")
PAGE, PAGES, CONTEXT = 128, 512, 4096
LAYERS = 2  # one dense, one of experts: the others are alike


def compiled(size, target, devices, rows, sequences, monkeypatch):
    """The executable of a step of so many rows, of sequences spread over devices."""
    from tpu_inference.kernels.ragged_paged_attention.v3 import kernel
    from tpu_inference.layers.common.attention_metadata import AttentionMetadata
    from tpu_inference.layers.common.sharding import ShardingAxisName

    from convert.weight_map import unflatten

    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[target]).devices
    monkeypatch.setattr(kernel, "get_tpu_version", lambda: int(target[1]))  # it asks the first device of this machine
    mesh = Mesh(np.asarray(chips[:devices]).reshape(1, devices, *[1] * 5), NAMES)
    config = VL2Config.preset(f"vl2-{size}")
    config = config.replace(language_config=config.language_config.replace(num_hidden_layers=LAYERS))
    language = config.language_config
    ours = own_mesh(mesh)
    layout = ONE_DEVICE if ours is None else MeshLayout(ours)
    model = VL2Model(config, jnp.bfloat16, jnp.bfloat16, layout=layout)

    def shaped(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*names)))

    if ours is None:
        params = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype), abstract_params(config))
    else:
        params = unflatten(abstract_sharded_params(config, ours, jnp.bfloat16))
    params = {name: part for name, part in params.items() if name not in ("vision", "projector")}
    data = ShardingAxisName.ATTN_DATA
    if language.use_mla:
        width = -(-language.kv_lora_rank // 128) * 128 + -(-language.qk_rope_head_dim // 128) * 128
        cache = (PAGES * devices, PAGE // 32, 32, width)
    else:
        cache = (PAGES * devices, PAGE, language.num_key_value_heads, 2, language.head_dim)
    caches = [shaped(cache, jnp.bfloat16, ShardingAxisName.BATCH)] * LAYERS
    numbers = {
        "input_positions": rows,
        "block_tables": sequences * CONTEXT // PAGE,
        "seq_lens": sequences,
        "query_start_loc": sequences + devices,
        "request_distribution": 3 * devices,
    }
    told = {name: shaped((count,), jnp.int32, data) for name, count in numbers.items()}
    x = shaped((rows, language.hidden_size), jnp.bfloat16, data, None)

    def step(params, caches, x, told):
        return decode(model, params, caches, x, AttentionMetadata(**told, padded_num_reqs=sequences), mesh)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (
            jax.jit(step, donate_argnums=1).trace(params, caches, x, told).lower(lowering_platforms=("tpu",)).compile()
        )


@pytest.mark.parametrize(
    ("size", "target", "devices", "rows"),
    [("tiny", "v5e", 1, 32), ("small", "v6e", 1, 512), ("small", "v5e", 4, 128), ("base", "v6e", 4, 128)],
)
def test_a_step_compiles_with_their_kernels_and_ours(size, target, devices, rows, monkeypatch):
    step = compiled(size, target, devices, rows, 32, monkeypatch)
    text, memory = step.as_text(), step.memory_analysis()
    assert text.count("tpu_custom_call") >= LAYERS + 1  # attention of each layer, and experts
    temporary, whole = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    print(f"{size}, {rows} rows on {devices} of {target}: {whole / 1e6:.0f} MB given, {temporary / 1e6:.0f} MB more")
    assert temporary < 1e9
