"""Recipes are read strictly: what is misspelled or of another kind is named."""

import pytest

from vl2_jax.errors import ConfigError
from vl2_jax.training.recipe import read_recipe


def test_changes_are_laid_over_the_file(recipe_file):
    recipe = read_recipe(recipe_file(), ["optimizer.learning_rate=2", "data.on_bad_sample=raise", "loop.steps=5"])
    assert (recipe.optimizer.learning_rate, recipe.data.on_bad_sample, recipe.loop.steps) == (2.0, "raise", 5)
    assert recipe.data.sources[0].weight == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.learning_rat=1", "did you mean 'learning_rate'"),
        ("optimiser.clip=1", "did you mean 'optimizer'"),
        ("loop.steps=many", "loop.steps is 'many'; expected int"),
        ("loop.steps=true", "expected int"),
        ("data.sources=[{file='x'}]", "unknown key data.sources.file"),
        ("data.sources=3", "must be a list"),
        ("model=3", "must be a table"),
        ("loop.steps", "expected table.key=value"),
    ],
)
def test_a_wrong_key_or_value_is_named(recipe_file, change, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe_file(), [change])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no recipe"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_recipe(tmp_path / "broken.toml")
