"""`flash_attention`: causal attention of packed rows, forward and backward, without all scores in memory.

B rows, T positions, H heads, K key width, V value width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.choice import Implementation, choose
from vl2_jax.ops.flash_attention import reference, xla


def flash_attention(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B T H K"],
    values: Float[Array, "B T H V"],
    segments: Int[Array, "B T"],
    scale: float,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention of each position to itself and those before it that its segment `sees` (`segments.sees`).

    Scores are float32 sums of products in the dtype of the queries; weights are rounded to the dtype of the values, and
    so is the result. Differentiable in queries, keys and values; weights are computed again for the gradients.

    Args:
      segments: the document that a position belongs to, from 1, + `BRANCH` * the branch; padding is 0, sees padding
        only, and is seen by nothing else.
      scale: of scores.
      implementation: "pallas_tpu" is the kernel, "xla" a loop over blocks of queries, "reference" all scores at once,
        for tests. `None` is the kernel where the program is compiled for a TPU and the kernel takes the dtype and the
        shape (`pallas_tpu.supports`), else "xla".
    """
    if implementation == "reference":
        return reference.flash_attention(queries, keys, values, segments, scale)
    if implementation is None and not _kernel_supports(queries, values):
        implementation = "xla"
    if implementation == "xla":
        return xla.flash_attention(queries, keys, values, segments, scale)
    return _flash_attention(queries, keys, values, segments, scale, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _flash_attention(queries, keys, values, segments, scale, implementation):
    return _forward(queries, keys, values, segments, scale, implementation)[0]


def _forward(queries, keys, values, segments, scale, implementation):
    arguments = (queries, keys, values, segments)
    out, sums = choose(implementation, partial(_kernel, scale=scale), partial(_plain, scale=scale))(*arguments)
    return out, (*arguments, out, sums)


def _backward(scale, implementation, residuals, dout):
    kernel, plain = partial(_kernel_backward, scale=scale), partial(_plain_backward, scale=scale)
    return (*choose(implementation, kernel, plain)(*residuals, dout), None)


def _plain(queries, keys, values, segments, *, scale):
    batch, length, heads, _ = queries.shape
    # Nothing needs the sums here, but both branches give them.
    return xla.flash_attention(queries, keys, values, segments, scale), jnp.zeros((batch, heads, 1, length))


def _plain_backward(queries, keys, values, segments, out, sums, dout, *, scale):
    del out, sums
    return jax.vjp(lambda q, k, v: xla.flash_attention(q, k, v, segments, scale), queries, keys, values)[1](dout)


# Pallas takes a third of a second to import, so it is imported where a kernel may be used.


def _kernel_supports(queries, values):
    if queries.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.flash_attention import pallas_tpu

    return pallas_tpu.supports(queries, values)


def _kernel(*arguments, scale):
    from vl2_jax.ops.flash_attention import pallas_tpu

    return pallas_tpu.forward(*arguments, scale=scale)


def _kernel_backward(*arguments, scale):
    from vl2_jax.ops.flash_attention import backward

    return backward.backward(*arguments, scale=scale)


_flash_attention.defvjp(_forward, _backward)
