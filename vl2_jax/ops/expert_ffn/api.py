"""`expert_ffn`: everything between the router and the sum of a mixture-of-experts layer.

N tokens, k experts a token, D model width, E experts, F expert width.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float, Int

from vl2_jax.ops.expert_ffn import reference, xla

Implementation = Literal["xla", "reference"]


def expert_ffn(
    x: Float[Array, "N D"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    expert_ids: Int[Array, "N k"],
    combine_weights: Float[Array, "N k"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """`sum_j weight[n, j] * down(silu(gate(x[n])) * up(x[n]))` over the experts `expert_ids[n, j]`.

    No row is dropped for any routing. The experts compute in the dtype of `x`; their outputs are weighted and summed
    in float32 and rounded once (SPEC 5.6). Differentiable in everything but `expert_ids`.

    Args:
      x: rows to transform.
      gate: gate projections.
      up: up projections.
      down: down projections.
      expert_ids: the experts of each row, all different within a row.
      combine_weights: float32 weights of the experts' outputs.
      implementation: "xla", or "reference" (every expert on every row, for tests); `None` is "xla".

    Returns:
      One row a token, in the dtype of `x`.
    """
    if implementation == "reference":
        return reference.expert_ffn(x, gate, up, down, expert_ids, combine_weights)
    return xla.expert_ffn(x, gate, up, down, expert_ids, combine_weights)
