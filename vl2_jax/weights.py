"""Weights from a directory to what computes with them: the kind they are kept in, adapters, and the dtype of products.

floats           of one dtype, as TPUs take them, and training (`arrays=True`), beside quantised matrices too
int8, int4       the decoder's matrices in so many bits (`convert.quantise`), everything else as without
on a CPU         no bfloat16 array is left: matrices and embeddings are whole numbers (`ops.narrow`), the few others
                 float32, and so are products
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from convert import adapters as lora
from convert.checkpoint import dtype_of, is_converted
from convert.checkpoint import read_pieces as read_converted
from convert.from_torch import CORRECTION_BIAS, checked_entries
from convert.from_torch import read_pieces as read_released
from convert.quantise import (
    bytes_of,
    checked_kind,
    in_kind,
    is_part,
    is_quantised,
    kind_at,
    kind_of,
    parts_of,
    put_together,
    quantised,
)
from convert.weight_map import Leaf, flatten, plan, unflatten
from vl2_jax.config import VL2Config, WeightKind
from vl2_jax.errors import CheckpointError
from vl2_jax.model.vl2 import Params
from vl2_jax.ops.narrow.kinds import Bits, Narrow
from vl2_jax.progress import Report
from vl2_jax.sharding.layout import MeshLayout
from vl2_jax.sharding.loading import load_sharded
from vl2_jax.sharding.rules import abstract_sharded_params

_EMBEDDINGS = "language/embed_tokens"


def kinds_of(directory: Path, leaves: list[Leaf], weights: str | None) -> tuple[str | None, str | None]:
    """The kind of weights that a directory holds and the kind that is wanted; `None` is of floats.

    Raises:
      CheckpointError: no such kind, or the directory's weights cannot become what is wanted.
    """
    held = kind_of(directory, leaves) if is_converted(directory) else None
    wanted = held if weights is None else checked_kind(weights)
    if held is not None and wanted != held:
        raise CheckpointError(
            f"the weights of {directory} are {held} and cannot become {weights}; give the model in bfloat16 or float32 "
            "that they are of."
        )
    return held, wanted


def stored_and_computed(directory: Path, config: VL2Config, dtype: str | None, weights: str | None) -> tuple[int, Any]:
    """Bytes that the weights of a model take on one device, and the dtype of products, told without reading them.

    Raises:
      CheckpointError: see `kinds_of`, `dtype_of`.
    """
    leaves, kept = plan(config), dtype_of(dtype or config.torch_dtype)
    _, kind = kinds_of(directory, leaves, weights)
    wide = _is_widened(jax.default_backend(), kept)
    return bytes_of(leaves, kind, kept.itemsize), np.dtype(np.float32) if wide else kept


def read_weights(
    directory: Path,
    config: VL2Config,
    leaves: list[Leaf],
    dtype: np.dtype,
    weights: WeightKind | None,
    layout: Any,
    adapters: lora.Adapters | None,
    merge: bool | None,
    arrays: bool,
    verify: bool,
    report: Report,
) -> tuple[Params, Any]:
    """Parameters, laid out, with adapters; and the dtype of products with them.

    Args:
      dtype: of what is not quantised.
      weights, merge, arrays: see `api.load`.
      layout: where they lie.
    """
    held, kind = kinds_of(directory, leaves, weights)
    if merge is None:
        merge = dtype == np.float32 and kind is None
    if adapters is not None and merge and kind is not None:
        raise CheckpointError(f"adapters cannot be added to {kind} weights; keep them beside: merge=False, --no-merge.")
    replaced = [path for path in adapters.whole if is_quantised(path)] if adapters and kind else []
    if replaced:
        raise CheckpointError(
            f"the adapters replace {len(replaced)} parameters such as {replaced[0]}, which are {kind}; load the model "
            "with weights of floats."
        )
    parts = [part for leaf in leaves for part in parts_of(leaf, held)]
    if isinstance(layout, MeshLayout):
        abstract = abstract_sharded_params(config, layout.mesh, dtype, held)
        flat = flatten(load_sharded(directory, parts, abstract, verify, report))
        if kind is not None and held is None:
            _quantise_in_place(flat, kind, abstract_sharded_params(config, layout.mesh, dtype, kind))
    else:
        flat = {}
        if is_converted(directory):
            pieces = read_converted(directory, parts, verify, report)
        else:
            pieces = read_released(directory, leaves, checked_entries(directory, leaves), dtype, verify, report)
        for piece in pieces:
            for path, array in (piece if held else in_kind(piece, kind)).items():
                kept = array.dtype if is_part(path) else np.float32 if path.endswith(CORRECTION_BIAS) else dtype
                flat[path] = jnp.asarray(array.astype(kept, copy=False))
    flat = put_together(flat)
    if adapters is None:
        params = unflatten(flat)
    else:
        params = unflatten(lora.merge(flat, adapters, in_place=True)) if merge else lora.beside(flat, adapters)
    return (params, jnp.dtype(dtype)) if arrays else _for_devices(params)


def _quantise_in_place(flat: dict[str, Array], kind: str, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Matrices on a mesh by their parts, one after another."""
    for path in [path for path in flat if is_quantised(path)]:
        matrix = quantised(flat.pop(path), kind_at(path, kind))
        for name, part in vars(matrix).items():
            flat[f"{path}/{name}"] = jax.device_put(part, abstract[f"{path}/{name}"].sharding)


def _for_devices(params: Params) -> tuple[Params, Any]:
    """Parameters as what computes with them takes them, and the dtype of products; the given tree is used up."""
    table: Array = params["language"]["embed_tokens"]
    if not _is_widened(next(iter(table.devices())).platform, table.dtype):
        return params, table.dtype
    flat = flatten(params)
    del params
    for path in list(flat):
        array = flat.pop(path)
        if not isinstance(array, Narrow) and array.dtype == jnp.bfloat16:
            is_matrix = lora.can_be_adapted(path) or path == _EMBEDDINGS
            array = Bits.of(array) if is_matrix else array.astype(jnp.float32)
        flat[path] = array
    return unflatten(flat), jnp.dtype(jnp.float32)


def _is_widened(platform: str, dtype: Any) -> bool:
    """Whether numbers of this dtype are multiplied in float32."""
    return platform == "cpu" and dtype == jnp.bfloat16
