"""`vl2 serve --engine vllm`: the same flags, given to `vllm serve`, which this process becomes."""

from __future__ import annotations

import os
import re
import shlex
from typing import Any

from vl2_jax.cli.flags import OptionalModelFlags
from vl2_jax.cli.serve import DoorFlags, LimitFlags, check_context, check_door, check_limits, keys_of, most_pictures
from vl2_jax.cli.terminal import tell
from vl2_jax.errors import RequestError, shown
from vl2_jax.sharding.devices import Devices

_DEVICES = re.compile(r"expert=([1-9][0-9]{0,3})")
_OURS_ALONE = (  # flags, of whom they are, and why vLLM has no such thing
    ("num_pages", "vLLM sizes its cache by --gpu-memory-utilization"),
    ("honor_detail", "pictures are always cut into tiles"),
    ("max_body_bytes", "a proxy in front of vLLM limits that"),
    ("chunk_size", "vLLM cuts prompts itself"),
)


def become_vllm(model: OptionalModelFlags, limits: LimitFlags, door: DoorFlags, mesh: str | None) -> None:
    """Replaces this process by `vllm serve`.

    Raises:
      VL2Error: vLLM is missing or another one, or a flag is wrong or one that it cannot honour.
    """
    from vl2_jax.api import find_model
    from vl2_jax.config import read_config
    from vl2_jax.serving.vllm import launch

    launch.check_versions()
    check_limits(limits)
    check_door(door)
    for flags in (model, limits, door):
        for name, why in _OURS_ALONE:
            if hasattr(flags, name) and getattr(flags, name) != type(flags).__dataclass_fields__[name].default:
                raise RequestError(f"--engine vllm knows no --{name.replace('_', '-')}: {why}.")
    match = _DEVICES.fullmatch(mesh or "expert=1")
    if match is None:
        raise RequestError(f"--mesh is {shown(mesh)}; with --engine vllm it is expert=N, for N devices.")
    keys = keys_of(door)
    if len(keys) > 1:
        raise RequestError("--engine vllm takes one key: others would stand in the list of processes; give one.")
    directory = find_model(model.model)
    config = read_config(directory)
    check_context(limits, config)
    loading = {name: str(value) if name == "adapters" else value for name, value in model.options(Devices()).items()
               if name in ("weights", "verify", "adapters", "merge") and value is not None}  # fmt: skip
    command = launch.command(
        directory,
        config,
        devices=int(match[1]),
        dtype=model.dtype,
        context=limits.max_model_len,
        plugin=loading,
        flags=_flags(model, limits, door),
        environment={**os.environ, **({"VLLM_API_KEY": keys[0]} if keys else {})},
    )
    tell(f"NEW_MODEL_DESIGN=1 {shlex.join(command.arguments)}")
    os.execve(command.arguments[0], command.arguments, dict(command.environment))


def _flags(model: OptionalModelFlags, limits: LimitFlags, door: DoorFlags) -> list[str]:
    """Flags that both have, in vLLM's words."""
    from vl2_jax.serving.http.fetching import check_domain

    pictures = most_pictures(door.limit_mm_per_prompt, 16)
    flags: dict[str, Any] = {
        "host": door.host,
        "port": door.port,
        "max-num-seqs": limits.max_num_seqs,
        "max-num-queued-reqs": limits.max_num_queued_reqs,
        "max-num-queued-tokens": limits.max_num_queued_tokens,
        "limit-mm-per-prompt": f'{{"image": {pictures}}}',
        "override-generation-config": door.override_generation_config,
        "shutdown-timeout": round(door.drain_seconds),
    }
    told = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    told.append("--enable-prefix-caching" if limits.enable_prefix_caching else "--no-enable-prefix-caching")
    told += ["--served-model-name", *(door.served_model_name or (model.model,))]
    for domain in door.allowed_media_domains:
        check_domain(domain.lower())
    if door.allowed_media_domains:
        told += ["--allowed-media-domains", *(domain.lower() for domain in door.allowed_media_domains)]
    return told
