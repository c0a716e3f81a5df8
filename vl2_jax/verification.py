"""`vl2 verify`: a model against numbers recorded from the official release, quantity by quantity.

Every case under `GOLDENS/cases` is run in float32: what the processor makes, every part of the network, router choices,
greedy tokens, and for training cases the losses and gradients.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.weight_map import flatten, plan
from vl2_jax.api import VL2
from vl2_jax.errors import ConfigError
from vl2_jax.inference.generate import Generator, matmul_precision
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.model.vl2 import apply
from vl2_jax.processing.batch import Batch, Encoded, Processor
from vl2_jax.processing.tiling import released_tiles
from vl2_jax.progress import Report, silent
from vl2_jax.training.objective import losses

ABSOLUTE = 2e-4
RELATIVE = 1e-4
EXACT = 0.0
_PROMPT_CHUNK = 7  # of the recorded incremental prefill
_CHUNK = 64  # of the others, so that all cases share one compiled program


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is a largest difference, or a number of values that differ where they must be equal."""

    case: str
    quantity: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # a NaN fails


def verify(vl2: VL2, goldens: Path, report: Report = silent) -> Iterator[Check]:
    """Runs every case and yields its comparisons.

    Raises:
      ConfigError: the directory holds no recorded cases.
    """
    paths = sorted((goldens / "cases").glob("*.json"))
    if not paths:
        raise ConfigError(f"{goldens} holds no cases/*.json; give a directory of recorded cases.")
    processor = vl2.processor.replace(as_released=True)
    for number, path in enumerate(paths):
        report(f"verifying {path.stem}", number, len(paths))
        info = json.loads(path.read_text(encoding="utf-8"))
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as stored:
            arrays = dict(stored)
        conversations = [_with_pictures(c, goldens) for c in info["conversations"]]
        encoded = [processor.encode(c, inference=info["inference_mode"]) for c in conversations]
        batch = processor.collate(encoded)
        case = partial(Check, path.stem)
        yield from _processor_checks(case, processor, batch, arrays)
        if "loss" in info.get("info", {}):
            yield from _training_checks(case, vl2, batch, info, arrays)
        else:
            yield from _forward_checks(case, vl2, batch, arrays)
            yield from _generation_checks(case, vl2, encoded, arrays)


def _with_pictures(conversation: list[dict], goldens: Path) -> list[dict]:
    folder = next((f for f in (goldens / "images", goldens.parent / "images") if f.is_dir()), goldens)
    return [m | {"images": [str(folder / name) for name in m.get("images", ())]} for m in conversation]


def _processor_checks(case: Any, processor: Processor, batch: Batch, arrays: dict) -> Iterator[Check]:
    for quantity, ours in (
        ("input_ids", batch.input_ids),
        ("labels", batch.labels),
        ("attention_mask", batch.attention_mask),
        ("images_seq_mask", batch.images_mask),
        ("images_spatial_crop", batch.crops),
        ("images", processor.released_pixels(batch)),
    ):
        if quantity in arrays:
            yield case(quantity, _differing(ours, arrays[quantity]), EXACT)


def _forward_checks(case: Any, vl2: VL2, batch: Batch, arrays: dict) -> Iterator[Check]:
    out, seen = _forward(vl2.model, vl2.params, *_inputs(batch))
    real = batch.attention_mask
    stored = released_tiles(batch.crops)

    def close(quantity: str, ours: Any, recorded: np.ndarray, mask: Any = slice(None)) -> Check:
        return case(quantity, _largest(np.asarray(ours)[mask], recorded[mask]), ABSOLUTE)

    if "vision_out" in arrays:
        yield close("vision_out", seen["vision_out"][0][stored], arrays["vision_out"])
        yield close("projector_out", seen["projector_out"][0][stored], arrays["projector_out"])
    for block, recorded in enumerate(arrays.get("vision_block_out", ())):
        yield close(f"vision_block_out[{block}]", seen["vision"]["vision_block_out"][block][stored], recorded)
    yield close("inputs_embeds", seen["inputs_embeds"][0], arrays["inputs_embeds"], real)
    for layer, recorded in enumerate(arrays.get("layer_out", ())):
        yield close(f"layer_out[{layer}]", seen["language"]["layer_out"][layer], recorded, real)
    if "final_norm_out" in arrays:
        yield close("final_norm_out", seen["final_norm_out"][0], arrays["final_norm_out"], real)
    for layer, (routing, ids) in enumerate(zip(out.routings, arrays["router_idx"], strict=True)):
        ours = np.sort(np.asarray(routing.expert_ids), axis=-1).reshape(ids.shape)
        yield case(f"router_idx[{layer}]", _differing(ours[real.ravel()], ids[real.ravel()]), EXACT)
    for name in ("logits", "logits_tail"):
        if name in arrays:
            length = arrays[name].shape[1]
            yield close(name, out.logits[:, -length:], arrays[name], real[:, -length:])
    yield close("logits_logsumexp", jax.nn.logsumexp(out.logits, axis=-1), arrays["logits_logsumexp"], real)
    yield case("logits_argmax", _differing(np.argmax(out.logits, -1)[real], arrays["logits_argmax"][real]), EXACT)


