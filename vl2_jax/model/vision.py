"""The SigLIP vision tower: tiles to patch features (SPEC 2).

I tiles, S pixels along a side, L patches, W width. The last block's output after the final LayerNorm is used.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vl2_jax.config import VisionConfig
from vl2_jax.model.layers import (
    ONE_DEVICE,
    Dtype,
    LayerNorm,
    Layout,
    Linear,
    declare,
    scan_layers,
    variables_of,
)
from vl2_jax.ops.vision_attention.api import vision_attention

_EPS = 1e-6
_CHANNELS = 3


class VisionTower(nn.Module):
    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype
    layout: Layout = ONE_DEVICE
    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "I S S 3"]) -> Float[Array, "I L W"]:
        """Features of every patch. Pixels that do not fill a patch at the right and the bottom are not seen."""
        config = self.config
        width = config.width
        x = PatchEmbedding(config, self.dtype, self.param_dtype, name="patch_embed")(pixels)
        axes = (None, "vision_embed")
        positions = declare(
            self, "pos_embed", nn.initializers.normal(0.02), (config.grid**2, width), axes, self.param_dtype
        )
        x += positions.astype(self.dtype)
        block = nn.remat(VisionBlock) if self.remat else VisionBlock
        is_loop = self.scan and not self.is_initializing()
        if is_loop:
            one = VisionBlock(config, self.dtype, self.param_dtype, self.layout, parent=None)
            variables = [variables_of(self, f"blocks_{layer}") for layer in range(config.layers)]

            def body(x: Array, variables: Any) -> tuple[Array, None]:
                out: Any = one.apply(variables, x)
                return self.layout.constrain(out, "tile", None, None), None

            x, _ = scan_layers(body, x, variables, self.dtype, self.remat)
        for layer in range(0 if is_loop else config.layers):
            x = block(config, self.dtype, self.param_dtype, self.layout, name=f"blocks_{layer}")(x)
            x = self.layout.constrain(x, "tile", None, None)
            self.sow("intermediates", "vision_block_out", x)
        if self.is_initializing():
            UnusedPooling(config, self.param_dtype, name="attn_pool")()
        return LayerNorm(_EPS, self.dtype, self.param_dtype, name="norm")(x)


class PatchEmbedding(nn.Module):
    """One row a patch. A convolution rather than a product of cut patches: on CPU it adds up in the released code's
    order, and the difference of 4e-7 that another order makes grows a thousandfold in small models.
    """

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "I S S 3"]) -> Float[Array, "I L W"]:
        patch, width = self.config.patch_size, self.config.width
        init = nn.initializers.lecun_normal()
        axes = (None, None, None, "vision_embed")
        kernel = declare(self, "kernel", init, (patch, patch, _CHANNELS, width), axes, self.param_dtype)
        bias = declare(self, "bias", nn.initializers.zeros, (width,), axes[-1:], self.param_dtype)
        grid = jax.lax.conv_general_dilated(
            pixels.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(patch, patch),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return rearrange(grid, "i h w c -> i (h w) c") + bias.astype(self.dtype)


class VisionBlock(nn.Module):
    """Pre-norm attention over all patches of a tile, then an MLP with the tanh GELU."""

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype
    layout: Layout = ONE_DEVICE

    @nn.compact
    def __call__(self, x: Float[Array, "I L W"]) -> Float[Array, "I L W"]:
        width, heads = self.config.width, self.config.heads

        def norm(name: str) -> LayerNorm:
            return LayerNorm(_EPS, self.dtype, self.param_dtype, name=name)

        def linear(features: int, axes: tuple[str, str], name: str) -> Linear:
            return Linear(features, axes, self.dtype, self.param_dtype, use_bias=True, name=name)

        qkv = linear(3 * width, ("vision_embed", "vision_heads"), "qkv")(norm("norm1")(x))
        whole_tiles = ("tile", None, None)
        (mixed,) = self.layout.on_own_parts(
            lambda qkv: (vision_attention(qkv, heads),), [whole_tiles], [whole_tiles], qkv
        )
        x += linear(width, ("vision_heads", "vision_embed"), "proj")(mixed)
        hidden = linear(self.config.mlp_width, ("vision_embed", "vision_mlp"), "fc1")(norm("norm2")(x))
        return x + linear(width, ("vision_mlp", "vision_embed"), "fc2")(nn.gelu(hidden, approximate=True))


class UnusedPooling(nn.Module):
    """The pooling head that every released checkpoint holds and nothing executes (SPEC 2.3).

    Its parameters are declared, so that a checkpoint keeps them and an export is complete.
    """

    config: VisionConfig
    param_dtype: Dtype

    @nn.compact
    def __call__(self) -> None:
        width, hidden = self.config.width, self.config.mlp_width
        one_row = jnp.zeros((1, width), self.param_dtype)
        declare(self, "latent", nn.initializers.normal(0.02), (1, width), (None, None), self.param_dtype)
        LayerNorm(_EPS, self.param_dtype, self.param_dtype, name="norm")(one_row)
        for name, inputs, features in (
            ("q", width, width),
            ("kv", width, 2 * width),
            ("proj", width, width),
            ("fc1", width, hidden),
            ("fc2", hidden, width),
        ):
            row = jnp.zeros((1, inputs), self.param_dtype)
            Linear(features, (None, None), self.param_dtype, self.param_dtype, use_bias=True, name=name)(row)
