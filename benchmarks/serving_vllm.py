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
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.vllm.conftest import options_on_cpu  # isort: skip - it sets what JAX and vLLM read when they are imported

import vl2_jax
from benchmarks.serving import question, together
from vl2_jax.api import SHIPPED, VL2, find_model
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.serving.engine import Engine
from vl2_jax.serving.requests import Limits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    vl2 = vl2_jax.load(SHIPPED, dtype="float32")
    asked = [question(number, side=112) for number in range(options.requests)]
    with Engine(vl2, Limits(max_running=options.concurrency, prefix_cache=False)) as engine:
        runs = {"vl2 serve": ours(vl2, engine, asked, options), "vLLM": theirs(vl2, asked, options)}
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


def ours(vl2: VL2, engine: Engine, asked: list[Any], options: argparse.Namespace) -> Callable[[], list[list[int]]]:
    prompts = [vl2.processor.encode(messages) for messages in asked]
    sampling = SamplingOptions(max_tokens=options.tokens, ignore_eos=True)

    def run() -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        together(engine, prompts, sampling, options.concurrency, answers)
        return [answers[number] for number in range(len(prompts))]

    return run


def theirs(vl2: VL2, asked: list[Any], options: argparse.Namespace) -> Callable[[], list[list[int]]]:
    from vllm import LLM, SamplingParams

    from tests.vllm.test_engine import prompt_of

    more = {"max_num_seqs": options.concurrency, "enable_prefix_caching": False}
    engine = LLM(str(find_model(SHIPPED)), **options_on_cpu() | more)
    prompts = [prompt_of(vl2, messages) for messages in asked]
    sampling = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)

    def run() -> list[list[int]]:
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run


if __name__ == "__main__":
    main()
