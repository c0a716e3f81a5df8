"""Every command's help, and the one line that a mistyped command line gets."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vl2_jax import __version__
from vl2_jax.cli import main
from vl2_jax.cli.parsing import COMMANDS, parse

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    return {command: _printed([command, "--help"]) for command in COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_can_be_typed(helps, command):
    (example,) = re.findall(r"^Example: (.*)", helps[command], re.MULTILINE)
    name, *arguments = shlex.split(example)
    assert (name, arguments[0]) == ("vl2", command)
    assert parse(arguments).func is COMMANDS[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_the_default_of_every_flag(helps, command):
    flags = re.findall(r"^  (--[a-z].*?)(?=^(?:  -|\s*$))", helps[command], re.MULTILINE | re.DOTALL)
    assert [flag for flag in flags if not re.search(r"\(\s*(?:default:|required|repeatable)", flag)] == []


def test_the_readme_has_a_row_for_each_command_and_no_flag_that_is_none(helps):
    table = README.read_text().partition("## Commands")[2].partition("##")[0]
    rows = re.findall(r"^\| `vl2 (\w+)(.*)", table, re.MULTILINE)
    assert [command for command, _ in rows] == list(COMMANDS)
    for command, row in rows:
        assert [flag for flag in re.findall(r"--[a-z-]+", row) if flag not in helps[command]] == []


def test_help_and_version_do_not_wait_for_jax():
    code = "import sys; from vl2_jax.cli import main\ntry: main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(command in shown.stdout for command in COMMANDS)
    assert _printed(["--version"]) == f"vl2 {__version__}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "give a command first: generate, chat"),
        ("--model m generate", "give a command first"),
        ("genrate --model m", "there is no command 'genrate'; did you mean generate?"),
        ("sing", "there is no command 'sing'; there are generate, chat"),
        ("generate --modle m --prompt x", "generate has no flag '--modle' (did you mean --model?)"),
        ("generate --model m --prompt x --max_tokns=3", "(did you mean --max-tokens?)"),
        ("generate --prompt x", "generate needs --model; `vl2 generate --help` shows all flags."),
        ("convert", "convert needs SOURCE and DESTINATION"),
        ("train sft-nano", "train needs --out"),
        ("generate --model m --prompt", "--prompt needs a value"),
        ("generate --model m --max-tokens abc", "--max-tokens takes a whole number, not 'abc'"),
        ("generate --model m --max_tokens=1.5", "--max-tokens takes a whole number, not '1.5'"),
        ("generate --model m --seed x", "--seed takes a whole number, not 'x'"),
        ("generate --model m --temperature warm", "--temperature takes a number, not 'warm'"),
        ("generate --model m --dispatch fast", "--dispatch takes {ring,ragged}, not 'fast'"),
        ("plan --model m --for dec", "--for takes {decode,prefill,train}, not 'dec'"),
        ("info a b", "'b' belongs to no flag"),
        ("generate --model m --image a.png b.png", "repeat a flag for each of its values"),
    ],
)
def test_a_mistyped_command_line_gets_one_line(capsys, command, message):
    with pytest.raises(SystemExit) as caught:
        main(command.split())
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def _printed(arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    return printed.getvalue()
