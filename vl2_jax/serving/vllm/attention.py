"""Attention over vLLM's cache: its kernels on a TPU, `reference` elsewhere.

T rows of all sequences one after another; each is a batch row of one position here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool

from vl2_jax.model.attention import OuterCache
from vl2_jax.serving.vllm import reference, theirs


class Step(NamedTuple):
    """Where the rows of one step belong, as vLLM tells it (`AttentionMetadata`), and the mesh they are spread over."""

    metadata: Any
    mesh: Mesh

    def exists(self) -> Bool[Array, " T"]:
        """Which rows are of a sequence; each part of the mesh fills up its own rows."""
        told = self.metadata
        parts = told.request_distribution.shape[0] // 3
        counts = told.request_distribution.reshape(parts, 3)[:, 2:]
        ends = jnp.take_along_axis(told.query_start_loc.reshape(parts, -1), counts, axis=1)
        return (jnp.arange(told.input_positions.shape[0] // parts) < ends).ravel()


def in_their_names(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `EngineCache` in which the mesh is vLLM's again, see `model.own_mesh`."""

    @wraps(method)
    def run(self: EngineCache, *arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(self.step.mesh.abstract_mesh):
            return method(self, *arguments)

    return run


class EngineCache(OuterCache):
    """The cache of one step, a layer's array at a time."""

    def __init__(self, step: Step):
        self.step = step
        self._is_on_tpu = step.mesh.devices.flat[0].platform == "tpu"

    @in_their_names
    def latents(self, q_latent, q_rotated, latents, rotated, cache, scale):
        rows = [each[:, 0] for each in (q_latent, q_rotated, latents, rotated)]
        if not self._is_on_tpu:
            return self._in_plain_xla(reference.attend_to_latents, rows, cache, scale)
        data = theirs.ShardingAxisName.ATTN_DATA
        cache, out = theirs.attend_to_latents(
            jnp.swapaxes(rows[0], 0, 1),
            *rows[1:],
            cache,
            self.step.metadata,
            self.step.mesh,
            num_attention_heads=q_latent.shape[2],
            qk_nope_head_dim=0,  # which nothing reads: queries are of latents already
            query_nth_sharding=PartitionSpec(None, data, None),
            query_tnh_sharding=PartitionSpec(data, None, None),
            keyvalue_skh_sharding=PartitionSpec(data, None),
            attn_o_nth_sharding=PartitionSpec(None, data, None),
            sm_scale=scale,
        )
        return jnp.swapaxes(out, 0, 1)[:, None], cache

    @in_their_names
    def heads(self, queries, keys, values, cache, scale):
        rows = [each[:, 0] for each in (queries, keys, values)]
        if not self._is_on_tpu:
            return self._in_plain_xla(reference.attend_to_heads, rows, cache, scale)
        cache, out = theirs.attend_to_heads(cache, *rows, self.step.metadata, self.step.mesh, sm_scale=scale)
        return out[:, None], cache

    def _in_plain_xla(
        self, attend: Callable[..., tuple[Array, Array]], rows: list[Array], cache: Array, scale: float
    ) -> tuple[Array, Array]:
        told = self.step.metadata
        places = (told.seq_lens, told.block_tables, told.query_start_loc, told.request_distribution)
        spread = PartitionSpec(theirs.ShardingAxisName.ATTN_DATA)
        out, cache = jax.shard_map(
            partial(attend, scale=scale),
            mesh=self.step.mesh,
            in_specs=spread,
            out_specs=spread,
            check_vma=False,
        )(*rows, cache, *places)
        return out[:, None], cache
