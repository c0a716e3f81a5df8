"""What is written, and how."""

import warnings

import pytest

from vl2_jax import errors
from vl2_jax.cli.terminal import tell_warnings


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: print(f"elsewhere: {message}"))
    tell_warnings()


def test_a_warning_of_ours_is_a_line_and_one_of_others_stays_as_it_is(told, capsys):
    ours = type("Ours", (UserWarning,), {"__module__": errors.__name__})
    warnings.showwarning(ours("another [base]"), ours, "file.py", 3)
    warnings.showwarning(UserWarning("theirs"), UserWarning, "file.py", 3)
    shown = capsys.readouterr()
    assert (shown.err, shown.out) == ("vl2: another [base]\n", "elsewhere: theirs\n")
