"""How many pages a cache can have, told before anything is loaded.

Where nobody says how many, the cache takes a share of what the weights leave of the memory, and no more than all
requests at once could fill.
"""

from __future__ import annotations

from typing import Any

import jax

from vl2_jax.config import VL2Config
from vl2_jax.errors import RequestError
from vl2_jax.memory import usable_memory
from vl2_jax.model.attention import CacheKind
from vl2_jax.model.decoder import page_bytes
from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.serving.requests import Limits

_SHARE = {"cpu": 0.25, "tpu": 0.8}  # of what is left: a CPU's memory is also everybody else's


def pages_for(
    config: VL2Config,
    weights: int,
    dtype: Any,
    limits: Limits,
    kind: CacheKind | None = None,
    memory: int | None = None,
    platform: str | None = None,
) -> int:
    """Pages of the cache, the scratch page among them.

    Args:
      weights: bytes of them on one device.
      dtype, kind: of the cache, see `attention.empty_pages`.
      memory: bytes that model and cache may take together; `None` is what this machine's first device has, or what
        this process may use, and no limit where neither tells.

    Raises:
      RequestError: a single request of the whole context does not fit, or more requests are wanted than there would be
        pages for.
    """
    context = limits.context or config.language_config.max_position_embeddings
    whole = -(-min(context, config.language_config.max_position_embeddings) // PAGE)
    wanted = limits.pages if limits.pages is not None else limits.max_running * whole
    platform = platform or jax.default_backend()
    memory = memory_of(platform) if memory is None else memory
    if memory is None:
        return 1 + wanted
    left = (memory - weights) * _SHARE.get(platform, 0.5)
    each = page_bytes(config.language_config, dtype, kind)
    fit = max(0, int(left / each) - 1)
    size = f"{each * whole / 1e9:.1f} GB"
    if limits.pages is not None and limits.pages > fit:
        raise RequestError(f"{limits.pages} pages do not fit into the memory beside the weights; {fit} do.")
    if fit < whole:
        raise RequestError(
            f"a request of {whole * PAGE} positions takes {size} of cache, which the memory does not leave beside the "
            f"weights; {fit * PAGE} positions fit."
        )
    if limits.max_running > fit:
        raise RequestError(f"{limits.max_running} requests at once need a page each; the memory holds {fit} pages.")
    return 1 + min(wanted, fit)


def memory_of(platform: str) -> int | None:
    """Bytes that a device of this platform has; of a CPU, what this process may use."""
    if platform == "cpu":
        return usable_memory()
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
