"""What `vl2 generate` gives to a model, and what it makes of the answer."""

import io
import json
import sys
from dataclasses import fields
from inspect import signature

import pytest
from PIL import Image

from tests.conftest import GOLDENS
from vl2_jax.api import load
from vl2_jax.cli import main
from vl2_jax.cli.flags import ModelFlags, SamplingFlags
from vl2_jax.inference.sampling import SamplingOptions
from vl2_jax.processing.grounding import Box

PICTURE = str(GOLDENS / "images" / "square.png")


def test_flags_are_the_arguments_of_the_library_with_its_defaults():
    flags = {field.name: field.default for field in fields(SamplingFlags)}
    options = {field.name: field.default for field in fields(SamplingOptions)}
    assert options.keys() - flags.keys() == {"logit_bias", "stop_token_ids"}  # ids, which nobody types
    assert flags == {name: options[name] for name in flags}
    arguments = signature(load).parameters
    for field in fields(ModelFlags):
        assert field.name in ("model", "merge", "no_merge") or field.default == arguments[field.name].default


def test_adapters_are_merged_as_the_library_does_unless_a_flag_says_how(model):
    for flags, merged in (([], None), (["--merge"], True), (["--no-merge"], False)):
        main(["generate", "--model", "m", "--prompt", "x", *flags])
        assert model.loaded[1].get("merge") is merged


def test_every_flag_reaches_the_model(model):
    asked = "--prompt hi --system Short. --n 2 --stop . --stop END --ignore-eos --max-tokens 7 --temperature 0.5"
    sampled = "--top-p 0.8 --top-k 3 --repetition-penalty 1.2 --seed 9"
    sampled += " --presence-penalty 1.5 --frequency-penalty -0.5 --min-p 0.1 --min-tokens 2"
    loaded = "--adapters a --no-merge --no-verify --dtype bfloat16 --weights int8 --cache int8 --chunk-size 64"
    main(f"generate --model m {asked} {sampled} {loaded} --mesh auto --dispatch ragged".split())
    assert [message["content"] for message in model.asked] == ["Short.", "hi"]
    assert model.options == {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.8, "top_k": 3, "repetition_penalty": 1.2, "seed": 9,
        "stop": (".", "END"), "ignore_eos": True, "n": 2, "boxes_on": -1,
        "presence_penalty": 1.5, "frequency_penalty": -0.5, "min_p": 0.1, "min_tokens": 2,
    }  # fmt: skip
    name, options = model.loaded
    assert name == "m"
    assert {**options, "adapters": str(options["adapters"]), "report": None} == {
        "adapters": "a", "merge": False, "verify": False, "dtype": "bfloat16", "weights": "int8", "cache": "int8",
        "chunk_size": 64, "mesh": "auto", "dispatch": "ragged", "report": None,
    }  # fmt: skip


def test_a_prompt_that_says_none_is_that_prompt(model):
    main(["generate", "--model", "m", "--prompt", "None"])
    assert model.asked[-1]["content"] == "None"


def test_adapters_on_a_bucket_keep_their_address(model):
    main(["generate", "--model", "m", "--prompt", "x", "--adapters", "gs://bucket/a"])
    assert str(model.loaded[1]["adapters"]) == "gs://bucket/a"


def test_boxes_belong_to_the_picture_that_was_chosen(model, tmp_path, capsys):
    large, small = tmp_path / "large.png", tmp_path / "small.png"
    Image.new("RGB", (200, 100)).save(large)
    Image.new("RGB", (20, 10)).save(small)
    model.boxes = [Box("star", 10, 20, 100, 90, (50, 200, 500, 900), 0)]
    drawn = tmp_path / "drawn.png"
    command = f"generate --model m --prompt x --image {large} --image {small} --boxes-on 1 --json --save-boxes {drawn}"
    main(command.split())
    assert model.options["boxes_on"] == 0
    assert Image.open(drawn).size == (200, 100)
    assert Image.open(drawn).getpixel((10, 60)) == (255, 0, 0)
    (box,) = json.loads(capsys.readouterr().out)["boxes"]
    assert box == {"label": "star", "x1": 10, "y1": 20, "x2": 100, "y2": 90, "raw": [50, 200, 500, 900], "picture": 1}


def test_boxes_are_drawn_on_a_picture_as_it_is_seen(model, tmp_path):
    turned, drawn = tmp_path / "turned.jpg", tmp_path / "drawn.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright, stored on its side
    Image.new("RGB", (80, 40)).save(turned, exif=exif)
    main(f"generate --model m --prompt x --image {turned} --save-boxes {drawn}".split())
    assert model.asked[0]["images"][0].size == (40, 80)
    assert Image.open(drawn).size == (40, 80)


def test_several_answers_are_numbered_and_each_is_an_object_of_its_own(model, capsys):
    main(["generate", "--model", "m", "--prompt", "x", "--n", "2"])
    assert capsys.readouterr().out == "[1] hello there\n[2] hello there\n"
    main(["generate", "--model", "m", "--prompt", "x", "--n", "2", "--json"])
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["hello there"] * 2
    assert answers[0]["timings"].keys() == {"new_tokens", "load_seconds"}


def test_an_answer_in_letters_that_the_output_lacks_does_not_end_in_a_traceback(model, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    model.words = ["红色 é"]
    main(["generate", "--model", "m", "--prompt", "x"])
    main(["generate", "--model", "m", "--prompt", "x", "--json"])
    lines = written.getvalue().decode("cp1252").splitlines()
    assert lines[0] == "?? é"
    assert json.loads(lines[1])["text"] == "红色 é"


def test_an_answer_does_not_steer_the_terminal(model, monkeypatch, capsys):
    model.words = ["a\x1b[2Jb\n\x9bc"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["generate", "--model", "m", "--prompt", "x"])
    assert capsys.readouterr().out == "a\ufffd[2Jb\n\ufffdc\n"


@pytest.mark.parametrize("name", ["[red]b.png", "[bold].png", ":eyes:.png", r"\[a].png"])
def test_brackets_and_colons_of_a_path_are_no_markup(model, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    main(["generate", "--model", "m", "--prompt", "x", "--image", PICTURE, "--save-boxes", name])
    assert capsys.readouterr().err == f"0 box(es) drawn on {name}\n"
