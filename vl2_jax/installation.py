"""How this package was installed, and so the line that adds one of its extras.

The package is on no index, so its bare name is never an instruction: whoever registered it there could run anything.
"""

from __future__ import annotations

import json
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "vl2-jax"


def install_line(*extras: str) -> str:
    """The `pip install` line that adds extras to what is installed here.

    A checkout or a wheel on disk is named by its path, a wheel or a repository elsewhere by its address
    (`direct_url.json`, PEP 610); where nothing tells, the packages of the extras are named themselves.
    """
    wanted = f"[{','.join(extras)}]"
    try:
        found = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return _from_checkout(wanted) or "install this project with its extras: pip install -e 'PATH[EXTRA]'"
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if path := _local_path(origin.get("url", "")):
        option = "-e " if origin.get("dir_info", {}).get("editable") else ""
        return f"pip install {option}{shlex.quote(path + wanted)}"
    if "url" in origin:
        kind = origin.get("vcs_info", {})
        address = f"{kind['vcs']}+{origin['url']}@{kind['commit_id']}" if kind else origin["url"]
        return f"pip install {shlex.quote(f'{NAME}{wanted} @ {address}')}"
    return _from_checkout(wanted) or f"pip install {' '.join(map(shlex.quote, _packages_of(found, extras)))}"


def _local_path(url: str) -> str:
    parts = urlsplit(url)
    return unquote(parts.path) if parts.scheme == "file" else ""


def _from_checkout(wanted: str) -> str:
    root = Path(__file__).parents[1]
    return f"pip install -e {shlex.quote(f'{root}{wanted}')}" if (root / "pyproject.toml").is_file() else ""


def _packages_of(found: metadata.Distribution, extras: tuple[str, ...]) -> list[str]:
    """The requirements of extras, those of extras that they name among them."""
    packages: list[str] = []
    for line in found.requires or ():
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if not any(f'extra == "{extra}"' in marker.replace("'", '"') for extra in extras):
            continue
        name, bracket, inner = requirement.partition("[")
        if name == NAME and bracket:
            packages += _packages_of(found, tuple(inner.rstrip("]").split(",")))
        else:
            packages.append(requirement)
    return packages
