"""What training minimises: next-token cross-entropy, plus the routers' balance losses (SPEC 5.6, 5.7).

B batch, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.model.moe import balance_loss
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.processing.batch import IGNORED, Batch


class Losses(NamedTuple):
    """float32 scalars; `total` is what gradients are taken of."""

    total: Float[Array, ""]
    next_token: Float[Array, ""]
    balance: Float[Array, " layers"]  # one a mixture-of-experts layer
    logits: Float[Array, "B T V"]


def next_token_loss(logits: Float[Array, "B T V"], labels: Int[Array, "B T"]) -> Float[Array, ""]:
    """Mean cross-entropy of each position's logits against the next position's label, where there is one."""
    targets = labels[:, 1:]
    counted = targets != IGNORED
    logprobs = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.where(counted, targets, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * counted) / jnp.maximum(counted.sum(), 1)


def losses(model: VL2Model, params: Params, batch: Batch, *, count_padding: bool = False) -> Losses:
    """The objective of one batch.

    Args:
      count_padding: let padding count in the balance loss, as the released code does.
    """
    segments = jnp.asarray(batch.attention_mask, jnp.int32)
    out = apply(model, params, batch.input_ids, segments, batch.visual_index, batch.tiles)
    counted = None if count_padding else segments > 0
    config = model.config.language_config
    balance = jnp.stack([balance_loss(config, routing, counted) for routing in out.routings] or [jnp.zeros(())])
    next_token = next_token_loss(out.logits, jnp.asarray(batch.labels))
    return Losses(next_token + balance.sum(), next_token, balance, out.logits)
