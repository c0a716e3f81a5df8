"""Attention of heads to cached latents in the cheaper of its two forms, which are equal up to rounding.

T new rows of each sequence, H heads, R latent rank, n and V widths of a head's key and value, P rotated width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float

from vl2_jax.ops.latent_attention.absorbed import absorbed_attention
from vl2_jax.ops.latent_attention.expanded import expanded_attention
from vl2_jax.ops.paging.pages import AnyLatentPages


def attend_to_latents(
    q_nope: Float[Array, "B T H n"], *arrays: Array, absorbed: bool | None = None, **rest: Any
) -> tuple[Float[Array, "B T H V"], AnyLatentPages]:
    """`absorbed_attention` or `expanded_attention`, which have these arguments.

    Args:
      absorbed: `None` is absorbed for one row, expanded for many, and of what lies between the one with fewer
        operations, except on TPUs, where the kernel of the expanded form makes a short chunk's scores once.
    """
    forms: tuple[Callable[..., Any], ...] = (absorbed_attention, expanded_attention)
    one, other = (partial(form, **rest) for form in forms)
    length = q_nope.shape[1]
    if absorbed is None:
        latents, kv_b = arrays[1], arrays[3]
        absorbed = length < absorbed_below(latents.shape[-1], q_nope.shape[-1], kv_b.shape[1] // q_nope.shape[2])
        if absorbed and length > 1:
            return jax.lax.platform_dependent(q_nope, *arrays, tpu=other, default=one)
    return (one if absorbed else other)(q_nope, *arrays)


def absorbed_below(rank: int, key: int, key_and_value: int) -> float:
    """Rows below which the absorbed form needs fewer operations.

    Per cached row and head: absorbed T (2 R + P); expanded T (n + P + V) and once R (n + V).
    """
    extra = 2 * rank - key_and_value
    return float("inf") if extra <= 0 else rank * key_and_value / extra
