"""The obvious version: every expert on every row, weighted by what the router gave it. For tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def expert_ffn(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    expert_ids: Int[Array, "N k"],
    combine_weights: Float[Array, "N k"],
) -> Float[Array, "N D"]:
    hidden = jax.nn.silu(jnp.einsum("nd,edf->nef", x, gate)) * jnp.einsum("nd,edf->nef", x, up)
    outputs = jnp.einsum("nef,efd->ned", hidden, down).astype(jnp.float32)
    chosen = jax.nn.one_hot(expert_ids, gate.shape[0], dtype=jnp.float32)
    return jnp.einsum("nke,nk,ned->nd", chosen, combine_weights, outputs).astype(x.dtype)
