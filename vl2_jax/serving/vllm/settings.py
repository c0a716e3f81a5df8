"""What the plug-in is told beside vLLM's settings (`--additional-config '{"vl2": {...}}'`), and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vl2_jax.errors import RequestError, shown

MODE = "vl2"  # of tokenizer and renderer, and the key in vLLM's additional configuration
PAGE_UNIT = 32  # rows: with other pages, sequences read each other's latents, and nothing tells


@dataclass(frozen=True)
class Settings:
    """How the model is loaded.

    Attributes:
      model: as `api.load` takes it: a directory, a bucket, a hub id or vl2-nano.
      weights, verify, adapters, merge: likewise.
    """

    model: str
    weights: str | None = None
    verify: bool = True
    adapters: str | None = None
    merge: bool | None = None

    @classmethod
    def of(cls, vllm_config: Any) -> Settings:
        """Those of one engine, after everything that would damage answers silently was looked for.

        Raises:
          RequestError: it was.
        """
        given = (vllm_config.additional_config or {}).get(MODE, {})
        if unknown := sorted(given.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(cls.__dataclass_fields__)
            raise RequestError(f"additional_config {MODE!r} has {shown(unknown)}; known are {known}.")
        _check(vllm_config)
        return cls(**{"model": vllm_config.model_config.model, **given})


def _check(vllm_config: Any) -> None:
    mode, page = vllm_config.model_config.tokenizer_mode, vllm_config.cache_config.block_size
    if mode != MODE:
        raise RequestError(
            f"the tokenizer mode {shown(mode)} does not make the released prompts; set --tokenizer-mode {MODE}."
        )
    if page % PAGE_UNIT:
        raise RequestError(
            f"pages of {page} positions mix up sequences; set --block-size to a multiple of {PAGE_UNIT}."
        )
    if not vllm_config.scheduler_config.disable_chunked_mm_input:
        raise RequestError("pictures must not be cut into chunks of a prompt; set --disable-chunked-mm-input.")
