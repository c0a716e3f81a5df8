"""A run that is stopped, killed or damaged goes on exactly where it was; what is not a number is never saved."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from tensorboardX.proto.event_pb2 import Event

import vl2_jax
from convert.checkpoint import orbax
from convert.weight_map import flatten
from tests.conftest import GOLDENS
from vl2_jax.cli import main
from vl2_jax.errors import CheckpointError, ConfigError
from vl2_jax.training.checkpoints import Checkpoints
from vl2_jax.training.data import batches
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import TrainingError, train
from vl2_jax.training.optimizer import is_trained, learning_rate, optimizer_of
from vl2_jax.training.recipe import OptimizerRecipe, read_recipe
from vl2_jax.training.step import all_finite, balanced, init_state, make_step

RATE = np.float32(1e-3)
PICTURE_QUESTION = [
    {"role": "user", "content": "<image>\nAnd this?", "images": [GOLDENS / "images" / "tall.png"]},
    {"role": "assistant", "content": ""},
]


def silent(_):
    pass


def losses_in(folder):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def leaves(state):
    return {**state.trained, **state.kept}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, write_recipe):
    """Eight steps without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_recipe(folder / "recipe.toml")
    return path, folder / "run", train(read_recipe(path), folder / "run", silent)


def test_a_stopped_run_goes_on_bit_for_bit(whole_run, tmp_path):
    path, folder, whole = whole_run
    recipe = read_recipe(path)
    train(recipe, tmp_path / "run", silent, until=4)
    told = []
    again = train(recipe, tmp_path / "run", told.append)
    assert "going on from step 4" in told
    assert losses_in(tmp_path / "run") == losses_in(folder)
    for name, array in leaves(whole.state).items():
        np.testing.assert_array_equal(leaves(again.state)[name], array)


def test_losses_fall_and_only_trained_parameters_change(whole_run, small_model):
    _, folder, run = whole_run
    losses = losses_in(folder)
    assert losses[8] < 0.7 * losses[1]
    before = vl2_jax.load(small_model, dtype="float32")
    changed = {name for name, array in flatten(before.params).items() if (leaves(run.state)[name] != array).any()}
    assert not {name for name in changed if name.startswith("vision/attn_pool/")}
    assert {name for name in changed if name.endswith("correction_bias")}
    assert all(name in changed for name in run.state.trained)


def test_the_trained_model_loads_back_with_the_same_logits(whole_run, tmp_path):
    _, folder, run = whole_run
    assert export_run(folder, tmp_path / "model", silent, dtype="float32") == 8
    trained = vl2_jax.load(tmp_path / "model", dtype="float32")
    before = vl2_jax.VL2(run.model.config, run.params, run.processor, "float32")
    batch = run.processor(PICTURE_QUESTION)
    np.testing.assert_array_equal(trained.logits(batch), before.logits(batch))


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(whole_run, tmp_path):
    path, folder, _ = whole_run
    command = [sys.executable, "-m", "vl2_jax.cli", "train", str(path), "--out", str(tmp_path / "run")]
    killed, stopped = sorted(random.sample(range(1, 8), 2))
    for kind, reached in ((signal.SIGKILL, killed), (signal.SIGTERM, stopped)):
        process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stderr=subprocess.PIPE)
        log = tmp_path / "run" / "log.jsonl"
        while not (log.is_file() and max(losses_in(tmp_path / "run"), default=0) >= reached):
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        process.send_signal(kind)
        _, messages = process.communicate(timeout=120)
        if kind == signal.SIGTERM:
            is_complete = b"the trained model is in" in messages
            assert process.returncode == (0 if is_complete else 128 + kind), messages.decode()
            assert is_complete or b"is saved, and the same command" in messages
    subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
    assert losses_in(tmp_path / "run") == losses_in(folder), f"killed at step {killed}, stopped at step {stopped}"
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_preempted_evaluation_is_given_up_at_once_and_done_again(whole_run, tmp_path, data_file):
    """The state is saved while the programs that answer are compiled, which takes longer than a preemption gives."""
    path, _, _ = whole_run
    more = [f'evaluation.sources=[{{path="{data_file}"}}]', "evaluation.every=1", "evaluation.samples=2"]
    more += ["evaluation.max_tokens=300", "loop.steps=2", "loop.checkpoint_every=0", "data.workers=1"]
    command = [sys.executable, "-m", "vl2_jax.cli", "train", str(path), "--out", str(tmp_path / "run")]
    command += [part for change in more for part in ("--set", change)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        while "step 1  evaluation loss" not in (line := process.stderr.readline()):
            assert line, "it ended"
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        while not (tmp_path / "run" / "checkpoints" / "00000001").is_dir():
            assert time.monotonic() - begun < 10
            time.sleep(0.05)
        process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
    assert not psutil.wait_procs(workers, timeout=20)[1]
    assert not (tmp_path / "run" / "evaluation.jsonl").exists()
    subprocess.run(command, env=environment, check=True)
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert rows == [1, 2]


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flip_a_bit, lambda content: content[:-1], None], ids=["flipped", "short", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_written_again(whole_run, tmp_path, damage):
    path, folder, _ = whole_run
    recipe = read_recipe(path)
    train(recipe, tmp_path / "run", silent, until=6)
    newest = tmp_path / "run" / "checkpoints" / "00000006"
    largest = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else -1)
    if damage is None:
        largest.unlink()
    else:
        largest.write_bytes(damage(largest.read_bytes()))
    told = []
    train(recipe, tmp_path / "run", told.append)
    assert any("00000006 is passed over" in line for line in told)
    assert "going on from step 3" in told
    assert losses_in(tmp_path / "run") == losses_in(folder)
    train(recipe, tmp_path / "run", told.append)
    assert "going on from step 8" in told
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 3 checkpoint"):
        train(recipe, tmp_path / "run", silent)


