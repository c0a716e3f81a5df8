"""Recipes are read strictly: what is misspelled or of another kind is named."""

import pytest

from vl2_jax.config import configs_directory
from vl2_jax.errors import ConfigError, VL2Error
from vl2_jax.training.length import Length
from vl2_jax.training.optimizer import optimizer_of
from vl2_jax.training.recipe import build_recipe, read_recipe

RECIPES = configs_directory() / "training"


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
        ("loop.steps.most=1", "steps is no table"),
        ("loop.steps=0", "loop.steps is 0; expected at least 1"),
        ("data.rows=0", "data.rows is 0; expected at least 1"),
        ("data.sources=[{scenes=1, weight=0}]", "weight of a data source is 0.0"),
        ("optimizer.accumulate=0", "optimizer.accumulate is 0"),
        ("optimizer.learning_rate=-1.0", "optimizer.learning_rate is -1.0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan"),
        ("optimizer.state_dtype=bf16", "'bf16'; expected float32 or bfloat16"),
        ("objective.loss_chunk=0", "objective.loss_chunk is 0"),
        ("evaluation.batches=0", "evaluation.batches is 0"),
        ("optimizer.beta1=1.5", "beta1 is 1.5; expected at least 0 and below 1"),
        ("data.seed=5_000_000_000", "expected at least 0 and below 4,294,967,296"),
        ("loop.stepz=", "did you mean 'steps'"),
        ("loop.keep_best=true", "keep_best needs evaluation.sources"),
    ],
)
def test_a_wrong_key_or_value_is_named(recipe_file, change, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe_file(), [change])


def test_what_a_file_says_is_taken_back_by_a_change_without_a_value(recipe_file):
    recipe = read_recipe(recipe_file(), ["loop.steps=", "data.epochs=3", "model.tokenizer="])
    assert (recipe.loop.steps, recipe.data.epochs, recipe.model.tokenizer) == (None, 3, None)


def test_what_is_trained_whole_is_trained_beside_adapters(recipe_file):
    with pytest.raises(ConfigError, match=r"lora\.whole is for training beside adapters"):
        read_recipe(recipe_file(), ["lora.whole=['projector/*']"])


def test_adapters_are_gone_on_from_on_the_model_they_were_made_for():
    with pytest.raises(ConfigError, match=r"model\.adapters needs model\.path"):
        build_recipe({"model": {"preset": "vl2-tiny", "adapters": "some"}})


def test_training_data_on_a_bucket_is_refused_before_the_work():
    with pytest.raises(VL2Error, match=r"copy it here first: `gcloud storage cp -r gs://b/data\.jsonl FOLDER`"):
        build_recipe({"data": {"sources": [{"path": "gs://b/data.jsonl"}]}})


def test_a_missing_or_broken_file_is_named(tmp_path):
    for name in ("none.toml", "sft-tiny.toml"):  # one of the project's is found by its name, not in any place
        with pytest.raises(ConfigError, match="no recipe"):
            read_recipe(tmp_path / name)
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        read_recipe(tmp_path / "broken.toml")


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "first.toml").write_text('optimizer = { learning_rate = 1e-4, warmup = 5 }\nmodel.path = "a"\n')
    (tmp_path / "second.toml").write_text('extends = "first.toml"\noptimizer.warmup = 7\n')
    recipe = read_recipe(tmp_path / "second.toml", ["loop.steps=3"])
    assert (recipe.optimizer.learning_rate, recipe.optimizer.warmup, recipe.model.path) == (1e-4, 7, "a")
    assert recipe.loop.steps == 3
    (tmp_path / "third.toml").write_text('extends = "lora-tiny.toml"\nlora.rank = 4\n')
    assert read_recipe(tmp_path / "third.toml").lora.rank == 4
    (tmp_path / "first.toml").write_text('extends = "second.toml"\n')
    with pytest.raises(ConfigError, match="extends itself"):
        read_recipe(tmp_path / "second.toml")
    (tmp_path / "first.toml").write_text('extends = "nowhere.toml"\n')
    with pytest.raises(ConfigError, match=r"no recipe .*nowhere\.toml"):
        read_recipe(tmp_path / "second.toml")


def test_a_recipe_of_the_project_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_recipe("lora-small") == read_recipe(RECIPES / "lora-small.toml")
    with pytest.raises(ConfigError, match=r"no recipe 'lora-smal'; give a TOML file or one of .*lora-small"):
        read_recipe("lora-smal")


TABLE = {  # the paper's table 2
    "align": {"tiny": 5.4e-4, "small": 4.2e-4, "base": 4.5e-4},
    "pretrain": {"tiny": 5.4e-4, "small": 4.2e-4, "base": 4.5e-4},
    "sft": {"tiny": 3e-5, "small": 1.4e-5, "base": 2e-5},
}


@pytest.mark.parametrize(("stage", "size"), [(stage, size) for stage in TABLE for size in ("tiny", "small", "base")])
def test_the_recipes_carry_the_papers_table(stage, size):
    recipe = read_recipe(RECIPES / f"{stage}-{size}.toml")
    optimizer, is_base = recipe.optimizer, size == "base"
    assert optimizer.learning_rate == TABLE[stage][size]
    assert optimizer.schedule == {"align": "cosine", "pretrain": "step", "sft": "constant"}[stage]
    assert (optimizer.vision_multiplier, optimizer.weight_decay, optimizer.clip) == (0.1, 0.1, 1.0)
    assert (optimizer.beta1, optimizer.beta2, optimizer.kind) == (0.9, 0.95, "adamw")
    assert optimizer.frozen == (("language/*",) if stage == "align" else ())
    assert optimizer.state_dtype == ("bfloat16" if is_base else "float32")
    assert recipe.objective.balance_loss == (0.0001 if is_base else 0.001)
    assert recipe.objective.bias_step == (0.001 if is_base and stage == "pretrain" else 0.0)
    batch = {"align": 256, "pretrain": 3360 if is_base else 2304, "sft": 64}[stage]
    assert recipe.data.rows * optimizer.accumulate == batch
    assert recipe.data.sequence_length == 4096
    tokens = {"align": 2.0, "pretrain": 800.0, "sft": 20.0}[stage]
    assert recipe.loop.steps * batch * 4096 / 1e9 == pytest.approx(tokens, rel=0.05)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_reads(path):
    recipe = read_recipe(path)
    optimizer_of(recipe.optimizer)
    assert Length.of(recipe)
