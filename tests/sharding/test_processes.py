"""Two processes of four devices each, on loopback, are one machine of eight; a failure of one ends both."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import GOLDENS
from vl2_jax.api import load
from vl2_jax.training.export import export_run
from vl2_jax.training.loop import train
from vl2_jax.training.recipe import read_recipe

MODEL, PICTURE = GOLDENS / "nano-small", GOLDENS / "images" / "tall.png"


@pytest.fixture(scope="module")
def model(first_layers):
    return first_layers("nano-small")


@pytest.fixture(scope="module")
def generate(model):
    asked = ["--prompt", "What is it?", "--max-tokens", "6", "--ignore-eos", "--json"]
    return ["generate", "--model", str(model), "--dtype", "float32", "--mesh", "expert=4,tensor=2", *asked]


def start_both(command: list[str], *changes: list[str]) -> list[subprocess.Popen]:
    """A command in two processes, each with its own changes to the command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"  # the last of a name counts
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "vl2_jax.cli", *command, "--coordinator", coordinator, "--processes", "2"]
    return [
        subprocess.Popen(
            [*command, "--process-id", str(number), *change],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, change in enumerate(changes)
    ]


def test_two_processes_generate_what_one_does(model, generate):
    picture = ["--image", str(PICTURE)]
    first, second = start_both(generate, picture, picture)
    (told, errors), (nothing, _) = first.communicate(timeout=300), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert nothing == ""
    turn = {"role": "user", "content": "<image>\nWhat is it?", "images": [str(PICTURE)]}
    (answer,) = load(model, dtype="float32").generate([turn], max_tokens=6, ignore_eos=True)
    assert json.loads(told)["token_ids"] == answer.token_ids


def test_an_error_in_one_process_ends_both_with_its_message(generate):
    begun = time.monotonic()
    both = start_both(generate, ["--image", str(PICTURE)], ["--image", "there-is-no-such.png"])
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert all(process.returncode != 0 for process in both)
    assert all("there-is-no-such.png" in text for text in errors)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_two_processes_train_stop_together_and_go_on(tmp_path):
    """A preemption reaches both at different moments; what they saved goes on, and one process exports it."""
    (tmp_path / "recipe.toml").write_text(
        """
        model.path = "vl2-nano"
        loop = { steps = 6, log_every = 1, checkpoint_every = 0 }
        [data]
        sources = [{ scenes = 3, sizes = { longest_side = 112, turns = 2 } }]
        sequence_length = 256
        rows = 8
        tiles = 64
        workers = 0
        """
    )
    command = ["train", str(tmp_path / "recipe.toml"), "--mesh", "data=2,fsdp=2,expert=2", "--out"]

    def finish(both):
        outputs = [process.communicate(timeout=400) for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        return outputs[0][1]

    def losses_in(run):
        rows = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # one process writes
        return [row["loss"] for row in rows]

    finish(start_both([*command, str(tmp_path / "whole")], [], []))
    both = start_both([*command, str(tmp_path / "stopped")], [], [])
    log = tmp_path / "stopped" / "log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) >= 2):
        ended = [process.poll() for process in both]
        assert ended == [None, None], [process.communicate()[1] for process in both if process.poll() is not None]
        time.sleep(0.05)
    for process in both:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    told = finish(both)
    assert "is saved, and the same command goes on" in told
    shutil.copytree(tmp_path / "stopped", tmp_path / "alone")
    assert "going on from step" in finish(start_both([*command, str(tmp_path / "stopped")], [], []))
    assert losses_in("stopped") == losses_in("whole")
    alone = train(read_recipe(tmp_path / "recipe.toml"), tmp_path / "alone", print, mesh="data=2,fsdp=2,expert=2")
    assert alone.is_complete  # one process goes on where two were
    assert len(losses_in("alone")) == 6
    assert export_run(tmp_path / "stopped", tmp_path / "model", print) == 6
    assert load(tmp_path / "model").config == load("vl2-nano").config


@pytest.mark.slow
def test_two_processes_end_together_where_their_data_does(tmp_path):
    """Nine records fill two batches of one process and one of the other; the only one held out is nobody else's."""
    rows = [json.dumps({"question": f"What is in picture {n}?", "answer": "A blue square."}) for n in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "held-out.jsonl").write_text(rows[0])
    (tmp_path / "recipe.toml").write_text(
        f"""
        model = {{ path = "vl2-nano", scan = true }}
        loop = {{ steps = 60, log_every = 1, checkpoint_every = 0 }}
        evaluation = {{ sources = [{{ path = "{tmp_path}/held-out.jsonl" }}], samples = 1, max_tokens = 4 }}
        [data]
        sources = [{{ path = "{tmp_path}/train.jsonl" }}]
        sequence_length = 32
        rows = 8
        tiles = 8
        workers = 0
        epochs = 1
        """
    )
    command = [
        "train",
        str(tmp_path / "recipe.toml"),
        "--mesh",
        "data=2,fsdp=2,expert=2",
        "--out",
        str(tmp_path / "run"),
    ]
    outputs = [(process.communicate(timeout=400)[1], process.returncode) for process in start_both(command, [], [])]
    assert [code for _, code in outputs] == [0, 0], outputs
    assert "the data ended after 2 steps" in outputs[0][0]
    assert "step 2  evaluation loss" in outputs[0][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "given together"),
        (["--processes", "2", "--coordinator", "127.0.0.1:1", "--process-id", "2"], "expected 0 to 1"),
        (["--mesh", "expert=3"], "3 devices"),
        (["--mesh", "expert=16"], "16 devices"),
        (["--mesh", "width=8"], "not understood"),
        (["--mesh", "tensor=8"], "attention heads"),
    ],
)
def test_a_mesh_that_cannot_be_says_what_can(flags, message, capsys):
    from vl2_jax.cli import main

    with pytest.raises(SystemExit):
        main(["generate", "--model", str(MODEL), "--prompt", "Hello", *flags])
    assert message in capsys.readouterr().err
