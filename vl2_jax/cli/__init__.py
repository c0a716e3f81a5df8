"""The `vl2` command. Text goes to standard output, progress and errors to standard error.

A file a command; flags that several commands share are in `flags.py`.
"""

from __future__ import annotations

import os
import sys

from vl2_jax.cli.interrupts import INTERRUPTED, leave_at_once, raise_lost_interrupts


def main(arguments: list[str] | None = None) -> None:
    """Runs one command; what a user can do wrong ends in one line and a code: 2 for a command line, else 1.

    Args:
      arguments: of a caller in this process; by default those of the process, which then is ours to end.
    """
    try:  # other imports are inside: Ctrl-C may come while they last
        from vl2_jax.cli.parsing import parse
        from vl2_jax.cli.terminal import accept_any_text, on_one_line, tell_warnings
        from vl2_jax.errors import VL2Error, shown

        accept_any_text()
        if arguments is None:
            raise_lost_interrupts()
            tell_warnings()
        try:
            parse(sys.argv[1:] if arguments is None else arguments)()
            if sys.stdout is not None:
                sys.stdout.flush()  # so that a reader who has left is met here
        except BrokenPipeError:  # `vl2 info M | head`: whoever read us has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except VL2Error as error:
            sys.exit(_told(on_one_line(str(error))))
        except OSError as error:  # a full disk, a folder without permission
            where = f": {shown(error.filename)}" if error.filename else ""
            sys.exit(_told(on_one_line(f"{error.strerror or error}{where}")))
    except KeyboardInterrupt:
        if sys.stderr is not None and sys.stderr.isatty():
            print(file=sys.stderr)  # below what was being written, and the terminal's ^C
        _told("interrupted")
        if arguments is None:
            leave_at_once()
        sys.exit(INTERRUPTED)


def _told(line: str) -> int:
    print(f"vl2: {line}", file=sys.stderr)
    return 1
