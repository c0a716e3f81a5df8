"""`vl2 serve`: a model behind OpenAI's API."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from vl2_jax.cli.flags import NO_MODEL, ModelFlags, OptionalModel, OptionalModelFlags, Place, Repeated
from vl2_jax.cli.terminal import messages, tell
from vl2_jax.errors import RequestError, VL2Error, shown
from vl2_jax.installation import install_line
from vl2_jax.progress import Display, Report
from vl2_jax.serving.http import MOST_BODY_BYTES
from vl2_jax.sharding.devices import Devices

_LARGEST_KEY_FILE = 1 << 16


@dataclass(frozen=True)
class LimitFlags:
    """How much is taken on.

    Attributes:
      max_model_len: Tokens that a prompt and its answer may have together; by default the model's context.
      max_num_seqs: Answers that are written at once.
      max_num_queued_reqs: Requests that wait; a further one gets 429 and asks again later.
      max_num_queued_tokens: Tokens of prompts that wait, likewise; by default no limit.
      num_pages: Pages of the cache, 128 tokens each; by default as many as --max-num-seqs whole contexts need, or as
        memory holds.
      enable_prefix_caching: Prompts that begin alike share what was computed.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 16
    max_num_queued_reqs: int = 256
    max_num_queued_tokens: int | None = None
    num_pages: int | None = None
    enable_prefix_caching: bool = True


