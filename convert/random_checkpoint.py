"""A checkpoint of any size with random weights, to try things out and to measure.

    python -m convert.random_checkpoint vl2-tiny DIRECTORY              the released layout
    python -m convert.random_checkpoint vl2-small DIRECTORY int4        a converted checkpoint, quantised as it is drawn

Weights are normal with deviation 0.02 (norms one, biases zero); the tokenizer knows bytes and the special tokens, at
the ids of the released one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from convert.checkpoint import describe, dtype_of, finish, pieces, replace_directory, unfinished_directory, write_piece
from convert.quantise import checked_kind, in_kind
from convert.safetensors_files import INDEX_FILE, layout_file
from convert.weight_map import plan, torch_shapes
from vl2_jax.config import CONFIG_FILE, PROCESSOR_FILE, VL2Config, read_preset
from vl2_jax.errors import VL2Error
from vl2_jax.files import local_destination
from vl2_jax.processing.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from vl2_jax.progress import Display, Report, silent

_WEIGHTS_FILE = "model-00001-of-000001.safetensors"
_DEVIATION = 0.02
_WORDS = {"bos": "begin", "eos": "end", "pad": "pad"}  # of the special tokens with these roles


def create(preset: str, destination: Path, seed: int = 0, report: Report = silent) -> None:
    """Writes a random checkpoint of a named size; one tensor is in memory at a time."""
    destination = local_destination(destination, "a random checkpoint")
    tables = read_preset(preset)
    config = VL2Config.from_hf(tables["model"])
    new = unfinished_directory(destination)
    write_small_files(tables, new, byte_tokenizer(tables["tokens"]))
    dtype = dtype_of(config.torch_dtype)
    shapes = torch_shapes(plan(config))
    header, ranges = layout_file({key: (dtype, shape) for key, shape in shapes.items()})
    random = np.random.default_rng(seed)
    with (new / _WEIGHTS_FILE).open("wb") as stream:
        stream.write(header)
        for number, key in enumerate(sorted(ranges, key=lambda key: ranges[key])):
            report("drawing weights", number, len(ranges))
            stream.write(_random_tensor(random, key, shapes[key]).astype(dtype).view(np.uint8).data)
    sizes = sum(size for _, size in ranges.values())
    index = {"metadata": {"total_size": sizes}, "weight_map": dict.fromkeys(sorted(shapes), _WEIGHTS_FILE)}
    (new / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    replace_directory(new, destination, report)


def create_quantised(preset: str, destination: Path, kind: str, seed: int = 0, report: Report = silent) -> None:
    """Writes a random converted checkpoint; one parameter at a time is drawn and rounded, and a layer is written."""
    destination = local_destination(destination, "a random checkpoint")
    kind, tables = checked_kind(kind), read_preset(preset)
    config = VL2Config.from_hf(tables["model"])
    new = unfinished_directory(destination)
    write_small_files(tables, new, byte_tokenizer(tables["tokens"]))
    dtype, leaves = dtype_of(config.torch_dtype), plan(config)
    random = np.random.default_rng(seed)
    tensors: dict[str, dict[str, Any]] = {}
    done = 0
    for group in pieces(leaves):  # writing a piece takes longer the more there are already: Small has 725 parameters
        arrays: dict[str, Any] = {}
        for leaf in group:
            report("drawing weights", done, len(leaves))
            drawn = [_random_tensor(random, key, leaf.torch_shape).astype(dtype) for key in leaf.keys]
            arrays |= in_kind({leaf.path: leaf.assemble(drawn, dtype)}, kind)
            done += 1
        write_piece(new, arrays)
        tensors |= {path: describe(array) for path, array in arrays.items()}
    finish(new, tensors)
    replace_directory(new, destination, report)


def write_small_files(tables: dict[str, Any], directory: Path, tokenizer: dict[str, Any]) -> None:
    """Configuration, processor and tokenizer files of a preset.

    Args:
      tokenizer: a `tokenizer.json` of text tokens; the preset's special tokens are added to it.
    """
    special = tables["tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": id_, "content": token} | flags for token, id_ in special.items()]
    tokenizer["model"]["vocab"] |= special
    processor = tables["processor"] | {"candidate_resolutions": tables["model"]["candidate_resolutions"]}
    roles = {f"{role}_token": _named(tables, word) for role, word in _WORDS.items()}
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (CONFIG_FILE, tables["model"]),
        (PROCESSOR_FILE, processor),
        (TOKENIZER_FILE, tokenizer),
        (TOKENIZER_CONFIG_FILE, {"tokenizer_class": "PreTrainedTokenizerFast"} | roles),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def byte_tokenizer(special: dict[str, int]) -> dict[str, Any]:
    """A `tokenizer.json` whose text tokens are the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    first = 3 if min(special.values()) == 0 else 0  # the released tokenizers put bos, eos and pad first or last
    vocabulary = {letter: first + i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    return {
        "version": "1.0",
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def _random_tensor(random: np.random.Generator, key: str, shape: tuple[int, ...]) -> np.ndarray:
    if key.endswith(".bias") or key.endswith("correction_bias"):
        return np.zeros(shape, np.float32)
    if key.count(".") and "norm" in key.split(".")[-2]:
        return np.ones(shape, np.float32)
    return random.standard_normal(shape, np.float32) * np.float32(_DEVIATION)


def _named(tables: dict, word: str) -> str:
    return next(token for token in tables["tokens"] if word in token)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        with Display(Console(stderr=True, highlight=False)) as report:
            if len(sys.argv) == 4:
                create_quantised(sys.argv[1], Path(sys.argv[2]), sys.argv[3], report=report)
            else:
                create(sys.argv[1], Path(sys.argv[2]), report=report)
    except VL2Error as error:
        sys.exit(f"random_checkpoint: {error}")
