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
# # Narrow weights: int8 and int4
#
# A model in less memory (Small in half, or a third), and what that does to its answers. The model is `vl2-nano`, which comes with the package: it knows drawn
# scenes of shapes and words, and nothing else. The same lines load a released model: `vl2_jax.load("deepseek-ai/deepseek-vl2-tiny", weights="int4")`.

# %%
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import matplotlib.pyplot as plt

import vl2_jax
from vl2_jax.cli.info import config_of, describe
from vl2_jax.scenes.conversations import SceneSizes
from vl2_jax.scenes.demo import demo_scene
from vl2_jax.scenes.drawing import render
from vl2_jax.scenes.evaluation import questions

# %% [markdown]
# ## Three ways to keep the same weights
#
# `weights=` rounds the matrices of the decoder while they are loaded. Router, norms, embeddings and the vision tower stay as they are.

# %%
kinds = {"bfloat16": None, "int8": "int8", "int4": "int4"}
models = {name: vl2_jax.load("vl2-nano", weights=kind) for name, kind in kinds.items()}
held = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) for name, model in models.items()}
for name, size in held.items():
    print(f"{name:10} {size / 1e6:6.2f} MB")

# %% [markdown]
# ## The same question

# %%
picture = render(demo_scene())
question = [{"role": "user", "content": "<image>\nWhat do you see?", "images": [picture]}]
for name, model in models.items():
    (answer,) = model.generate(question, max_tokens=24)
    print(f"{name:10} {answer.text!r}, log-probability {sum(answer.logprobs):.2f}")
picture

# %% [markdown]
# ## Many questions
#
# One answer says little. Drawn scenes have one right answer each, so we count. A difference of a few percent is chance with so few.

# %%
asked = [
    row for row in questions(1_000_000, 8, SceneSizes()) if row[0] in ("colour", "shape", "count", "read", "presence")
]
right = {}
for name, model in models.items():
    found = []
    for _, images, text, expected in asked:
        (answer,) = model.generate([{"role": "user", "content": text, "images": images}], max_tokens=12)
        found.append(answer.text.strip() == expected)
    right[name] = sum(found) / len(found)
    print(f"{name:10} {len(found)} questions, {100 * right[name]:.0f} % right")

# %%
figure, (left, middle) = plt.subplots(1, 2, figsize=(7, 2.0), layout="constrained")
left.barh(list(held), [size / 1e6 for size in held.values()])
left.set_xlabel("memory of the weights, MB")
middle.barh(list(right), [100 * share for share in right.values()])
middle.set_xlabel("right answers, %")
plt.show()

# %% [markdown]
# ## The released sizes
#
# From shapes alone, without any weights: bytes of all parameters.

# %%
for size in ("vl2-tiny", "vl2-small", "vl2-base"):
    facts = describe(config_of(size))
    row = [f"{kind} {facts[f'memory_bytes_{kind}'] / 1e9:5.1f} GB" for kind in ("bfloat16", "int8", "int4")]
    print(f"{size:10} {', '.join(row)}")
