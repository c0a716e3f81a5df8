"""The weights that ship: as good as the README says on scenes they have not seen, and readable without this project."""

import json

import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from convert.weight_map import plan, torch_shapes
from vl2_jax.api import find_model, load
from vl2_jax.scenes import SceneSizes
from vl2_jax.scenes.evaluation import ask_all, table


@pytest.mark.slow
def test_the_shipped_model_reaches_its_goals():
    rows = {
        row.skill: row.score for row in table(ask_all(load("vl2-nano", dtype="float32"), 200, 1_000_000, SceneSizes()))
    }
    assert rows["all short questions"] >= 0.90
    assert rows["all boxes"] >= 0.85
    assert rows["read"] >= 0.80


def test_the_shipped_files_are_of_the_released_layout():
    folder = find_model("vl2-nano")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 12e6
    config = load("vl2-nano").config
    tensors = load_file(folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == torch_shapes(plan(config))
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_vl_v2"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    for role in ("bos", "eos", "pad"):
        assert tokenizer.token_to_id(described[f"{role}_token"]) is not None
    text = "<|ref|>the red star<|/ref|>"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text
