"""The small parts that the vision tower, the projector and the decoder are made of.

Every parameter is declared once, by name, shape, logical axes and initialiser. The axes are names such as "embed" or
"heads"; which mesh axis each of them is laid along is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Dtype = Any
Initializer = Callable[..., jax.Array]


def declare(
    module: nn.Module,
    name: str,
    initializer: Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype: Dtype,
) -> jax.Array:
    """A parameter of `module`, with the logical name of each of its axes."""
    boxed: Any = nn.with_logical_partitioning(initializer, tuple(axes))
    return module.param(name, boxed, tuple(shape), dtype)


class Linear(nn.Module):
    """`x @ kernel + bias`, computed in `dtype`. The kernel is `[in, out]`, the transpose of PyTorch's weight."""

    features: int
    axes: tuple[str | None, str | None]
    dtype: Dtype
    param_dtype: Dtype
    use_bias: bool = False
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        shape = (x.shape[-1], self.features)
        kernel = declare(self, "kernel", self.kernel_init, shape, self.axes, self.param_dtype)
        y = jnp.einsum("...d,df->...f", x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = declare(self, "bias", nn.initializers.zeros, shape[1:], self.axes[1:], self.param_dtype)
            y += bias.astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """`scale * x / rms(x)`: statistics in float32, rounded to `dtype` before the product (SPEC 5.1)."""

    eps: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = declare(self, "scale", nn.initializers.ones, x.shape[-1:], (None,), self.param_dtype)
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return scale.astype(self.dtype) * normed.astype(self.dtype)


class LayerNorm(nn.Module):
    """Centred and scaled, with bias; statistics in float32 (SPEC 2.2)."""

    eps: float
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = declare(self, "scale", nn.initializers.ones, x.shape[-1:], (None,), self.param_dtype)
        bias = declare(self, "bias", nn.initializers.zeros, x.shape[-1:], (None,), self.param_dtype)
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases: the dense layer and the shared experts (SPEC 5.6)."""

    features: int
    dtype: Dtype
    param_dtype: Dtype
    kernel_init: Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        def linear(features: int, axes: tuple[str, str], name: str) -> Linear:
            return Linear(features, axes, self.dtype, self.param_dtype, kernel_init=self.kernel_init, name=name)

        gate = linear(self.features, ("embed", "mlp"), "gate_proj")(x)
        up = linear(self.features, ("embed", "mlp"), "up_proj")(x)
        return linear(x.shape[-1], ("mlp", "embed"), "down_proj")(nn.silu(gate) * up)


def attend(
    queries: Float[Array, "B T H K"],
    keys: Float[Array, "B S H K"],
    values: Float[Array, "B S H V"],
    mask: Float[Array, "B T S"] | None,
    scale: float,
) -> Float[Array, "B T H V"]:
    """Softmax attention with float32 scores; `mask` is True where a query may look.

    A query that may look nowhere (padding) looks evenly everywhere, as in the released code (SPEC 5.5).
    """
    scores = jnp.einsum("bthk,bshk->bhts", queries, keys, preferred_element_type=jnp.float32) * scale
    return jnp.einsum("bhts,bshv->bthv", softmax(scores, mask).astype(values.dtype), values)


def softmax(scores: Float[Array, "B H T S"], mask: Float[Array, "B T S"] | None) -> Float[Array, "B H T S"]:
    if mask is not None:
        # Added, not chosen: padding that looks evenly everywhere then has the released gradient too.
        scores += jnp.where(mask, 0.0, jnp.finfo(scores.dtype).min)[:, None]
    return jax.nn.softmax(scores, axis=-1)
