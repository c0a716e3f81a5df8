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
# # Serving: OpenAI's API over a model of yours
#
# Start the server, ask it with OpenAI's own client, stream an answer, draw its boxes. The model is `vl2-nano`, which comes with the package: it knows
# drawn scenes of shapes and words, and nothing else. `vl2 serve deepseek-ai/deepseek-vl2-tiny` serves a released model.

# %%
import base64
import importlib.util
import io
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import matplotlib.pyplot as plt

from vl2_jax.processing.grounding import Box, draw_boxes
from vl2_jax.scenes.demo import demo_scene
from vl2_jax.scenes.drawing import render

if importlib.util.find_spec("openai") is None:  # the client is no part of vl2-jax
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "openai"], check=True)
from openai import OpenAI

# %% [markdown]
# ## Start
#
# In a terminal this is `vl2 serve vl2-nano`. The port is open at once; `/ready` answers 200 when every program is compiled.

# %%
command = [sys.executable, "-m", "vl2_jax.cli", "serve", "vl2-nano", "--port", "0", "--max-num-seqs", "4"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"JAX_PLATFORMS": "cpu"} | os.environ)
line = server.stderr.readline()
while "http://" not in line:
    assert line, "the server ended"
    line = server.stderr.readline()
address = "http://" + line.split("http://")[1].split("/")[0]
threading.Thread(target=server.stderr.read, daemon=True).start()  # so that it never waits for a reader


def is_ready() -> bool:
    try:
        return urllib.request.urlopen(f"{address}/ready").status == 200
    except urllib.error.HTTPError:  # 503, with the stage it is in
        return False


while not is_ready():
    assert server.poll() is None, "the server ended"
    time.sleep(0.5)
print("ready")

# %% [markdown]
# ## Ask
#
# A picture goes along as a `data:` address.

# %%
picture = render(demo_scene())
file = io.BytesIO()
picture.save(file, "PNG")
url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(text: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


client = OpenAI(base_url=f"{address}/v1", api_key="none")
answer = client.chat.completions.create(
    model="vl2-nano", messages=question("What is written here?"), temperature=0, max_tokens=30
)
print(answer.choices[0].message.content)
print(answer.usage.prompt_tokens, "tokens of the prompt,", answer.usage.completion_tokens, "of the answer")
picture

# %% [markdown]
# ## Stream

# %%
stream = client.chat.completions.create(
    model="vl2-nano", messages=question("What do you see?"), temperature=0, max_tokens=40, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="|")

# %% [markdown]
# ## Boxes
#
# Asked with `<|grounding|>` or `<|ref|>...<|/ref|>`, the answer points at things. `message.boxes` has them in pixels of the picture.

# %%
answer = client.chat.completions.create(
    model="vl2-nano", messages=question("<|grounding|>What do you see?"), temperature=0, max_tokens=120
)
message = answer.choices[0].message
boxes = [Box(b["label"], b["x1"], b["y1"], b["x2"], b["y2"], tuple(b["raw"])) for b in message.boxes]
print(message.content)
for box in boxes:
    print(box)
plt.figure(figsize=(3, 3))
plt.imshow(draw_boxes(picture, boxes))
plt.axis("off")
plt.show()

# %% [markdown]
# ## Many at once
#
# The engine decodes one token of everybody in one program. Each gets what it would get alone.

# %%
texts = ["What is written here?", "How many shapes are there?", "What do you see?"] * 4
found: dict[int, str] = {}


def ask(number: int) -> None:
    got = client.chat.completions.create(
        model="vl2-nano", messages=question(texts[number]), temperature=0, max_tokens=30
    )
    found[number] = got.choices[0].message.content


threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for number in range(3):
    assert len({found[other] for other in range(number, len(texts), 3)}) == 1
    print(f"{texts[number]:32} {found[number]}")

# %% [markdown]
# ## Stop
#
# SIGTERM lets running answers end.

# %%
server.terminate()
print("ended with code", server.wait(timeout=60))
