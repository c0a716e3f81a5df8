"""Adapters on disk, as PEFT lays them out: `adapter_config.json` and `adapter_model.safetensors`.

our path                             PEFT's tensors, one pair a released matrix
.../q_proj/kernel      a [in, r]     base_model.model.language.model.layers.0.self_attn.q_proj.lora_A.weight [r, in]
                       b [r, out]    ...lora_B.weight [out, r]
.../experts_up_proj    a [E, in, r]  ...experts.0.up_proj.lora_A.weight, ...experts.1..., one pair an expert
trained whole                        base_model.model.projector.layers.0.weight, named in `modules_to_save`

Tools write other prefixes, and the adapter's name inside of keys ("lora_A.default.weight").
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from convert.adapters import Adapters, can_be_adapted
from convert.checkpoint import listing, replace_directory, unfinished_directory
from convert.from_torch import is_computed
from convert.safetensors_files import WEIGHT_DTYPES, TensorEntry, scan_file
from convert.weight_map import UNUSED_POOLING, Leaf
from vl2_jax.errors import CheckpointError, VL2Warning, shown
from vl2_jax.files import is_file_on, is_folder_on, local_destination, path_of, why_not_whole

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_OTHER_WEIGHTS = "adapter_model.bin"
_PREFIX = "base_model.model."
_PREFIXES = re.compile(r"((base_model|model|module|_orig_mod)\.)+")
_WEIGHT = ".weight"
_HALF = re.compile(r"(.+)\.(lora_[AB])(?:\.([^.]+))?\.weight")
# What a key may be beside null; anything else is another computation than `scale * a @ b`.
_USUAL: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,), "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "layer_replication": ([],), "target_parameters": ([],), "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],), "bias": ("none", "all", "lora_only"),
}  # fmt: skip


@dataclass(frozen=True)
class _Scaling:
    """Rank and scale of every module, as `adapter_config.json` gives them."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]  # by patterns of modules
    alphas: Mapping[str, float]
    by_root: bool  # rank-stabilised: alpha / sqrt(rank)

    def of(self, module: str) -> tuple[int, float]:
        rank, alpha = _by_pattern(self.ranks, module, self.rank), _by_pattern(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.by_root else rank)


def write_adapters(destination: Path, adapters: Adapters, leaves: Iterable[Leaf], base: str) -> None:
    """Writes a directory that PEFT reads.

    Args:
      leaves: of the model (`weight_map.plan`).
      base: directory or hub id of the model that the adapters belong to.

    Raises:
      CheckpointError: the destination exists, or is not here.
    """
    destination = local_destination(destination, "adapters")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    saved: list[str] = []
    for leaf in leaves:
        if leaf.path in adapters.whole:
            for key, tensor in leaf.split(np.asarray(adapters.whole[leaf.path])).items():
                tensors[f"{_PREFIX}{key}"] = np.ascontiguousarray(tensor)
                module, _, last = key.rpartition(".")
                # PEFT knows modules alone: of a parameter that is in none of its own, only we read the tensor.
                saved += [module] if last in ("weight", "bias") and module not in saved else []
        if leaf.path not in adapters.pairs:
            continue
        a, b = (half if leaf.transform.is_stacked else half[None] for half in adapters.pairs[leaf.path])
        for number, key in enumerate(leaf.keys):
            module = key.removesuffix(_WEIGHT)
            ranks[module] = a.shape[-1]
            alphas[module] = float(f"{adapters.scales[leaf.path] * a.shape[-1]:.12g}")
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a[number].T, np.float32)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b[number].T, np.float32)
    ((rank, _),), ((alpha, _),) = Counter(ranks.values()).most_common(1), Counter(alphas.values()).most_common(1)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(module): other for module, other in ranks.items() if other != rank},
        "alpha_pattern": {re.escape(module): other for module, other in alphas.items() if other != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # A pattern: PEFT compares a list with every module, one by one.
        "target_modules": "|".join(re.escape(module) for module in ranks),
        "modules_to_save": saved or None,
    }
    new = unfinished_directory(destination)
    (new / WEIGHTS_FILE).write_bytes(save(tensors, {"format": "pt"}))
    (new / CONFIG_FILE).write_text(json.dumps(config, indent=2), encoding="utf-8")
    replace_directory(new, destination)


