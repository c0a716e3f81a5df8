"""Gradients of the routed experts as grouped products, for TPUs: hidden rows are computed again, not stored.

R rows, one a (token, slot) pair, ordered by expert. With y the output of a row's expert and w its weight,

    out[t] = sum_r w[r] y[r]         y = down(h),  h = silu(g) * u,  g = gate(x),  u = up(x)
    e = dout[t] down^T               dh = w e,     dw = y . dout[t] = h . e        (so y itself is not needed)
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from vl2_jax.ops.expert_ffn.pallas_tpu import bits_of, order_by_expert
from vl2_jax.ops.grouped_matmul.api import Implementation, grouped_matmul, grouped_transposed_matmul


def backward(
    x, gate, up, down, expert_ids, combine_weights, dout, *, implementation: Implementation | None = "pallas_tpu"
):  # fmt: skip
    """Gradients of all arguments but `expert_ids`, from the gradient of the result."""
    tokens, k = expert_ids.shape
    routing = order_by_expert(expert_ids, combine_weights, gate.shape[0], slack=0)
    slot_bits = bits_of(k)
    token, slot = routing.pairs >> slot_bits, routing.pairs & ((1 << slot_bits) - 1)
    sizes = routing.counts

    def product(rows, kernels, transpose_rhs=False):
        return grouped_matmul(rows, kernels, sizes, transpose_rhs=transpose_rhs, implementation=implementation)

    def transposed_product(rows, drows):
        return grouped_transposed_matmul(rows, drows, sizes, implementation=implementation)

    exists = (jnp.arange(len(routing.pairs)) < sizes.sum())[:, None]  # the rest is of experts that are not here

    with jax.named_scope("gather"):
        rows, drows = x[token], dout.astype(x.dtype)[token]
        weight = routing.weights[routing.pairs][:, None]
    with jax.named_scope("hidden"):
        hidden, hidden_vjp = jax.vjp(lambda g, u: jax.nn.silu(g) * u, product(rows, gate), product(rows, up))
    with jax.named_scope("gradients_of_rows"):
        projected = product(drows, down, transpose_rhs=True)
        wide = projected.astype(jnp.float32)
        dgated, dupped = hidden_vjp((wide * weight).astype(x.dtype))
        dx_rows = product(dgated, gate, transpose_rhs=True).astype(jnp.float32)
        dx_rows += product(dupped, up, transpose_rhs=True).astype(jnp.float32)
        dx_rows = jnp.where(exists, dx_rows, 0)  # products of rows of no group are never written
    with jax.named_scope("gradients_of_kernels"):
        weighted = (hidden.astype(jnp.float32) * weight).astype(x.dtype)
        dgate, dup, ddown = (
            transposed_product(left, right) for left, right in ((rows, dgated), (rows, dupped), (weighted, drows))
        )
    with jax.named_scope("combine"):
        dweight = jnp.where(exists, hidden.astype(jnp.float32) * wide, 0).sum(axis=-1)
        place = jnp.argsort(token * k + slot).reshape(tokens, k)  # of every (token, slot) among the rows
        dx = functools.reduce(jnp.add, (dx_rows[place[:, j]] for j in range(k)))
    return dx.astype(x.dtype), dgate, dup, ddown, dweight[place].astype(combine_weights.dtype)
