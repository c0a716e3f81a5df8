"""Compiling for TPUs on a machine that has none: the `libtpu` wheel holds the compiler."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no Cloud TPU metadata to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile at once

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.quantise import abstract_quantised
from vl2_jax.ops.paging.pages import PAGE, HeadPages, LatentPages

TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SIZES = {"tiny": (1280, 896, 64), "small": (2048, 1408, 64), "base": (2560, 1536, 72)}  # D, F, E
TOP_K = 6
LATENT_HEADS = {"small": 16, "base": 32}  # of latent attention, rank 512 and 64 rotated; Tiny has 10 of 128 numbers

LARGE = 1e6  # bytes of a copy
_BYTES = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1}
_COPY = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\w+)\[([\d,]*)\]\S* (?:copy|transpose)\(")


@cache
def devices_of(target: str) -> list[Any]:
    return topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target]).devices


@cache
def one_chip(target: str) -> Mesh:
    return Mesh(np.asarray(devices_of(target)[:1]), ("x",))


def compile_for(target: str, function: Any, *shapes: Any, donated: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """The executable of `function` for one chip; raises where the TPU compiler refuses it."""
    mesh = one_chip(target)
    whole = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)
    with jax.set_mesh(mesh):
        return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def expert_shapes(size: str, tokens: int, kind: str | None = None) -> list[Any]:
    """x, gate, up, down, expert ids and weights of the routed experts of one layer; `kind` is of quantised ones."""
    width, hidden, experts = SIZES[size]
    shape, bf16 = jax.ShapeDtypeStruct, jax.numpy.bfloat16
    matrices = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    return [
        shape((tokens, width), bf16),
        *(shape(matrix, bf16) if kind is None else abstract_quantised("", matrix, kind) for matrix in matrices),
        shape((tokens, TOP_K), jax.numpy.int32),
        shape((tokens, TOP_K), jax.numpy.float32),
    ]


def latent_shapes(size: str, batch: int, context: int, length: int = 1, paged: bool = False) -> list[Any]:
    """Arguments of `latent_attention` in one layer; `paged` gives a table."""
    shape, bf16, heads, per = jax.ShapeDtypeStruct, jax.numpy.bfloat16, LATENT_HEADS[size], context // PAGE
    lead = (batch * per,) if paged else (batch, per)
    pages = LatentPages(shape((*lead, PAGE, 512), bf16), shape((*lead, PAGE // 2, 128), bf16))
    queries = [shape((batch, length, heads, width), bf16) for width in (512, 64)]
    new = [shape((batch, length, width), bf16) for width in (512, 64)]
    return [*queries, *new, pages, *_placement(batch, per, paged)]


def multi_head_shapes(batch: int, context: int, length: int = 1, paged: bool = False) -> list[Any]:
    """Arguments of `multi_head_attention` in one layer of Tiny."""
    shape, bf16, per = jax.ShapeDtypeStruct, jax.numpy.bfloat16, context // PAGE
    lead = (batch * per,) if paged else (batch, per)
    pages = HeadPages(*[shape((*lead, 10, PAGE, 128), bf16)] * 2)
    return [*[shape((batch, length, 10, 128), bf16)] * 3, pages, *_placement(batch, per, paged)]


def _placement(batch: int, per: int, paged: bool) -> list[Any]:
    shape, int32 = jax.ShapeDtypeStruct, jax.numpy.int32
    return [shape((batch, per), int32) if paged else None, shape((batch,), int32)]


def copies(text: str) -> Iterator[tuple[str, int, bool]]:
    """(name, bytes, whether in the body of a loop) of every copy outside of a fusion, whose parts are in registers."""
    computation = ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            computation = line.split(" ")[0]
        found = _COPY.match(line)
        if found and "fused" not in computation:
            name, dtype, shape = found.groups()
            size = math.prod(int(n) for n in shape.split(",") if n) * _BYTES[dtype]
            yield name, size, "region" in computation
