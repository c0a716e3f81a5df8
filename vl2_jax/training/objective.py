"""What training minimises: next-token cross-entropy, plus the routers' balance losses (SPEC 5.6, 5.7).

B batch, T positions, D model width, V vocabulary, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.model.decoder import vocabulary_layer
from vl2_jax.model.layers import ADAPTERS
from vl2_jax.model.moe import Routing, balance_loss
from vl2_jax.model.vl2 import Params, VL2Model, apply
from vl2_jax.processing.batch import IGNORED, Batch
from vl2_jax.training.packing import PackedBatch


class Losses(NamedTuple):
    """float32; `total` is what gradients are taken of."""

    total: Float[Array, ""]
    next_token: Float[Array, ""]
    balance: Float[Array, " layers"]  # one a mixture-of-experts layer
    load: Float[Array, "layers E"]  # positions that each expert took


def token_losses(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Cross-entropy of every position, zero where the target is IGNORED."""
    counted = targets != IGNORED
    # Compared rather than gathered: the gradient of a gather is a scatter into zeros as large as the logits.
    wanted = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(axis=-1)
    return (jax.nn.logsumexp(logits, axis=-1) - wanted) * counted


def next_token_loss(
    model: VL2Model,
    params: Params,
    hidden: Float[Array, "B T D"],
    labels: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of the cross-entropies of each position's prediction against the next position's label, where there is one.

    Logits are made for `chunk` positions at a time, over all rows of a device, and made again in the backward pass:
    those of a 4096-token sequence would take 1.7 GB in float32 at 102,400 words. On a mesh each device does so with its
    own sequences, and the vocabulary's weights and their gradients travel once, not with every chunk.
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    layer = vocabulary_layer(model.config.language_config, model.dtype, model.param_dtype, parent=None)
    head = {"params": params["language"]["lm_head"]}
    adapters = params.get(ADAPTERS, {}).get("language", {})
    if "lm_head" in adapters:
        head[ADAPTERS] = adapters["lm_head"]

    def of_rows(head: Any, hidden: Array, targets: Array) -> Float[Array, ""]:
        rows, length = targets.shape
        pieces = min(length, -(-rows * length // chunk))
        size = -(-length // pieces)
        more = ((0, 0), (0, pieces * size - length))
        targets, hidden = jnp.pad(targets, more, constant_values=IGNORED), jnp.pad(hidden, (*more, (0, 0)))

        @jax.checkpoint
        def piece(begin: Array) -> Float[Array, ""]:
            inputs, wanted = (jax.lax.dynamic_slice_in_dim(a, begin, size, axis=1) for a in (hidden, targets))
            logits: Any = layer.apply(head, inputs)
            return token_losses(logits.astype(jnp.float32), wanted).sum()

        if pieces == 1:
            return piece(jnp.int32(0))
        return jax.lax.map(piece, jnp.arange(pieces) * size).sum()

    head = jax.tree.map(lambda leaf: leaf.astype(model.dtype), head)
    return model.layout.sum_over_sequences(of_rows, head, hidden, targets)


def expert_load(routing: Routing, experts: int, counted: Bool[Array, "B T"]) -> Float[Array, " E"]:
    """How many counted positions each expert took."""
    ids = jnp.where(counted[..., None], routing.expert_ids, experts)
    return jnp.zeros(experts + 1).at[ids.ravel()].add(1.0)[:experts]


def losses(
    model: VL2Model,
    params: Params,
    batch: Batch | PackedBatch,
    *,
    count_padding: bool = False,
    chunk: int = 512,
    balance_weight: float | None = None,
    targets: Float[Array, ""] | None = None,
) -> Losses:
    """The objective of one batch, a `Batch` or a `PackedBatch`.

    Args:
      count_padding: let padding count in the balance loss, and predict the first token of a row padded on the left, as
        in the released code.
      chunk: positions, over all rows of a device, whose logits are held at a time.
      balance_weight: of the balance loss; `None` is the model's `aux_loss_alpha`.
      targets: what the sum of cross-entropies is divided by; `None` is the number of targets in this batch.
    """
    if isinstance(batch, PackedBatch):
        segments, positions = jnp.asarray(batch.segments), batch.positions
    else:
        segments, positions = jnp.asarray(batch.attention_mask, jnp.int32), None
    labels = jnp.asarray(batch.labels)
    inputs = (batch.input_ids, segments, batch.visual_index, batch.tiles, positions)
    out = apply(model, params, *inputs, method="hidden")
    present = segments > 0
    if not count_padding:
        labels = jnp.where(jnp.pad(present[:, :-1], ((0, 0), (1, 0))), labels, IGNORED)
    config = model.config.language_config
    counted = None if count_padding else present
    balance = [balance_loss(config, routing, counted, balance_weight) for routing in out.routings]
    load = [expert_load(routing, config.n_routed_experts or 0, present) for routing in out.routings]
    if targets is None:
        targets = jnp.maximum((labels[:, 1:] != IGNORED).sum(), 1)
    next_token = next_token_loss(model, params, out.hidden, labels, chunk) / targets
    stacked = jnp.stack(balance or [jnp.zeros(())])
    return Losses(next_token + stacked.sum(), next_token, stacked, jnp.stack(load or [jnp.zeros(1)]))
