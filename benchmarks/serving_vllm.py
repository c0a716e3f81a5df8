"""The engine of `vl2 serve` against vLLM's engine with the plug-in, on a CPU, in one run: vl2-nano in float32.

    make vllm                                                   # once: its environment, 10 GB
    .venv-vllm/bin/python benchmarks/serving_vllm.py [--requests 32] [--tokens 64] [--concurrency 16] [--rounds 3]

Every request has a picture and a question of its own; prefix caches are off. The engines take turns, and what is
printed is the best round of each. vLLM runs as `make vllm` runs it: on a CPU there are no kernels of its own for
attention, so both engines attend in plain XLA, and the ratio is one of engines and not of TPUs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import tests.vllm.conftest  # noqa: F401 - what a CPU needs, before vLLM is imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    runs = {"vl2 serve": ours(options), "vLLM": theirs(options)}
    answers = {name: run() for name, run in runs.items()}  # compiles
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"{options.requests} requests, {same} with the same tokens from both")
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(options.rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - begun)
    for name, seconds in best.items():
        print(f"{name:12} {seconds:7.1f} s  {options.requests * options.tokens / seconds:8.1f} tokens/s")
    print(f"ratio {best['vLLM'] / best['vl2 serve']:.2f}")


def questions(count: int) -> list[list[dict]]:
    from PIL import Image

    def asked(number: int) -> list[dict]:
        pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((112, 112))
        return [{"role": "user", "content": f"<image>\nWhat stands at place {number}?", "images": [picture]}]

    return [asked(number) for number in range(count)]


def ours(options: argparse.Namespace) -> Callable[[], list[list[int]]]:
    import vl2_jax
    from benchmarks.serving import together
    from vl2_jax.api import open_answer
    from vl2_jax.inference.options import SamplingOptions
    from vl2_jax.serving.engine import Engine
    from vl2_jax.serving.requests import Limits

    vl2 = vl2_jax.load("vl2-nano", dtype="float32")
    engine = Engine(vl2, Limits(max_running=options.concurrency, prefix_cache=False)).__enter__()
    prompts = [vl2.processor.encode(open_answer(asked)) for asked in questions(options.requests)]
    sampling = SamplingOptions(max_tokens=options.tokens, ignore_eos=True)

    def run() -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        together(engine, prompts, sampling, options.concurrency, answers)
        return [answers[number] for number in range(len(prompts))]

    return run


def theirs(options: argparse.Namespace) -> Callable[[], list[list[int]]]:
    from vllm import LLM, SamplingParams

    import vl2_jax
    from tests.vllm.conftest import options_on_cpu
    from tests.vllm.test_engine import prompt_of
    from vl2_jax.api import find_model

    vl2 = vl2_jax.load("vl2-nano", dtype="float32")
    more = {"max_num_seqs": options.concurrency, "enable_prefix_caching": False}
    engine = LLM(str(find_model("vl2-nano")), **options_on_cpu() | more)
    prompts = [prompt_of(vl2, asked) for asked in questions(options.requests)]
    sampling = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)

    def run() -> list[list[int]]:
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


if __name__ == "__main__":
    main()