def read_adapters(source: str | Path, leaves: Iterable[Leaf], names: Iterable[str] = ()) -> Adapters:
    """Adapters that PEFT, a tool with it inside, or `write_adapters` wrote for a model with these parameters.

    Those of the pooling, which nothing executes, are passed over.

    Args:
      names: of the model, hub ids and directories; adapters that were made for another are a `VL2Warning`.

    Raises:
      CheckpointError: a file is missing or damaged, or they are adapters of another model or of another kind.
    """
    directory = path_of(source)
    base, scaling = _read_config(directory)
    halves, whole = _read_tensors(directory)
    pairs, scales, replaced, problems = {}, {}, {}, []
    for leaf in leaves:
        modules = [key.removesuffix(_WEIGHT) for key in leaf.keys]
        found = [{half: halves.pop((module, half), None) for half in ("lora_A", "lora_B")} for module in modules]
        given = {key: whole.pop(key) for key in leaf.keys if key in whole}
        if leaf.keys[0].startswith(UNUSED_POOLING):
            continue
        if any(half is not None for pair in found for half in pair.values()):
            if can_be_adapted(leaf.path):
                troubles, pair, scale = _pair_of(leaf, modules, found, scaling)
            else:
                troubles, pair, scale = [f"{modules[0]} is no linear layer and cannot have an adapter"], None, 1.0
            problems += troubles
            if pair is not None:
                pairs[leaf.path], scales[leaf.path] = pair, scale
        if given:
            troubles = _troubles_of_whole(leaf, given)
            problems += troubles
            if not troubles:
                tensors = [given[key].read() for key in leaf.keys]
                replaced[leaf.path] = leaf.assemble(tensors, tensors[0].dtype)
    problems += [f"{module}.{half} belongs to nothing in the model" for module, half in halves]
    problems += [f"{key} belongs to nothing in the model" for key in whole if not is_computed(key)]
    if problems or not (pairs or replaced):
        raise CheckpointError(listing(f"the adapters of {directory} do not fit the model", problems))
    if not _is_same_model(base, names):
        line = f"the adapters of {directory} were made for {shown(base)}, and this is {shown(next(iter(names)))}"
        warnings.warn(f"{line}; their shapes fit, their numbers may not", VL2Warning, stacklevel=3)
    return Adapters(pairs, scales, replaced, base)


def _is_same_model(base: str, names: Iterable[str]) -> bool:
    """Whether the name of a base may be one of a model's names.

    Only the last part counts, of a place in the hub's cache that of the id: models are moved on the way.
    """

    def last(name: str) -> str:
        parts = [part for part in re.split(r"[/\\]", name.lower()) if part]
        cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
        return (cached or parts or [""])[-1]

    known = {last(name) for name in names}
    return not known or not last(base) or last(base) in known


def _pair_of(
    leaf: Leaf, modules: list[str], found: list[dict[str, np.ndarray | None]], scaling: _Scaling
) -> tuple[list[str], tuple[np.ndarray, np.ndarray] | None, float]:
    """What is wrong, or the factors of a parameter and their scale.

    Experts may differ in rank and scale: lower ranks are filled with zeros, and so are experts without an adapter.
    """
    described = [scaling.of(module) for module in modules]
    present = [number for number, pair in enumerate(found) if any(half is not None for half in pair.values())]
    most, first = max(described[n][0] for n in present), described[present[0]][1]
    a = np.zeros((len(modules), leaf.shape[-2], most), np.float32)
    b = np.zeros((len(modules), most, leaf.shape[-1]), np.float32)
    problems = []
    for number in present:
        (rank, scale), left, right = described[number], found[number]["lora_A"], found[number]["lora_B"]
        if left is None or right is None:
            problems.append(f"{modules[number]} has one of lora_A and lora_B")
            continue
        for name, half, shape in (("A", left, (rank, leaf.shape[-2])), ("B", right, (leaf.shape[-1], rank))):
            if half.shape != shape:
                problems.append(f"{modules[number]}.lora_{name} has shape {list(half.shape)}, expected {list(shape)}")
        if not problems:
            a[number, :, :rank], b[number, :rank] = left.T, right.T
            if scale != first:
                b[number] *= scale / first
    if problems:
        return problems, None, first
    return [], (a, b) if leaf.transform.is_stacked else (a[0], b[0]), first


def _troubles_of_whole(leaf: Leaf, given: Mapping[str, TensorEntry]) -> list[str]:
    if len(given) != len(leaf.keys):
        return [f"{next(iter(given))} is there whole, and {len(leaf.keys) - len(given)} of its fellow experts are not"]
    shape = leaf.torch_shape
    return [
        f"{key} has shape {list(entry.shape)}, expected {list(shape)}"
        for key, entry in given.items()
        if entry.shape != shape
    ]


