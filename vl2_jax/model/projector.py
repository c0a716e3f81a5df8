"""From patch features to rows of the language model's embedding (SPEC 3.1, 3.2).

I tiles, L patches, W vision width, D model width. The released projector joins 2 x 2 patches into one token:

    27 x 27 patches     pad one row and one column of zeros      28 x 28  ->  14 x 14 tokens of 4 W features,
                                                                 channel slowest, then row, then column
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vl2_jax.config import ProjectorConfig
from vl2_jax.model.layers import Dtype, Linear


class Projector(nn.Module):
    config: ProjectorConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, features: Float[Array, "I L W"]) -> Float[Array, "I M D"]:
        config = self.config

        def linear(x: Array, width: int, name: str) -> Array:
            axes = ("vision_embed", "embed") if name == "layers_0" else (None, "embed")
            return Linear(width, axes, self.dtype, self.param_dtype, use_bias=True, name=name)(x)

        x = features
        if config.token_pooling:
            even = int(x.shape[1] ** 0.5) // 2 * 2
            x = linear(join_patches(x, 2, even), config.input_dim, "token_pooling_layer")
        if config.projector_type == "identity":
            return x
        if config.projector_type == "linear":
            return linear(x, config.n_embed, "layers")
        hidden = config.n_embed
        if config.projector_type == "downsample_mlp_gelu":
            ratio, grid = config.downsample_ratio, int(x.shape[1] ** 0.5)
            x = join_patches(x, ratio, -(-grid // ratio) * ratio)
            hidden *= config.mlp_ratio
        # `layers_{i}` counts the activations too, as the checkpoint's keys do.
        for i in range(config.depth):
            width = config.n_embed if i == config.depth - 1 else hidden
            x = linear(x if i == 0 else nn.gelu(x, approximate=False), width, f"layers_{2 * i}")
        return x


def join_patches(x: Float[Array, "I L W"], ratio: int, side: int) -> Float[Array, "I M RRW"]:
    """Each `ratio` x `ratio` square of patches as one row, after the grid is cut or zero-padded to `side`."""
    grid = int(x.shape[1] ** 0.5)
    square = rearrange(x, "i (h w) c -> i h w c", h=grid)[:, :side, :side]
    more = (0, max(0, side - grid))
    square = jnp.pad(square, ((0, 0), more, more, (0, 0)))
    return rearrange(square, "i (h p) (w q) c -> i (h w) (c p q)", p=ratio, q=ratio)
