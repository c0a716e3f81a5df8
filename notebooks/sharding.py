# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Meshes: how a model lies on many devices
#
# Eight virtual devices on a CPU do what eight TPU chips would: the same programs, the same collectives, the same numbers. We lay a small model out
# in three ways, draw where each weight is, and check that the answer stays the same.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from pathlib import Path

import jax
import matplotlib.pyplot as plt

import vl2_jax
from convert.random_checkpoint import create
from convert.weight_map import flatten
from vl2_jax.config import VL2Config
from vl2_jax.errors import MeshError
from vl2_jax.sharding.mesh import default_mesh, make_mesh

directory = Path("out") / "nano"
if not directory.is_dir():
    create("vl2-nano", directory)
len(jax.devices())

# %% [markdown]
# ## A mesh by name
#
# `auto` puts experts on as many devices as divide them. A mesh that does not divide the model says what would do.

# %%
for name in ("vl2-tiny", "vl2-small", "vl2-base"):
    sizes = {count: default_mesh(VL2Config.preset(name), count) for count in (4, 8, 16)}
    print(name, {count: {axis: n for axis, n in mesh.items() if n > 1} for count, mesh in sizes.items()})

try:
    make_mesh("tensor=4,expert=2", VL2Config.preset("vl2-tiny"))
except MeshError as error:
    print(error)

# %% [markdown]
# ## Where weights lie
#
# One square a device, one colour a part: devices of the same colour hold the same part of a weight. Routed experts lie along `expert` (and `tensor`,
# where they divide), attention and dense layers along `tensor`, and everything along `fsdp`.

# %%
meshes = ("expert=8", "expert=4,tensor=2", "data=2,fsdp=2,tensor=2")
models = {mesh: vl2_jax.load(directory, dtype="float32", mesh=mesh) for mesh in meshes}
shown = (
    "language/embed_tokens",
    "language/layers_1/self_attn/q_proj/kernel",
    "language/layers_1/self_attn/kv_a_proj_with_mqa/kernel",
    "language/layers_1/mlp/experts_gate_proj",
    "language/layers_1/mlp/shared_experts/gate_proj/kernel",
    "vision/blocks_0/qkv/kernel",
)
figure, axes = plt.subplots(len(shown), len(meshes), figsize=(9, 5), layout="constrained")
for column, (mesh, vl2) in enumerate(models.items()):
    flat = flatten(vl2.params)
    for row, path in enumerate(shown):
        array, axis = flat[path], axes[row, column]
        parts = [str(shard.index) for shard in sorted(array.addressable_shards, key=lambda s: s.device.id)]
        numbers = [sorted(set(parts)).index(part) for part in parts]
        axis.imshow([numbers], cmap="tab10", vmin=0, vmax=9, aspect=0.6)
        axis.set_xticks(range(8)), axis.set_yticks([])
        if row == 0:
            axis.set_title(mesh, fontsize=10)
        piece = "x".join(map(str, array.sharding.shard_shape(array.shape)))
        axis.set_xlabel(f"{'x'.join(map(str, array.shape))}, each {piece}", fontsize=7)
        if column == 0:
            name = "/".join(path.split("/")[-3:]).removesuffix("/kernel")
            axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
plt.show()

# %% [markdown]
# ## How much a device holds

# %%
one = vl2_jax.load(directory, dtype="float32")
whole = sum(a.nbytes for a in jax.tree.leaves(one.params))
for mesh, vl2 in models.items():
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(vl2.params))
    print(f"{mesh:24} {held / 1e6:6.2f} MB a device, of {whole / 1e6:.2f} MB")

# %% [markdown]
# ## The same answer
#
# Four conversations at once, on one device and on eight: the same tokens. No token is dropped, however the router spreads them.

# %%
questions = [[{"role": "user", "content": f"What is {number} and {number}?"}] for number in range(4)]
expected = [answer.token_ids for answer in one.generate(questions, max_tokens=12, ignore_eos=True)]
for mesh, vl2 in models.items():
    found = [answer.token_ids for answer in vl2.generate(questions, max_tokens=12, ignore_eos=True)]
    print(f"{mesh:24} {'the same tokens' if found == expected else 'other tokens'}")
    assert found == expected

# %% [markdown]
# ## The cache
#
# Latents have no heads, so `tensor` repeats them; sequences are spread over all other axes.

# %%
vl2 = models["expert=4,tensor=2"]
prompts = [vl2.processor.encode([*question, {"role": "assistant", "content": ""}]) for question in questions]
_, (first_layer, *_) = vl2.generator.prefill(prompts, capacity=256)
latents = first_layer.latents  # [sequences, pages, 128 rows, latent rank]
jax.debug.visualize_array_sharding(latents[:, :, 0, 0])
print(latents.shape, "on each device", latents.sharding.shard_shape(latents.shape))
