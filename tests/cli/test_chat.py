"""What a conversation in the terminal survives."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.conftest import GOLDENS
from vl2_jax.cli import main
from vl2_jax.errors import ConversationError

PICTURE = str(GOLDENS / "images" / "square.png")
CHAT = ["chat", "--model", "m"]


def test_pictures_go_with_the_next_message_and_no_further(model, typed, capsys):
    typed(f"/image '{PICTURE}' {PICTURE}", f"/image {PICTURE}", "what?", "really?", "/quit")
    main(CHAT)
    first, _, second = model.asked
    assert (len(first["images"]), first["content"]) == (3, "<image>\n<image>\n<image>\nwhat?")
    assert second["images"] == []
    assert capsys.readouterr().err.count("goes with the next message") == 3


def test_a_picture_that_is_dropped_on_the_terminal_is_no_unknown_command(model, typed):
    typed(f"'{PICTURE}' ", f"{PICTURE} what is it?")
    main(CHAT)
    (turn,) = model.asked
    assert (len(turn["images"]), turn["content"]) == (2, "<image>\n<image>\nwhat is it?")


def test_an_unknown_command_says_what_there_is(model, typed, capsys):
    typed("/imagine a.png", "/image", "/quit")
    main(CHAT)
    told = capsys.readouterr().err
    assert "there is no command '/imagine'; there are /image, /new, /help and /quit" in told
    assert "/image needs the path of a picture" in told
    assert model.asked == []


def test_help_names_every_command(model, typed, capsys):
    typed("/help")
    main(CHAT)
    assert set(re.findall(r"/\w+", capsys.readouterr().err)) >= {"/image", "/new", "/help", "/quit"}


def test_a_message_may_begin_with_a_slash(model, typed):
    typed("//etc is what?")
    main(CHAT)
    assert model.asked[-1]["content"] == "/etc is what?"


def test_a_new_conversation_begins_with_the_system_message_again(model, typed):
    typed("one", "/new", "two")
    main([*CHAT, "--system", "Short."])
    assert [message["content"] for message in model.asked] == ["Short.", "two"]


def test_flags_of_sampling_reach_a_chat(model, typed):
    typed("one")
    main([*CHAT, "--stop", "END", "--temperature", "0.5", "--seed", "3", "--no-merge"])
    assert (model.options["stop"], model.options["temperature"], model.options["seed"]) == (("END",), 0.5, 3)
    assert model.loaded[1]["merge"] is False


@pytest.mark.parametrize("sentence", ["2 tags in '[INST] <image> hi [/INST]'", "no [bold", "[/] :eyes:", r"\[a]"])
def test_square_brackets_are_no_markup_in_a_message(model, typed, capsys, sentence):
    model.words = [ConversationError(sentence)]
    typed("[INST] <image> hi [/INST]", "/quit")
    main(CHAT)
    assert sentence in capsys.readouterr().err


def test_ctrl_c_stops_the_answer_and_keeps_what_was_read(model, typed, capsys):
    model.words = ["once ", "upon ", KeyboardInterrupt()]
    typed(f"/image {PICTURE}", "a story", "/quit")
    main(CHAT)
    assert "stopped" in capsys.readouterr().err
    model.words = ["fine"]
    typed("a story", "go on")
    main(CHAT)
    assert [message["content"] for message in model.asked] == ["a story", "fine", "go on"]


def test_a_stopped_answer_is_part_of_the_conversation(model, typed):
    model.words = ["once ", "upon ", KeyboardInterrupt()]
    typed(f"/image {PICTURE}", "a story", "go on")
    main(CHAT)
    assert [message["content"] for message in model.asked] == ["<image>\na story", "once upon ", "go on"]


def test_ctrl_c_before_the_first_word_takes_the_message_back_and_leaves_its_picture(model, typed, capsys):
    model.words = [KeyboardInterrupt()]
    typed(f"/image {PICTURE}", "a story", "another")
    main(CHAT)
    assert "the message is taken back" in capsys.readouterr().err
    assert [message["content"] for message in model.asked] == ["<image>\nanother"]


def test_a_device_without_memory_for_a_message_does_not_end_the_conversation(model, typed, capsys):
    model.words = [RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes")]
    typed("much", "/new", "/quit")
    main(CHAT)
    assert "Out of memory allocating" in capsys.readouterr().err


def test_ctrl_c_at_the_prompt_asks_and_a_second_one_ends(model, typed, capsys):
    typed(KeyboardInterrupt(), "hello", KeyboardInterrupt(), KeyboardInterrupt(), "never asked")
    with pytest.raises(SystemExit) as caught:
        main(CHAT)
    assert caught.value.code == 130
    assert model.asked[-1]["content"] == "hello"
    assert "Ctrl-C again" in capsys.readouterr().err


def test_end_of_input_ends(model, typed, capsys):
    typed()
    main(CHAT)
    assert capsys.readouterr().out == "\n"


def test_a_closed_standard_input_is_the_end_of_input(model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    main(CHAT)
    assert model.asked == []


def test_bytes_that_are_no_text_are_answered_all_the_same(model, standard_input):
    standard_input(b"caf\xe9\n/quit\n")
    main(CHAT)
    assert model.asked[-1]["content"] == "caf\ufffd"


def _line_with(stream, *words):
    return next(line for line in iter(stream.readline, b"") if any(word in line for word in words))


def _drop_what_is_there(stream):
    os.set_blocking(stream.fileno(), False)
    stream.read()
    os.set_blocking(stream.fileno(), True)


@pytest.mark.slow
def test_a_real_conversation_goes_on_after_ctrl_c():
    """On a busy machine an answer may end before the signal comes, which then falls on the prompt: not every time."""
    flags = ["--model", str(GOLDENS / "nano-small"), "--max-tokens", "100000", "--ignore-eos"]
    command = [sys.executable, "-m", "vl2_jax.cli", "chat", *flags]
    told, pipes = [], dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

    def listen():  # what a shell starts in the background would ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, **pipes, preexec_fn=listen) as chat:
        for message in (b"hello\n", b"go on\n"):
            chat.stdin.write(b"/help\n" + message)
            chat.stdin.flush()
            _line_with(chat.stderr, b"//...")  # of the help: what came before it is over
            _drop_what_is_there(chat.stdout)
            assert len(chat.stdout.read(20)) == 20  # a prompt or two, and some of an answer of thousands of tokens
            chat.send_signal(signal.SIGINT)
            told += [_line_with(chat.stderr, b"stopped\n", b"Ctrl-C again")]
        out, errors = chat.communicate(b"/quit\n", timeout=60)
    assert chat.returncode == 0
    assert any(b"stopped" in line for line in told)
    assert out.endswith(b"> ")
    assert b"Traceback" not in errors
