"""From random weights to exact answers: 32 pictures with a question each."""

import json

import numpy as np
import pytest

import vl2_jax
from vl2_jax.scenes import SceneSizes, scene_conversation
from vl2_jax.training.loop import train
from vl2_jax.training.recipe import build_recipe


@pytest.mark.slow
def test_thirty_two_questions_are_learned_by_heart(tmp_path):
    rows, asked = [], []
    for number in range(32):
        sizes = SceneSizes(turns=1, most_shapes=2, most_words=1, longest_side=112)
        question, answer = scene_conversation((77, number), sizes)["messages"]
        names = [f"{number}-{i}.png" for i in range(len(question["images"]))]
        for name, picture in zip(names, question["images"], strict=True):
            picture.save(tmp_path / name)
        asked.append(([question], answer["content"]))
        turns = [{"role": m["role"], "content": m["content"]} for m in (question, answer)]
        rows.append(json.dumps({"messages": turns, "images": names}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    recipe = build_recipe(
        {
            "model": {"preset": "vl2-nano", "tokenizer": "vl2-nano"},
            "data": {
                "sources": [{"path": str(tmp_path / "pairs.jsonl")}],
                "sequence_length": 512,
                "rows": 8,
                "tiles": 72,
                "workers": 0,
            },
            "optimizer": {
                "kind": "muon",
                "learning_rate": 3e-3,
                "warmup": 10,
                "schedule": "cosine",
                "weight_decay": 0.0,
            },
            "loop": {"steps": 70, "log_every": 20, "checkpoint_every": 0},
        }
    )
    run = train(recipe, tmp_path / "run", print)
    vl2 = vl2_jax.VL2(run.model.config, run.params, run.processor, "float32")
    answers = vl2.generate([turns for turns, _ in asked], max_tokens=128)
    right = [answer.text.strip() == expected for answer, (_, expected) in zip(answers, asked, strict=True)]
    assert np.mean(right) == 1.0, [(a.text, e) for a, (_, e), r in zip(answers, asked, right, strict=True) if not r]