def _read_tensors(directory: Path) -> tuple[dict[tuple[str, str], np.ndarray], dict[str, TensorEntry]]:
    """Factors by module and half, in float32, and whole tensors by released key."""
    path = directory / WEIGHTS_FILE
    if not is_file_on(path):
        reason = f"{path} does not exist; give a directory that holds adapters in PEFT's layout."
        if is_file_on(directory / _OTHER_WEIGHTS):
            reason = (
                f"{directory} holds {_OTHER_WEIGHTS}, which is not read: PyTorch's own format can run any code. Load "
                "the adapters with PEFT and save them with save_pretrained(..., safe_serialization=True)."
            )
        raise CheckpointError(why_not_whole(path) or reason)
    entries, damages = scan_file(path)
    damages += [
        f"{name} has dtype {entry.dtype}, expected float32, bfloat16 or float16"
        for name, entry in entries.items()
        if entry.dtype not in WEIGHT_DTYPES
    ]
    if damages:
        raise CheckpointError(why_not_whole(path) or f"{path} cannot be read ({damages[0]}).")
    released = {_PREFIXES.sub("", name, count=1) if _PREFIXES.match(name) else name: e for name, e in entries.items()}
    matches = {key: _HALF.fullmatch(key) for key in released}
    names = {match[3] for match in matches.values() if match}
    if len(names) > 1:
        raise CheckpointError(
            f"{path} holds several adapters ({shown(sorted(map(str, names)))}); save the one that is meant."
        )
    name = re.escape(next(iter(names), None) or "default")
    wrapper = re.compile(rf"\.(modules_to_save(\.({name}|default)(?=\.))?|base_layer)(?=\.)")
    halves = {(m[1], m[2]): released[key].read().astype(np.float32) for key, m in matches.items() if m}
    others = {key: e for key, e in released.items() if matches[key] is None and ".original_module." not in key}
    return halves, {wrapper.sub("", key): entry for key, entry in others.items()}


def _read_config(directory: Path) -> tuple[str, _Scaling]:
    """The base's name, and how the factors are scaled."""
    path = directory / CONFIG_FILE
    if not is_file_on(path):
        held = (
            sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}")) if is_folder_on(directory) else []
        )
        hint = f"; there are some in {shown(held)}" if held else ""
        raise CheckpointError(
            why_not_whole(path)
            or f"{path} does not exist; give a directory that holds adapters in PEFT's layout{hint}."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("peft_type")
        if kind != "LORA":
            raise ValueError(f"peft_type is {shown(kind)}, expected 'LORA'")
        scaling = _Scaling(
            rank=_number(config, "r", 8, int),
            alpha=_number(config, "lora_alpha", 8, float),
            ranks=_numbers(config, "rank_pattern", int),
            alphas=_numbers(config, "alpha_pattern", float),
            by_root=bool(config.get("use_rslora")),
        )
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise CheckpointError(
            why_not_whole(path) or f"{path} does not describe LoRA adapters ({shown(str(error), 200)})."
        ) from None
    for key, usual in _USUAL.items():
        if config.get(key) is not None and config[key] not in usual:
            raise CheckpointError(f"{path} has {key} = {shown(config[key])}; only {usual[0]!r} is supported.")
    base = config.get("base_model_name_or_path")
    return base if isinstance(base, str) else "", scaling


def _number(values: Mapping[str, Any], key: str, default: float, kind: type) -> Any:
    """A number above 0; the default where there is none."""
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
        raise ValueError(f"{key} is {shown(value)}, expected a number above 0")
    if kind is int and value != int(value):
        raise ValueError(f"{key} is {shown(value)}, expected a whole number")
    return kind(value)


def _numbers(config: Mapping[str, Any], key: str, kind: type) -> dict[str, Any]:
    """Patterns of modules, as PEFT reads them, and what they give."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} is {shown(patterns)}, expected an object")
    for pattern in patterns:
        try:
            re.compile(_as_peft(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{key} has {shown(pattern)}, which is no pattern: {error}") from None
    return {pattern: _number(patterns, pattern, 0, kind) for pattern in patterns}


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that fits the end of a module's name, as PEFT chooses it."""
    return next((value for pattern, value in patterns.items() if re.match(_as_peft(pattern), module)), default)


def _as_peft(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
