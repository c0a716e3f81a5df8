"""Every command's help, and the one line that a mistyped command line gets."""

import contextlib
import io
import os
import pty
import re
import shlex
import subprocess
import sys

import pytest

from vl2_jax import __version__
from vl2_jax.cli import main
from vl2_jax.cli.parsing import COMMANDS, parse


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


def test_help_and_version_do_not_wait_for_jax():
    code = "import sys; from vl2_jax.cli import main\ntry: main(['--help'])\nfinally: assert 'jax' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(command in shown.stdout for command in COMMANDS)
    assert _printed(["--version"]) == f"vl2 {__version__}\n"


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "vl2"
    path.write_text(_printed(["--print-completion", "bash"]))
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("gen", ["generate"]),
        ("", ["-h", "--help", *COMMANDS]),
        ("generate --max-t", ["--max-tokens"]),
        ("serve --max-num", ["--max-num-seqs", "--max-num-queued-reqs", "--max-num-queued-tokens"]),
        ("plan --for ", ["decode", "prefill", "train"]),
    ],
)
def test_bash_completes_commands_flags_and_choices(script, typed, offered):
    words = ["vl2", *typed.split(" ")]
    ask = f'source "$0"; COMP_WORDS=("$@"); COMP_CWORD={len(words) - 1}; _tyro_vl2; printf "%s\\n" "${{COMPREPLY[@]}}"'
    shown = subprocess.run(["bash", "-c", ask, script, *words], capture_output=True, text=True, check=True)
    assert sorted(shown.stdout.split()) == sorted(offered)


@pytest.mark.parametrize(
    "begun", ["generate --image my\\ ph", "verify my\\ ph", "serve vl2-nano --port 1 --api-key-file my\\ ph"]
)
def test_bash_completes_names_of_files_as_it_is_typed(script, tmp_path, begun):
    """In a terminal of its own: the tabulator, then the line is turned into one that prints itself."""
    (tmp_path / "my photo.jpg").touch()
    keys = f"PS1=; . {script}\nvl2 {begun}\t\x01printf '<%s>' \nexit\n"
    ours, theirs = pty.openpty()
    shell = ["bash", "--norc", "--noprofile", "-i"]
    with subprocess.Popen(shell, cwd=tmp_path, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, text=True) as bash:
        os.write(ours, keys.encode())
        printed, _ = bash.communicate(timeout=20)
    os.close(ours), os.close(theirs)
    assert printed.endswith("<my photo.jpg>")


@pytest.mark.parametrize(("shell", "registers"), [("zsh", "#compdef vl2\n"), ("fish", "--command 'vl2'")])
def test_other_shells_get_a_script_that_knows_each_command(shell, registers):
    script = _printed(["--print-completion", shell])
    assert registers in script
    assert [command for command in COMMANDS if f"'{command}': {{'description'" not in script] == []
    assert script.count("or ['__TYRO_COMPLETE_FILES__']:") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "give a command first: generate, chat"),
        ("--model m generate", "give a command first"),
        ("genrate --model m", "there is no command 'genrate'; did you mean generate?"),
        ("--print-completion tcsh", "--print-completion takes bash, zsh or fish, not 'tcsh'."),
        ("--print-completion", "takes bash, zsh or fish"),
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
