"""`vl2 doctor`: what this machine has, and the lines that add what is missing."""

from __future__ import annotations

import sys
from importlib import metadata

from vl2_jax.installation import install_line

_PACKAGES = (  # what is looked for: its extra, and what it is for
    ("jax", "", ""), ("jaxlib", "", ""), ("flax", "", ""), ("orbax-checkpoint", "", ""),
    ("libtpu", "tpu", "on a TPU machine, or to plan for one"), ("grain", "train", "to train"),
    ("tensorboardX", "train", "to see training in TensorBoard"), ("pyarrow", "train", "to read parquet and arrow"),
    ("matplotlib", "plan", "to draw a plan"), ("pillow-heif", "heif", "to read HEIC pictures"),
    ("fastapi", "serve", "to serve a model over HTTP"), ("gradio", "demo", "to open the web page"),
    ("gcsfs", "gcs", "to read from a bucket"),
)  # fmt: skip


def doctor() -> None:
    """What this machine has, what is missing, and the line that adds it.

    Example: vl2 doctor
    """
    import jax

    print(f"{'python':16} {sys.version.split()[0]}")
    for package, extra, purpose in _PACKAGES:
        try:
            print(f"{package:16} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package:16} missing; {purpose}: {install_line(extra)}")
    for device in jax.devices():
        print(f"{'device':16} {device.device_kind} ({device.platform}:{device.id})")
