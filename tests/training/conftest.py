"""A small data set of real pictures, and a recipe that trains a small model on it in seconds."""

import functools
import json

import pytest

from tests.conftest import GOLDENS
from vl2_jax.training import loop
from vl2_jax.training.recipe import read_recipe

PICTURES = ("square.png", "tall.png", "medium.png", "grey.png", "tiny.png")
ANSWERS = ("a square", "a tower", "two things", "grey", "nearly nothing", "no picture at all")


@pytest.fixture(scope="session", autouse=True)
def _an_update_is_traced_once():
    """Runs of equal recipes share their jitted update: tracing it takes as long as a whole run of these."""
    made = functools.cache(loop.make_step)

    def make_step(model, recipe, like=None):
        return made(model, recipe) if like is None else made.__wrapped__(model, recipe, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make_step)
        yield


@pytest.fixture(scope="session")
def small_model(first_layers):
    return first_layers("nano-base")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Six conversations: five with one picture each, one without, as JSONL in two of the known forms."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = []
    for number, (picture, answer) in enumerate(zip(PICTURES, ANSWERS)):
        image = str(GOLDENS / "images" / picture)
        if number % 2:
            turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
            rows.append({"image": image, "conversations": turns})
        else:
            turns = [{"role": "user", "content": "<image>\nAnd this?"}, {"role": "assistant", "content": answer}]
            rows.append({"images": [image], "messages": turns})
    rows.append({"question": "What do you see?", "answer": ANSWERS[-1]})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="session")
def write_recipe(data_file, small_model):
    def write(path, model=small_model):
        path.write_text(
            f"""
            [model]
            path = "{GOLDENS / model}"
            scan = true
            [data]
            sources = [{{ path = "{data_file}" }}]
            sequence_length = 256
            rows = 2
            tiles = 24
            workers = 0
            [objective]
            bias_step = 0.001
            [optimizer]
            learning_rate = 1e-3
            schedule = "cosine"
            warmup = 2
            [loop]
            steps = 8
            log_every = 1
            checkpoint_every = 3
            """
        )
        return path

    return write


@pytest.fixture
def recipe_file(tmp_path, write_recipe):
    return functools.partial(write_recipe, tmp_path / "recipe.toml")


@pytest.fixture
def recipe(recipe_file):
    def read(*changes, **choices):
        return read_recipe(recipe_file(**choices), changes)

    return read
