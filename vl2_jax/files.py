"""Files of a model, in a directory or on a bucket (`gs://bucket/model`): what `pathlib` does not do there.

Buckets are read where they are. They are not written to: what is written here gets its name once all of it is on disk,
which a bucket cannot do.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np

from vl2_jax.errors import CheckpointError, shown
from vl2_jax.installation import install_line

# Two letters at least: one is a drive. One slash is enough: `pathlib` keeps no more.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
_LFS_POINTER, _LARGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024
Answer = TypeVar("Answer")
_COPIERS = {"gs": "gcloud storage cp -r", "s3": "aws s3 cp --recursive"}


def path_of(name: str | os.PathLike[str]) -> Path:
    """A path that reads as `pathlib.Path` does, wherever its files are.

    Raises:
      CheckpointError: it is an address of what is no store of files (`http://...`).
    """
    scheme, rest = _address(name)
    if scheme == "file":
        return Path("/", unquote(rest.removeprefix("localhost/")))
    if not scheme:
        with suppress(RuntimeError, ValueError):  # nobody has that name, or can have it: a file may
            return Path(name).expanduser()
        return Path(name)
    from etils import epath

    address = f"{scheme}://{rest}"
    try:
        remote: Any = epath.Path(address)
    except KeyError:  # of the table of stores that it knows
        raise CheckpointError(
            f"{shown(address, 200)} is not in a store whose files can be read (gs://, s3://); copy them here and give "
            "their folder."
        ) from None
    return remote


def is_remote(path: str | os.PathLike[str]) -> bool:
    return _address(path)[0] not in ("", "file")


def local_destination(path: str | os.PathLike[str], what: str) -> Path:
    """A place on this machine to write to.

    Args:
      what: is written, as the message says it.

    Raises:
      CheckpointError: it is an address, on a bucket or elsewhere.
    """
    return _here(path, f"{what} cannot be written to", "give a folder here, then", ("FOLDER", "{}"))


def local_source(path: str | os.PathLike[str], what: str) -> Path:
    """A place on this machine to read from, of what is not read from a bucket.

    Raises:
      CheckpointError: as `local_destination`.
    """
    return _here(path, f"{what} cannot be read from", "copy it here first:", ("{}", "FOLDER"))


def is_file_on(path: Path) -> bool:
    """Whether there is such a file, here or on a bucket.

    Raises:
      CheckpointError: the bucket cannot be read, or the package that reads it is missing.
    """
    return _asked(path.is_file, path)


def is_folder_on(path: Path) -> bool:
    """Whether there is such a folder, as `is_file_on`."""
    return _asked(path.is_dir, path)


def read_file(path: Path) -> bytes:
    """All bytes of a file, here or on a bucket; raises as `is_file_on`."""
    return _asked(path.read_bytes, path)


def why_not_whole(path: Path) -> str:
    """What keeps a file from being what its name says, and the remedy: a link to nothing, a Git LFS pointer, or ""."""
    if not is_remote(path) and path.is_symlink() and not path.exists():
        return (
            f"{path} is a link to {os.readlink(path)}, which is not there; copy the model with the files behind its "
            "links (cp -rL), or download it again."
        )
    if path.is_file() and size_of(path) <= _LARGEST_POINTER:
        with path.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return (
                    f"{path} is a Git LFS pointer, which stands for the file in a repository; run `git lfs pull` "
                    "there, or download the model again."
                )
    return ""


def size_of(path: Path) -> int:
    status: Any = path.stat()
    return status.length if is_remote(path) else status.st_size


def read_range(path: Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes: mapped from a local file, so that pages come in as they are used; one request to a bucket."""
    if not is_remote(path):
        return np.asarray(np.memmap(path, np.uint8, "r", offset, size))
    with path.open("rb") as stream:
        stream.seek(offset)
        return np.frombuffer(stream.read(size), np.uint8)


def _address(name: str | os.PathLike[str]) -> tuple[str, str]:
    """Scheme and the rest of an address; ("", ...) of a path."""
    match = _ADDRESS.fullmatch(os.fspath(name))
    return (match[1].lower(), match[2]) if match else ("", os.fspath(name))


def _here(path: str | os.PathLike[str], refusal: str, remedy: str, order: tuple[str, str]) -> Path:
    if not is_remote(path):
        return path_of(path)
    scheme, rest = _address(path)
    address = f"{scheme}://{rest}"
    places = " ".join(place.format(shlex.quote(address)) for place in order)
    line = f"`{_COPIERS[scheme]} {places}`" if scheme in _COPIERS else "use the tool of that place"
    raise CheckpointError(f"{refusal} {shown(address, 200)}; {remedy} {line}.")


def _asked(question: Callable[[], Answer], path: Path) -> Answer:
    try:
        return question()
    except ImportError as error:
        line = f": {install_line('gcs')}" if _address(path)[0] == "gs" else ""
        raise CheckpointError(f"reading {path} needs another package ({error}){line}") from None
    except Exception as error:  # each kind of bucket has its own: no such bucket, no permission, no connection
        raise CheckpointError(f"{path} cannot be read ({error}); check its name and your credentials.") from None
