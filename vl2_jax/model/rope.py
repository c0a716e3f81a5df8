"""Rotary position embeddings, plain and scaled (SPEC 5.4). Everything here is float32.

B batch, T positions, P rotated width of a head.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vl2_jax.config import LanguageConfig, RopeScaling


def rotary_tables(
    config: LanguageConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T P/2"], Float[Array, "B T P/2"]]:
    """Cosines and sines of every position's angles."""
    dim, base, scaling = config.rope_dim, config.rope_theta, config.rope_scaling
    steps = positions.astype(jnp.float32)
    frequencies: Array | np.ndarray = _frequencies(dim, base)
    magnitude = 1.0
    if scaling is not None and scaling.type == "linear":
        steps = steps / scaling.factor
    elif scaling is not None and scaling.type == "dynamic":
        frequencies = _dynamic_frequencies(config, scaling, jnp.max(positions) + 1)
    elif scaling is not None:
        frequencies = _yarn_frequencies(dim, base, scaling)
        magnitude = yarn_magnitude(scaling.factor, scaling.mscale) / yarn_magnitude(
            scaling.factor, scaling.mscale_all_dim
        )
    angles = steps[..., None] * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(
    x: Float[Array, "B T H P"],
    cos: Float[Array, "B T P/2"],
    sin: Float[Array, "B T P/2"],
    *,
    interleaved: bool,
) -> Float[Array, "B T H P"]:
    """Each pair of features turned by its angle, laid out [first halves, second halves].

    A pair is (2j, 2j + 1) if `interleaved` (latent attention), else (j, j + P/2) (multi-head attention).
    """
    wide = x.astype(jnp.float32)
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def softmax_scale(config: LanguageConfig) -> float:
    """What scores are multiplied with: head_dim^-0.5, corrected for YaRN in latent attention (SPEC 5.2, 6)."""
    scale, scaling = config.head_dim**-0.5, config.rope_scaling
    if config.use_mla and scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def yarn_magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _frequencies(dim: int, base: float) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.power(np.float32(base), exponents)).astype(np.float32)


def _dynamic_frequencies(config: LanguageConfig, scaling: RopeScaling, length: Array) -> Array:
    """The base grows with the sequence once it is longer than the trained context (NTK)."""
    dim, trained = config.rope_dim, config.max_position_embeddings
    growth = scaling.factor * length / trained - (scaling.factor - 1)
    base = config.rope_theta * jnp.where(length > trained, growth, 1.0) ** (dim / (dim - 2))
    return 1.0 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


def _yarn_frequencies(dim: int, base: float, scaling: RopeScaling) -> np.ndarray:
    def dimension_of(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    span = (high - low) or 0.001
    interpolated = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / np.float32(span), 0, 1)
    exact = _frequencies(dim, base)
    return exact / np.float32(scaling.factor) * interpolated + exact * (1 - interpolated)
