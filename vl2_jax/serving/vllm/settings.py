"""What the plug-in is told beside vLLM's settings (`--additional-config '{"vl2": {...}}'`), and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
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
        """Those of one engine, after what would damage answers silently was looked for; how vLLM's mesh is cut is
        looked at where the weights go onto it (`model.own_mesh`).

        Raises:
          RequestError: it was found.
        """
        more = vllm_config.additional_config or {}
        given = more.get(MODE, {})
        if unknown := sorted(given.keys() - cls.__dataclass_fields__.keys()):
            known = ", ".join(cls.__dataclass_fields__)
            raise RequestError(f"additional_config {MODE!r} has {shown(unknown)}; known are {known}.")
        _check(vllm_config, more.get("sharding", {}).get("sharding_strategy", {}))
        return cls(**{"model": vllm_config.model_config.model, **given})


def _check(vllm_config: Any, strategy: Mapping[str, Any]) -> None:
    mode, page = vllm_config.model_config.tokenizer_mode, vllm_config.cache_config.block_size
    scheduler = vllm_config.scheduler_config
    if mode != MODE:
        raise RequestError(
            f"the tokenizer mode {shown(mode)} does not make the released prompts; set --tokenizer-mode {MODE}."
        )
    if page % PAGE_UNIT:
        raise RequestError(
            f"pages of {page} positions mix up sequences; set --block-size to a multiple of {PAGE_UNIT}."
        )
    if not scheduler.disable_chunked_mm_input:
        raise RequestError("pictures must not be cut into chunks of a prompt; set --disable-chunked-mm-input.")
    if scheduler.async_scheduling:
        raise RequestError("some answers were wrong with asynchronous scheduling; set --no-async-scheduling.")
    if not strategy.get("enable_dp_attention"):
        raise RequestError(
            "attention is not by data, and latents have no heads to spread; set enable_dp_attention in the "
            "sharding_strategy of --additional-config."
        )
