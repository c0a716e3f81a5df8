"""`multi_head_attention`: queries attend to keys and values in pages, new rows are written on the way.

B sequences, T new rows of each, H heads, K head width, N pages of 128 rows (`ops.paging.pages`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from vl2_jax.ops.choice import Implementation, choose
from vl2_jax.ops.multi_head_attention import reference, xla
from vl2_jax.ops.paging.pages import PAGE, AnyHeadPages, pages_a_sequence
from vl2_jax.ops.paging.xla import write_rows


def multi_head_attention(
    queries: Float[Array, "B T H K"],
    new_keys: Float[Array, "B T H K"],
    new_values: Float[Array, "B T H K"],
    pages: AnyHeadPages,
    table: Int[Array, "B per"] | None,
    positions: Int[Array, " B"],
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H K"], AnyHeadPages]:
    """Attention with a cache (SPEC 5.3): as `latent_attention`, with keys and values of every head.

    The new rows are written to slots `positions + t`; then query t of a sequence attends to its slots 0 to
    `positions + t`, softmax in float32. Slots past the last new row are not looked at, and hold anything finite.

    Args:
      pages: donate them: they are updated in place.
      table: the page of every 128 slots of each sequence. What it says past the page of the last new row is not used.
        `None` is a contiguous cache: its arrays are `[B, n, ...]`.
      positions: of the first new row of each sequence. Where it is negative, nothing is written and the result is 0.
      implementation: "pallas_tpu" is the kernel, "xla" a loop over blocks, "reference" one softmax, for tests. `None`
        is the kernel where the program is compiled for a TPU and the kernel takes the dtypes and the shape
        (`pallas_tpu.supports`; of pages, bfloat16), else "xla".

    Returns:
      `[B, T, H, K]` in the dtype of `queries`, and the pages.

    Raises:
      ValueError: the pages, or the table, are of other sequences.
    """
    arguments = (queries, new_keys, new_values, pages, table, positions)
    if implementation == "reference":
        return reference.multi_head_attention(*arguments, scale=scale)
    kernel: Callable[..., Any] = _kernel
    if implementation is None and not _kernel_supports(queries, pages):
        kernel, implementation = _chunk_kernel, None if _chunk_supports(queries, pages, table) else "xla"
    return choose(implementation, partial(kernel, scale=scale), partial(xla.multi_head_attention, scale=scale))(
        *arguments
    )


# Pallas takes a third of a second to import, so it is imported where a kernel may be used.


def _kernel_supports(queries, pages):
    if queries.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.multi_head_attention import pallas_tpu

    return pallas_tpu.supports(queries, pages)


def _kernel(*arguments, scale):
    from vl2_jax.ops.multi_head_attention import pallas_tpu

    return pallas_tpu.multi_head_attention(*arguments, scale=scale)


def _chunk_supports(queries, pages, table):
    if queries.dtype != jnp.bfloat16:
        return False
    from vl2_jax.ops.multi_head_attention import prefill

    return prefill.supports(queries, pages, pages_a_sequence(pages, table, queries.shape[0]) * PAGE)


def _chunk_kernel(queries, new_keys, new_values, pages, table, positions, *, scale):
    from vl2_jax.ops.multi_head_attention import prefill

    new = tuple(rearrange(rows, "b t h k -> b h t k") for rows in (new_keys, new_values))
    pages = write_rows(pages, new, table, positions)
    begins = jnp.maximum(positions, 0)  # of a sequence that does nothing, nobody looks at the result
    return prefill.multi_head_prefill(queries, pages, table, begins, scale), pages
