"""Low-rank adapters on disk, as PEFT lays them out: `adapter_config.json` and `adapter_model.safetensors`.

our path                             PEFT's tensors, one pair a released matrix
.../q_proj/kernel      a [in, r]     base_model.model.language.model.layers.0.self_attn.q_proj.lora_A.weight [r, in]
                       b [r, out]    ...lora_B.weight [out, r]
.../experts_up_proj    a [E, in, r]  ...experts.0.up_proj.lora_A.weight, ...experts.1..., one pair an expert
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors.numpy import save

from convert.checkpoint import listing, replace_directory, unfinished_directory
from convert.safetensors_files import scan_file
from convert.weight_map import Leaf
from vl2_jax.errors import CheckpointError
from vl2_jax.files import path_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WEIGHT = ".weight"
# A router is no linear layer in the released model, nor are patches; the pooling is executed by nothing.
_LINEAR = re.compile(r"(?!vision/attn_pool/).*((?<!/mlp/gate)(?<!/patch_embed)/kernel|/kv_b_proj|/experts_\w+_proj)")


@dataclass(frozen=True)
class Adapters:
    """Factors of updates `scale * a @ b`.

    Attributes:
      pairs: parameter path -> (a `[..., in, rank]`, b `[..., rank, out]`), float32, on the host or on devices.
      rank, alpha: `scale` is alpha / rank.
    """

    pairs: Mapping[str, tuple[Any, Any]]
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def can_be_adapted(path: str) -> bool:
    """Whether a parameter is a linear layer of the released model, or the linear layers of all experts."""
    return _LINEAR.fullmatch(path) is not None


def write_adapters(destination: Path, adapters: Adapters, leaves: Iterable[Leaf], base: str) -> None:
    """Writes a directory that PEFT reads.

    Args:
      leaves: of the model (`weight_map.plan`).
      base: directory or hub id of the model that the adapters belong to.

    Raises:
      CheckpointError: the destination exists.
    """
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for leaf in leaves:
        if leaf.path not in adapters.pairs:
            continue
        a, b = (half if leaf.transform.is_stacked else half[None] for half in adapters.pairs[leaf.path])
        for number, key in enumerate(leaf.keys):
            module = key.removesuffix(_WEIGHT)
            modules.append(module)
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a[number].T, np.float32)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b[number].T, np.float32)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # A pattern: PEFT compares a list with every module, one by one.
        "target_modules": "|".join(re.escape(module) for module in modules),
    }
    new = unfinished_directory(destination)
    (new / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
    (new / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    replace_directory(new, destination)


def read_adapters(source: str | Path, leaves: Iterable[Leaf]) -> Adapters:
    """Adapters that PEFT or `write_adapters` wrote for a model with these parameters.

    Raises:
      CheckpointError: a file is missing or damaged, or they are adapters of another model or of another kind.
    """
    directory = path_of(source)
    config = _read_config(directory / CONFIG_FILE)
    try:
        entries, damages = scan_file(directory / WEIGHTS_FILE)
    except OSError as error:
        entries, damages = {}, [str(error)]
    if damages:
        raise CheckpointError(f"{directory / WEIGHTS_FILE} cannot be read ({damages[0]}).")
    tensors = {name: entry.read() for name, entry in entries.items()}
    rank, pairs, problems = int(config["r"]), {}, []
    for leaf in leaves:
        modules = [f"{_PREFIX}{key.removesuffix(_WEIGHT)}" for key in leaf.keys]
        if not any(f"{module}.lora_A.weight" in tensors for module in modules) or not can_be_adapted(leaf.path):
            continue
        problems += [
            f"{module} has one of lora_A and lora_B"
            for module in modules
            if (f"{module}.lora_A.weight" in tensors) != (f"{module}.lora_B.weight" in tensors)
        ]
        halves = []
        for half, (rows, columns) in (("lora_A", (rank, leaf.shape[-2])), ("lora_B", (leaf.shape[-1], rank))):
            # An expert without an adapter stays as it is: zeros add nothing.
            names = [f"{module}.{half}.weight" for module in modules]
            found = [tensors.pop(name, np.zeros((rows, columns), np.float32)) for name in names]
            problems += [
                f"{name} has shape {list(tensor.shape)}, expected {[rows, columns]}"
                for name, tensor in zip(names, found, strict=True)
                if tensor.shape != (rows, columns)
            ]
            halves.append([tensor.astype(np.float32).T for tensor in found])
        if not problems:
            a, b = (np.stack(half) if leaf.transform.is_stacked else half[0] for half in halves)
            pairs[leaf.path] = (a, b)
    problems += [f"{name} belongs to nothing in the model" for name in tensors]
    if problems or not pairs:
        raise CheckpointError(listing(f"the adapters of {directory} do not fit the model", problems))
    return Adapters(pairs, rank, float(config["lora_alpha"]))


def merge(params: Mapping[str, Array], adapters: Adapters, in_place: bool = False) -> dict[str, Array]:
    """Flat parameters with the adapters' products added, each in its own dtype; sums are float32.

    Args:
      in_place: the memory of `params` is taken for the result, and they cannot be used any more.
    """
    add = _add_in_place if in_place else _add
    merged = dict(params)
    for path, (a, b) in adapters.pairs.items():
        merged[path] = add(merged[path], a, b * np.float32(adapters.scale))
    return merged


def _add_product(weight: Array, a: Array, b: Array) -> Array:
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (weight.astype(jnp.float32) + product).astype(weight.dtype)


_add, _add_in_place = jax.jit(_add_product), jax.jit(_add_product, donate_argnums=0)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        if config["peft_type"] != "LORA" or rank < 1 or alpha <= 0:
            raise ValueError(f"peft_type {config['peft_type']}, r {rank}, lora_alpha {alpha}")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist; give a directory that holds adapters in PEFT's layout."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} does not describe LoRA adapters ({error}).") from None
    for key, usual in (("use_dora", False), ("use_rslora", False), ("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(key, usual) != usual:
            raise CheckpointError(f"{path} has {key} = {config[key]!r}; only {usual!r} is supported.")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
        if config.get(key):
            raise CheckpointError(
                f"{path} has {key}, which is not supported: every adapter has the same rank and scale."
            )
    return config
