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
# The model here is `vl2-nano`, which comes with the project: it is small, and knows only drawn scenes of shapes and words. Give
# `vl2_jax.load` a released model: `"deepseek-ai/deepseek-vl2-tiny"` (9 GB of memory on a CPU), or its directory.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import vl2_jax
from vl2_jax.processing.grounding import draw_boxes, parse_boxes
from vl2_jax.scenes.demo import demo_scene
from vl2_jax.scenes.drawing import render

picture = render(demo_scene())  # a path, bytes or an address would do as well

vl2 = vl2_jax.load("vl2-nano")
print(f"{sum(a.size for a in jax.tree.leaves(vl2.params)):,} parameters")

# %% [markdown]
# ## What the model sees
#
# The picture is shown twice: as a whole (the *global view*), and cut into the raster of tiles that fits its shape best. A conversation is a list of
# messages; `<image>` marks where a picture belongs, and the last message is the answer, still empty.

# %%
conversation = [
    {"role": "user", "content": "<image>\nWhat do you see?", "images": [picture]},
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
questions = ["How many shapes are there?", "Where is the green star, seen from the yellow circle: above or below it?"]
several = [[{"role": "user", "content": f"<image>\n{q}", "images": [picture]}] for q in questions]
for row in vl2.generate(several, max_tokens=8, temperature=0.7, seed=1):
    print(row.prompt_tokens, repr(row.text))

chat = vl2.chat()
chat.ask("<image>\nWhat do you see?", [picture], max_tokens=8)
answer = chat.ask("Are you sure?", max_tokens=8)
print(answer.timings.reused_tokens, "positions came from the cache")

# %% [markdown]
# ## Point at things
#
# Asked with `<|ref|>...<|/ref|>`, the model answers with boxes: numbers are 0 to 999 of the picture's sides, and `answer.boxes` are pixels. The beginning of an
# answer can be given, and the model continues it.

# %%
begun = "<|ref|>the circle<|/ref|><|det|>[["
turns = [
    {"role": "user", "content": "<image>\n<|ref|>the circle<|/ref|>", "images": [picture]},
    {"role": "assistant", "content": begun},
]
(answer,) = vl2.generate(turns, max_tokens=24)
boxes = parse_boxes(begun + answer.text, *picture.size)
print(answer.text, boxes)
plt.figure(figsize=(4, 4))
plt.imshow(draw_boxes(picture, boxes))
plt.axis("off")
