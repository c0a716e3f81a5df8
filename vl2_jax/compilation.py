"""Compiled programs are kept in the user's cache folder, so that the second start of anything compiles nothing.

    $VL2_COMPILATION_CACHE    another folder; "off" keeps nothing
    ~/.cache/vl2-jax/compiled/x86_64-1f2e3d4c     else, one folder a kind of processor

JAX's own setting, where there is one (`JAX_COMPILATION_CACHE_DIR`), is left as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

VARIABLE = "VL2_COMPILATION_CACHE"
_MOST_BYTES = 4 << 30  # the programs used last stay
_JAX_DEFAULT_SECONDS = 1.0
COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX calls the event


def keep_compiled_programs() -> Path | None:
    """Where programs compiled from now on are kept; None where they are not, or not by us."""
    settings: Any = jax.config  # types of its attributes are not declared
    if settings.jax_compilation_cache_dir is not None:
        return None
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("off", "0", "none"):
        return None
    folder = Path(chosen).expanduser() if chosen else _default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()  # a program that was compiled before has settled that there is none
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if settings.jax_persistent_cache_min_compile_time_secs == _JAX_DEFAULT_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


@contextlib.contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """The names of the programs that are compiled meanwhile, or found in the folder of compiled ones."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **about: str | int) -> None:
        if event == COMPILED:
            names.append(str(about.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _default_folder() -> Path:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "vl2-jax" / "compiled" / _processor()


def _processor() -> str:
    """A program compiled for one processor may hold instructions that another in the same network lacks."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
