"""Compiling for TPUs on a machine that has none: the `libtpu` wheel holds the compiler."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no Cloud TPU metadata to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SIZES = {"tiny": (1280, 896, 64), "small": (2048, 1408, 64), "base": (2560, 1536, 72)}  # D, F, E
TOP_K = 6


@cache
def devices_of(target: str) -> list[Any]:
    return topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target]).devices


@cache
def one_chip(target: str) -> Mesh:
    return Mesh(np.asarray(devices_of(target)[:1]), ("x",))


def compile_for(target: str, function: Any, *shapes: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """The executable of `function` for one chip; raises where the TPU compiler refuses it."""
    mesh = one_chip(target)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole) for a in shapes]
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(*arguments).compile()


def expert_shapes(size: str, tokens: int) -> list[jax.ShapeDtypeStruct]:
    """x, gate, up, down, expert ids and weights of the routed experts of one layer."""
    width, hidden, experts = SIZES[size]
    shape, bf16 = jax.ShapeDtypeStruct, jax.numpy.bfloat16
    return [
        shape((tokens, width), bf16),
        shape((experts, width, hidden), bf16),
        shape((experts, width, hidden), bf16),
        shape((experts, hidden, width), bf16),
        shape((tokens, TOP_K), jax.numpy.int32),
        shape((tokens, TOP_K), jax.numpy.float32),
    ]
