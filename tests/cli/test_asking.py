"""Prompts and pictures as shells, pipes, file managers and people give them."""

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import GOLDENS
from vl2_jax.cli import main
from vl2_jax.cli.asking import dropped_files, names_in, read_pictures, read_prompt

PICTURE = GOLDENS / "images" / "square.png"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the pictures of these lines lie; it is home too."""
    for name in ("a.png", "b.png", "my photo.png", "it's mine.png", "über 50% & more.png"):
        shutil.copy(PICTURE, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("a.png", ["a.png"]),
        ("my photo.png", ["my photo.png"]),
        ("  'my photo.png' ", ["my photo.png"]),
        ('"my photo.png" a.png', ["my photo.png", "a.png"]),
        (r"my\ photo.png a.png", ["my photo.png", "a.png"]),
        ("my photo.png a.png my photo.png", ["my photo.png", "a.png", "my photo.png"]),
        ("it's mine.png", ["it's mine.png"]),
        (r"it\'s\ mine.png", ["it's mine.png"]),
        ("'it'\\''s mine.png' b.png", ["it's mine.png", "b.png"]),
        ("~/a.png ~/b.png", ["~/a.png", "~/b.png"]),
        ("nowhere.png a.png", ["nowhere.png", "a.png"]),
        (r'"C:\Users\me\a b.png"', [r"C:\Users\me\a b.png"]),
        (r"C:\Users\me\a.png", [r"C:\Users\me\a.png"]),
        ("https://example.org/a.png", ["https://example.org/a.png"]),
        ("", []),
    ],
)
def test_names_are_read_as_people_and_terminals_write_them(folder, line, names):
    assert names_in(line) == names


@pytest.mark.parametrize(
    "name", ["a.png", "~/a.png", "file://{}/my%20photo.png", "file://{}/%C3%BCber%2050%25%20%26%20more.png"]
)
def test_a_picture_is_found_by_its_path_its_home_or_its_address(folder, name):
    assert read_pictures([name.format(folder)])[0].size == Image.open(PICTURE).size


@pytest.mark.parametrize(
    ("line", "files", "rest"),
    [
        ("'{}/my photo.png' {}/a.png ", ["{}/my photo.png", "{}/a.png"], ""),
        ("{}/my photo.png", ["{}/my photo.png"], ""),
        (r"{}/my\ photo.png what's this?", ["{}/my photo.png"], "what's this?"),
        ("file://{}/my%20photo.png", ["file://{}/my%20photo.png"], ""),
        ("a.png", [], "a.png"),
        ("what is {}/a.png?", [], "what is {}/a.png?"),
        ("what's \0", [], "what's \0"),
        ("", [], ""),
    ],
)
def test_files_that_are_dropped_on_the_terminal_are_told_from_the_message(folder, line, files, rest):
    names, message = dropped_files(line.format(folder, folder))
    assert (names, message) == ([name.format(folder) for name in files], rest.format(folder))


def test_standard_input_is_a_picture(standard_input):
    standard_input(PICTURE.read_bytes())
    assert np.array_equal(read_pictures(["-"])[0], Image.open(PICTURE).convert("RGB"))


def test_a_pipe_that_can_be_read_once_is_a_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[PICTURE.read_bytes()], daemon=True).start()
    assert read_pictures([str(tmp_path / "pipe")])[0].size == Image.open(PICTURE).size


def test_process_substitution_is_a_picture():
    read, write = os.pipe()
    threading.Thread(target=_write_and_close, args=[write, PICTURE.read_bytes()], daemon=True).start()
    assert read_pictures([f"/dev/fd/{read}"])[0].size == Image.open(PICTURE).size


def test_an_address_is_fetched_only_where_that_is_allowed(monkeypatch):
    asked = []
    monkeypatch.setattr("vl2_jax.cli.asking.load_image", lambda source, allow_urls: asked.append((source, allow_urls)))
    read_pictures(["https://example.org/a.png"])
    read_pictures(["https://example.org/a.png"], allow_urls=True)
    assert asked == [("https://example.org/a.png", False), ("https://example.org/a.png", True)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"What is this?\n", "What is this?"),
        (b"two\nlines\r\n", "two\nlines"),
        ("café".encode("latin-1"), "caf\ufffd"),
        ("\ufeffcafé".encode(), "café"),
        ("\ufeffcafé".encode("utf-16-le"), "café"),
    ],
)
def test_a_prompt_is_read_from_a_file_and_from_standard_input(tmp_path, standard_input, data, text):
    (tmp_path / "question.txt").write_bytes(data)
    standard_input(data)
    assert read_prompt("", str(tmp_path / "question.txt")) == text
    assert read_prompt("-", None) == text


def test_bytes_of_a_command_line_that_are_no_text_become_replacement_characters():
    assert read_prompt(b"caf\xe9".decode("utf-8", "surrogateescape"), None) == "caf\ufffd"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate --model m", "there is no question"),
        ("generate --model m --prompt=", "there is no question"),
        ("generate --model m --prompt -", "there is no question in standard input"),
        ("generate --model m --prompt-file {empty}", "there is no question in 'empty.txt'"),
        ("generate --model m --prompt-file nowhere.txt", "'nowhere.txt' cannot be read (No such file"),
        ("generate --model m --prompt-file .", "cannot be read (Is a directory"),
        ("generate --model m --prompt-file {picture}", "does not hold the text of a question"),
        ("generate --model m --prompt x --prompt-file {empty}", "not with both"),
        ("generate --model m --prompt - --image -", "only one of"),
        ("generate --model m --prompt x --image - --image -", "only one of"),
        ("generate --model m --prompt x --image -", "0 bytes"),
        ("generate --model m --prompt x --image /dev/null", "is not a file"),
        ("generate --model m --prompt x --image {picture} --boxes-on 0", "--boxes-on is 0"),
        ("generate --model m --prompt x --image {picture} --boxes-on 2", "of which 1 are given"),
        ("generate --model m --prompt x --boxes-on 1", "of which 0 are given"),
        ("generate --model m --prompt x --merge --no-merge", "choose one of them"),
        ("generate --model m --prompt x --image {picture} --n 2 --save-boxes b.png", "draws one answer"),
        (
            "generate --model m --prompt x --image {picture} --save-boxes b.psd",
            "not a picture format that can be written",
        ),
        ("generate --model m --prompt x --image {picture} --save-boxes b", "not a picture format that can be written"),
        ("generate --model m --prompt x --image {picture} --save-boxes b.xbm", "XBM cannot hold this picture"),
        ("generate --model m --prompt x --image {picture} --save-boxes b.grib", "GRIB cannot hold this picture"),
        ("generate --model m --prompt x --image {picture} --save-boxes no/b.png", "there is no folder"),
        ("generate --model m --prompt x --image {picture} --save-boxes gs://b/c.png", "there is no folder"),
        ("generate --model m --prompt x --image {wide} --save-boxes b.webp", "WEBP cannot hold this picture"),
        ("generate --model m --prompt x --image {picture} --save-boxes {folder}", "cannot be written"),
        ("plan --model m --save p.psd", "expected the name of a picture: "),
        ("plan --model m --save no/p.png", "cannot be written"),
    ],
)
def test_what_cannot_be_asked_is_told_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, standard_input, command, message
):
    monkeypatch.setattr("vl2_jax.api.load", lambda *_, **__: pytest.fail("the model was loaded first"))
    monkeypatch.chdir(tmp_path)
    standard_input(b"")
    Path("empty.txt").write_text("\n")
    Path("folder.png").mkdir()
    Image.new("RGB", (20_000, 2)).save("wide.png")
    places = {"empty": "empty.txt", "picture": PICTURE, "wide": "wide.png", "folder": "folder.png"}
    with pytest.raises(SystemExit) as caught:
        main(command.format(**places).split())
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def _write_and_close(descriptor: int, data: bytes) -> None:
    with open(descriptor, "wb") as stream:
        stream.write(data)
