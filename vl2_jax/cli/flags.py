"""Flags that several commands have, each described once. Reading them needs no JAX."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vl2_jax.cli.terminal import messages
from vl2_jax.errors import CheckpointError, RequestError
from vl2_jax.files import path_of
from vl2_jax.progress import Display
from vl2_jax.sharding.devices import Devices


def _place(typed: str) -> Path:
    """An address of no store stays as it was typed: whoever reads or writes there says so in its own words."""
    try:
        return path_of(typed)
    except CheckpointError:
        return Path(typed)


Place = Annotated[  # a file or a folder, here or on a bucket
    Path,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda given: _place(given[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
Source = Annotated[tyro.conf.Positional[Place], tyro.conf.arg(metavar="SOURCE")]
Destination = Annotated[tyro.conf.Positional[Place], tyro.conf.arg(metavar="DESTINATION")]
ModelName = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and how it is loaded.

    Attributes:
      model: Directory of a released or converted model, here or on a bucket (gs://...); a hub id; or vl2-nano.
      adapters: Directory of low-rank adapters in PEFT's layout.
      merge: Add the adapters to the weights; by default to float32 weights alone.
      no_merge: Keep the adapters beside the weights, where bfloat16 loses nothing of them.
      dtype: bfloat16 or float32, of the weights; by default the checkpoint's. A CPU computes in float32.
      weights: int8 or int4: the decoder's matrices in so many bits, if the checkpoint does not hold them so already.
      cache: int8: rows of the cache in eight bits; by default in the dtype of products.
      chunk_size: Prompt positions computed at a time, at most; by default what suits the platform.
      verify: Check the weights against their manifest while loading.
    """

    model: str
    adapters: Place | None = None
    merge: tyro.conf.FlagCreatePairsOff[bool] = False
    no_merge: tyro.conf.FlagCreatePairsOff[bool] = False
    dtype: str | None = None
    weights: str | None = None
    cache: str | None = None
    chunk_size: int | None = None
    verify: bool = True

    def load(self, devices: Devices, **changed: Any) -> tuple[Any, float]:
        """The model, and the seconds it took."""
        options = self.options(devices)
        from vl2_jax.api import load

        begun = time.perf_counter()
        with Display(messages) as report:
            vl2 = load(self.model, **options | {"report": report} | changed)
        return vl2, time.perf_counter() - begun

    def options(self, devices: Devices) -> dict[str, Any]:
        """What `vl2_jax.load` takes beside the model."""
        if self.merge and self.no_merge:
            raise RequestError("--merge and --no-merge are given; choose one of them.")
        options = {
            name: getattr(self, name) for name in ("adapters", "dtype", "weights", "cache", "chunk_size", "verify")
        }
        if self.merge or self.no_merge:
            options["merge"] = self.merge
        return options | {"mesh": devices.mesh, "dispatch": devices.dispatch}


@dataclass(frozen=True)
class OptionalModelFlags(ModelFlags):
    """Where a model may be named in another way.

    Attributes:
      model: Directory of a released or converted model, here or on a bucket (gs://...); a hub id; or vl2-nano.
    """

    model: str = ""


@dataclass(frozen=True)
class SamplingFlags:
    """How an answer is chosen, and where it ends.

    Attributes:
      max_tokens: Longest answer, in tokens.
      temperature: 0 takes the likeliest token each time; more is more varied.
      top_p: When sampling, the probability that is sampled from.
      top_k: When sampling, the number of tokens that are sampled from; 0 is no limit.
      repetition_penalty: By default 1.1 when sampling, none otherwise.
      seed: Equal seeds give equal answers; by default sampling takes new numbers each time.
      stop: The answer ends before this text; may be given several times.
      ignore_eos: Go on to --max-tokens.
      presence_penalty: From -2 to 2; taken from the logits of tokens that the answer holds.
      frequency_penalty: Likewise, once for each time that it does.
      min_p: When sampling, tokens that are less than this much as likely as the likeliest are left out.
      min_tokens: The answer does not end by itself before it has so many.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Repeated = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_p: float = 0.0
    min_tokens: int = 0

    def options(self) -> dict[str, Any]:
        """What `VL2.generate` and `Chat.ask` take."""
        return asdict(self)


ONE_DEVICE, GREEDY, NO_MODEL = Devices(), SamplingFlags(), OptionalModelFlags()
Model = tyro.conf.OmitArgPrefixes[ModelFlags]
OptionalModel = tyro.conf.OmitArgPrefixes[OptionalModelFlags]
Sampling = tyro.conf.OmitArgPrefixes[SamplingFlags]
OnDevices = tyro.conf.OmitArgPrefixes[Devices]


def in_all_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Runs a command that takes `devices` in every process of a slice; only process 0 writes."""

    @functools.wraps(command)
    def run(*arguments: Any, devices: Devices = ONE_DEVICE, **options: Any) -> None:
        from vl2_jax.sharding.processes import running_together

        with running_together(devices) as process:
            messages.quiet = process > 0
            command(*arguments, devices=devices, **options)

    return run
