"""How much memory this process may use: that of the machine, or less where a container or a shell limits it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_NO_LIMIT = 2**60  # version 1 of control groups writes a number near 2**63


def usable_memory(root: Path = Path("/")) -> int | None:
    """Bytes, the least of what the machine has, its control groups allow and `ulimit -v` leaves; None if nobody tells.

    Args:
      root: of the file system that describes the machine.
    """
    limits = [*_machine(root), *_control_groups(root), *_address_space()]
    return min((limit for limit in limits if 0 < limit < _NO_LIMIT), default=None)


def _machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemTotal:"):
            yield int(line.split()[1]) * 1024
            return
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # not Linux
        yield os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_groups(root: Path) -> Iterator[int]:
    """The limits of this process's group and of all groups around it.

    Inside of a container the path that `/proc/self/cgroup` names may be one of the host, while the tree that is mounted
    begins with the container's own group: its limit is then that of the tree's root.
    """
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            tree, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            tree, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = tree / path.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(tree):
                break
            for text in _lines(place / file):
                if text.isdecimal():  # "max" is no limit
                    yield int(text)


def _address_space() -> Iterator[int]:
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        yield soft


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
