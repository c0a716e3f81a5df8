"""`vl2 verify`: a model against numbers recorded from the official release, quantity by quantity.

Every case under `GOLDENS/cases` is run in float32: what the processor makes, every part of the network, router choices,
greedy tokens, and for training cases the losses and gradients (quantised weights have none).

Rows of hidden states are as large as a model makes them, and rounding in float32 is relative. So they are compared
with a tolerance for each row: 1e-5 of its largest recorded number, and never below 2e-4, which are equal in rows of
size 20. Logits keep 2e-4. Where recorded rows are larger than 20, rounding that began in early layers has grown beyond
that before the logits (PyTorch is 4e-4 away from its own recording, and the recording 5e-4 from float64): there every
layer, and the logits, are computed from the recorded rows before them, so that each is held to its own rounding.
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
from vl2_jax.inference.generate import Generator
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.prefill import matmul_precision
from vl2_jax.model.vl2 import apply
from vl2_jax.ops.narrow.kinds import Narrow
from vl2_jax.processing.batch import Batch, Encoded, Processor
from vl2_jax.processing.tiling import released_tiles
from vl2_jax.progress import Report, silent
from vl2_jax.training.objective import losses

ABSOLUTE = 2e-4
OF_ROW = 1e-5
RELATIVE = 1e-4
EXACT = 0.0
LARGEST, DIFFERING, RELATIVELY = "largest difference", "values that differ", "relative difference"
ROWS = f"{LARGEST}, in rows beyond {ABSOLUTE / OF_ROW:.0f} as of rows of {ABSOLUTE / OF_ROW:.0f}"
FROM_RECORDED = ", from the recorded rows before"
_PROMPT_CHUNK = 7  # of the recorded incremental prefill
_CHUNK = 64  # of the others, so that all cases share one compiled program


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is what `measured` says, at most `tolerance` where it passes.

    "largest difference", "relative difference", "values that differ", or for hidden states "largest difference, in rows
    beyond 20 as of rows of 20", with ", from the recorded rows before" where that is what was computed from.
    """

    case: str
    quantity: str
    error: float
    tolerance: float
    measured: str = LARGEST

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
            yield _equal(case, quantity, ours, arrays[quantity])


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
    logits, measured = out.logits, ROWS
    if "layer_out" in arrays:
        layers, final = seen["language"]["layer_out"], seen["final_norm_out"][0]
        if np.abs(arrays["layer_out"][:, real]).max() * OF_ROW > ABSOLUTE:
            measured = f"{ROWS}{FROM_RECORDED}"
            layers, final, logits = from_recorded_rows(vl2, batch, arrays)
        for layer, recorded in enumerate(arrays["layer_out"]):
            error = of_rows(np.asarray(layers[layer])[real], recorded[real])
            yield case(f"layer_out[{layer}]", error, ABSOLUTE, measured)
        error = of_rows(np.asarray(final)[real], arrays["final_norm_out"][real])
        yield case("final_norm_out", error, ABSOLUTE, measured)
    for layer, (routing, ids) in enumerate(zip(out.routings, arrays["router_idx"], strict=True)):
        ours = np.sort(np.asarray(routing.expert_ids), axis=-1).reshape(ids.shape)
        yield _equal(case, f"router_idx[{layer}]", ours[real.ravel()], ids[real.ravel()])
    for name in ("logits", "logits_tail"):
        if name in arrays:
            length = arrays[name].shape[1]
            error = _largest(np.asarray(logits)[:, -length:][real[:, -length:]], arrays[name][real[:, -length:]])
            basis = FROM_RECORDED if logits is not out.logits else ""
            yield case(name, error, ABSOLUTE, f"{LARGEST}{basis}")
    yield close("logits_logsumexp", jax.nn.logsumexp(out.logits, axis=-1), arrays["logits_logsumexp"], real)
    yield _equal(case, "logits_argmax", np.argmax(out.logits, -1)[real], arrays["logits_argmax"][real])


def _generation_checks(case: Any, vl2: VL2, encoded: list[Encoded], arrays: dict) -> Iterator[Check]:
    tokenizer = vl2.processor.tokenizer
    options = SamplingOptions(max_tokens=arrays["gen_tokens"].shape[1], ignore_eos=True)
    answers, _ = Generator(vl2.model, vl2.params, tokenizer, _CHUNK).generate(encoded, options)
    yield _equal(case, "gen_tokens", np.asarray([a.token_ids for a in answers]), arrays["gen_tokens"])
    consistent = "chunk7_consistent_last_logits"
    name = consistent if consistent in arrays else "chunk7_last_logits"
    hidden, _ = Generator(vl2.model, vl2.params, tokenizer, _PROMPT_CHUNK).prefill(encoded, capacity=256)
    yield case(name, _largest(apply(vl2.model, vl2.params, hidden, method="logits"), arrays[name]), ABSOLUTE)