def test_what_is_saved_may_be_gone_once_saving_has_begun(tmp_path):
    """Where a device has memory of its own, nothing is copied there for Orbax."""
    state = {str(n): jax.random.normal(jax.random.key(n), (1000, 1000)) for n in range(8)}
    wanted = jax.tree.map(np.array, state)
    response = orbax().save_async(str(tmp_path / "state"), state)
    jax.tree.map(lambda array: array.delete(), state)
    response.result()
    jax.tree.map(np.testing.assert_array_equal, orbax().load(str(tmp_path / "state")), wanted)


def test_checkpoints_of_other_versions_are_named_and_not_passed_over(tmp_path):
    state = {"a": jnp.ones(2)}
    checkpoints = Checkpoints(tmp_path, 3, silent)
    checkpoints.save(1, state, {"data": 0, "format": 1})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match="written by another version of vl2-jax"):
        checkpoints.restore(state)


def test_a_run_ends_where_its_data_does_and_goes_on_when_its_epochs_grow(recipe, data_file, tmp_path):
    changes = [
        "loop.log_every=100",
        "loop.steps=",
        f'evaluation.sources=[{{path="{data_file}"}}]',
        "evaluation.every=0",
        "loop.keep_best=true",
    ]
    told, steps = [], []
    for epochs in (2, 3):
        run = train(recipe(*changes, f"data.epochs={epochs}"), tmp_path / "run", told.append)
        steps.append(int(run.state.step))
        assert run.is_complete
        assert run.ended_by == f"the data ended after {steps[-1]} steps (data.epochs = {epochs})"
        assert told[-1] == f"complete after {steps[-1]} steps: {run.ended_by}"
    assert 0 < steps[0] < steps[1] < 8
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == steps
    assert list(losses_in(tmp_path / "run")) == steps
    best = min(rows, key=lambda row: row["loss"])["step"]
    assert export_run(tmp_path / "run", tmp_path / "best", silent, step="best") == best
    assert export_run(tmp_path / "run", tmp_path / "first", silent, step=steps[0]) == steps[0]


def test_what_ends_a_run_with_steps_and_epochs_is_told(whole_run, tmp_path):
    path, _, whole = whole_run
    assert whole.ended_by == "loop.steps = 8 ended the run"
    told = []
    run = train(read_recipe(path, ["data.epochs=20", "loop.steps=1"]), tmp_path / "run", told.append)
    assert re.fullmatch(r"loop.steps = 1 ended the run, with \d+ % of data.epochs = 20 read; .*", run.ended_by)
    assert (
        "the run ends after 1 steps (loop.steps) or data.epochs = 20, 120 conversations, whichever comes first" in told
    )
    assert not train(read_recipe(path), tmp_path / "other", silent, until=1).is_complete