@dataclass(frozen=True)
class DoorFlags:
    """Who may ask, and what.

    Attributes:
      host: Address to listen on; 0.0.0.0 is all of this machine's.
      port: 0 is any that is free.
      api_key: What callers have to show; may be given several times. By default VL2_API_KEY of the environment, else
        everybody may ask.
      api_key_file: A file with such keys, one a line.
      served_model_name: What the model is called; may be given several times. By default as --model has it.
      allowed_media_domains: A host whose pictures are fetched by their address; may be given several times. By default
        none: pictures are sent in requests.
      limit_mm_per_prompt: Pictures in a request, as JSON: '{"image": 4}'.
      honor_detail: Pictures of "detail": "low" are seen as one tile; by default they are seen as all are.
      override_generation_config: What requests that say nothing ask for, as JSON: '{"temperature": 0}'.
      max_body_bytes: Of a request.
      drain_seconds: That answers have to end after SIGTERM or Ctrl-C.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: Repeated = ()
    api_key_file: Place | None = None
    served_model_name: Repeated = ()
    allowed_media_domains: Repeated = ()
    limit_mm_per_prompt: str | None = None
    honor_detail: tyro.conf.FlagCreatePairsOff[bool] = False
    override_generation_config: str | None = None
    max_body_bytes: int = MOST_BODY_BYTES
    drain_seconds: float = 30.0


def serve(
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")] = "",
    model: OptionalModel = NO_MODEL,
    limits: tyro.conf.OmitArgPrefixes[LimitFlags] = LimitFlags(),
    door: tyro.conf.OmitArgPrefixes[DoorFlags] = DoorFlags(),
    mesh: str | None = None,
    engine: Literal["own", "vllm"] = "own",
) -> None:
    """Serve a model over HTTP, as OpenAI's API.

    Example: vl2 serve vl2-nano --port 8000

    Args:
        name: As --model.
        mesh: Spread the model over this machine's devices: auto, expert, or sizes such as expert=4,tensor=2.
        engine: own, in this process; or vllm, which runs this model on TPUs by a plug-in (docs/serving.md), and which
          this process becomes.
    """
    if bool(name) == bool(model.model):
        raise RequestError("serve needs a model, once: vl2 serve MODEL, or --model MODEL.")
    model = dataclasses.replace(model, model=name or model.model)
    if engine == "vllm":
        from vl2_jax.cli.serve_vllm import become_vllm

        become_vllm(model, limits, door, mesh)
        return
    try:
        from vl2_jax.serving.http import server
        from vl2_jax.serving.http.service import Service
    except ModuleNotFoundError as error:
        raise VL2Error(f"serving needs {error.name!r}: {install_line('serve')}") from None
    settings = _settings(model, limits, door, mesh)  # what is wrong is told before a port is taken and weights are read
    options = model.options(Devices(mesh))
    listener = server.bind(door.host, door.port)
    host, port = listener.getsockname()[:2]
    log_to_standard_error()
    logging.getLogger("vl2_jax").setLevel(logging.INFO)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    tell(f"{settings.names[0]} is loading; {address}/ready tells how far it is")
    warn_if_open(settings.keys, host, port)

    with Display(messages) as display:

        def when_ready() -> None:
            display.close()
            tell(f"{settings.names[0]} is ready at {address}/v1")

        load = loading(model.model, options, settings.limits)
        server.run(Service(settings), listener, load, door.drain_seconds, display, when_ready)


def loading(model: str, options: dict[str, Any], limits: Any) -> Callable[[Report], tuple[Any, Any]]:
    """What makes an engine for a model, and what reads for it."""

    def load(report: Report) -> tuple[Any, Any]:
        from vl2_jax.api import load as load_model
        from vl2_jax.serving.engine import Engine

        vl2 = load_model(model, **options, report=report)
        return Engine(vl2, limits, report=report), vl2.processor

    return load


def limits_of(model: ModelFlags, flags: LimitFlags, mesh: str | None) -> Any:
    """How much is taken on.

    Raises:
      RequestError: more than the model's context or the memory of this machine holds, or less than one request needs.
    """
    from vl2_jax.api import find_model
    from vl2_jax.config import read_config
    from vl2_jax.model.attention import checked_cache
    from vl2_jax.serving.requests import Limits
    from vl2_jax.serving.room import pages_for
    from vl2_jax.weights import stored_and_computed

    check_limits(flags)
    cache, directory = checked_cache(model.cache), find_model(model.model)
    config = read_config(directory)
    config.language_config.checked_context(flags.max_model_len)
    limits = Limits(
        max_running=flags.max_num_seqs,
        max_waiting=flags.max_num_queued_reqs,
        max_waiting_tokens=flags.max_num_queued_tokens,
        context=flags.max_model_len,
        pages=flags.num_pages,
        prefix_cache=flags.enable_prefix_caching,
    )
    if mesh is None:  # how weights and cache are spread over one is the mesh's to know
        pages_for(config, *stored_and_computed(directory, config, model.dtype, model.weights), limits, cache)
    return limits


def _settings(model: OptionalModelFlags, flags: LimitFlags, door: DoorFlags, mesh: str | None) -> Any:
    from vl2_jax.serving.http.decoding import PictureLimits
    from vl2_jax.serving.http.door import names_of_loopback
    from vl2_jax.serving.http.sampling import Defaults
    from vl2_jax.serving.http.server import is_loopback
    from vl2_jax.serving.http.service import Settings

    check_door(door)
    keys = keys_of(door)
    return Settings(
        names=tuple(door.served_model_name) or (model.model,),
        keys=keys,
        limits=limits_of(model, flags, mesh),
        pictures=PictureLimits(most=most_pictures(door)),
        media_domains=frozenset(domains_of(door)),
        defaults=Defaults.read(door.override_generation_config),
        honor_detail=door.honor_detail,
        hosts=frozenset(names_of_loopback(door.host)) if is_loopback(door.host) and not keys else None,
        most_body=door.max_body_bytes,
    )


def check_limits(flags: LimitFlags) -> None:
    """Raises RequestError for a number that is out of bounds."""
    _check_at_least(1, flags, "max_model_len", "max_num_seqs", "max_num_queued_reqs", "max_num_queued_tokens")
    _check_at_least(1, flags, "num_pages")


def check_door(door: DoorFlags) -> None:
    """Raises RequestError for a number that is out of bounds."""
    _check_at_least(1024, door, "max_body_bytes")
    _check_at_least(0, door, "drain_seconds")
    if math.isinf(door.drain_seconds):
        raise RequestError(f"--drain-seconds is {door.drain_seconds}; expected a number that ends.")
    check_port(door.port)


def check_port(port: int) -> None:
    if not 0 <= port < 1 << 16:
        raise RequestError(f"--port is {port}; expected a number from 0 to 65535.")


def _check_at_least(least: int, flags: Any, *names: str) -> None:
    for name in names:
        value = getattr(flags, name)
        if value is not None and not value >= least:
            raise RequestError(f"--{name.replace('_', '-')} is {value}; expected at least {least}.")


def keys_of(door: DoorFlags) -> tuple[str, ...]:
    """The keys of flags, of a file or of the environment.

    Raises:
      RequestError: the file cannot be read or holds none, or one of them cannot stand in a header.
    """
    keys: Sequence[str] = door.api_key
    if door.api_key_file is not None:
        try:
            with door.api_key_file.open("rb") as file:
                lines = file.read(_LARGEST_KEY_FILE).decode("utf-8", "replace").splitlines()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise RequestError(f"--api-key-file {shown(str(door.api_key_file))} cannot be read ({why}).") from None
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise RequestError(f"--api-key-file {shown(str(door.api_key_file))} holds no key; write one a line.")
        keys = [*keys, *found]
    if not keys and os.environ.get("VL2_API_KEY"):
        keys = [os.environ["VL2_API_KEY"]]
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise RequestError("a key is empty, or has characters that a header cannot hold; use letters and digits.")
    return tuple(keys)


def warn_if_open(keys: Sequence[str], host: str, port: int) -> None:
    """Tells that everybody who reaches a server may ask it."""
    from vl2_jax.serving.http.server import is_loopback

    if not keys and not is_loopback(host):
        tell(f"whoever reaches {host}:{port} may ask; --api-key limits that", "yellow")


def log_to_standard_error() -> None:
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)


def domains_of(door: DoorFlags) -> tuple[str, ...]:
    """The hosts of `--allowed-media-domains`, in small letters.

    Raises:
      RequestError: one of them is no name of a host.
    """
    from vl2_jax.serving.http.fetching import check_domain

    domains = tuple(domain.lower() for domain in door.allowed_media_domains)
    for domain in domains:
        check_domain(domain)
    return domains


def most_pictures(door: DoorFlags) -> int:
    """The number of pictures of `--limit-mm-per-prompt`."""
    from vl2_jax.serving.http.decoding import PictureLimits

    given = door.limit_mm_per_prompt
    if given is None:
        return PictureLimits.most
    try:
        most = json.loads(given)["image"]
    except (ValueError, KeyError, TypeError, RecursionError):
        most = None
    if not isinstance(most, int) or isinstance(most, bool) or not 0 <= most <= 1000:
        raise RequestError(f"--limit-mm-per-prompt is {shown(given)}; expected JSON such as '{{\"image\": 4}}'.")
    return most