def _training_checks(case: Any, vl2: VL2, batch: Batch, info: dict, arrays: dict) -> Iterator[Check]:
    has_gradients = not any(isinstance(leaf, Narrow) for leaf in flatten(vl2.params).values())
    found, grads = _gradients(vl2.model, vl2.params, batch, has_gradients)
    recorded = info["info"]
    yield case("loss", abs(float(found.next_token) - recorded["loss"]) / abs(recorded["loss"]), RELATIVE, RELATIVELY)
    for layer, (ours, aux) in enumerate(zip(found.balance, recorded["aux_loss"], strict=True)):
        yield case(f"aux_loss[{layer}]", abs(float(ours) - aux) / max(abs(aux), 1e-12), RELATIVE, RELATIVELY)
    yield case("logits_last", _largest(vl2.logits(batch)[:, -1], arrays["logits_last"]), ABSOLUTE)
    if not has_gradients:
        return
    ours_by_key: dict[str, np.ndarray] = {}
    flat = flatten(grads)
    for leaf in plan(vl2.config):
        ours_by_key |= leaf.split(np.asarray(flat[leaf.path]))
    for name, expected in arrays.items():
        if name.startswith("grad/"):
            error = _largest(ours_by_key[name.removeprefix("grad/")], expected)
            yield case(name, error / max(float(np.abs(expected).max()), 1e-12), RELATIVE, RELATIVELY)
    errors = {
        key: abs(float(np.linalg.norm(ours_by_key[key])) - norm) / max(norm, 1e-12)
        for key, norm in info["grad_norms"].items()
    }
    worst = max(errors, key=errors.__getitem__)
    yield case(f"grad_norms ({len(errors)}; worst {worst})", errors[worst], RELATIVE, RELATIVELY)
    idle = sum(bool(np.any(ours_by_key[key])) for key in recorded["params_without_grad"])
    yield case("params_without_grad", float(idle), EXACT, DIFFERING)


def from_recorded_rows(vl2: VL2, batch: Batch, arrays: dict) -> tuple[list[Any], Any, Any]:
    """Every layer's rows, the last norm's and the logits, each computed from the recorded rows before it."""
    positions = np.broadcast_to(np.arange(batch.input_ids.shape[1]), batch.input_ids.shape)
    before = [arrays["inputs_embeds"], *arrays["layer_out"]]
    placed = (positions, batch.attention_mask.astype(np.int32))
    layers = [_layer(vl2.model, vl2.params, number, rows, *placed) for number, rows in enumerate(before[:-1])]
    return layers, *_end(vl2.model, vl2.params, before[-1])


def of_rows(ours: np.ndarray, recorded: np.ndarray) -> float:
    """The largest difference of rows `[N, D]`, with rows whose largest number is beyond 20 scaled down to it."""
    if ours.shape != recorded.shape:
        return float("inf")
    sizes = np.maximum(1.0, np.abs(recorded).max(axis=-1, keepdims=True) * (OF_ROW / ABSOLUTE))
    return float((np.abs(ours - recorded) / sizes).max(initial=0.0))


@partial(jax.jit, static_argnums=(0, 2))
def _layer(model: Any, params: Any, number: int, rows: Any, positions: Any, segments: Any) -> Any:
    with matmul_precision(model.dtype):
        return apply(model, params, number, rows, positions, segments, method="decoder_layer")


@partial(jax.jit, static_argnums=0)
def _end(model: Any, params: Any, rows: Any) -> Any:
    with matmul_precision(model.dtype):
        return apply(model, params, rows, method="end")


@partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Any, *inputs: Any) -> Any:
    with matmul_precision(model.dtype):
        out, variables = model.apply({"params": params}, *inputs, mutable=["intermediates"])
    return out, variables["intermediates"]


def _gradients(model: Any, params: Any, batch: Batch, has_gradients: bool) -> Any:
    """The losses of a batch, and their gradients; none of quantised weights."""

    def objective(params: Any) -> Any:
        with matmul_precision(model.dtype):
            found = losses(model, params, batch, count_padding=True)
        return found.total, found

    if not has_gradients:
        return jax.jit(objective)(params)[1], None
    (_, found), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return found, grads


def _inputs(batch: Batch) -> tuple:
    return batch.input_ids, batch.attention_mask.astype(np.int32), batch.visual_index, batch.tiles


def _largest(ours: Any, recorded: np.ndarray) -> float:
    ours = np.asarray(ours)
    if ours.shape != recorded.shape:
        return float("inf")
    return float(np.abs(ours - recorded).max(initial=0.0))


def _equal(case: Any, quantity: str, ours: Any, recorded: np.ndarray) -> Check:
    is_alike = np.shape(ours) == recorded.shape
    return case(quantity, float((np.asarray(ours) != recorded).sum()) if is_alike else float("inf"), EXACT, DIFFERING)
