"""`vl2 info`: what a model is, from its configuration alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from vl2_jax.cli.flags import ModelName
from vl2_jax.cli.terminal import print_json


def info(model: ModelName, json: bool = False) -> None:
    """What a model is: parameters, memory, cache.

    Example: vl2 info vl2-small

    Args:
        model: A model's directory, a hub id, or the name of a size: vl2-tiny, vl2-small, vl2-base.
        json: Print one object.
    """
    facts = describe(config_of(model))
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):32} {value:,}" if isinstance(value, int) else f"{name:32} {value}")


def config_of(model: str) -> Any:
    """The configuration of a size, a directory or a hub id."""
    from vl2_jax.config import VL2Config, preset_names, read_config

    if model in preset_names():
        return VL2Config.preset(model)
    from vl2_jax.api import find_model

    return read_config(find_model(model))


def describe(config: Any) -> dict[str, Any]:
    """Counts and sizes of a configuration, from shapes alone."""
    from convert.quantise import bytes_of
    from convert.weight_map import plan
    from vl2_jax.config import WEIGHT_KINDS
    from vl2_jax.model.decoder import page_bytes
    from vl2_jax.ops.paging.pages import PAGE

    language = config.language_config
    leaves = plan(config)
    count = {leaf.path: int(np.prod(leaf.shape)) for leaf in leaves}
    total = sum(count.values())
    pooling = sum(n for path, n in count.items() if path.startswith("vision/attn_pool/"))
    idle = 0
    if language.n_routed_experts:
        routed = sum(n for path, n in count.items() if "/experts_" in path)
        idle = routed * (language.n_routed_experts - language.num_experts_per_tok) // language.n_routed_experts
    return {
        "parameters": total,
        "parameters_without_unused_pooling": total - pooling,
        "parameters_active_per_token": total - pooling - idle - count["language/embed_tokens"],
        "memory_bytes_bfloat16": 2 * total,
        "memory_bytes_float32": 4 * total,
        **{f"memory_bytes_{kind}": bytes_of(leaves, kind) for kind in WEIGHT_KINDS},
        "cache_bytes_per_token_bfloat16": page_bytes(language, "bfloat16") // PAGE,
        "cache_bytes_per_token_int8": page_bytes(language, "bfloat16", "int8") // PAGE,
        "context_tokens": language.max_position_embeddings,
        "visual_tokens_per_tile": config.tokens_per_tile,
        "attention": "latent (MLA)" if language.use_mla else "multi-head",
        "router": f"{language.scoring_func}, {language.topk_method}",
    }
