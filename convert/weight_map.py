"""Which released tensor is which parameter: one table, used in both directions (SPEC 7).

A rule names a released key and a parameter, with `{layer}` and `{expert}` where a number stands, and how an array
changes on the way. `plan` matches the table against the abstract parameters of a configuration, so that shapes, key
lists, conversion and export all follow from the same lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from vl2_jax.config import VL2Config
from vl2_jax.model.vl2 import abstract_params


class Transform(NamedTuple):
    """How a released array becomes (one slice of) a parameter, and back; and the released shape it implies."""

    name: str
    to_leaf: Any
    to_torch: Any
    torch_shape: Any
    is_stacked: bool = False


SAME = Transform("same", lambda a: a, lambda a: a, lambda s: s)
ONE_ROW = Transform("one row", lambda a: a[0], lambda a: a[None], lambda s: (1, *s))
LINEAR = Transform("linear", lambda a: a.T, lambda a: a.T, lambda s: s[::-1])
EXPERTS = Transform("experts", lambda a: a.T, lambda a: a.T, lambda s: s[:0:-1], is_stacked=True)
PATCHES = Transform(
    "patches",
    lambda a: rearrange(a, "o i h w -> h w i o"),
    lambda a: rearrange(a, "h w i o -> o i h w"),
    lambda s: (s[3], s[2], s[0], s[1]),
)

_LAYER = "language.model.layers.{layer}"
_OUR_LAYER = "language/layers_{layer}"
_BLOCK, _OUR_BLOCK = "vision.blocks.{layer}", "vision/blocks_{layer}"
UNUSED_POOLING = "vision.attn_pool."  # in the released checkpoints, executed by nothing (SPEC 2.3)
_POOL, _OUR_POOL = "vision.attn_pool", "vision/attn_pool"


def _linear(torch: str, leaf: str) -> list[tuple[str, str, Transform]]:
    return [(f"{torch}.weight", f"{leaf}/kernel", LINEAR), (f"{torch}.bias", f"{leaf}/bias", SAME)]


def _norm(torch: str, leaf: str) -> list[tuple[str, str, Transform]]:
    return [(f"{torch}.weight", f"{leaf}/scale", SAME), (f"{torch}.bias", f"{leaf}/bias", SAME)]


TABLE: list[tuple[str, str, Transform]] = [
    ("image_newline", "image_newline", SAME),
    ("view_seperator", "view_separator", SAME),  # the released spelling
    # Vision tower
    ("vision.pos_embed", "vision/pos_embed", ONE_ROW),
    ("vision.patch_embed.proj.weight", "vision/patch_embed/kernel", PATCHES),
    ("vision.patch_embed.proj.bias", "vision/patch_embed/bias", SAME),
    *_norm(f"{_BLOCK}.norm1", f"{_OUR_BLOCK}/norm1"),
    *_linear(f"{_BLOCK}.attn.qkv", f"{_OUR_BLOCK}/qkv"),
    *_linear(f"{_BLOCK}.attn.proj", f"{_OUR_BLOCK}/proj"),
    *_norm(f"{_BLOCK}.norm2", f"{_OUR_BLOCK}/norm2"),
    *_linear(f"{_BLOCK}.mlp.fc1", f"{_OUR_BLOCK}/fc1"),
    *_linear(f"{_BLOCK}.mlp.fc2", f"{_OUR_BLOCK}/fc2"),
    *_norm("vision.norm", "vision/norm"),
    (f"{_POOL}.latent", f"{_OUR_POOL}/latent", ONE_ROW),
    *_linear(f"{_POOL}.q", f"{_OUR_POOL}/q"),
    *_linear(f"{_POOL}.kv", f"{_OUR_POOL}/kv"),
    *_linear(f"{_POOL}.proj", f"{_OUR_POOL}/proj"),
    *_norm(f"{_POOL}.norm", f"{_OUR_POOL}/norm"),
    *_linear(f"{_POOL}.mlp.fc1", f"{_OUR_POOL}/fc1"),
    *_linear(f"{_POOL}.mlp.fc2", f"{_OUR_POOL}/fc2"),
    # Projector; {layer} counts activations too
    *_linear("projector.layers.{layer}", "projector/layers_{layer}"),
    *_linear("projector.layers", "projector/layers"),
    *_linear("projector.token_pooling_layer", "projector/token_pooling_layer"),
    # Decoder
    ("language.model.embed_tokens.weight", "language/embed_tokens", SAME),
    (f"{_LAYER}.input_layernorm.weight", f"{_OUR_LAYER}/input_layernorm/scale", SAME),
    (f"{_LAYER}.post_attention_layernorm.weight", f"{_OUR_LAYER}/post_attention_layernorm/scale", SAME),
    *(
        (f"{_LAYER}.self_attn.{name}.weight", f"{_OUR_LAYER}/self_attn/{name}/kernel", LINEAR)
        for name in ("q_proj", "k_proj", "v_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    ),
    (f"{_LAYER}.self_attn.kv_b_proj.weight", f"{_OUR_LAYER}/self_attn/kv_b_proj", LINEAR),
    (f"{_LAYER}.self_attn.q_a_layernorm.weight", f"{_OUR_LAYER}/self_attn/q_a_layernorm/scale", SAME),
    (f"{_LAYER}.self_attn.kv_a_layernorm.weight", f"{_OUR_LAYER}/self_attn/kv_a_layernorm/scale", SAME),
    *(
        (f"{_LAYER}.mlp.{part}{name}.weight", f"{_OUR_LAYER}/mlp/{our_part}{name}/kernel", LINEAR)
        for part, our_part in (("", ""), ("shared_experts.", "shared_experts/"))
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    *(
        (f"{_LAYER}.mlp.experts.{{expert}}.{name}.weight", f"{_OUR_LAYER}/mlp/experts_{name}", EXPERTS)
        for name in ("gate_proj", "up_proj", "down_proj")
    ),
    (f"{_LAYER}.mlp.gate.weight", f"{_OUR_LAYER}/mlp/gate/kernel", LINEAR),
    (f"{_LAYER}.mlp.gate.e_score_correction_bias", f"{_OUR_LAYER}/mlp/gate/correction_bias", SAME),
    ("language.model.norm.weight", "language/norm/scale", SAME),
    ("language.lm_head.weight", "language/lm_head/kernel", LINEAR),
]


@dataclass(frozen=True)
class Leaf:
    """One parameter and the released tensors it is made of: one, or one an expert."""

    path: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    transform: Transform

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of every one of `keys`."""
        return tuple(self.transform.torch_shape(self.shape))

    def assemble(self, tensors: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
        """The parameter from its released tensors, in C order."""
        if not self.transform.is_stacked:
            return np.ascontiguousarray(self.transform.to_leaf(tensors[0]).astype(dtype, copy=False))
        out = np.empty(self.shape, dtype)
        for slot, tensor in zip(out, tensors, strict=True):
            slot[...] = self.transform.to_leaf(tensor)
        return out

    def split(self, array: np.ndarray) -> dict[str, np.ndarray]:
        """The released tensors of the parameter."""
        slices = array if self.transform.is_stacked else [array]
        return {key: self.transform.to_torch(piece) for key, piece in zip(self.keys, slices, strict=True)}


def plan(config: VL2Config) -> list[Leaf]:
    """Every parameter of a configuration in a fixed order, layer by layer."""
    rules = [(_pattern(leaf), torch, transform) for torch, leaf, transform in TABLE]
    leaves = []
    for path, shape in flatten(abstract_params(config)).items():
        for pattern, torch, transform in rules:
            match = pattern.fullmatch(path)
            if match:
                numbers = match.groupdict()
                experts = range(shape.shape[0]) if transform.is_stacked else [0]
                keys = tuple(torch.format(**numbers, expert=expert) for expert in experts)
                leaves.append(Leaf(path, tuple(shape.shape), keys, transform))
                break
        else:
            raise AssertionError(f"the weight table has no rule for parameter {path!r}")
    return leaves


def _pattern(leaf: str) -> re.Pattern[str]:
    return re.compile(leaf.replace("{layer}", r"(?P<layer>\d+)"))


def torch_shapes(leaves: list[Leaf]) -> dict[str, tuple[int, ...]]:
    """Released key -> shape, of a whole checkpoint."""
    return {key: leaf.torch_shape for leaf in leaves for key in leaf.keys}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one with paths joined by "/"."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
