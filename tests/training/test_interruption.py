"""Signals save what is at rest, whatever the main thread is doing."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from vl2_jax.training.interruption import Interrupted, Interruption


def test_what_is_at_rest_is_saved_as_soon_as_a_signal_comes():
    saved = threading.Event()
    with Interruption() as interruption:
        with interruption.at_rest(saved.set):
            interruption.check()
            os.kill(os.getpid(), signal.SIGTERM)
            assert saved.wait(5)
            with pytest.raises(Interrupted):
                interruption.check()
        assert interruption.came == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_during_an_update_nothing_is_saved_until_the_state_is_at_rest():
    saved = threading.Event()
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.has_come()
        assert not saved.wait(0.3)
        with interruption.at_rest(saved.set):
            assert saved.wait(5)


BUSY = """
import hashlib, os, signal, sys, threading, time
from vl2_jax.training import interruption
from vl2_jax.training.interruption import Interruption

def tell():
    print("saved", flush=True)

interruption._PATIENCE = 0.2
with Interruption() as running:
    begun = threading.Timer(0.3, lambda: print("begun", flush=True))
    begun.start()
    with running.at_rest(tell):
        for _ in range(int(sys.argv[1])):
            hashlib.pbkdf2_hmac("sha256", b"p", b"s", 60_000_000)  # one call, in which no handler runs
"""


def test_a_main_thread_that_does_not_come_back_is_not_waited_for():
    """As in a compilation of minutes: what there is to save is saved, and the process ends as the signal says."""
    command = [sys.executable, "-c", BUSY, "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "begun\n"
        run.send_signal(signal.SIGTERM)
        told, errors = run.communicate(timeout=10)
    assert told == "saved\n"
    assert run.returncode == 128 + signal.SIGTERM
    assert "what there is to save is saved" in errors


def test_signals_are_left_to_others_outside_of_the_main_thread():
    seen = []

    def elsewhere():
        with Interruption() as interruption, interruption.at_rest(lambda: None):
            seen.append(interruption.has_come())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) is before