def test_every_phase_of_a_beginning_is_told(whole_run, tmp_path):
    path, _, _ = whole_run
    phases = []
    train(read_recipe(path), tmp_path / "run", silent, until=1, report=lambda phase, *_: phases.append(phase))
    order = ["reading weights", "preparing the data", "reading data", "compiling the update", "the first step", ""]
    places = [phases.index(phase) for phase in order]
    assert places[:-1] == sorted(places[:-1])
    assert phases[-1] == ""


def board_of(folder):
    """(name, step) of every number in TensorBoard's files."""
    for path in sorted((folder / "tensorboard").glob("events*")):
        content, begin = path.read_bytes(), 0
        while begin < len(content):
            end = begin + 16 + int.from_bytes(content[begin : begin + 8], "little")
            event = Event.FromString(content[begin + 12 : end - 4])
            yield from ((value.tag, event.step) for value in event.summary.value)
            begin = end


def test_curves_hold_every_step_once_after_a_run_was_killed(whole_run, tmp_path):
    path, folder, _ = whole_run
    run = tmp_path / "run"
    train(read_recipe(path), run, silent, until=5)
    shutil.rmtree(run / "checkpoints" / "00000005")  # as if it had been killed before
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 1.')
    (board,) = (run / "tensorboard").glob("events*")
    board.write_bytes(board.read_bytes()[:-3])
    told = []
    train(read_recipe(path), run, told.append)
    assert "going on from step 3" in told
    assert [row["step"] for row in map(json.loads, (run / "log.jsonl").read_text().splitlines())] == list(range(1, 9))
    assert losses_in(run) == losses_in(folder)
    drawn = list(board_of(run))
    assert sorted(step for name, step in drawn if name == "loss") == list(range(1, 9))
    assert len(drawn) == len(set(drawn))


@pytest.mark.parametrize(
    ("vision", "what", "last_saved"), [(1.0, "the loss or the gradients", 2), (10.0, "the parameters", 1)]
)
def test_what_is_not_a_number_ends_the_run_and_is_not_saved(recipe, tmp_path, vision, what, last_saved):
    changes = ("optimizer.learning_rate=1e38", "optimizer.clip=1e38", "optimizer.schedule=constant")
    described = recipe(*changes, f"optimizer.vision_multiplier={vision}", "loop.checkpoint_every=1", "loop.keep=8")
    with pytest.raises(TrainingError, match=rf"{what} .*of step {last_saved + 1} are not numbers"):
        train(described, tmp_path / "run", silent)
    saved = Checkpoints(tmp_path / "run" / "checkpoints", 8, silent)
    assert saved.steps() == list(range(1, last_saved + 1))
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_step_that_is_not_a_number_changes_nothing(recipe, small_model):
    described = recipe("optimizer.warmup=0")
    vl2 = vl2_jax.load(small_model, dtype="float32")
    batch = next(iter(batches(described.data, vl2.processor)))
    state = init_state(described, vl2.params)
    state.trained["language/norm/scale"] = state.trained["language/norm/scale"].at[0].set(jnp.nan)
    before = jax.tree.map(np.array, state)
    after, metrics = make_step(vl2.model, described)(state, jax.tree.map(lambda a: a[None], batch), RATE)
    assert not metrics.is_finite
    assert not all_finite(after)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, after), before)


def test_the_rate_may_change_after_a_step_that_was_no_number(recipe, tmp_path):
    train(recipe(), tmp_path / "run", silent, until=3)
    told = []
    train(recipe("optimizer.learning_rate=5e-4"), tmp_path / "run", told.append, until=3)
    assert told[:2] == ["going on with other values of optimizer.learning_rate", "going on from step 3"]


