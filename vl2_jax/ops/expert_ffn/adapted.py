"""Experts with low-rank adapters beside their projections: grouped products of rows that are ordered by expert.

    x[rows of e] @ W[e] + (x[rows of e] @ a[e]) @ b[e]

The sum of a bfloat16 matrix and a small update is often the matrix, so the update is never added to it; and gradients
of the whole matrix are not computed. N tokens, k experts a token, D width, E experts, F expert width, r rank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.grouped_matmul.api import grouped_matmul
from vl2_jax.ops.narrow.kinds import Narrow

Factors = tuple[Float[Array, "E wide r"], Float[Array, "E r out"]]
ExpertAdapters = tuple[Factors | None, Factors | None, Factors | None]  # of gate, up and down


def expert_ffn(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D F"] | Narrow,
    up: Float[Array, "E D F"] | Narrow,
    down: Float[Array, "E F D"] | Narrow,
    expert_ids: Int[Array, "N k"],
    combine_weights: Float[Array, "N k"],
    adapters: ExpertAdapters,
) -> Float[Array, "N D"]:
    """See `api.expert_ffn`."""
    experts, k = gate.shape[0], expert_ids.shape[1]
    ids = expert_ids.ravel()
    order, sizes = jnp.argsort(ids, stable=True), jnp.bincount(ids, length=experts)

    def project(rows: Array, kernel: Array | Narrow, factors: Factors | None) -> Array:
        out = grouped_matmul(rows, kernel, sizes)
        if factors is None:
            return out
        return out + grouped_matmul(grouped_matmul(rows, factors[0], sizes), factors[1], sizes)

    # Products of rows of no expert that is here hold anything, and so do their gradients: neither leaves this function.
    is_here = (ids[order] < experts)[:, None]
    rows = jnp.where(is_here, x[order // k], 0)
    hidden = jax.nn.silu(project(rows, gate, adapters[0])) * project(rows, up, adapters[1])
    results = jnp.where(is_here, project(hidden, down, adapters[2]), 0).astype(jnp.float32)
    weighted = results * combine_weights.ravel()[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // k].add(weighted).astype(x.dtype)
