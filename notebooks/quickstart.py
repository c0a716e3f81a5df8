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
# # Quickstart: ask a picture a question
#
# Load a model, see what it sees, ask, and draw the boxes of its answer. Everything runs on a CPU in about a minute.
#
# The model here is `vl2-nano` with **random weights**: it shows how things work, and its answers mean nothing. For real answers give
# `vl2_jax.load` a released model: `"deepseek-ai/deepseek-vl2-tiny"` (13 GB of memory in float32), or its directory.
#
# In Colab or elsewhere without a checkout, first: `%pip install "vl2-jax[notebooks]"`.

# %%
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import vl2_jax
from convert.random_checkpoint import create
from vl2_jax.processing.grounding import draw_boxes, parse_boxes
from vl2_jax.processing.images import load_image

root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "assets").is_dir())
photograph = root / "assets" / "grace_hopper.jpg"
directory = root / "out" / "nano"
if not directory.is_dir():
    create("vl2-nano", directory)

vl2 = vl2_jax.load(directory)
print(f"{sum(a.size for a in jax.tree.leaves(vl2.params)):,} parameters")

# %% [markdown]
# ## What the model sees
#
# The picture is shown twice: as a whole (the *global view*), and cut into the raster of tiles that fits its shape best. A conversation is a list of
# messages; `<image>` marks where a picture belongs, and the last message is the answer, still empty.

# %%
conversation = [
    {"role": "user", "content": "<image>\nWho is this?", "images": [str(photograph)]},
    {"role": "assistant", "content": ""},
]
batch = vl2.processor(conversation)
across, down = batch.crops[0, 0]
print(
    f"{batch.input_ids.shape[1]} positions, {batch.images_mask.sum()} of them show the picture: {across} x {down} tiles"
)

figure, axes = plt.subplots(1, len(batch.tiles), figsize=(2 * len(batch.tiles), 2.3))
for number, (tile, place) in enumerate(zip(batch.tiles, axes)):
    place.imshow(tile)
    place.set_title("global view" if number == 0 else f"tile {number}")
    place.set_axis_off()

# %% [markdown]
# ## Ask
#
# `generate` takes a conversation or a list of them, and returns a list of answers. Text can be streamed with `on_text`.

# %%
(answer,) = vl2.generate(conversation, max_tokens=24)
print(repr(answer.text))
print(answer.finish_reason, answer.token_ids[:8], np.round(answer.logprobs[:4], 2))

# %% [markdown]
# Sampling, several questions at once (of any lengths: each gets the answer that it would get alone), and a chat that keeps its cache:

# %%
questions = ["Describe the picture.", "What is on her jacket, and what does it tell about her career in the navy?"]
several = [[{"role": "user", "content": f"<image>\n{q}", "images": [str(photograph)]}] for q in questions]
for row in vl2.generate(several, max_tokens=8, temperature=0.7, seed=1):
    print(row.prompt_tokens, repr(row.text))

chat = vl2.chat()
chat.ask("<image>\nWho is this?", [str(photograph)], max_tokens=8)
chat.ask("Are you sure?", max_tokens=8)
print(vl2.generator.timings.reused_tokens, "positions came from the cache")

# %% [markdown]
# ## Point at things
#
# A trained model answers `<|ref|>the hat<|/ref|>` with boxes. The beginning of an answer can be given, and the model continues it. Random weights
# would never close the bracket, so we write a whole answer ourselves to see what happens with it: numbers are 0 to 999 of the picture's sides.

# %%
hat = "<|ref|>the hat<|/ref|><|det|>[[330, 10, 740, 270]]<|/det|>"
ribbons = "<|ref|>the ribbons<|/ref|><|det|>[[640, 810, 860, 890]]<|/det|>"
picture = load_image(photograph)
boxes = parse_boxes(f"She wears {hat} and {ribbons}.", *picture.size)
print(boxes)
plt.figure(figsize=(4, 4.7))
plt.imshow(draw_boxes(picture, boxes))
plt.axis("off")
