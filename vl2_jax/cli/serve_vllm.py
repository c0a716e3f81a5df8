"""`vl2 serve --engine vllm`: the same flags, given to `vllm serve`, which this process becomes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from typing import Any

from vl2_jax.cli.flags import ModelFlags, OptionalModelFlags
from vl2_jax.cli.serve import (
    DoorFlags,
    LimitFlags,
    check_door,
    check_limits,
    domains_of,
    keys_of,
    most_pictures,
    warn_if_open,
)
from vl2_jax.cli.terminal import tell
from vl2_jax.errors import RequestError, shown
from vl2_jax.sharding.devices import Devices

_DEVICES = re.compile(r"expert=([1-9][0-9]{0,3})")
_HANDED_ON = {
    "model", "adapters", "merge", "no_merge", "dtype", "weights", "verify",
    "max_model_len", "max_num_seqs", "max_num_queued_reqs", "max_num_queued_tokens", "enable_prefix_caching",
    "host", "port", "api_key", "api_key_file", "served_model_name", "allowed_media_domains", "limit_mm_per_prompt",
    "override_generation_config", "drain_seconds",
}  # fmt: skip
_WHY_NOT = {  # of flags that are refused
    "cache": "vLLM holds its own, in the dtype of products",
    "chunk_size": "vLLM cuts prompts itself",
    "num_pages": "vLLM sizes its cache by --gpu-memory-utilization",
    "honor_detail": "pictures are always cut into tiles",
    "max_body_bytes": "a proxy in front of vLLM limits that",
}
_NO_DEFAULTS = {"max_tokens", "min_tokens", "ignore_eos"}  # vLLM leaves them out of its defaults, and tells nobody


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
    refuse_what_is_not_handed_on(model, limits, door)
    _check_defaults(door.override_generation_config)
    match = _DEVICES.fullmatch(mesh or "expert=1")
    if match is None:
        raise RequestError(f"--mesh is {shown(mesh)}; with --engine vllm it is expert=N, for N devices.")
    keys = keys_of(door)
    if len(keys) > 1:
        raise RequestError("--engine vllm takes one key: others would stand in the list of processes; give one.")
    directory = find_model(model.model)
    told = launch.options(
        directory,
        read_config(directory),
        devices=int(match[1]),
        dtype=model.dtype,
        context=limits.max_model_len,
        plugin=loading_of(model),
    )
    environment = {**os.environ, **({"VLLM_API_KEY": keys[0]} if keys else {})}
    command = launch.command(told, _flags(model, limits, door), environment)
    warn_if_open([key] if (key := command.environment.get("VLLM_API_KEY")) else [], door.host, door.port)
    settings = (f"{name}={value}" for name, value in launch.REQUIRED.items())
    tell(f"{' '.join(settings)} {shlex.join(command.arguments)}")
    os.execve(command.arguments[0], command.arguments, dict(command.environment))


def loading_of(model: ModelFlags) -> dict[str, Any]:
    """What the plug-in is told of how the model is loaded: `settings.Settings` beside the model."""
    from vl2_jax.serving.vllm.settings import Settings

    return {name: str(value) if name == "adapters" else value for name, value in model.options(Devices()).items()
            if name in Settings.__dataclass_fields__ and value is not None}  # fmt: skip


def refuse_what_is_not_handed_on(*groups: ModelFlags | LimitFlags | DoorFlags) -> None:
    """Raises RequestError for a flag that was given and that vLLM has nothing for."""
    for flags in groups:
        for field in dataclasses.fields(flags):
            if field.name not in _HANDED_ON and getattr(flags, field.name) != field.default:
                why = _WHY_NOT.get(field.name, "vLLM has no such thing")
                raise RequestError(f"vLLM's engine knows no --{field.name.replace('_', '-')}: {why}.")


def _check_defaults(text: str | None) -> None:
    from vl2_jax.serving.http.sampling import Defaults

    Defaults.read(text)
    if unheard := sorted(_NO_DEFAULTS & json.loads(text or "{}").keys()):
        raise RequestError(
            f"--override-generation-config has {shown(unheard[0])}, which --engine vllm takes from requests alone; "
            "leave it out, or limit answers with max_new_tokens."
        )


def _flags(model: OptionalModelFlags, limits: LimitFlags, door: DoorFlags) -> list[str]:
    """Flags that both have, in vLLM's words."""
    flags: dict[str, Any] = {
        "host": door.host,
        "port": door.port,
        "max-num-seqs": limits.max_num_seqs,
        "max-num-queued-reqs": limits.max_num_queued_reqs,
        "max-num-queued-tokens": limits.max_num_queued_tokens,
        "limit-mm-per-prompt": f'{{"image": {most_pictures(door)}}}',
        "override-generation-config": door.override_generation_config or None,
        "shutdown-timeout": round(door.drain_seconds),
    }
    told = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    told.append("--enable-prefix-caching" if limits.enable_prefix_caching else "--no-enable-prefix-caching")
    told += ["--served-model-name", *(door.served_model_name or (model.model,))]
    if domains := domains_of(door):
        told += ["--allowed-media-domains", *domains]
    return told