def test_a_model_that_a_run_did_not_write_is_left_alone(recipe_file, tmp_path, capsys):
    mine = tmp_path / "project" / "model"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    command = ["train", str(recipe_file()), "--out", str(mine.parent), "--set", f"model.path={mine}"]
    with pytest.raises(SystemExit):
        main(command)
    assert "choose another --out" in capsys.readouterr().err
    assert (mine / "config.json").is_file()


def test_a_run_of_bad_samples_alone_is_told(recipe, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(TrainingError, match=r"no sample that can be trained on \(1 were left out\)"):
        train(recipe(f"data.sources=[{{path='{tmp_path}/bad.jsonl'}}]", "data.epochs=1"), tmp_path / "run", silent)


def test_a_start_that_fails_leaves_no_recipe_to_keep_to(recipe, tmp_path):
    with pytest.raises(ConfigError, match="no data file"):
        train(recipe("data.sources=[{path='typo.jsonl'}]"), tmp_path / "run", silent)
    train(recipe(), tmp_path / "run", silent, until=1)


@pytest.mark.parametrize("change", ["optimizer.weight_decay=0.2", "data.rows=4"])
def test_another_recipe_is_refused(whole_run, recipe, change):
    _, folder, _ = whole_run
    with pytest.raises(ConfigError, match=rf"another recipe .*{change.partition('=')[0]}"):
        train(recipe(change), folder, silent)


def test_accumulated_batches_equal_one_large_one(recipe, small_model):
    """Two halves of one batch, each with the whole table of tiles, move the parameters as the batch itself does."""
    changes = ("data.rows=4", "data.tiles=48", "objective.balance_loss=0.0", "optimizer.warmup=0")
    vl2 = vl2_jax.load(small_model, dtype="float32")
    batch = next(iter(batches(recipe(*changes).data, vl2.processor)))
    halves = [
        dataclasses.replace(batch, **{n: getattr(batch, n)[rows] for n in batch.__dataclass_fields__ if n != "tiles"})
        for rows in (slice(0, 2), slice(2, 4))
    ]
    states = []
    for described, parts in ((recipe(*changes), [batch]), (recipe(*changes, "optimizer.accumulate=2"), halves)):
        state = init_state(described, vl2.params)
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
        states.append(make_step(vl2.model, described)(jax.tree.map(jnp.copy, state), stacked, RATE))
    (large, of_large), (small, of_small) = states
    np.testing.assert_allclose(of_large.loss, of_small.loss, rtol=1e-6)
    np.testing.assert_allclose(of_large.gradient_norm, of_small.gradient_norm, rtol=1e-5)
    for moment, other in zip(jax.tree.leaves(large.optimizer), jax.tree.leaves(small.optimizer), strict=True):
        largest = float(jnp.abs(moment).max())
        np.testing.assert_allclose(moment, other, rtol=0, atol=1e-4 * largest)


def test_schedules_follow_the_paper():
    def rates(steps=100, **changes):
        return [learning_rate(OptimizerRecipe(learning_rate=1.0, **changes), step, steps) for step in range(steps)]

    assert set(rates(schedule="constant")) == {1.0}
    step = rates(schedule="step")
    np.testing.assert_allclose([step[49], step[50], step[75]], [1.0, 10**-0.5, 0.1], rtol=1e-6)
    cosine = rates(schedule="cosine", warmup=10)
    assert cosine[0] == 0
    assert cosine[10] == 1
    assert 0.1 <= cosine[99] < 0.11
    stable = rates(schedule="warmup_stable_decay", warmup=10, decay_share=0.2)
    assert stable[79] == 1
    assert stable[99] < 0.2
    with pytest.raises(ConfigError, match="'linear'; expected one of constant"):
        optimizer_of(OptimizerRecipe(schedule="linear"))


def test_the_vision_tower_learns_at_its_own_rate_and_vectors_do_not_decay():
    params = {name: jnp.ones((2, 2)) for name in ("vision/a", "language/a")} | {"language/scale": jnp.ones(2)}
    recipe = OptimizerRecipe(learning_rate=1.0, vision_multiplier=0.1, weight_decay=0.5, clip=1e9)
    optimizer = optimizer_of(recipe)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params, rate=1.0)
    np.testing.assert_allclose([updates[n].ravel()[0] for n in params], [-0.05, -0.5, 0.0], rtol=1e-6)


