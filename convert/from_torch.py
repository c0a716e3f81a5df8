"""A released Hugging Face directory to a converted checkpoint, or straight into memory, a layer at a time."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from convert.checkpoint import (
    FILLED,
    MANIFEST_FILE,
    check_files,
    check_tensor,
    describe,
    dtype_of,
    finish,
    is_converted,
    listing,
    pieces,
    read_manifest,
    replace_directory,
    unfinished_directory,
    write_piece,
)
from convert.checkpoint import read_pieces as read_converted
from convert.quantise import check_not_quantised, checked_kind, in_kind
from convert.safetensors_files import SUFFIX, WEIGHT_DTYPES, TensorEntry, scan, weight_files
from convert.weight_map import UNUSED_POOLING, Leaf, plan, torch_shapes
from vl2_jax.config import read_config
from vl2_jax.errors import CheckpointError, VL2Warning, shown
from vl2_jax.files import local_destination
from vl2_jax.processing.batch import Processor
from vl2_jax.progress import Report, silent

_KEPT_SUFFIXES = (".json", ".txt", ".md", ".model", ".jinja")
_KEPT_NAMES = ("LICENSE", "NOTICE")
# Of adapters, of a training run, of weights in another format: in the directory of a model they would mislead.
_LEFT_BEHIND = {"adapter_config.json", "trainer_state.json", "pytorch_model.bin.index.json", "optimizer.json"}
CORRECTION_BIAS = "correction_bias"  # stays float32: rounding it changes routing
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)|position_ids)")
_QUANTISED = re.compile(
    r".*\.(qweight|qzeros|g_idx|scales|weight_scale(_inv|_2)?|weight_packed|weight_zero_point|input_scale|SCB"
    r"|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..*|weight_format)"
)
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack")


def convert(
    source: Path,
    destination: Path,
    dtype: str | None = None,
    weights: str | None = None,
    report: Report = silent,
) -> None:
    """Writes the converted checkpoint of a released directory, or a quantised one of a converted checkpoint.

    Args:
      source: `config.json`, `*.safetensors`, tokenizer and processor files.
      destination: a directory that does not exist yet.
      dtype: of the parameters; `None` keeps the checkpoint's.
      weights: "int8" or "int4" quantises the decoder's matrices (`convert.quantise`).

    What is filled in and left out, of what nothing executes, is told as a `VL2Warning`.

    Raises:
      CheckpointError: tensors are missing, unexpected, misshaped or truncated (all of them named), a file is missing
        without which the model answers nothing, or the destination exists or is not here; nothing is written.
      ConfigError: the configuration or the processor's is missing or describes another model.
    """
    destination = local_destination(destination, "the converted model")
    wanted = None if dtype is None else dtype_of(dtype)
    kind = None if weights is None else checked_kind(weights)
    config = read_config(source)
    leaves = plan(config)
    if kind is not None and is_converted(source):
        check_not_quantised(source, leaves)
        read = _in_dtype(read_converted(source, leaves, verify=True, report=report), wanted)
        filled = {leaf.path for leaf in leaves if read_manifest(source)["tensors"].get(leaf.path, {}).get(FILLED)}
    else:
        entries = checked_entries(source, leaves)
        for line in differences(entries):
            warnings.warn(f"{source}: {line}", VL2Warning, stacklevel=2)
        read = read_pieces(source, leaves, entries, wanted, verify=True, report=report)
        filled = {leaf.path for leaf in leaves if not entries[leaf.keys[0]].size}
    Processor.from_directory(source, config)
    new = unfinished_directory(destination)
    tensors: dict[str, dict] = {}
    for piece in read:
        arrays = in_kind(piece, kind)
        write_piece(new, arrays)
        tensors |= {
            path: describe(array) | ({FILLED: True} if path in filled else {}) for path, array in arrays.items()
        }
    copy_small_files(source, new)
    finish(new, tensors)
    replace_directory(new, destination, report)


def _in_dtype(pieces: Iterator[dict[str, np.ndarray]], dtype: np.dtype | None) -> Iterator[dict[str, np.ndarray]]:
    for piece in pieces:
        yield {
            path: array if dtype is None or path.endswith(CORRECTION_BIAS) else array.astype(dtype, copy=False)
            for path, array in piece.items()
        }


def checked_entries(source: Path, leaves: list[Leaf]) -> dict[str, TensorEntry]:
    """Every tensor of a released directory, after comparing all of them with what the configuration needs.

    Beside what is needed stand tensors that are computed here; tensors of the pooling, which nothing executes (SPEC
    2.3), are filled with zeros where they are missing.

    Raises:
      CheckpointError: there are no weights that can be read, or they differ from what is needed, listing everything.
    """
    if not weight_files(source):
        raise CheckpointError(_why_no_weights(source))
    entries, problems = scan(source)
    expected = torch_shapes(leaves)
    if quantised := [key for key in entries if _QUANTISED.fullmatch(key)]:
        raise CheckpointError(
            f"the weights of {source} are quantised ({len(quantised)} tensors such as {shown(quantised[0], 120)}) and "
            "cannot be read; give the model in bfloat16, float16 or float32 that they were made from."
        )
    like = next((entry.dtype for entry in entries.values() if entry.dtype in WEIGHT_DTYPES), WEIGHT_DTYPES[0])
    missing = [key for key in expected if key not in entries and not _is_blamed(key, problems)]
    unused = [key for key in missing if key.startswith(UNUSED_POOLING)]
    entries |= {key: TensorEntry(source, like, expected[key], 0, 0) for key in unused}
    problems += [f"{key} is missing" for key in missing if key not in entries]
    problems += [f"{key} is unexpected" for key in entries if key not in expected and not is_computed(key)]
    for key, shape in expected.items():
        if key not in entries:
            continue
        if entries[key].shape != shape:
            problems.append(f"{key} has shape {list(entries[key].shape)}, expected {list(shape)}")
        if entries[key].dtype not in WEIGHT_DTYPES:
            problems.append(
                f"{key} has dtype {entries[key].dtype}, expected bfloat16, float16 or float32; quantised weights "
                "cannot be read"
            )
    if problems:
        raise CheckpointError(listing(f"the weights of {source} do not fit its config.json", problems))
    return entries


def differences(entries: Mapping[str, TensorEntry]) -> list[str]:
    """What the parameters have that the files do not have, and the other way round, in sentences; none as a rule."""
    filled = [key for key, entry in entries.items() if entry.size == 0]
    computed = [key for key in entries if is_computed(key)]
    lines = []
    if filled:
        lines.append(
            f"{len(filled)} tensors are missing ({filled[0]} ...), which nothing executes; they are filled with zeros"
        )
    if computed:
        lines.append(f"{len(computed)} tensors are left out ({computed[0]} ...), which are computed here")
    return lines


def is_computed(key: str) -> bool:
    """Whether a tensor is one that is computed from the configuration, and that some checkpoints hold all the same."""
    return _COMPUTED.fullmatch(key) is not None


def _is_blamed(key: str, problems: list[str]) -> bool:
    return any(problem.startswith(f"{key} ") for problem in problems)


def _why_no_weights(source: Path) -> str:
    if source.is_file():
        return f"{source} is a file; give the directory that holds it, with config.json and the tokenizer's files."
    others = sorted(path.name for path in source.iterdir() if path.suffix in _OTHER_FORMATS)
    if others:
        return (
            f"{source} holds weights only as {shown(', '.join(others), 120)}, which are not read (PyTorch's own format "
            f"can run any code); load them where they were made and save them as *{SUFFIX}."
        )
    return f"{source} holds no *{SUFFIX} file with a model's weights; give the directory of a released model."


def read_pieces(
    source: Path,
    leaves: list[Leaf],
    entries: Mapping[str, TensorEntry],
    dtype: np.dtype | None,
    verify: bool,
    report: Report,
) -> Iterator[dict[str, np.ndarray]]:
    """The parameters of a released directory, a piece at a time; checked against its manifest where it has one."""
    manifest = None
    if verify and (source / MANIFEST_FILE).is_file():
        manifest = read_manifest(source)
        check_files(source, manifest)
    total, done = sum(entry.size for entry in entries.values()), 0
    for group in pieces(leaves):
        arrays = {}
        for leaf in group:
            tensors = [entries[key].read() for key in leaf.keys]
            if manifest is not None:
                for key, tensor in zip(leaf.keys, tensors):
                    check_tensor(manifest, key, tensor, entries[key].file)
            kept = tensors[0].dtype if dtype is None or leaf.path.endswith(CORRECTION_BIAS) else dtype
            arrays[leaf.path] = leaf.assemble(tensors, kept)
            done += sum(entries[key].size for key in leaf.keys)
        report("reading weights", done, total)
        yield arrays


def copy_small_files(source: Path, destination: Path) -> None:
    """Configuration, tokenizer and documents, byte for byte; the weight index tells an export the file layout."""
    for path in sorted(source.iterdir()):
        is_small = path.suffix in _KEPT_SUFFIXES or path.name in _KEPT_NAMES
        is_other = path.name.startswith(".") or path.name in (MANIFEST_FILE, *_LEFT_BEHIND)
        if path.is_file() and is_small and not is_other:
            (destination / path.name).write_bytes(path.read_bytes())
