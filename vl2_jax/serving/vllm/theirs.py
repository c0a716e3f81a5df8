"""All that is taken from vLLM and from its JAX backend, `tpu-inference`. No other file imports them."""

from torch import from_numpy
from tpu_inference.layers.common.attention_interface import attention as attend_to_heads
from tpu_inference.layers.common.attention_interface import mla_attention as attend_to_latents
from tpu_inference.layers.common.sharding import ShardingAxisName
from tpu_inference.models.common.model_loader import register_model
from transformers import BatchFeature, TokenizersBackend
from vllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.renderers import BaseRenderer
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

__all__ = [
    "MULTIMODAL_REGISTRY",
    "RENDERER_REGISTRY",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "BaseDummyInputsBuilder",
    "BaseMultiModalProcessor",
    "BaseProcessingInfo",
    "BaseRenderer",
    "BatchFeature",
    "MultiModalFieldConfig",
    "PromptReplacement",
    "SamplingParams",
    "ShardingAxisName",
    "TokenizerRegistry",
    "TokenizersBackend",
    "VLLMClientError",
    "attend_to_heads",
    "attend_to_latents",
    "from_numpy",
    "register_model",
]
