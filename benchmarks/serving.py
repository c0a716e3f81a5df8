"""Many requests with pictures on a CPU: together through the engine of `vl2 serve`, against one after another.

    .venv/bin/python benchmarks/serving.py [--requests 32] [--tokens 64] [--concurrency 1 4 16]

The model is that of `benchmarks/cpu.py`, float32 with random weights; every request has a picture and a question of its
own. So many callers as `--concurrency` says ask again as soon as they have their answer. The peer, `VL2.generate`,
answers the same requests one by one, in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cpu import benchmark_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.threads]))
    os.environ["JAX_PLATFORMS"] = "cpu"
    from vl2_jax.inference.options import SamplingOptions
    from vl2_jax.serving.engine import Engine
    from vl2_jax.serving.requests import Limits

    vl2 = build()
    sampling = SamplingOptions(max_tokens=options.tokens, ignore_eos=True)
    prompts = [vl2.processor.encode(question(number)) for number in range(options.requests)]
    tokens = options.requests * options.tokens
    print(f"{options.requests} requests, prompts of {np.mean([len(p) for p in prompts]):.0f} tokens on average")
    print(f"{'':24}   seconds   tokens/s   first token      between tokens")
    print(f"{'':24}                        median, worst    median, worst")

    one_by_one(vl2, prompts[:2], sampling)  # compiles
    begun = time.perf_counter()
    timed = one_by_one(vl2, prompts, sampling)
    alone = time.perf_counter() - begun
    print(row("one after another", alone, tokens, *timed))
    for concurrency in options.concurrency:
        limits = Limits(max_running=concurrency, prefix_cache=False)
        with Engine(vl2, limits) as engine:
            begun = time.perf_counter()
            timed = together(engine, prompts, sampling, concurrency)
            seconds = time.perf_counter() - begun
        print(row(f"engine, {concurrency} at once", seconds, tokens, *timed) + f"   {alone / seconds:.2f} x")


def build() -> Any:
    import jax
    import jax.numpy as jnp

    from convert.random_checkpoint import create
    from vl2_jax.api import VL2
    from vl2_jax.config import VL2Config
    from vl2_jax.model.vl2 import init_params
    from vl2_jax.processing.batch import Processor

    config = benchmark_config().replace(candidate_resolutions=VL2Config.preset("vl2-tiny").candidate_resolutions)
    with tempfile.TemporaryDirectory() as folder:
        create("vl2-nano", Path(folder) / "nano")  # for its tokenizer
        processor = Processor.from_directory(Path(folder) / "nano")
    sizes = dataclasses.replace(processor.config, candidate_resolutions=config.candidate_resolutions)
    return VL2(config, init_params(config, jax.random.key(0)), processor.replace(config=sizes), jnp.float32)


def question(number: int, side: int = 384) -> list[dict[str, Any]]:
    """A conversation with a picture of its own, `side` pixels wide and high."""
    from PIL import Image

    from vl2_jax.api import open_answer

    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((side, side))
    message = {"role": "user", "content": f"<image>\nWhat stands at place {number}?", "images": [picture]}
    return open_answer([message])


def one_by_one(vl2: Any, prompts: list[Any], sampling: Any) -> tuple[list[float], list[float]]:
    first, between = [], []
    for prompt in prompts:
        timings = vl2.generator.generate([prompt], sampling)[0][0].timings
        first.append(timings.vision_seconds + timings.prefill_seconds)
        between.append(timings.decode_seconds / (sampling.max_tokens - 1))
    return first, between


def together(
    engine: Any, prompts: list[Any], sampling: Any, callers: int, answers: dict[int, list[int]] | None = None
) -> tuple[list[float], list[float]]:
    """Seconds to the first token and between tokens of each; ids of prompt number i go to `answers[i]`."""
    from vl2_jax.serving.requests import Failed, Finished, Request, Started

    first: list[float] = []
    between: list[float] = []
    waiting = iter(enumerate(prompts))
    lock = threading.Lock()

    def call() -> None:
        while True:
            with lock:
                number, prompt = next(waiting, (0, None))
            if prompt is None:
                return
            ended, began, started = threading.Event(), time.perf_counter(), [0.0]

            def listen(event: Any, number: int = number, ended: Any = ended, started: Any = started) -> None:
                if isinstance(event, Started):
                    started[0] = time.perf_counter()
                if isinstance(event, Failed):
                    raise SystemExit(str(event.error))
                if isinstance(event, Finished):
                    if answers is not None:
                        answers[number] = event.answer.token_ids
                    ended.set()

            engine.submit(Request(prompt, sampling), listen)
            ended.wait()
            first.append(started[0] - began)
            between.append((time.perf_counter() - started[0]) / (sampling.max_tokens - 1))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return first, between


def row(name: str, seconds: float, tokens: int, first: list[float], between: list[float]) -> str:
    waits = f"{np.median(first):6.2f} {max(first):6.2f} s"
    paces = f"{np.median(between) * 1e3:5.0f} {max(between) * 1e3:5.0f} ms"
    return f"{name:24} {seconds:9.1f} {tokens / seconds:10.1f}  {waits}    {paces}"


if __name__ == "__main__":
    main()
