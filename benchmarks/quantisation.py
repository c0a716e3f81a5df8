"""What narrow weights cost in quality: vl2-nano on scenes it has not seen, and logits of the recorded models.

    python benchmarks/quantisation.py [--count 200] [--scenes 100] [--kinds bfloat16 int8 int4 int8-cache]

For each kind: the lines of `vl2 eval --count COUNT`; over every position of the right answers of so many scenes, the KL
divergence from float32 (nats) and how often the likeliest token is the same; and for the recorded decoder families
(random weights) the largest difference of a logit from float32, beside the largest logit. vl2-nano ships in bfloat16,
so that float32 and bfloat16 are the same numbers: bfloat16 loses nothing on a CPU, which computes in float32.
"int8-cache" has float32 weights, and every position attends to rows of a cache in eight bits.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import vl2_jax
from vl2_jax.inference.prefill import empty_cache
from vl2_jax.model.vl2 import apply
from vl2_jax.processing.batch import IGNORED, Batch
from vl2_jax.scenes.conversations import SceneSizes
from vl2_jax.scenes.evaluation import ask_all, questions, table

ROOT = Path(__file__).parents[1]
SEED = 1_000_000
LENGTH, TILES = 384, 16  # room for every conversation, so that one program does for all
FAMILIES = ("nano-tiny", "nano-small", "nano-base")
CACHE = "int8-cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["float32", "bfloat16", "int8", "int4", CACHE])
    options = parser.parse_args()
    exact = answers_of(loaded("vl2-nano", "float32"), options.scenes)
    for kind in options.kinds:
        vl2 = loaded("vl2-nano", kind)
        print(json.dumps({"kind": kind, **compared(exact, answers_of(vl2, options.scenes))}), flush=True)
        for family in FAMILIES:
            print(json.dumps({"kind": kind, "family": family, **logits_error(family, kind)}), flush=True)
        if options.count:
            rows = table(ask_all(vl2, options.count, SEED, SceneSizes()))
            lines = {row.skill: round(100 * row.score, 1) for row in rows}
            print(json.dumps({"kind": kind, "eval": lines}), flush=True)


def loaded(model: str | Path, kind: str) -> vl2_jax.VL2:
    """Weights of a kind; what is not quantised is float32."""
    if kind in ("float32", "bfloat16"):
        return vl2_jax.load(model, dtype=kind)
    if kind == CACHE:
        return vl2_jax.load(model, dtype="float32", cache="int8")
    return vl2_jax.load(model, dtype="float32", weights=kind)


def logits_of(vl2: vl2_jax.VL2, batch: Batch) -> np.ndarray:
    """Logits of every position; with a cache of some kind, each attends to its rows."""
    if vl2.model.cache_kind is None:
        return vl2.logits(batch)
    segments = batch.attention_mask.astype(np.int32)
    return np.asarray(_over_cache(vl2.model, vl2.params, batch.input_ids, segments, batch.visual_index, batch.tiles))


@partial(jax.jit, static_argnums=0)
def _over_cache(model, params, ids, segments, index, tiles):
    x = apply(model, params, ids, index, apply(model, params, tiles, method="encode_tiles"), method="embed")
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    out = apply(model, params, x, positions, segments, empty_cache(model, *ids.shape), method="decode")
    return apply(model, params, out.hidden, method="logits")


def answers_of(vl2: vl2_jax.VL2, scenes: int) -> list[np.ndarray]:
    """Log-probabilities of every position of the right answers, a question after another."""
    found = []
    for _, images, question, answer in questions(SEED, scenes, SceneSizes()):
        turn = {"role": "user", "content": question, "images": images}
        batch = vl2.processor([turn, {"role": "assistant", "content": answer}])
        batch = batch.padded_to(LENGTH, TILES, vl2.processor.tokenizer.pad_id)
        logits = logits_of(vl2, batch)[0]
        spoken = np.flatnonzero(batch.labels[0] != IGNORED)
        spoken = spoken[spoken > 0]  # nothing stands before the first token, which has a label too
        found.append(np.asarray(jax.nn.log_softmax(logits[spoken - 1])))
    return found


def compared(exact: list[np.ndarray], ours: list[np.ndarray]) -> dict[str, float]:
    p, q = np.concatenate(exact).astype(np.float64), np.concatenate(ours).astype(np.float64)
    divergence = (np.exp(p) * (p - q)).sum(axis=-1)
    return {
        "positions": len(p),
        "KL": float(divergence.mean()),
        "largest KL": float(divergence.max()),
        "top-1 agreement": float((p.argmax(-1) == q.argmax(-1)).mean()),
    }


def logits_error(family: str, kind: str) -> dict[str, float]:
    folder = ROOT / "tests" / "goldens" / family
    turn = {"role": "user", "content": "<image>\nWhat is it?", "images": [ROOT / "assets" / "grace_hopper.jpg"]}
    logits = []
    for of in ("float32", kind):
        vl2 = loaded(folder, of)
        logits.append(logits_of(vl2, vl2.processor([turn, {"role": "assistant", "content": "Nothing much."}])))
    error = float(np.abs(logits[1] - logits[0]).max())
    return {"largest error": error, "largest logit": float(np.abs(logits[0]).max())}


if __name__ == "__main__":
    main()
