"""From a command line to the command it asks for, or to one line that says what is wrong with it."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import tyro

from vl2_jax import __version__
from vl2_jax.cli.batch import batch
from vl2_jax.cli.chat import chat
from vl2_jax.cli.convert import convert
from vl2_jax.cli.demo import demo
from vl2_jax.cli.doctor import doctor
from vl2_jax.cli.evaluate import evaluate
from vl2_jax.cli.export import export
from vl2_jax.cli.generate import generate
from vl2_jax.cli.info import info
from vl2_jax.cli.plan import plan
from vl2_jax.cli.serve import serve
from vl2_jax.cli.terminal import on_one_line
from vl2_jax.cli.train import train
from vl2_jax.cli.verify import verify
from vl2_jax.errors import shown

COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "demo": demo,
    "batch": batch,
    "convert": convert,
    "export": export,
    "train": train,
    "eval": evaluate,
    "verify": verify,
    "plan": plan,
    "info": info,
    "doctor": doctor,
}
_DESCRIPTION = """DeepSeek-VL2: look at pictures, talk about them, point at things in them.
`vl2 COMMAND --help` shows the flags of a command and an example; `vl2 --version` the version;
`vl2 --print-completion SHELL` what bash, zsh or fish needs to complete commands, flags and files."""
_HELP_FLAGS = ("-h", "--help")
_SHELLS = ("bash", "zsh", "fish")
_FILES_TOO = {  # in the parser's scripts, which complete file names after some flags alone
    "for completion in completions:": "for completion in completions or ['__TYRO_COMPLETE_FILES__']:",
    'COMPREPLY=($(compgen -f -- "$cur"))': "COMPREPLY=()",  # bash itself does it better: folders, blanks, arguments
    "complete -F _tyro_vl2 vl2\n": "complete -o default -F _tyro_vl2 vl2\n",
}
_KINDS = {"INT": "a whole number", "FLOAT": "a number"}
_WRONG = 2  # the exit code of a command line that cannot be read
_LONGEST = 200  # characters of what the parser says


def parse(arguments: Sequence[str]) -> Callable[[], None]:
    """The command with its arguments, ready to be called. Help and mistakes are printed, and end the process."""
    name, *given = arguments or [""]
    if name in COMMANDS:
        return _command(name, given)
    if name == "--version":
        print(f"vl2 {__version__}")
        sys.exit()
    if name in _HELP_FLAGS:
        return _all_commands(arguments)
    if name == "--print-completion":
        if len(given) != 1 or given[0] not in _SHELLS:
            _refuse(
                f"--print-completion takes {', '.join(_SHELLS[:-1])} or {_SHELLS[-1]}, not {shown(' '.join(given))}."
            )
        print(_completion(given[0]))
        sys.exit()
    if not name or name.startswith("-"):
        _refuse(f"give a command first: {', '.join(COMMANDS)}; `vl2 --help` says what they do.")
    _refuse(f"there is no command {shown(name)}; {_meant(name, COMMANDS) or 'there are ' + ', '.join(COMMANDS)}")


def _all_commands(arguments: Sequence[str]) -> Callable[[], None]:
    """What the parser of all commands together makes of arguments: slow, and its mistakes are not told in one line."""
    app = tyro.extras.SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name, help=(command.__doc__ or "").partition("\n\n")[0])(_deferred(command))
    return app.cli(prog="vl2", description=_DESCRIPTION, args=arguments)


def _completion(shell: str) -> str:
    """The parser's script for a shell. Where it knows no completion, files are offered: pictures, models, recipes."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        _all_commands(["--tyro-print-completion", shell])
    script = out.getvalue()
    for written, wanted in _FILES_TOO.items():
        script = script.replace(written, wanted)
    return script


def _command(name: str, given: Sequence[str]) -> Callable[[], None]:
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            command, left = _read(name, given)
    except SystemExit as ended:
        if not ended.code:
            raise
        left = []
    else:
        if not left:
            return command
    _refuse(f"{_mistake(name, given, left)}; `vl2 {name} --help` shows all flags.")


def _read(name: str, given: Sequence[str]) -> tuple[Callable[[], None], list[str]]:
    """The command with its arguments, and the arguments that belong to nothing."""
    return tyro.cli(_deferred(COMMANDS[name]), prog=f"vl2 {name}", args=given, return_unknown_args=True)


def _deferred(command: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The command, to be run after its arguments were read: then what it writes is its own, and not of the parser."""

    @functools.wraps(command)
    def with_arguments(*arguments: Any, **options: Any) -> Callable[[], None]:
        return functools.partial(command, *arguments, **options)

    return with_arguments


def _refuse(line: str) -> NoReturn:
    print(f"vl2: {line}", file=sys.stderr)
    sys.exit(_WRONG)


def _mistake(name: str, given: Sequence[str], left: Sequence[str]) -> str:
    """What is wrong with arguments that were refused or left, for the one line about it.

    The parser tells by what it prints: a title, and parts between rules.
    """
    usage, _ = _printed(name, ["--help"])
    known = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage))
    flags = (argument.partition("=")[0] for argument in given if argument.startswith("--"))
    unknown = next((flag for flag in flags if flag != "--" and flag.replace("_", "-") not in known), None)
    if unknown is not None:
        meant = _meant(unknown, known)
        return f"{name} has no flag {shown(unknown)}{meant and f' ({meant})'}"
    if left:
        return f"{shown(left[0])} belongs to no flag: quote what has blanks, and repeat a flag for each of its values"
    _, printed = _printed(name, given)
    part = list(itertools.takewhile(lambda line: not line.strip().startswith("---"), printed.splitlines()[2:]))
    said = on_one_line(" ".join(line.strip() for line in part))
    if said.startswith("Missing from"):
        missing = [match[1] for line in part if (match := re.match(r" {6}(\S+)", line))]
        return f"{name} needs {' and '.join(missing)}"
    if match := re.match(r"Missing value for argument '(\S+)'", said):
        return f"{match[1]} needs a value; one that begins with -- is written {match[1]}=VALUE"
    if match := re.match(r"(?:Error parsing|invalid choice .* for argument) '?(--[\w-]+)", said):
        kinds = re.findall(rf"^ *{match[1]} (\S+)", usage, re.MULTILINE) or ["another value"]
        kind = kinds[0].removeprefix("{None}|")
        return f"{match[1]} takes {_KINDS.get(kind, kind)}, not {shown(_value_of(match[1], given))}"
    return said if len(said) <= _LONGEST else said[:_LONGEST] + "..."


def _value_of(flag: str, given: Sequence[str]) -> str:
    """What stands after a flag, where it was given last."""
    for number, argument in reversed(list(enumerate(given))):
        name, is_joined, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            return value if is_joined else " ".join(given[number + 1 : number + 2])
    return ""


def _meant(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _printed(name: str, given: Sequence[str]) -> tuple[str, str]:
    """What the parser writes to standard output and standard error, in plain letters without frames."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), contextlib.suppress(SystemExit):
        _read(name, given)
    plain = [re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue()) for stream in (out, errors)]
    return plain[0], plain[1]
