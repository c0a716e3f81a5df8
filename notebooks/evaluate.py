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
# # Evaluation: how often a model is right
#
# `vl2 eval` asks about drawn scenes that the model has not seen. Each scene is drawn from a number, so its right answers are known, and the same number gives the same
# questions anywhere. The model is `vl2-nano`, which comes with the package and knows such scenes and nothing else; a released model is asked with
# `--model deepseek-ai/deepseek-vl2-tiny`.

# %%
import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib.pyplot as plt

import vl2_jax
from vl2_jax.processing.grounding import draw_boxes, parse_boxes
from vl2_jax.scenes.conversations import SceneSizes
from vl2_jax.scenes.evaluation import ask_all, table

# %% [markdown]
# ## The command
#
# In a terminal: `vl2 eval --model vl2-nano --count 6`. A hundred scenes, the default, make a better estimate.

# %%
command = [sys.executable, "-m", "vl2_jax.cli", "eval", "--model", "vl2-nano", "--count", "6"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

# %% [markdown]
# ## The answers themselves
#
# The same in Python, where every question, its right answer and the model's can be looked at.

# %%
vl2 = vl2_jax.load("vl2-nano", dtype="float32")
asked = ask_all(vl2, 30, 5, SceneSizes())
wrong = [one for one in asked if one.score < 1]
print(f"{len(asked)} questions, {len(wrong)} not wholly right")
for one in wrong[:6]:
    print(
        f"- {one.skill}: {one.question.splitlines()[-1]}\n    right {one.expected!r}, the model says {one.answer.text!r}"
    )

# %% [markdown]
# ## A wrong answer, with its picture

# %%
shown = [one for one in wrong if len(one.images) == 1][:3]
figure, axes = plt.subplots(1, 3, figsize=(8, 2.8), squeeze=False, layout="constrained")
for place in axes[0]:
    place.set_axis_off()
for place, one in zip(axes[0], shown):
    picture = one.images[0]
    place.imshow(draw_boxes(picture, parse_boxes(one.answer.text, *picture.size)))
    place.set_title(f"{one.question.splitlines()[-1][:40]}\n{one.answer.text[:36]}", fontsize=7)
plt.show()

# %% [markdown]
# ## Scores by skill

# %%
rows = table(asked)
plt.figure(figsize=(6, 3), layout="constrained")
plt.barh([row.skill for row in rows], [100 * row.score for row in rows])
plt.xlabel("right, %")
plt.show()
