"""What a run was begun with is kept to, and rows of numbers hold every step once."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from vl2_jax.errors import CheckpointError, ConfigError
from vl2_jax.training.checkpoints import Checkpoints
from vl2_jax.training.evaluation import best_step
from vl2_jax.training.export import export_run
from vl2_jax.training.folder import check_run, keep_recipe, keep_rows, rows_of
from vl2_jax.training.loop import _warn_of_lost_updates
from vl2_jax.training.recipe import build_recipe
from vl2_jax.training.step import TrainState


def silent(_):
    pass


@pytest.fixture
def begun(tmp_path):
    """A run on one file, and what makes its recipe with other values of data."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "?", "answer": "a"}\n{"question": "?", "answer": "b"}\n')

    def recipe(*more, **data):
        return build_recipe({"data": {"sources": [{"path": str(path)}, *more], **data}, "loop": {"steps": 3}})

    keep_recipe(tmp_path, recipe(), check_run(tmp_path, recipe(), False, silent))
    return path, recipe


def test_data_that_changed_under_a_run_is_refused(begun, tmp_path):
    path, recipe = begun
    check_run(tmp_path, recipe(), True, silent)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")  # as long as it was
    with pytest.raises(ConfigError, match=r"data\.jsonl changed since .* was begun"):
        check_run(tmp_path, recipe(), True, silent)
    check_run(tmp_path, recipe(), False, silent)


def test_epochs_may_change_where_they_leave_the_order_as_it_is(begun, tmp_path):
    _, recipe = begun
    told = []
    check_run(tmp_path, recipe(epochs=2, workers=3), True, told.append)
    assert told == ["going on with other values of data.epochs, data.workers"]
    several = recipe({"scenes": 1})
    keep_recipe(tmp_path, several, {})
    with pytest.raises(ConfigError, match=r"another recipe \(data\.epochs\)"):
        check_run(
            tmp_path, dataclasses.replace(several, data=dataclasses.replace(several.data, epochs=2)), True, silent
        )


def test_rows_after_the_step_that_is_gone_on_from_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": n / 2}) + "\n" for n in range(1, 6)) + '{"step": 6, "lo')
    keep_rows(path, 4)
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 4]
    assert path.read_text().endswith('"loss": 2.0}\n')


def test_the_best_checkpoint_is_kept_and_found_again(tmp_path):
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 1.0}, {"step": 4, "loss": None}]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checkpoints = Checkpoints(tmp_path, 1, silent)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, {"a": jnp.full(2, step)}, {})
        checkpoints.wait()
        checkpoints.best = best_step(tmp_path, checkpoints.steps())[1]
    assert checkpoints.steps() == [2, 4]
    assert best_step(tmp_path, [2, 4]) == (0.5, 2)
    assert best_step(tmp_path, [4])[1] is None
    step, read = checkpoints.of_step(2)
    assert read(["a"])["a"].tolist() == [2, 2]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; the steps that have one: 2, 4"):
        checkpoints.of_step(3)


def test_the_best_of_a_run_that_was_never_evaluated_is_refused(begun, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of a step that was evaluated"):
        export_run(tmp_path, tmp_path / "model", silent, step="best")


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("float32", False)])
def test_weights_that_would_lose_their_updates_are_told_of(dtype, warned):
    told = []
    _warn_of_lost_updates(
        TrainState(jnp.int32(0), {"a": jnp.ones(3, dtype)}, {"b": jnp.ones(3, "bfloat16")}, ()), told.append
    )
    assert [('set model.param_dtype = "float32"' in line) for line in told] == [True] * warned
