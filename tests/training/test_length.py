"""A run ends where its steps or its passes do, and schedules come down there."""

import math

import numpy as np
import pytest

from vl2_jax.errors import ConfigError
from vl2_jax.training.length import Length
from vl2_jax.training.optimizer import learning_rate
from vl2_jax.training.recipe import OptimizerRecipe, build_recipe

FILE, SCENES = {"path": "a.jsonl"}, {"scenes": 1}


def length(sources=(FILE,), **given):
    tables = {"data": {"sources": list(sources)}, "loop": {}}
    for key, value in given.items():
        tables["data" if key == "epochs" else "loop"][key] = value
    return Length.of(build_recipe(tables))


def test_steps_alone_or_epochs_alone_say_how_long_a_run_is():
    assert length(steps=6).total(3, 0.0) == 6
    assert length(epochs=3).total(5, 0.25) == 20
    assert length(epochs=3).total(5, 0.0) == math.inf


@pytest.mark.parametrize(("read", "total"), [(0.1, 30), (0.5, 10), (1.0, 5)])
def test_with_both_the_shorter_one_counts(read, total):
    assert length(epochs=1, steps=30).total(5, read) == total


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing says how long the run is; set data.epochs"),
        ({"epochs": 2, "sources": [SCENES]}, "scenes have no end"),
    ],
)
def test_a_run_without_an_end_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        length(**given)


def test_what_ended_a_run_is_said():
    both = length(epochs=3, steps=6)
    assert both.end(6, 0.25) == (
        "loop.steps = 6 ended the run, with 25 % of data.epochs = 3 read; --set loop.steps= goes to their end"
    )
    assert both.end(5, 1.0) == "the data ended after 5 steps (data.epochs = 3); loop.steps = 6 was not reached"
    assert length(steps=6).end(6, 0.0) == "loop.steps = 6 ended the run"
    assert both.plan(144) == (
        "the run ends after 6 steps (loop.steps) or data.epochs = 3, 144 conversations, whichever comes first"
    )


@pytest.mark.parametrize("schedule", ["cosine", "warmup_stable_decay"])
def test_a_rate_that_follows_the_data_comes_down_to_its_end(schedule):
    """Batches hold unlike numbers of samples, so the length is not known before."""
    random = np.random.default_rng(0)
    counts = random.integers(4, 12, 40)
    recipe = OptimizerRecipe(learning_rate=1.0, schedule=schedule, warmup=4)
    run, total = length(epochs=1), counts.sum()
    rates, known = [], []
    for step, read in enumerate(np.cumsum(counts)):
        rates.append(learning_rate(recipe, step, run.total(step + 1, read / total)))
        known.append(learning_rate(recipe, step, 40))
    assert rates[-1] == known[-1]
    assert rates[-1] < 0.25
    np.testing.assert_allclose(rates, known, atol=0.12)
