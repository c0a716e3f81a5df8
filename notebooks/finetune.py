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
# # Fine-tuning: a new task in minutes on a CPU
#
# `vl2-nano`, the small model that comes with the project, knows colours. We teach it a question that it has never been asked,
# *is its colour a warm one?*, first with low-rank adapters, then with all of its weights. With a released model the same lines run on a TPU.

# %%
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib.pyplot as plt
import numpy as np

import vl2_jax
from vl2_jax.scenes.drawing import render, sample_scene
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import train
from vl2_jax.training.recipe import build_recipe

folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The data
#
# A conversation a line, pictures beside the file. 200 pictures to learn from, 40 to look at now and then.

# %%
WARM = {"red", "orange", "yellow", "brown"}
QUESTION = "<image>\nIs its colour a warm one?"


def draw(name: str, count: int, seed: int) -> Path:
    lines = []
    for number in range(count):
        scene = sample_scene(np.random.default_rng((seed, number)), most_shapes=1, longest_side=112, most_words=0)
        render(scene).save(folder / f"{name}-{number}.png")
        answer = "yes" if scene.things[0].colour in WARM else "no"
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns, "images": [f"{name}-{number}.png"]}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return path


learned, held_out = draw("learned", 200, seed=1), draw("held-out", 40, seed=2)
print(learned.read_text().splitlines()[0])


# %%
def share_right(vl2) -> float:
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    turns = [[{**row["messages"][0], "images": [folder / row["images"][0]]}] for row in rows]
    answers = vl2.generate(turns, max_tokens=6)
    return float(np.mean([a.text.strip() == row["messages"][1]["content"] for a, row in zip(answers, rows)]))


before = vl2_jax.load("vl2-nano", dtype="float32")
print("right before:", share_right(before))

# %% [markdown]
# ## Adapters
#
# The model stays as it is; small matrices beside its linear layers learn, those of the experts included. Each row of a batch holds several conversations, which do not
# see each other.

# %%
data = {"sources": [{"path": str(learned)}], "sequence_length": 256, "rows": 4, "tiles": 16, "workers": 0}
common = {"model": {"path": "vl2-nano"}, "data": data}
adapters = build_recipe(
    common
    | {
        "lora": {"rank": 8, "targets": ["language/layers_*/*_proj*", "projector/*"]},
        "optimizer": {"learning_rate": 4e-3, "warmup": 5, "schedule": "cosine"},
        "loop": {"steps": 24, "log_every": 3, "checkpoint_every": 0},
    }
)
run = train(adapters, folder / "adapters", print)


# %%
def losses(name: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


plt.figure(figsize=(5, 2.5))
plt.plot(*zip(*losses("adapters")), marker="o")
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# The adapters alone, in the layout that PEFT has, and merged into the model as they are loaded:

# %%
export_run(folder / "adapters", folder / "warm-adapters", print, adapters=True)
for file in sorted((folder / "warm-adapters").iterdir()):
    print(f"{file.name:28} {file.stat().st_size / 1e3:8.0f} kB")
tuned = vl2_jax.load("vl2-nano", dtype="float32", adapters=folder / "warm-adapters")
print("right with adapters:", share_right(tuned))

# %% [markdown]
# ## All weights
#
# The same data, every parameter. The result is a directory in the released layout that any reader of the released models can open.

# %%
everything = build_recipe(
    common
    | {
        "optimizer": {"learning_rate": 5e-4, "warmup": 5, "schedule": "cosine"},
        "loop": {"steps": 18, "log_every": 3, "checkpoint_every": 0},
    }
)
train(everything, folder / "everything", print)
export_run(folder / "everything", folder / "warm", print)
print(sorted(file.name for file in (folder / "warm").iterdir()))
whole = vl2_jax.load(folder / "warm", dtype="float32")
print("right with all weights:", share_right(whole))

# %%
row = json.loads(held_out.read_text().splitlines()[3])
(answer,) = whole.generate([{**row["messages"][0], "images": [folder / row["images"][0]]}], max_tokens=6)
plt.figure(figsize=(2, 2))
plt.imshow(plt.imread(folder / row["images"][0]))
plt.title(answer.text)
plt.axis("off")
plt.show()
