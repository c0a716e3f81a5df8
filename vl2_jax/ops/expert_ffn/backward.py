"""Gradients of the routed experts on TPUs: hidden rows are computed again, not stored.

R rows, one a (token, slot) pair, ordered by expert. With y the output of a row's expert and w its weight,

    out[t] = sum_r w[r] y[r]         y = down(h),  h = silu(g) * u,  g = gate(x),  u = up(x)
    e = dout[t] down^T               dh = w e,     dw = y . dout[t] = h . e        (so y itself is not needed)

Two kernels: `backward_rows` reads every expert's weights once and leaves what `backward_weights` multiplies.
"""

from __future__ import annotations

import functools

import jax

from vl2_jax.ops.chips import chip_of_mesh
from vl2_jax.ops.expert_ffn.backward_rows import BackwardScratch, rows_gradients
from vl2_jax.ops.expert_ffn.backward_weights import weights_gradients
from vl2_jax.ops.expert_ffn.tiling import Tiling, choose_tiling


@functools.partial(jax.jit, static_argnames=("spread_over", "tiling"))  # lowered once, however many layers
def backward(
    x, gate, up, down, expert_ids, combine_weights, dout,
    *, spread_over: int | None = None, tiling: Tiling | None = None,
):  # fmt: skip
    """Gradients of all arguments but `expert_ids`, from the gradient of the result."""
    (tokens, width), (experts, _, expert_width), k = x.shape, gate.shape, expert_ids.shape[1]
    chip, shared_by = chip_of_mesh(), spread_over or experts
    tiling = tiling or choose_tiling(chip, tokens, width, expert_width, shared_by, k, BackwardScratch)
    assert tiling is not None, "ask `supports` first"
    with jax.named_scope("gradients_of_rows"):
        dx, dweights, rows, starts = rows_gradients(
            x, gate, up, down, expert_ids, combine_weights, dout.astype(x.dtype), tiling
        )
    with jax.named_scope("gradients_of_weights"):
        dgate, dup, ddown = weights_gradients(rows, starts, tiling.vmem)
    return dx, dgate, dup, ddown, dweights.astype(combine_weights.dtype)
