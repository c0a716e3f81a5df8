"""`latent_attention`: queries of all heads attend to latent rows in pages, new rows are written on the way.

B sequences, T new rows of each, H heads, R latent rank, P rotated width, N pages of 128 rows (`ops.paging.pages`).
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.ops.choice import Implementation, choose
from vl2_jax.ops.latent_attention import reference, xla
from vl2_jax.ops.paging.pages import AnyLatentPages


def latent_attention(
    q_latent: Float[Array, "B T H R"],
    q_rotated: Float[Array, "B T H P"],
    new_latents: Float[Array, "B T R"],
    new_rotated: Float[Array, "B T P"],
    pages: AnyLatentPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H R"], AnyLatentPages]:
    """Absorbed attention (DeepSeek-V2, arXiv 2405.04434, 2.1; SPEC 5.2): latents are every head's keys and values.

    The new rows are written to slots `positions + t`; then query t of a sequence attends to its slots 0 to
    `positions + t`, with scores `(q_latent . latent + q_rotated . rotated) * scale`, softmax in float32, and mixes the
    latents. Slots past the last new row are not looked at, and hold anything finite.

    Args:
      q_latent: queries times the key projection.
      q_rotated: the rotated part of the queries.
      new_latents: latents of the new rows, in the dtype that the pages are read in.
      new_rotated: their rotated keys.
      pages: donate them: they are updated in place.
      table: the page of every 128 slots of each sequence. What it says past the page of the last new row is not used.
        `None` is a contiguous cache: its arrays are `[B, n, ...]`.
      positions: of the first new row of each sequence. Where it is negative, nothing is written and the result is 0.
      implementation: "pallas_tpu" is the kernel, "xla" a loop over blocks, "reference" one softmax, for tests. `None`
        is the kernel where the program is compiled for a TPU and the kernel takes the dtypes and the shape
        (`pallas_tpu.supports`; of pages, bfloat16), else "xla".

    Returns:
      `[B, T, H, R]` in the dtype of `q_latent`, to be multiplied with the value projection, and the pages.

    Raises:
      ValueError: the pages, or the table, are of other sequences.
    """
    arguments = (q_latent, q_rotated, new_latents, new_rotated, pages, table, positions)
    if implementation == "reference":
        return reference.latent_attention(*arguments, scale=scale)
    if implementation is None and not _kernel_supports(q_latent, q_rotated, pages):
        implementation = "xla"
    kernel, plain = (partial(function, scale=scale) for function in (_kernel, xla.latent_attention))
    return choose(implementation, kernel, plain)(*arguments)


# Pallas takes a third of a second to import, so it is imported where a kernel may be used.


def _kernel_supports(q_latent, q_rotated, pages):
    if q_latent.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.latent_attention import pallas_tpu

    return pallas_tpu.supports(q_latent, q_rotated, pages)


def _kernel(*arguments, scale):
    from vl2_jax.ops.latent_attention import pallas_tpu

    return pallas_tpu.latent_attention(*arguments, scale=scale)