def _generation_checks(case: Any, vl2: VL2, encoded: list[Encoded], arrays: dict) -> Iterator[Check]:
    tokenizer = vl2.processor.tokenizer
    options = SamplingOptions(max_tokens=arrays["gen_tokens"].shape[1], ignore_eos=True)
    answers, _ = Generator(vl2.model, vl2.params, tokenizer, _CHUNK).generate(encoded, options)
    yield case("gen_tokens", _differing(np.asarray([a.token_ids for a in answers]), arrays["gen_tokens"]), EXACT)
    consistent = "chunk7_consistent_last_logits"
    name = consistent if consistent in arrays else "chunk7_last_logits"
    hidden, _ = Generator(vl2.model, vl2.params, tokenizer, _PROMPT_CHUNK).prefill(encoded, capacity=256)
    yield case(name, _largest(apply(vl2.model, vl2.params, hidden, method="logits"), arrays[name]), ABSOLUTE)


def _training_checks(case: Any, vl2: VL2, batch: Batch, info: dict, arrays: dict) -> Iterator[Check]:
    (_, found), grads = _gradients(vl2.model, vl2.params, batch)
    recorded = info["info"]
    yield case("loss", abs(float(found.next_token) - recorded["loss"]) / abs(recorded["loss"]), RELATIVE)
    for layer, (ours, aux) in enumerate(zip(found.balance, recorded["aux_loss"], strict=True)):
        yield case(f"aux_loss[{layer}]", abs(float(ours) - aux) / max(abs(aux), 1e-12), RELATIVE)
    yield case("logits_last", _largest(vl2.logits(batch)[:, -1], arrays["logits_last"]), ABSOLUTE)
    ours_by_key: dict[str, np.ndarray] = {}
    flat = flatten(grads)
    for leaf in plan(vl2.config):
        ours_by_key |= leaf.split(np.asarray(flat[leaf.path]))
    for name, expected in arrays.items():
        if name.startswith("grad/"):
            error = _largest(ours_by_key[name.removeprefix("grad/")], expected)
            yield case(name, error / max(float(np.abs(expected).max()), 1e-12), RELATIVE)
    errors = {
        key: abs(float(np.linalg.norm(ours_by_key[key])) - norm) / max(norm, 1e-12)
        for key, norm in info["grad_norms"].items()
    }
    worst = max(errors, key=errors.__getitem__)
    yield case(f"grad_norms ({len(errors)}; worst {worst})", errors[worst], RELATIVE)
    idle = sum(bool(np.any(ours_by_key[key])) for key in recorded["params_without_grad"])
    yield case("params_without_grad", float(idle), EXACT)


@partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Any, *inputs: Any) -> Any:
    with matmul_precision(model.dtype):
        out, variables = model.apply({"params": params}, *inputs, mutable=["intermediates"])
    return out, variables["intermediates"]


def _gradients(model: Any, params: Any, batch: Batch) -> Any:
    def objective(params: Any) -> Any:
        with matmul_precision(model.dtype):
            found = losses(model, params, batch, count_padding=True)
        return found.total, found

    return jax.jit(jax.value_and_grad(objective, has_aux=True))(params)


def _inputs(batch: Batch) -> tuple:
    return batch.input_ids, batch.attention_mask.astype(np.int32), batch.visual_index, batch.tiles


def _largest(ours: Any, recorded: np.ndarray) -> float:
    ours = np.asarray(ours)
    if ours.shape != recorded.shape:
        return float("inf")
    return float(np.abs(ours - recorded).max(initial=0.0))


def _differing(ours: np.ndarray, recorded: np.ndarray) -> float:
    return float((np.asarray(ours) != recorded).sum()) if np.shape(ours) == recorded.shape else float("inf")
