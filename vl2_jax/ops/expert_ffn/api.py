"""`expert_ffn`: everything between the router and the sum of a mixture-of-experts layer.

N tokens, k experts a token, D model width, E experts, F expert width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.choice import Implementation, choose
from vl2_jax.ops.expert_ffn import adapted, reference, xla
from vl2_jax.ops.expert_ffn.adapted import ExpertAdapters
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.ops.narrow.product import widened


def expert_ffn(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D F"] | Narrow,
    up: Float[Array, "E D F"] | Narrow,
    down: Float[Array, "E F D"] | Narrow,
    expert_ids: Int[Array, "N k"],
    combine_weights: Float[Array, "N k"],
    *,
    adapters: ExpertAdapters | None = None,
    spread_over: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """`sum_j weight[n, j] * down(silu(gate(x[n])) * up(x[n]))` over the experts `expert_ids[n, j]`.

    No row is dropped for any routing. The experts compute in the dtype of `x`; their outputs are weighted and summed
    in float32 and rounded once (SPEC 5.6). Differentiable in everything but `expert_ids` and narrow projections.

    Args:
      x: rows to transform.
      gate: gate projections; all three may be narrow (`ops.narrow`).
      up: up projections.
      down: down projections.
      expert_ids: the experts of each row, all different within a row; `E` is an expert that is not here and gives
        nothing.
      combine_weights: float32 weights of the experts' outputs.
      adapters: low-rank factors beside gate, up and down: see `adapted`, which is then the implementation.
      spread_over: how many experts share the rows, those that are not here included; by default E. It chooses block
        sizes and changes no result.
      implementation: "pallas_tpu" is the kernel, "xla" a loop over blocks of rows, "reference" every expert on every
        row, for tests. `None` is the kernel where the program is compiled for a TPU and the kernel takes the dtype and
        the shape (`pallas_tpu.supports`), else "xla".

    Returns:
      One row a token, in the dtype of `x`.
    """
    if adapters is not None:
        return adapted.expert_ffn(x, gate, up, down, expert_ids, combine_weights, adapters)
    if implementation == "reference":
        wide_gate, wide_up, wide_down = (widened(kernel, x.dtype) for kernel in (gate, up, down))
        return reference.expert_ffn(x, wide_gate, wide_up, wide_down, expert_ids, combine_weights)
    if implementation is None and not _kernel_supports(x, gate, up, down):
        implementation = "xla"
    return _expert_ffn(x, gate, up, down, expert_ids, combine_weights, implementation, spread_over or gate.shape[0])


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _expert_ffn(x, gate, up, down, expert_ids, combine_weights, implementation, spread_over):
    return _forward(x, gate, up, down, expert_ids, combine_weights, implementation, spread_over)[0]


def _forward(x, gate, up, down, expert_ids, combine_weights, implementation, spread_over):
    arguments = (x, gate, up, down, expert_ids, combine_weights)
    plain = partial(xla.expert_ffn, spread_over=spread_over)
    return choose(implementation, partial(_kernel, spread_over=spread_over), plain)(*arguments), arguments


def _backward(implementation, spread_over, arguments, dout):
    if isinstance(arguments[1], Narrow):
        return _backward_beside_narrow(arguments, dout)
    plain = partial(xla.backward, spread_over=spread_over)
    kernel = partial(_kernel_backward, spread_over=spread_over)
    gradients = choose(implementation, kernel, plain)(*arguments, dout)
    return (*gradients[:4], None, gradients[4])


def _backward_beside_narrow(arguments, dout):
    """Gradients of rows and weights. Hidden rows are computed again, not kept, and one matrix after another widened."""

    def without_adapters(x, combine_weights):
        return adapted.expert_ffn(x, gate, up, down, expert_ids, combine_weights, (None, None, None))

    x, gate, up, down, expert_ids, combine_weights = jax.lax.optimization_barrier(arguments)
    dx, dcombine = jax.vjp(without_adapters, x, combine_weights)[1](dout)
    return dx, None, None, None, None, dcombine


# Pallas takes a third of a second to import, so it is imported where a kernel may be used.


def _kernel_supports(x, gate, up, down):
    if x.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.expert_ffn import pallas_tpu

    return pallas_tpu.supports(x, gate, up, down)


def _kernel(*arguments, spread_over):
    from vl2_jax.ops.expert_ffn import pallas_tpu

    return pallas_tpu.expert_ffn(*arguments, spread_over=spread_over)


def _kernel_backward(*arguments, spread_over):
    from vl2_jax.ops.expert_ffn import backward

    return backward.backward(*arguments, spread_over=spread_over)


_expert_ffn.defvjp(_forward, _backward)
