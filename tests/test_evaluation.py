"""`vl2 eval` asks every question by itself and scores what comes back; its mistakes are named."""

import json

import pytest

from vl2_jax.cli import main
from vl2_jax.errors import VL2Error
from vl2_jax.scenes import SceneSizes, scene_conversation
from vl2_jax.scenes.evaluation import questions


def test_a_random_model_is_asked_everything(first_layers, capsys):
    main(["eval", "--model", str(first_layers("nano-small")), "--count", "2", "--longest-side", "112", "--json"])
    rows = json.loads(capsys.readouterr().out)
    asked = sum(len(scene_conversation((1_000_000, n), SceneSizes(longest_side=112))["skills"]) for n in range(2))
    totals = [name for name in rows if name.startswith("all ")]
    assert sum(row["questions"] for name, row in rows.items() if name not in totals) == asked
    assert all(0 <= row["score"] < 0.5 for row in rows.values())


def test_every_question_stands_alone_with_its_pictures():
    for _, images, question, answer in questions(3, 10, SceneSizes(longest_side=112)):
        assert question.count("<image>") == len(images) > 0
        assert answer


def test_nothing_to_ask_is_refused(capsys):
    with pytest.raises((SystemExit, VL2Error)):
        main(["eval", "--model", "nowhere", "--count", "0"])
    assert "--count is 0" in capsys.readouterr().err
