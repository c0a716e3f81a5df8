"""The real engine of vLLM on a CPU, with this package's plug-in installed: `make vllm`.

A CPU has no path in its JAX backend, so a second plug-in takes away what only TPUs have (`on_cpu/vl2_on_cpu.py`), and
attention is `vl2_jax.serving.vllm.reference`. All else is vLLM's: scheduler, cache, prefix cache, sampler, server.
"""

import os
import random
import sys
from pathlib import Path

import pytest

ON_CPU = Path(__file__).with_name("on_cpu")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "NEW_MODEL_DESIGN": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "SKIP_JAX_PRECOMPILE": "1",  # a bucket of tokens compiles where it is needed
    # Arrays of a CPU may be NumPy's own memory, which vLLM fills for the next step while this one still computes.
    "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false",
}
os.environ.update(ENVIRONMENT)
sys.path.insert(0, str(ON_CPU))
GOLDENS = Path(__file__).parents[1] / "goldens"
PICTURES = ("square.png", "wide.png", "tall.png")
WORDS = ("where", "red", "shape", "beside", "<|User|>", "\\<image>")


def options_on_cpu(devices=1):
    """What vLLM's engine is told where its devices are those of a CPU."""
    strategy = {"enable_dp_attention": True, "attn_dp_size": devices}
    return {
        "tokenizer_mode": "vl2",
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "block_size": 32,
        "num_gpu_blocks_override": 256,
        "disable_chunked_mm_input": True,
        "enforce_eager": True,
        "async_scheduling": False,  # see JAX_CPU_ENABLE_ASYNC_DISPATCH
        "limit_mm_per_prompt": {"image": 4},
        "tensor_parallel_size": devices,
        "additional_config": {"sharding": {"sharding_strategy": strategy}},
    }


@pytest.fixture(scope="module")
def make_engine():
    """`make_engine(model)` is vLLM's engine in this process; there is one at a time."""
    from vllm import LLM

    running = []

    def make(model, devices=1, **options):
        while running:
            running.pop().llm_engine.engine_core.shutdown()
        running.append(LLM(str(model), **options_on_cpu(devices) | options))
        return running[0]

    yield make
    while running:
        running.pop().llm_engine.engine_core.shutdown()


def conversation(number):
    """Messages of 10 to 350 tokens with 0 to 3 pictures and one or two questions; many begin alike."""
    chosen = random.Random(number)
    pictures = [str(GOLDENS / "images" / name) for name in sorted(PICTURES)[: number % 4]]
    words = " ".join(chosen.choices(WORDS, k=1 + number * 7 % 30))
    first = {"role": "user", "content": "<image>\n" * len(pictures) + "Look at this. " * 9 + words, "images": pictures}
    if number % 3:
        return [first]
    return [first, {"role": "assistant", "content": "It is there."}, {"role": "user", "content": words}]
