"""The look at a model in training, and what is counted of its arithmetic."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

import vl2_jax
from tests.conftest import GOLDENS
from tests.training.conftest import ANSWERS, PICTURES
from vl2_jax.config import VL2Config
from vl2_jax.errors import ConfigError
from vl2_jax.ops.chips import peak_flops
from vl2_jax.training.flops import costs_of, training_costs
from vl2_jax.training.formats import to_conversation
from vl2_jax.training.loop import train
from vl2_jax.training.objective import losses
from vl2_jax.training.packing import pack
from vl2_jax.training.recipe import build_recipe


def test_a_run_is_evaluated_and_asked(recipe, data_file, tmp_path):
    told = []
    changes = [
        f'evaluation.sources=[{{path="{data_file}"}}]',
        "evaluation.every=4",
        "evaluation.samples=3",
        "evaluation.max_tokens=4",
        "loop.profile_from=1",
        "loop.profile_steps=1",
    ]
    run = train(recipe(*changes), tmp_path / "run", told.append)
    rows = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    assert rows[1]["loss"] < rows[0]["loss"]

    # The loss is that of all conversations, a row each, wherever the row's padding is.
    processor = run.processor.replace(config=dataclasses.replace(run.processor.config, mask_prompt=True))
    vl2 = vl2_jax.VL2(run.model.config, run.params, processor, "float32")
    lines = data_file.read_text().splitlines()
    conversations = [to_conversation(json.loads(line), data_file.parent) for line in lines]
    for padding in ("left", "right"):
        batch = vl2.processor(conversations, inference=False, padding=padding)
        apart = jax.jit(lambda params, batch=batch: losses(vl2.model, params, batch).next_token)(vl2.params)
        assert rows[1]["loss"] == pytest.approx(float(apart), rel=1e-4)

    asked = [json.loads(line) for line in (tmp_path / "run/samples/00000008.jsonl").read_text().splitlines()]
    row = next(row for row in asked if "<image>" in row["question"])
    picture = GOLDENS / "images" / PICTURES[ANSWERS.index(row["expected"])]
    turn = {"role": "user", "content": row["question"], "images": [picture]}
    assert row["answer"] == vl2.generate([turn], max_tokens=4)[0].text
    drawn = Image.open(tmp_path / f"run/samples/00000008-{asked.index(row)}.png")
    assert drawn.size == Image.open(picture).size
    assert any(row["answer"] in line and f"(right: {row['expected']})" in line for line in told)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert all(row["flops_per_second"] > 0 and row["tiles_per_second"] > 0 for row in log)
    assert all(row["busiest_expert"] >= 1 for row in log)
    assert list((tmp_path / "run/tensorboard").glob("events*"))


def test_a_signal_ends_an_evaluation_which_is_done_when_the_run_goes_on(recipe, data_file, tmp_path):
    changes = [f'evaluation.sources=[{{path="{data_file}"}}]', "evaluation.every=2", "evaluation.samples=3"]
    changes += ["evaluation.max_tokens=4", "loop.steps=3", "loop.checkpoint_every=0"]
    told = []

    def tell(line):
        told.append(line)
        if "step 2  evaluation loss" in line and told.count(line) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    run = train(recipe(*changes), tmp_path / "run", tell)
    assert (run.stopped_by, run.is_complete) == (signal.SIGTERM, False)
    assert told[-1] == "interrupted; step 2 is saved, and the same command goes on from there"
    assert not (tmp_path / "run/evaluation.jsonl").exists()
    assert train(recipe(*changes), tmp_path / "run", tell).is_complete
    rows = [json.loads(line) for line in (tmp_path / "run/evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    assert [path.name for path in sorted((tmp_path / "run/samples").glob("*.jsonl"))] == [
        "00000002.jsonl",
        "00000003.jsonl",
    ]


def test_padding_has_no_part_in_the_balance_loss(small_model):
    vl2 = vl2_jax.load(small_model, dtype="float32")
    turns = [{"role": "user", "content": "What do you see?"}, {"role": "assistant", "content": "nothing"}]
    one = vl2.processor.encode(turns, inference=False)
    short, long = (
        pack([[one]], length, 24, vl2.processor.tokenizer.pad_id, vl2.processor.config.tile_size)
        for length in (len(one), 3 * len(one))
    )
    alone, padded, counted = (
        np.asarray(jax.jit(lambda p, b=batch, c=count: losses(vl2.model, p, b, count_padding=c).balance)(vl2.params))
        for batch, count in ((short, False), (long, False), (long, True))
    )
    np.testing.assert_allclose(padded, alone, rtol=1e-5)
    assert (np.abs(counted / alone - 1) > 0.01).all()


def test_what_cannot_be_asked_is_left_out_of_an_evaluation(recipe, tmp_path):
    path = tmp_path / "held-out.jsonl"
    good = {"question": "What do you see?", "answer": "nothing"}
    begun = {"messages": [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "?"}]}
    path.write_text("\n".join(map(json.dumps, [good | {"image": "missing.png"}, good, begun, good | {"question": ""}])))
    changes = [f'evaluation.sources=[{{path="{path}"}}]', "evaluation.samples=4", "evaluation.max_tokens=2"]
    profiled = ["loop.profile_from=0", "loop.profile_steps=5"]
    told = []
    train(recipe(*changes, *profiled, "loop.steps=2"), tmp_path / "run", told.append)
    assert any("held-out.jsonl:1: " in line for line in told)
    assert len((tmp_path / "run/samples/00000002.jsonl").read_text().splitlines()) == 2
    # The same run goes on inside of the steps that are profiled, and ends there.
    train(recipe(*changes, *profiled, "loop.steps=3"), tmp_path / "run", silent)
    assert len(list((tmp_path / "run/profile").rglob("*.xplane.pb"))) == 2
    path.write_text(json.dumps(good | {"image": "missing.png"}))
    with pytest.raises(ConfigError, match=r"evaluation\.sources hold no sample that can be used"):
        train(recipe(*changes), tmp_path / "other", silent)


def silent(_):
    pass


@pytest.mark.parametrize(
    ("size", "active"),
    # Weights that a text position visits, the vocabulary's once: SPEC's activated parameters without the vision tower.
    [("vl2-tiny", 0.57e9), ("vl2-small", 2.45e9), ("vl2-base", 4.12e9)],
)
def test_a_position_costs_two_operations_for_each_weight_it_visits(size, active):
    assert costs_of(VL2Config.preset(size)).position == pytest.approx(2 * active, rel=0.01)


def test_what_is_frozen_costs_no_gradients():
    config = VL2Config.preset("vl2-nano")
    costs = costs_of(config)
    language, tiles = costs.forward(8192, 8192 * 2048, 0), costs.tile * 5

    def of(**tables):
        return training_costs(config, build_recipe(tables)).of(8192, 8192 * 2048, 5)

    assert of() == pytest.approx(3 * (language + tiles))
    assert of(optimizer={"frozen": ["vision/*"]}) == pytest.approx(3 * language + tiles)
    assert of(optimizer={"frozen": ["vision/*", "language/*"]}) == pytest.approx(2 * language + tiles)
    assert of(lora={"rank": 8}) == pytest.approx(2 * language + tiles)


def test_xla_counts_the_same_operations_without_the_experts():
    """Where no kernel hides anything: the vision tower, on this machine's compiler."""
    import jax
    import jax.numpy as jnp

    from vl2_jax.model.vl2 import VL2Model, abstract_params, apply

    config = VL2Config.preset("vl2-nano")
    model, params = VL2Model(config, jnp.float32, jnp.float32), abstract_params(config, jnp.float32)
    tiles = jax.ShapeDtypeStruct((4, 112, 112, 3), jnp.uint8)
    lowered = jax.jit(lambda p, t: apply(model, p, t, method="encode_tiles")).lower(params, tiles)
    counted = lowered.compile().cost_analysis()["flops"]
    assert counted == pytest.approx(4 * costs_of(config).tile, rel=0.1)


def test_peaks_are_known_of_tpus_alone():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None
    assert np.isfinite(peak_flops("TPU v4"))