def test_muon_makes_updates_of_hidden_matrices_orthogonal_each_expert_by_itself():
    random = np.random.default_rng(0)
    shapes = {"language/mlp/experts_up": (3, 32, 16), "language/o/kernel": (16, 32), "language/embed_tokens": (16, 32)}
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()} | {"language/scale": jnp.zeros(16)}
    gradients = {name: jnp.asarray(random.standard_normal(a.shape), jnp.float32) for name, a in params.items()}
    updates = {}
    for kind in ("adamw", "muon"):
        optimizer = optimizer_of(OptimizerRecipe(kind=kind, weight_decay=0.0, clip=1e9))
        updates[kind], _ = optimizer.update(gradients, optimizer.init(params), params, rate=1.0)
    for name in ("language/embed_tokens", "language/scale"):
        np.testing.assert_array_equal(updates["muon"][name], updates["adamw"][name])
    for name in ("language/mlp/experts_up", "language/o/kernel"):
        singular = jnp.linalg.svd(updates["muon"][name] / (0.2 * 32**0.5), compute_uv=False)
        assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.3  # the iteration's own spread
        assert float(jnp.sqrt(jnp.mean(updates["muon"][name] ** 2))) == pytest.approx(0.2, rel=0.2)
    alone, _ = optimizer.update(
        gradients | {"language/mlp/experts_up": gradients["language/mlp/experts_up"].at[1:].multiply(100.0)},
        optimizer.init(params),
        params,
        rate=1.0,
    )
    np.testing.assert_allclose(
        alone["language/mlp/experts_up"][0], updates["muon"]["language/mlp/experts_up"][0], atol=1e-5
    )
    with pytest.raises(ConfigError, match="'sgd'; expected adamw or muon"):
        optimizer_of(OptimizerRecipe(kind="sgd"))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("params", ["float32", "bfloat16"])
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_moments_are_kept_as_asked_and_computed_in_float32(kind, params, state):
    recipe = OptimizerRecipe(kind=kind, state_dtype=state)
    optimizer = optimizer_of(recipe)
    leaves = {
        "language/layers_0/mlp/up_proj/kernel": jnp.ones((4, 4), params),
        "language/norm/scale": jnp.ones(4, params),
    }
    gradients = jax.tree.map(lambda a: jnp.full(a.shape, 3e-3), leaves)
    states = optimizer.init(leaves)
    for _ in range(3):
        updates, states = optimizer.update(gradients, states, leaves, rate=RATE)
    moments = [a for a in jax.tree.leaves(states) if jnp.shape(a) in ((4, 4), (4,)) and a.dtype != jnp.int32]
    assert {str(a.dtype) for a in moments} == {state}
    wanted, exact = optimizer_of(OptimizerRecipe(kind=kind)), jax.tree.map(lambda a: a.astype(jnp.float32), leaves)
    states = wanted.init(exact)
    for _ in range(3):
        right, states = wanted.update(gradients, states, exact, rate=RATE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02), updates, right)


def test_frozen_patterns_and_correction_biases_are_not_trained(recipe, tmp_path):
    assert not is_trained("language/layers_1/mlp/gate/correction_bias", ())
    assert not is_trained("vision/attn_pool/latent", ())
    assert is_trained("vision/norm/scale", ("language/*",))
    with pytest.raises(ConfigError, match="'langage/\\*', which fits no parameter"):
        train(recipe("optimizer.frozen=['langage/*']"), tmp_path / "run", silent)


def test_correction_biases_move_towards_an_even_load():
    bias = {
        "language/layers_10/mlp/gate/correction_bias": jnp.zeros(3),
        "language/layers_2/mlp/gate/correction_bias": jnp.zeros(3),
    }
    moved = balanced(bias, jnp.asarray([[3.0, 0.0, 0.0], [1.0, 1.0, 4.0]]), 0.5)
    np.testing.assert_array_equal(moved["language/layers_2/mlp/gate/correction_bias"], [-0.5, 0.5, 0.5])
    np.testing.assert_array_equal(moved["language/layers_10/mlp/gate/correction_bias"], [0.5, 0.5, -0.5])
