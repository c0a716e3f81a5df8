"""vLLM with all that this model needs: the options of its engine, and `vllm serve` as a command with its environment.

pages of 128        a multiple of 32: with 16, vLLM 0.32 lets sequences read each other's latents. Its own 1024 share
                    no prompt shorter than that
attention by data   each device has whole sequences: latents have no heads to be spread
whole pictures      in one chunk of a prompt, which therefore has room for the largest
prompts             ours (`prompts`): vLLM's template of this model is off by a space
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vl2_jax.config import CONFIG_FILE, PROCESSOR_FILE, VL2Config, read_processor_config
from vl2_jax.errors import RequestError, VL2Error
from vl2_jax.files import is_file_on, is_remote, read_file
from vl2_jax.installation import install_line
from vl2_jax.processing.tiling import largest_raster, visual_token_count
from vl2_jax.processing.tokenizer import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from vl2_jax.serving.vllm.settings import MODE

VERSIONS = {"vllm-tpu": "0.32.0", "tpu-inference": "0.32.0"}  # those of the extra
_OLDEST_PYTHON = (3, 12)  # that the JAX of these versions runs on
_PAGE = 128
_FEWEST_TOKENS = 2048  # of a step
REQUIRED = {"NEW_MODEL_DESIGN": "1"}  # of the environment of vLLM's processes
WISHED = {"VLLM_NO_USAGE_STATS": "1"}  # likewise, where nothing else is set
_HEAD = (CONFIG_FILE, PROCESSOR_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)  # what vLLM's processes read


@dataclass(frozen=True)
class Command:
    """What is executed."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def check_versions(version_of: Callable[[str], str] = metadata.version) -> None:
    """Raises VL2Error where vLLM is not here, or is not the one that this plug-in is for."""
    remedy = f"in an environment of its own: {install_line('vllm')}"
    if sys.version_info[:2] < _OLDEST_PYTHON:
        needed, found = (".".join(map(str, version[:2])) for version in (_OLDEST_PYTHON, sys.version_info))
        raise VL2Error(f"vLLM needs Python {needed} and this is {found}; {remedy}")
    for name, wanted in VERSIONS.items():
        try:
            found = version_of(name)
        except metadata.PackageNotFoundError:
            raise VL2Error(f"vLLM's engine needs {name} {wanted}, which is not installed; {remedy}") from None
        if found != wanted:
            raise VL2Error(f"the plug-in is for {name} {wanted} and not for {found}, which is installed; {remedy}")


def command(told: Mapping[str, Any], flags: Sequence[str], environment: Mapping[str, str]) -> Command:
    """How `vllm serve` is called.

    Args:
      told: see `options`.
      flags: further ones, as vLLM takes them.
      environment: of this process.
    """
    own = [part for name, value in told.items() if name != "model" for part in _flag(name.replace("_", "-"), value)]
    arguments = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", told["model"], *own, *flags]
    return Command(tuple(arguments), {**WISHED, **environment, **REQUIRED})


def options(
    directory: Path,
    config: VL2Config,
    *,
    devices: int,
    dtype: str | None,
    context: int | None,
    plugin: Mapping[str, Any],
) -> dict[str, Any]:
    """What vLLM's engine has to be told, by the names of its arguments.

    Args:
      directory: of the model; what vLLM reads of a bucket is copied.
      devices: over which sequences and experts are spread.
      context: positions of a prompt and its answer, at most the model's; `None` is as many.
      plugin: `settings.Settings` beside the model.

    Raises:
      RequestError: a number of devices that vLLM does not take, or more than the model's context.
    """
    context, heads = config.language_config.checked_context(context), config.language_config.num_attention_heads
    if heads % devices:
        raise RequestError(f"vLLM takes numbers of devices that divide the {heads} heads of this model, not {devices}.")
    processor = read_processor_config(directory)
    largest = visual_token_count(largest_raster(processor.rasters, processor.token_grid), processor.token_grid)
    strategy: dict[str, Any] = {"enable_dp_attention": True, "attn_dp_size": devices}
    return {
        "model": str(_head_of(directory)),
        "tokenizer_mode": MODE,
        "generation_config": "vllm",
        "dtype": dtype or _stored(config),
        "max_model_len": context,
        "block_size": _PAGE,
        "max_num_batched_tokens": 1 << (max(largest, _FEWEST_TOKENS) - 1).bit_length(),
        "disable_chunked_mm_input": True,
        "async_scheduling": False,
        "tensor_parallel_size": devices,
        "additional_config": {
            "sharding": {"sharding_strategy": strategy},
            MODE: {"model": str(directory), **plugin},
        },
    }


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _stored(config: VL2Config) -> str:
    """The dtype to compute in: what the checkpoint holds, of what a TPU computes with."""
    return "float32" if config.torch_dtype == "float32" else "bfloat16"


def _head_of(directory: Path) -> Path:
    """A folder on this machine with the small files of a model, which may lie on a bucket.

    Raises:
      CheckpointError: the bucket cannot be read.
      RequestError: the folder cannot be written.
    """
    if not is_remote(directory):
        return directory
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "vl2-jax" / "vllm" / name
    files = {file: read_file(directory / file) for file in _HEAD if is_file_on(directory / file)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written ({error.strerror or error}); it is for vLLM to read.") from None
    return folder
