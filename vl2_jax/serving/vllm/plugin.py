"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

from __future__ import annotations

from vl2_jax.serving.vllm.settings import MODE

ARCHITECTURE = "DeepseekVLV2ForCausalLM"  # in place of vLLM's own class, which its JAX backend does not support


def register() -> None:
    """Makes the model, its prompts and its pictures known to vLLM; a second call changes nothing."""
    from vl2_jax.serving.vllm import pictures, theirs
    from vl2_jax.serving.vllm.model import DeepseekVL2

    if MODE in theirs.TokenizerRegistry.tokenizers:
        return
    package = __name__.rpartition(".")[0]
    theirs.TokenizerRegistry.register(MODE, f"{package}.tokens", "VL2Tokenizer")
    theirs.RENDERER_REGISTRY.register(MODE, f"{package}.prompts", "VL2Renderer")
    registered = theirs.MULTIMODAL_REGISTRY.register_processor(
        pictures.Pictures, info=pictures.PictureInfo, dummy_inputs=pictures.LargestPictures
    )
    theirs.register_model(ARCHITECTURE, registered(DeepseekVL2))
