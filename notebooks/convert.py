# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Conversion: released weights to Orbax and back
#
# A released directory becomes a converted one with checksums, and the same bytes again. Then one byte is damaged, to see what happens. The model is `vl2-nano`,
# which comes with the package in the released layout; the same lines convert `"deepseek-ai/deepseek-vl2-tiny"`.

# %%
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hashlib
import json
import tempfile
from pathlib import Path

import vl2_jax
from convert.from_torch import convert
from convert.to_torch import export
from vl2_jax.api import find_model
from vl2_jax.errors import VL2Error
from vl2_jax.scenes.demo import demo_scene
from vl2_jax.scenes.drawing import render

released = find_model("vl2-nano")
folder = Path(tempfile.mkdtemp())


def files_of(directory: Path) -> list[tuple[str, int]]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in files]


for name, size in files_of(released):
    print(f"{size:12,} {name}")

# %% [markdown]
# ## There
#
# In a terminal: `vl2 convert SOURCE DESTINATION`. A layer is read and written at a time, and the directory gets its name after the last byte.

# %%
converted = folder / "converted"
convert(released, converted)
found = files_of(converted)
print(len(found), "files")
for name, size in [row for row in found if not row[0].startswith("params/")]:
    print(f"{size:12,} {name}")

# %% [markdown]
# The manifest has a line for each parameter: type, shape, checksum.

# %%
manifest = json.loads((converted / "manifest.json").read_text())
tensors = manifest["tensors"]
print(len(tensors), "parameters")
for name in sorted(tensors)[:3]:
    print(name, tensors[name])

# %% [markdown]
# ## And back
#
# `vl2 export SOURCE DESTINATION`. Every file that both have is the same, byte for byte.

# %%
again = folder / "again"
export(converted, again)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


for name, _ in files_of(again):
    if name != "manifest.json" and (released / name).exists():
        same = digest(released / name) == digest(again / name)
        print(f"{name:28} {digest(again / name)} {'the same' if same else 'another'}")
        assert same

# %% [markdown]
# ## A damaged byte
#
# Disks and copies go wrong in silence. We turn one bit of the largest file of weights, and load.

# %%
largest = max(
    (path for path in (converted / "params").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
)
data = bytearray(largest.read_bytes())
data[len(data) // 2] ^= 1
largest.write_bytes(data)
try:
    vl2_jax.load(converted)
except VL2Error as error:
    print(str(error).replace(str(folder), ""))
else:
    raise AssertionError("it was not noticed")

# %% [markdown]
# The error names the parameter. `verify=False` (`--no-verify`) would load it all the same. The bit turned back, it loads:

# %%
data[len(data) // 2] ^= 1
largest.write_bytes(data)
vl2 = vl2_jax.load(converted)
question = {"role": "user", "content": "<image>\nWhat is written here?", "images": [render(demo_scene())]}
(answer,) = vl2.generate([question], max_tokens=8)
print(answer.text)
