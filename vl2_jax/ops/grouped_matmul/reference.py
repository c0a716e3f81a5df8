"""The obvious versions: every group's matrix on every row, one group kept. For tests."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    lhs: Float[Array, "N K"], rhs: Float[Array, "G K M"], group_sizes: Int[Array, " G"]
) -> Float[Array, "N M"]:
    member = _membership(lhs.shape[0], group_sizes)
    return jnp.einsum("ng,nk,gkm->nm", member, lhs.astype(jnp.float32), rhs.astype(jnp.float32)).astype(lhs.dtype)


def grouped_transposed_matmul(
    lhs: Float[Array, "N K"], rhs: Float[Array, "N M"], group_sizes: Int[Array, " G"]
) -> Float[Array, "G K M"]:
    member = _membership(lhs.shape[0], group_sizes)
    return jnp.einsum("ng,nk,nm->gkm", member, lhs.astype(jnp.float32), rhs.astype(jnp.float32)).astype(lhs.dtype)


def _membership(rows: int, group_sizes: Int[Array, " G"]) -> Float[Array, "N G"]:
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")
    return jax.nn.one_hot(group, group_sizes.shape[0])
