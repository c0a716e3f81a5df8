"""Any part of any parameter, from a released or a converted directory, reading only the bytes of that part.

What a device needs of a model that is spread over many: see `vl2_jax.sharding.loading`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import (
    MANIFEST_FILE,
    PARAMS_FOLDER,
    check_files,
    check_tensor,
    is_converted,
    read_manifest,
)
from convert.from_torch import checked_entries, differences
from convert.weight_map import Leaf
from vl2_jax.errors import CheckpointError
from vl2_jax.files import read_range, size_of

Index = tuple[slice, ...]


class Parts:
    """The parameters of a directory, mapped from its files.

    Args:
      verify: compare sizes and headers of all files with the manifest now, and whole tensors in `check`.

    Raises:
      CheckpointError: what is there does not fit the configuration or the manifest.
    """

    def __init__(self, directory: Path, leaves: list[Leaf], verify: bool):
        self._directory = directory
        self._converted = is_converted(directory)
        self._entries = {} if self._converted else checked_entries(directory, leaves)
        self._manifest: dict[str, Any] | None = None
        if verify and (self._converted or (directory / MANIFEST_FILE).is_file()):
            self._manifest = read_manifest(directory)
            check_files(directory, self._manifest)

    @property
    def differences(self) -> list[str]:
        """What is filled in, and left out, in sentences."""
        return differences(self._entries)

    def read(self, leaf: Leaf, index: Index, dtype: np.dtype) -> np.ndarray:
        """One part of a parameter, in C order."""
        if self._converted:
            return np.ascontiguousarray(self._whole(leaf)[index].astype(dtype, copy=False))
        if not leaf.transform.is_stacked:
            array = leaf.transform.to_leaf(self._entries[leaf.keys[0]].read())
            return np.ascontiguousarray(array[index].astype(dtype, copy=False))
        keys = leaf.keys[index[0]]
        shape = [len(range(*part.indices(size))) for part, size in zip(index, leaf.shape, strict=True)]
        out = np.empty(shape, dtype)
        for slot, key in zip(out, keys, strict=True):
            slot[...] = leaf.transform.to_leaf(self._entries[key].read())[index[1:]]
        return out

    def check(self, leaf: Leaf) -> None:
        """Reads a whole parameter and compares it with the manifest, where there is one.

        Raises:
          CheckpointError: it is damaged.
        """
        if self._manifest is None:
            return
        if self._converted:
            check_tensor(self._manifest, leaf.path, self._whole(leaf), self._directory)
            return
        for key in leaf.keys:
            check_tensor(self._manifest, key, self._entries[key].read(), self._entries[key].file)

    def _whole(self, leaf: Leaf) -> np.ndarray:
        """A parameter's one chunk: raw bytes, as `convert.checkpoint` writes them."""
        folder = self._directory / PARAMS_FOLDER / "state" / leaf.path.replace("/", ".")
        chunk = folder / ".".join("0" * max(1, len(leaf.shape)))
        try:
            name = json.loads((folder / ".zarray").read_text(encoding="utf-8"))["dtype"]
            dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
            return read_range(chunk, 0, size_of(chunk)).view(dtype).reshape(leaf.shape)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{leaf.path} of {self._directory} cannot be read ({error}).") from None
