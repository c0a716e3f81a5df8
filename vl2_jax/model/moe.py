"""The mixture-of-experts layer: router, routed experts, shared experts (SPEC 5.6).

B batch, T positions, D model width, E experts, F expert width, k experts a token. The router is float32 throughout.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl2_jax.config import LanguageConfig
from vl2_jax.model.layers import ONE_DEVICE, Dtype, GatedMLP, Layout, adapter_of, declare
from vl2_jax.ops.narrow.product import in_dtype


class Routing(NamedTuple):
    """What one router decided."""

    expert_ids: Int[Array, "B T k"]
    weights: Float[Array, "B T k"]  # after normalising and scaling
    scores: Float[Array, "B T E"]  # softmax or sigmoid of the logits, without the correction bias


class MoE(nn.Module):
    config: LanguageConfig
    dtype: Dtype
    param_dtype: Dtype
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], exists: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Routing]:
        """The sums of all experts; of positions that do not exist, of the shared experts alone."""
        config = self.config
        experts, width, hidden = config.n_routed_experts, x.shape[-1], config.moe_intermediate_size
        assert experts is not None
        init = nn.initializers.normal(config.initializer_range)
        routing = Router(config, self.param_dtype, name="gate")(x)

        wide, tall = ("expert", "embed", "expert_mlp"), ("expert", "expert_mlp", "embed")
        described = {
            "experts_gate_proj": ((experts, width, hidden), wide),
            "experts_up_proj": ((experts, width, hidden), wide),
            "experts_down_proj": ((experts, hidden, width), tall),
        }
        kernels = [
            in_dtype(declare(self, name, init, shape, axes, self.param_dtype), self.dtype)
            for name, (shape, axes) in described.items()
        ]
        gate, up, down = kernels
        factors = [adapter_of(self, name, self.dtype) for name in described]
        adapters = (factors[0], factors[1], factors[2]) if any(factors) else None
        ids = routing.expert_ids if exists is None else jnp.where(exists[..., None], routing.expert_ids, experts)
        with jax.named_scope("routed_experts"):
            routed = self.layout.experts(x, gate, up, down, ids, routing.weights, adapters)
        if config.n_shared_experts:
            shared_width = config.n_shared_experts * hidden
            shared = GatedMLP(shared_width, self.dtype, self.param_dtype, init, name="shared_experts")
            routed += shared(x)
        return routed, routing


class Router(nn.Module):
    config: LanguageConfig
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Routing:
        config = self.config
        assert config.n_routed_experts is not None
        shape = (x.shape[-1], config.n_routed_experts)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # U(-1/sqrt(D), 1/sqrt(D))
        kernel = declare(self, "kernel", init, shape, ("embed", None), self.param_dtype)
        bias = None
        if config.topk_method == "noaux_tc":
            bias = declare(self, "correction_bias", nn.initializers.zeros, shape[1:], (None,), jnp.float32)
        logits = jnp.einsum(
            "btd,de->bte",
            x.astype(jnp.float32),
            kernel.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return route(config, logits, bias)


def route(config: LanguageConfig, logits: Float[Array, "B T E"], bias: Float[Array, " E"] | None) -> Routing:
    """The experts of every token and their weights, from the router's logits."""
    scores = jax.nn.softmax(logits, axis=-1) if config.scoring_func == "softmax" else jax.nn.sigmoid(logits)
    k, groups = config.num_experts_per_tok, config.n_group or 1
    assert k is not None
    choice = scores if bias is None else scores + jax.lax.stop_gradient(bias)
    if config.topk_method != "greedy":
        grouped = choice.reshape(*choice.shape[:-1], groups, -1)
        if config.topk_method == "noaux_tc":
            group_score = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        else:
            group_score = grouped.max(axis=-1)
        kept = jax.lax.top_k(group_score, config.topk_group or groups)[1]
        keep = jax.nn.one_hot(kept, groups, dtype=bool).any(axis=-2)
        # Experts of other groups get 0.0, which a negative biased score loses to: the released rule (SPEC 10.4, 36).
        choice = jnp.where(keep[..., None], grouped, 0.0).reshape(choice.shape)
    _, expert_ids = jax.lax.top_k(choice, k)
    # group_limited_greedy weighs with the masked scores, noaux_tc with the raw ones.
    weighed = choice if config.topk_method == "group_limited_greedy" else scores
    weights = jnp.take_along_axis(weighed, expert_ids, axis=-1)
    if config.norm_topk_prob and k > 1:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(expert_ids, weights * config.routed_scaling_factor, scores)


def balance_loss(
    config: LanguageConfig,
    routing: Routing,
    counted: Bool[Array, "B T"] | None = None,
    weight: float | None = None,
) -> Float[Array, ""]:
    """The auxiliary loss that keeps experts evenly loaded (SPEC 5.6); no gradient flows through the counts.

    Args:
      counted: positions that count. The released code counts padding too, which is `None`.
      weight: of the loss; `None` is the model's `aux_loss_alpha`.
    """
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    assert experts is not None
    assert k is not None
    if counted is None:
        counted = jnp.ones(routing.scores.shape[:2], bool)
    present = counted.astype(jnp.float32)[..., None]
    picks = jax.nn.one_hot(routing.expert_ids, experts).sum(axis=2) * present
    axes = (1,) if config.seq_aux else (0, 1)
    tokens = jnp.maximum(present.sum(axis=axes), 1.0)
    load = jax.lax.stop_gradient(picks.sum(axis=axes) * experts / (tokens * k))
    mean_score = (routing.scores * present).sum(axis=axes) / tokens
    return (config.aux_loss_alpha if weight is None else weight) * jnp.mean(jnp.sum(load * mean_score, axis=-1))
