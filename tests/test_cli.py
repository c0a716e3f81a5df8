"""The commands a user types, and the one sentence that a mistake gets."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time

import pytest
from rich.console import Console

from tests.conftest import GOLDENS
from vl2_jax.cli import main
from vl2_jax.installation import install_line
from vl2_jax.progress import Display

MODEL = str(GOLDENS / "nano-small")
PICTURE = str(GOLDENS / "images" / "square.png")


def test_generate_prints_one_json_object_and_saves_boxes(tmp_path, capsys):
    boxes = tmp_path / "boxes.png"
    main(f"generate --model {MODEL} --image {PICTURE} --prompt hi --max-tokens 4 --json --save-boxes {boxes}".split())
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["token_ids"]) == 4
    assert answer["timings"]["prompt_tokens"] > 49
    assert boxes.is_file()


def test_convert_export_and_info(tmp_path, capsys):
    main(["convert", MODEL, str(tmp_path / "converted")])
    main(["export", str(tmp_path / "converted"), str(tmp_path / "exported")])
    main(["info", str(tmp_path / "converted"), "--json"])
    assert json.loads(capsys.readouterr().out)["cache_bytes_per_token_bfloat16"] == 2 * 4 * 24


def test_a_chat_shows_pictures_starts_again_and_survives_mistakes(monkeypatch, capsys):
    lines = iter(["/image nowhere.png", f"/image {PICTURE}", "what is it?", "are you sure?", "/new", "hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    main(["chat", "--model", MODEL, "--max-tokens", "2"])
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) >= 3
    assert "does not exist" in shown.err


def test_long_work_gives_a_sign_of_life(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("vl2_jax.progress._SECONDS_OF_SILENCE", 0.05)
    with Display(Console(file=stream)) as report:
        report("hashing [/INST] :eyes:", 1, 4)
        end = time.monotonic() + 10
        while not stream.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
    assert "hashing [/INST] :eyes: 25 %" in stream.getvalue()


def test_a_progress_bar_shows_square_brackets_as_they_are():
    stream = io.StringIO()
    with Display(Console(file=stream, force_terminal=True, width=120)) as report:
        report("hashing [/INST] [red] :eyes:", 1, 4)
    assert "hashing [/INST] [red] :eyes:" in stream.getvalue()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --model /nowhere --prompt x", "there is no directory"),
        ("generate --model {empty} --prompt x", "holds no config.json"),
        ("generate --model {no_tokenizer} --prompt x", "tokenizer.json does not exist"),
        ("generate --model {no_weights} --prompt x", "holds no *.safetensors file"),
        ("generate --model {bad_config} --prompt x", "is not valid JSON"),
        ("generate --model {model} --prompt x --image none.png", "does not exist"),
        ("generate --model {model} --prompt x --image {model}/config.json", "accepted formats"),
        ("generate --model {model} --prompt x --dtype int7", "dtype 'int7' is not supported"),
        ("generate --model {model} --prompt x --temperature -1", "temperature is -1.0"),
        ("generate --model {model} --prompt x --top-p 0", "top_p is 0.0"),
        ("generate --model {model} --prompt x --max-tokens 0", "max_tokens is 0"),
        ("generate --model {model} --prompt x --chunk-size 0", "chunk_size is 0"),
        ("generate --model {model} --prompt <image><image> --image {picture}", "2 <image> tag(s) but 1 picture"),
        ("generate --model {model} --prompt {long}", "the context holds 4096"),
        ("info vl2-huge", "there is no directory 'vl2-huge'"),
        ("convert {model} {model}", "exists already"),
        ("convert {empty} {empty}/new", "config.json"),
        ("export {model} {empty}/new", "is not a converted checkpoint"),
        ("convert {model} {empty}/new --dtype int7", "dtype 'int7' is not supported"),
        ("convert {model} {empty}/new --weights int3", "kind 'int3' are not known; choose one of int8, int4"),
        ("generate --model {model} --prompt x --weights int3", "kind 'int3' are not known; choose one of int8, int4"),
        ("plan --model vl2-tiny", "plan needs a slice: --topology v5e:2x4, or --search"),
        ("plan --model vl2-tiny --topology v5e:1x1 --weights int3", "kind 'int3' are not known; choose one of int8"),
        ("plan --model vl2-tiny --topology v5e:1x1 --cache int4", "a cache of kind 'int4' is not known; choose int8"),
        ("verify {model} {empty}", "holds no cases"),
        ("generate --model deepseek-ai/deepseek-vl2-tiny --prompt x", "check the name and the connection"),
        ("generate --model {model} --prompt x --image {empty}", "is not a file"),
        ("generate --model {model} --prompt x --save-boxes {empty}/b.png", "needs a picture"),
        ("generate --model {other_size} --prompt x", "do not fit its config.json"),
        ("generate --model {model} --prompt x --temperature 1 --top-k -1", "top_k is -1"),
        ("generate --model {model} --prompt x --repetition-penalty 0", "repetition_penalty is 0.0"),
        ("generate --model {model} --prompt {pictures} {many}", "for pictures"),
        ("export {empty} {empty}/new", "is not a converted checkpoint"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    places = {"model": MODEL, "picture": PICTURE, "long": "word" * 5000, "empty": tmp_path / "empty"}
    places["pictures"], places["many"] = "<image>" * 400, f"--image {PICTURE} " * 400
    places["empty"].mkdir()
    for name, left_out in (("no_tokenizer", "tokenizer.json"), ("no_weights", "*.safetensors"), ("bad_config", "_")):
        places[name] = tmp_path / name
        shutil.copytree(MODEL, places[name], ignore=shutil.ignore_patterns("cases", left_out, "*.index.json"))
    (places["bad_config"] / "config.json").write_text("{not json")
    places["other_size"] = tmp_path / "other_size"
    shutil.copytree(MODEL, places["other_size"], ignore=shutil.ignore_patterns("cases"))
    shutil.copy(GOLDENS / "nano-v2" / "config.json", places["other_size"])
    with pytest.raises(SystemExit) as caught:
        main(command.replace("{many}", str(places["many"])).format(**places).split())
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_doctor_names_what_is_there_and_the_line_that_adds_what_is_not(capsys, monkeypatch):
    monkeypatch.setattr("vl2_jax.cli.doctor._PACKAGES", (("jax", "", ""), ("no-such-package", "extra", "to do more")))
    main(["doctor"])
    told = capsys.readouterr().out
    assert f"no-such-package  missing; to do more: {install_line('extra')}\n" in told
    assert "(cpu:0)" in told


@pytest.mark.parametrize("command", ["generate --model m --prompt x", "info m", "convert m n", "plan --model m"])
def test_ctrl_c_ends_a_command_in_one_line(monkeypatch, capsys, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("vl2_jax.api.find_model", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 130
    assert capsys.readouterr().err == "vl2: interrupted\n"


def test_a_disk_that_is_full_is_told_in_one_line(monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors")

    monkeypatch.setattr("convert.from_torch.convert", full)
    with pytest.raises(SystemExit) as caught:
        main(["convert", MODEL, "out"])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "vl2: No space left on device: 'out/model.safetensors'\n"


def test_a_reader_who_has_seen_enough_is_no_mistake():
    command = f"{shlex.quote(sys.executable)} -m vl2_jax.cli info vl2-tiny | true"
    shown = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert (shown.returncode, shown.stderr) == (0, b"")
