"""The small parts that the vision tower, the projector and the decoder are made of.

Every parameter is declared once, by name, shape, logical axes and initialiser. The axes are names such as "embed" or
"heads"; which mesh axis each of them is laid along is decided in `sharding.rules`, and a `Layout` carries it in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl2_jax.errors import ConfigError
from vl2_jax.ops.expert_ffn.api import ExpertAdapters, expert_ffn
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.ops.narrow.product import in_dtype, product

Dtype = Any
Initializer = Callable[..., jax.Array]
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """Where arrays lie and where experts compute: here, on one device; `sharding.layout` does it for a mesh."""

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """`x` laid out by the logical names of its axes; an axis without a name is whole on every device."""
        del axes
        return x

    def on_own_parts(
        self, function: Callable[..., tuple[Array, ...]], axes: Sequence[Axes], results: Sequence[Axes], *arrays: Array
    ) -> tuple[Array, ...]:
        """`function(*arrays)` of the parts that each device has, by the logical names of the axes of all arrays.

        Args:
          axes: of every argument; axes of one name are cut alike, into as many parts as divide all of them.
          results: axes of what comes out; those with names are as long as the argument's of that name.
        """
        return function(*arrays)

    def sum_over_sequences(self, function: Callable[..., Array], shared: Any, *rows: Array) -> Array:
        """The sum of `function(shared, *rows)` over the sequences that each device has; `shared` travels once."""
        return function(shared, *rows)

    def on_devices(self) -> AbstractContextManager:
        """The context that programs of this layout are traced, compiled and called in."""
        return nullcontext()

    @property
    def devices(self) -> int:
        """Over which tiles are spread."""
        return 1

    def experts(
        self,
        x: Float[Array, "B T D"],
        gate: Float[Array, "E D F"] | Narrow,
        up: Float[Array, "E D F"] | Narrow,
        down: Float[Array, "E F D"] | Narrow,
        expert_ids: Int[Array, "B T k"],
        combine_weights: Float[Array, "B T k"],
        adapters: ExpertAdapters | None = None,
    ) -> Float[Array, "B T D"]:
        """`ops.expert_ffn` of every position."""
        rows = (a.reshape(-1, a.shape[-1]) for a in (x, expert_ids, combine_weights))
        x_rows, ids, weights = rows
        return expert_ffn(x_rows, gate, up, down, ids, weights, adapters=adapters).reshape(x.shape)


ONE_DEVICE = Layout()
ADAPTERS = "adapters"  # the collection of variables beside "params"; where there is one argument, it stands in it


def variables_of(module: nn.Module, name: str) -> dict[str, Any]:
    """The parameters of a part of `module`, and its adapters if there are any, for `apply`."""
    collections = module.variables
    return {kind: collections[kind][name] for kind in ("params", ADAPTERS) if name in collections.get(kind, {})}


def scan_layers(
    body: Callable[[Array, Any], tuple[Array, Any]], x: Array, variables: Sequence[Any], dtype: Dtype, remat: bool
) -> tuple[Array, Any]:
    """Alike layers one after another as one loop, which is compiled once; `(x, what the layers tell, stacked)`.

    Args:
      body: one layer, `(x, its variables)` to the new x and what it tells.
      variables: of each layer. They stay apart everywhere else and are stacked here, in `dtype`: a copy that casting
        would make anyway, and a second one of what is not cast, as narrow weights are not.
      remat: keep only each layer's input for the backward pass.
    """
    if len({jax.tree.structure(each) for each in variables}) > 1:
        raise ConfigError("model.scan makes one loop of all layers, which must have adapters on the same projections.")
    cast = [jax.tree.map(partial(_cast, dtype=dtype), each, is_leaf=_is_narrow) for each in variables]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cast)
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, stacked)


def _cast(leaf: Any, dtype: Dtype) -> Any:
    """Matrices are multiplied in the layers' dtype; vectors, routers' biases among them, stay as they are."""
    return in_dtype(leaf, dtype) if leaf.ndim > 1 else leaf


def _is_narrow(leaf: Any) -> bool:
    return isinstance(leaf, Narrow)


def declare(
    module: nn.Module,
    name: str,
    initializer: Initializer,
    shape: Sequence[int],
    axes: Sequence[str | None],
    dtype: Dtype,
) -> Any:
    """A parameter of `module`, with the logical name of each of its axes; a matrix may be `Narrow`."""
    if module.has_variable("params", name):
        stored: Any = module.get_variable("params", name)
        if isinstance(stored, Narrow):
            return stored
    boxed: Any = nn.with_logical_partitioning(initializer, tuple(axes))
    return module.param(name, boxed, tuple(shape), dtype)


def adapter_of(module: nn.Module, name: str, dtype: Dtype) -> tuple[Array, Array] | None:
    """The factors of a low-rank adapter on a parameter of `module`, if it has one (`training.lora`); B is scaled."""
    if not module.has_variable(ADAPTERS, name):
        return None
    pair: Any = module.get_variable(ADAPTERS, name)
    return pair["a"].astype(dtype), pair["b"].astype(dtype)


class Linear(nn.Module):
    """`x @ kernel + bias`, computed in `dtype`. The kernel is `[in, out]`, the transpose of PyTorch's weight.

    An adapter is applied to `x` and never multiplied out, so that gradients of the whole kernel are not computed.
    """

    features: int
    axes: tuple[str | None, str | None]
    dtype: Dtype
    param_dtype: Dtype
    use_bias: bool = False
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        shape = (x.shape[-1], self.features)
        kernel = declare(self, "kernel", self.kernel_init, shape, self.axes, self.param_dtype)
        x = x.astype(self.dtype)
        # Rows in one axis: XLA:CPU makes a transposed copy of the gradient for a product over more than one.
        y = product(x.reshape(-1, shape[0]), in_dtype(kernel, self.dtype)).reshape(*x.shape[:-1], self.features)
        if pair := adapter_of(self, "kernel", self.dtype):
            y += (x @ pair[0]) @ pair[1]
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
