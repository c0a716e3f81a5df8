"""How this package was installed, and so the line that adds one of its extras.

The package is on no index, so its bare name is never an instruction: whoever registered it there could run anything.
"""

from __future__ import annotations

import json
import os
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

NAME = "vl2-jax"


def install_line(*extras: str) -> str:
    """The `pip install` line that adds extras to what is installed here.

    A checkout or a wheel on disk is named by its path, a wheel or a repository elsewhere by its address
    (`direct_url.json`, PEP 610). Where nothing tells, or the path is gone, the packages of the extras are named.
    """
    wanted = f"[{','.join(extras)}]"
    try:
        found = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return _from_checkout(wanted) or f"pip install -e {_quoted('CHECKOUT_OF_THIS_PROJECT' + wanted)}"
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    url, repository = origin.get("url", ""), origin.get("vcs_info")
    path = _local_path(url)
    if repository:
        url = f"{repository['vcs']}+{url}@{repository['commit_id']}"
    elif path:
        if Path(path).exists():
            option = "-e " if origin.get("dir_info", {}).get("editable") else ""
            return f"pip install {option}{_quoted(path + wanted)}"
        url = ""  # a wheel that was deleted, or built somewhere else
    if url:
        folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
        return f"pip install {_quoted(f'{NAME}{wanted} @ {url}{folder}')}"
    return _from_checkout(wanted) or f"pip install {' '.join(map(_quoted, _packages_of(found, extras)))}"


def _local_path(url: str) -> str:
    parts = urlsplit(url)
    return url2pathname(parts.path) if parts.scheme == "file" else ""


def _from_checkout(wanted: str) -> str:
    root = Path(__file__).parents[1]
    return f"pip install -e {_quoted(f'{root}{wanted}')}" if (root / "pyproject.toml").is_file() else ""


def _quoted(argument: str) -> str:
    """For the shell of this machine; that of Windows knows double quotes only."""
    return f'"{argument}"' if os.name == "nt" else shlex.quote(argument)


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
