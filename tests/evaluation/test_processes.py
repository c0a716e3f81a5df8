"""The command itself, killed and in several processes: every question is answered once, and as in one run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.evaluation.drawn import questions, write_parquet
from tests.sharding.test_processes import start_both
from vl2_jax.evaluation.answers import Scored, rows_done


@pytest.fixture(scope="module")
def flags(first_layers, tmp_path_factory):
    data = write_parquet(tmp_path_factory.mktemp("data") / "drawn.parquet", questions(6))
    model = str(first_layers("nano-small"))
    asked = ["--benchmark", "exact", "--max-tokens", "12", "--dtype", "float32", "--max-num-seqs", "2"]
    return ["eval", "--model", model, "--data", str(data), *asked]


def answers_in(folder):
    lines = [json.loads(line) for file in sorted(folder.glob("answers*")) for line in file.read_text().splitlines()]
    return {(line["row"], line["number"]): line["text"] for line in lines}, len(lines)


@pytest.mark.slow
def test_two_processes_share_and_what_was_killed_goes_on_to_the_same(flags, tmp_path):
    command, rows = [sys.executable, "-m", "vl2_jax.cli", *flags, "--out"], len(questions(6))
    shared = tmp_path / "shared"
    first, second = start_both([*flags, "--out", str(shared)], [], [])
    (told, errors), (nothing, _) = first.communicate(timeout=300), second.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), errors
    assert told.startswith("all ")
    assert nothing == ""
    whole, lines = answers_in(shared)
    assert lines == len(whole) == rows
    assert sorted(file.name for file in shared.glob("answers*")) == ["answers-1-of-2.jsonl", "answers-2-of-2.jsonl"]

    killed = tmp_path / "killed"
    with subprocess.Popen([*command, str(killed)], env=os.environ) as running:
        end = time.monotonic() + 120
        while not (killed / "answers.jsonl").exists() or len(answers_in(killed)[0]) < 3:
            assert time.monotonic() < end
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert len(answers_in(killed)[0]) < rows
    subprocess.run([*command, str(killed)], check=True, timeout=300, env=os.environ)
    assert answers_in(killed)[0] == whole


def test_a_row_is_done_when_all_its_questions_are():
    half, rest = Scored(0, 0, of=2), Scored(0, 1, of=2)
    assert rows_done({(0, 0): half, (1, 0): Scored(1)}) == {1}
    assert rows_done({(0, 0): half, (0, 1): rest, (2, 0): Scored(2, of=0)}) == {0, 2}
