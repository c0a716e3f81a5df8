"""Models of `transformers` that hold this project's parameters: peers for tests and benchmarks, never a dependency.

Where they differ from DeepSeek-VL2 (SPEC 5.6) and so cannot be peers:
  DeepSeek-V2 has no sigmoid router, and ignores `norm_topk_prob`;
  DeepSeek-V3 has only the sigmoid router, and fills groups that were not chosen with minus infinity instead of zero,
  which changes the choice where a biased score is negative;
  neither has multi-head attention, nor `moe_layer_freq`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from convert.weight_map import flatten, plan
from vl2_jax.config import LanguageConfig, VL2Config
from vl2_jax.model.vl2 import Params


def released_tensors(config: VL2Config, params: Params) -> dict[str, torch.Tensor]:
    """Every parameter under its released name."""
    flat = flatten(params)
    arrays = {key: a for leaf in plan(config) for key, a in leaf.split(np.asarray(flat[leaf.path])).items()}
    return {key: torch.from_numpy(np.array(a, np.float32)) for key, a in arrays.items()}


def vision_tower(config: VL2Config, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """`SiglipVisionModel`: NCHW pixels to `.last_hidden_state`, `[tiles, patches, width]`."""
    vision = config.vision_config
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            vision_use_head=False,
        )
    )
    state: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith("vision.") or "attn_pool" in key:
            continue
        name = key.removeprefix("vision.")
        for released, theirs in (
            ("pos_embed", "embeddings.position_embedding.weight"),
            ("patch_embed.proj", "embeddings.patch_embedding"),
            ("blocks.", "encoder.layers."),
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attn.proj", "self_attn.out_proj"),
        ):
            name = name.replace(released, theirs)
        name = "post_layernorm." + name.removeprefix("norm.") if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, piece in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3)):
                state[name.replace("attn.qkv", f"self_attn.{part}")] = piece.contiguous()
        else:
            state[name] = tensor[0] if "position_embedding" in name else tensor
    return _filled(model, state)


def decoder(config: LanguageConfig, tensors: dict[str, torch.Tensor], **options: Any) -> torch.nn.Module:
    """`DeepseekV2ForCausalLM` or, for the sigmoid router, `DeepseekV3ForCausalLM`.

    Args:
      options: of the configuration class, such as `experts_implementation`.
    """
    is_v3 = config.scoring_func == "sigmoid"
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling is not None:
        rope |= {name: value for name, value in vars(scaling).items() if name != "type"} | {"rope_type": scaling.type}
    shared = {
        name: getattr(config, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "n_shared_experts", "n_routed_experts", "n_group"),
            *("topk_group", "num_experts_per_tok", "first_k_dense_replace", "norm_topk_prob", "rms_norm_eps"),
            *("routed_scaling_factor", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"),
            *("v_head_dim", "max_position_embeddings"),
        )
    }
    options = {"attn_implementation": "eager", "rope_parameters": rope, **shared, **options}
    model: torch.nn.Module
    if is_v3:
        options["num_mtp_layers"] = 0
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**options))
    else:
        options["topk_method"] = config.topk_method
        model = transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**options))
    state = {k.removeprefix("language."): t for k, t in tensors.items() if k.startswith("language.")}
    for layer in range(config.num_hidden_layers):
        if not config.is_moe_layer(layer):
            continue
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([state.pop(f"{experts}.{e}.{name}.weight") for e in range(config.n_routed_experts or 0)])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        state[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
        state[f"{experts}.down_proj"] = down
    return _filled(model, state)


def _filled(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    model.load_state_dict(state, strict=True)
    return model.eval()
