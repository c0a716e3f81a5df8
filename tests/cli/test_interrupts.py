"""Ctrl-C in a process of its own."""

import signal
import subprocess
import sys

# Whatever started the tests may have told its children to ignore Ctrl-C, as shells do in the background.
_LISTENS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
LOST = """
import time
from vl2_jax.cli.interrupts import raise_lost_interrupts

class Callback:
    def __del__(self):
        raise KeyboardInterrupt

raise_lost_interrupts()
try:
    Callback()
    time.sleep(10)
except KeyboardInterrupt:
    print("raised again")
"""
PRESSED = """
import signal, sys
import vl2_jax.cli.info
from vl2_jax.cli import main

vl2_jax.cli.info.config_of = lambda _: signal.raise_signal(signal.SIGINT)
sys.argv = ["vl2", "info", "m"]
main()
"""


def test_ctrl_c_that_a_callback_swallows_is_raised_again():
    shown = subprocess.run([sys.executable, "-c", _LISTENS + LOST], capture_output=True, text=True)
    assert (shown.stdout, shown.stderr) == ("raised again\n", "")


def test_ctrl_c_ends_the_process_in_one_line_as_a_shell_tells_of_it():
    shown = subprocess.run([sys.executable, "-c", _LISTENS + PRESSED], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout, shown.stderr) == (128 + signal.SIGINT, "", "vl2: interrupted\n")
