"""Prefill, decoding, vision and training on a CPU against PyTorch, in one run: same weights, same inputs, float32.

    make peers                                  # once: installs PyTorch and transformers
    .venv/bin/python benchmarks/cpu.py [--rounds 5] [--threads 2] [--work training]

The peers are `transformers`' SiglipVisionModel and DeepseekV2ForCausalLM, the latter with its expert
implementations. A training step is a loss, its gradients and an AdamW update. The parties take turns round by round,
so that a machine that slows down slows both; what is printed is the best round of each and the ratio of the bests.
Shapes: see `SHAPE`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vl2_jax.config import VL2Config
    from vl2_jax.model.vl2 import Params

Party = Callable[[], float]

OURS = "vl2-jax"
_TOO_SLOW = 20.0  # seconds; such a party is not asked again
PROMPT, NEW_TOKENS, TILES = 1087, 32, 2
ROWS, ROW = 8, 256  # of a training step
WORK = {
    "prefill": (PROMPT, "tokens/s"),
    "decode": (NEW_TOKENS - 1, "tokens/s"),  # the first one comes with the prompt
    "vision": (TILES, "tiles/s"),
    "training": (ROWS * ROW, "tokens/s"),
}
SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408, "moe_intermediate_size": 352,
    "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "n_shared_experts": 2,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 128,
    "q_lora_rank": None, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "scoring_func": "softmax",
    "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0, "max_position_embeddings": 2048,
}  # fmt: skip
VISION = {"image_size": 384, "patch_size": 14, "width": 384, "layers": 6, "heads": 6, "mlp_ratio": 4}
EXPERT_LOOPS = ("eager", "grouped_mm")  # "batched_mm" copies every token's experts: 14 GB at this prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="measure the parties whose name holds this")
    parser.add_argument("--work", choices=WORK, help="measure this alone")
    options = parser.parse_args()
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: options.threads]))
    os.environ["JAX_PLATFORMS"] = "cpu"
    parties = {
        key: run
        for key, run in all_parties(options.threads).items()
        if options.only in key[1] and options.work in (None, key[0])
    }
    best: dict[tuple[str, str], float] = {}
    for round_ in range(options.rounds + 1):
        for key, run in list(parties.items()):
            seconds = run()
            if round_:  # the first one warms up
                best[key] = min(best.get(key, float("inf")), seconds)
            if round_ and seconds > _TOO_SLOW:
                print(f"{key[1]}: {key[0]} took {seconds:.0f} s; measured once")
                del parties[key]
    for work, (amount, unit) in WORK.items():
        rows = sorted((seconds, party) for (kind, party), seconds in best.items() if kind == work)
        if rows:
            print(f"\n{work}")
        for seconds, party in rows:
            ratio = f"   {OURS} is {seconds / best[work, OURS]:5.2f} x" if (work, OURS) in best else ""
            print(f"  {party:28} {amount / seconds:9.1f} {unit}{ratio}")


def benchmark_config() -> VL2Config:
    from vl2_jax.config import VL2Config

    config = VL2Config.preset("vl2-nano")
    return config.replace(
        language_config=config.language_config.replace(**SHAPE),
        vision_config=config.vision_config.replace(**VISION),
        projector_config=config.projector_config.replace(input_dim=VISION["width"], n_embed=SHAPE["hidden_size"]),
    )


def all_parties(threads: int) -> dict[tuple[str, str], Party]:
    """(work, name) -> a function that does the work once and returns its seconds."""
    import jax

    from vl2_jax.model.vl2 import init_params

    config = benchmark_config()
    params = init_params(config, jax.random.key(0))
    return our_parties(config, params) | torch_parties(config, params, threads)


def our_parties(config: VL2Config, params: Params) -> dict[tuple[str, str], Party]:
    import tempfile

    import jax
    import jax.numpy as jnp
    import numpy as np

    from convert.random_checkpoint import create
    from vl2_jax.api import VL2
    from vl2_jax.inference.options import SamplingOptions
    from vl2_jax.inference.prefill import encode_tiles
    from vl2_jax.processing.batch import TEXT, Encoded, Processor

    with tempfile.TemporaryDirectory() as folder:
        create("vl2-nano", Path(folder) / "nano")  # for its tokenizer
        processor = Processor.from_directory(Path(folder) / "nano")
    generator = VL2(config, params, processor, jnp.float32).generator
    ids = (np.arange(PROMPT) * 7 % SHAPE["vocab_size"]).astype(np.int32)
    size = VISION["image_size"]
    no_tiles = np.zeros((0, size, size, 3), np.uint8)
    prompt = Encoded(ids, ids, np.full_like(ids, TEXT), no_tiles, np.zeros((0, 2), np.int32), (), 196, "")
    tiles = np.random.default_rng(0).integers(0, 256, (TILES, size, size, 3), np.uint8)
    answer = partial(generator.generate, [prompt], SamplingOptions(max_tokens=NEW_TOKENS, ignore_eos=True))

    def prefill() -> float:
        return answer()[0][0].timings.prefill_seconds

    def decode() -> float:
        return answer()[0][0].timings.decode_seconds

    def vision() -> float:
        return seconds_of(lambda: jax.block_until_ready(encode_tiles(generator.model, params, tiles)))

    training = our_training(config, params)
    return {
        ("prefill", OURS): prefill,
        ("decode", OURS): decode,
        ("vision", OURS): vision,
        ("training", OURS): training,
    }


def our_training(config: VL2Config, params: Params) -> Party:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vl2_jax.model.vl2 import VL2Model
    from vl2_jax.processing.batch import TEXT
    from vl2_jax.training.packing import PackedBatch
    from vl2_jax.training.recipe import ObjectiveRecipe, OptimizerRecipe, Recipe
    from vl2_jax.training.step import init_state, make_step

    optimizer = OptimizerRecipe(learning_rate=1e-5, frozen=("vision/*", "projector/*"))
    objective = ObjectiveRecipe(balance_loss=0.0, loss_chunk=ROWS * ROW)  # all logits at once, as the peers
    recipe = Recipe(objective=objective, optimizer=optimizer)
    ids = training_ids()[None]
    ones, places = np.ones_like(ids), np.broadcast_to(np.arange(ROW, dtype=np.int32), ids.shape)
    no_tiles = np.zeros((1, 0, VISION["image_size"], VISION["image_size"], 3), np.uint8)
    batch = PackedBatch(ids, ids, ones, places, np.full_like(ids, TEXT), no_tiles)
    update = make_step(VL2Model(config, jnp.float32, jnp.float32), recipe)
    state: list[Any] = []

    def step() -> float:
        if not state:  # here, so that nothing is held for a party that is not asked
            state.append(init_state(recipe, jax.tree.map(jnp.copy, params)))

        def once() -> None:
            state[0], metrics = update(state[0], batch, np.float32(optimizer.learning_rate))
            jax.block_until_ready((state[0], metrics))

        return seconds_of(once)

    return step


def training_ids() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (ROWS, ROW), np.int32)


def torch_parties(config: VL2Config, params: Params, threads: int) -> dict[tuple[str, str], Party]:
    import torch

    from tests.peers.transformers_models import decoder, released_tensors, vision_tower

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    tensors = released_tensors(config, params)
    tower, pixels = vision_tower(config, tensors), torch.rand(TILES, 3, VISION["image_size"], VISION["image_size"])
    ids = torch.arange(PROMPT)[None] * 7 % SHAPE["vocab_size"]
    rows = torch.from_numpy(training_ids()).long()
    parties: dict[tuple[str, str], Party] = {("vision", "SiglipVisionModel"): lambda: seconds_of(lambda: tower(pixels))}

    def prefill(model: Any) -> float:
        return seconds_of(lambda: model(ids, use_cache=True, logits_to_keep=1))

    def decode(model: Any) -> float:
        out = model(ids, use_cache=True, logits_to_keep=1)

        def steps() -> None:
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
            for _ in range(NEW_TOKENS - 1):
                token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

        return seconds_of(steps)

    def training(model: Any, optimizers: list[Any]) -> float:
        if not optimizers:
            optimizers.append(torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True))

        def once() -> None:
            model(rows, labels=rows).loss.backward()
            optimizers[0].step()
            optimizers[0].zero_grad()

        with torch.enable_grad():
            return seconds_of(once)

    for experts in EXPERT_LOOPS:
        model = decoder(config.language_config, tensors, experts_implementation=experts, attn_implementation="sdpa")
        name = f"transformers, {experts}"
        try:
            model(ids[:, :64])
        except Exception as error:
            print(f"{name} cannot run here: {str(error).splitlines()[0]:.100}")
            continue
        parties["prefill", name], parties["decode", name] = partial(prefill, model), partial(decode, model)
        parties["training", name] = partial(training, model, [])
    return parties


def seconds_of(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the peers of the tests
    main()
