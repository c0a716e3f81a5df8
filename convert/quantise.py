"""Matrices of the decoder in fewer bits: which, how they are rounded, and what stands on disk for each.

    .../q_proj/kernel            becomes    .../q_proj/kernel/values, .../q_proj/kernel/scales       int8
    .../mlp/experts_up_proj      becomes    .../experts_up_proj/nibbles, .../experts_up_proj/scales  int4

Experts, attention, shared and dense parts are quantised; routers, norms, embeddings, the vocabulary, the vision tower
and the projector stay. In "int4", attention is int8: it is a fiftieth of the numbers, and in four bits loses more than
all others do (vl2-nano, KL divergence from float32: 0.033 of attention, 0.001 of the experts). Rounding is symmetric.
D and F are the width of what is multiplied and of the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from convert.adapters import can_be_adapted
from convert.checkpoint import PARAMS_FOLDER
from convert.weight_map import SAME, Leaf
from vl2_jax.config import WEIGHT_KINDS
from vl2_jax.errors import CheckpointError, shown
from vl2_jax.files import is_file_on
from vl2_jax.ops.narrow.kinds import GROUP, Int4, Int8, Narrow, to_int8

_FEWEST = 8  # rows of a group: what divides `GROUP` and the rows of the matrix; where these are fewer, it is int8
_TRIALS = 8  # of scales of a group


def checked_kind(name: str) -> str:
    """The name of a kind of quantised weights.

    Raises:
      CheckpointError: it is none.
    """
    if name not in WEIGHT_KINDS:
        raise CheckpointError(f"weights of kind {shown(name)} are not known; choose one of {', '.join(WEIGHT_KINDS)}.")
    return name


def kind_of(directory: Path, leaves: list[Leaf]) -> str | None:
    """The kind of weights that a converted checkpoint holds; `None` is of floats."""
    for leaf in islice((leaf for leaf in leaves if is_quantised(leaf.path) and _may_be_int4(leaf)), 1):
        for kind in WEIGHT_KINDS:
            folder = directory / PARAMS_FOLDER / "state" / parts_of(leaf, kind)[0].path.replace("/", ".")
            if is_file_on(folder / ".zarray"):
                return kind
    return None


def check_not_quantised(directory: Path, leaves: list[Leaf]) -> None:
    """Raises CheckpointError where the weights of a converted checkpoint are quantised, and those of floats needed."""
    if kind := kind_of(directory, leaves):
        raise CheckpointError(
            f"the weights of {directory} are {kind} already; give the model in bfloat16 or float32 that they are of."
        )


def is_quantised(path: str) -> bool:
    """Whether a parameter is one of those that are kept in fewer bits."""
    return path.startswith("language/layers_") and can_be_adapted(path)


def kind_at(path: str, kind: str) -> str:
    """The kind of a matrix in a checkpoint of a kind."""
    return "int8" if "/self_attn/" in path else kind


def parts_of(leaf: Leaf, kind: str | None) -> list[Leaf]:
    """What a checkpoint of a kind holds for a parameter: itself, or its parts."""
    if kind is None or not is_quantised(leaf.path):
        return [leaf]
    parts = vars(abstract_quantised(leaf.path, leaf.shape, kind)).items()
    return [Leaf(f"{leaf.path}/{name}", tuple(part.shape), leaf.keys, SAME) for name, part in parts]


def _may_be_int4(leaf: Leaf) -> bool:
    return kind_at(leaf.path, "int4") == "int4" and math.gcd(GROUP, leaf.shape[-2]) >= _FEWEST


@cache
def abstract_quantised(path: str, shape: tuple[int, ...], kind: str) -> Narrow:
    """Shapes and dtypes of the parts of a matrix."""
    return jax.eval_shape(partial(quantised, kind=kind_at(path, kind)), jax.ShapeDtypeStruct(shape, jnp.float32))


def bytes_of(leaves: list[Leaf], kind: str | None, others: int = 2) -> int:
    """What parameters take in memory; those that are not quantised, so many bytes a number."""
    total = 0
    for leaf in leaves:
        is_narrow = kind is not None and is_quantised(leaf.path)
        parts = vars(abstract_quantised(leaf.path, leaf.shape, kind)).values() if is_narrow else ()
        total += sum(part.size * part.dtype.itemsize for part in parts) or others * math.prod(leaf.shape)
    return total


def put_together(flat: dict[str, Any]) -> dict[str, Any]:
    """Flat parameters with quantised matrices in the places of their parts; the parts leave `flat`."""
    for path in [path for path in flat if path.endswith("/scales")]:
        matrix, scales = path.removesuffix("/scales"), flat.pop(path)
        nibbles = flat.pop(f"{matrix}/nibbles", None)
        flat[matrix] = Int8(flat.pop(f"{matrix}/values"), scales) if nibbles is None else Int4(nibbles, scales)
    return flat


def in_kind(arrays: Mapping[str, np.ndarray], kind: str | None) -> dict[str, np.ndarray]:
    """Some parameters as a checkpoint of a kind holds them."""
    if kind is None:
        return dict(arrays)
    out: dict[str, np.ndarray] = {}
    for path, array in arrays.items():
        if is_quantised(path):
            matrix = quantised(jnp.asarray(array), kind_at(path, kind))
            out |= {f"{path}/{name}": np.asarray(part) for name, part in vars(matrix).items()}
        else:
            out[path] = array
    return out


def is_part(path: str) -> bool:
    """Whether a path is one of a part of a quantised matrix, which has a dtype of its own."""
    return path.endswith(("/scales", "/nibbles", "/values"))


@partial(jax.jit, static_argnames="kind")
def quantised(array: Float[Array, "... D F"], kind: str) -> Narrow:
    """A matrix, or those of all experts, rounded."""
    if array.ndim == 3:
        return jax.lax.map(partial(quantised, kind=kind), array)  # an expert at a time, for the memory
    depth, width = array.shape
    group = math.gcd(GROUP, depth)
    if kind == "int8" or group < _FEWEST:
        return Int8(*to_int8(array, -2))
    scales, values = _fitted(array.reshape(depth // group, group, width))
    pairs = values.reshape(depth // 2, 2, width).astype(jnp.int32) + 8
    return Int4((pairs[:, 0] | pairs[:, 1] << 4).astype(jnp.uint8), scales)


def _fitted(array: Float[Array, "G D F"]) -> tuple[Float[Array, "G 1 F"], Float[Array, "G D F"]]:
    """Scales of columns of groups, and whole numbers from -8 to 7, with the least squares of all that are tried.

    The number of the largest size becomes -7, as rounding to nearest with levels to both sides has it, up to -8.75,
    which is cut off at -8; then the scale is the best one for the whole numbers.
    """
    array = array.astype(jnp.float32)
    at = jnp.abs(array).argmax(axis=1, keepdims=True)
    largest = jnp.take_along_axis(array, at, axis=1)

    def trial(number: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        values = jnp.clip(jnp.rint(array / jnp.where(largest == 0, 1, largest) * -(7 + number / 4)), -8, 7)
        squares = (values * values).sum(axis=1, keepdims=True)
        scales = (array * values).sum(axis=1, keepdims=True) / jnp.where(squares > 0, squares, 1)
        error = jnp.square(array - scales * values).sum(axis=1, keepdims=True)
        return jax.tree.map(lambda new, old: jnp.where(error < best[0], new, old), (error, scales, values), best)

    nothing = jnp.full(largest.shape, jnp.inf), jnp.zeros_like(largest), jnp.zeros_like(array)
    _, scales, values = jax.lax.fori_loop(0, _TRIALS, trial, nothing)
    return scales, values
