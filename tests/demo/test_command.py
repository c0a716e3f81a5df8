"""`vl2 demo`: what it serves, where, and what is told before anything is loaded. None of this needs Gradio."""

import os
import sys
import types

import pytest

from vl2_jax.cli import main


@pytest.fixture
def served(monkeypatch):
    """What the command hands to the server, in place of a server."""
    given = []

    def run(service, listener, load, drain_seconds, report, when_ready, app):
        given.append(types.SimpleNamespace(service=service, address=listener.getsockname(), app=app))
        listener.close()

    monkeypatch.setattr("vl2_jax.serving.http.server.run", run)
    page = types.SimpleNamespace(make_app=lambda service, gallery: ("the page", gallery.folder))
    monkeypatch.setitem(sys.modules, "vl2_jax.serving.page.app", page)
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    return given


def test_only_this_machine_can_reach_the_page(served, monkeypatch):
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    main(["demo", "--port", "0"])
    assert served[0].address[0] == "127.0.0.1"
    assert served[0].service.settings.names == ("vl2-nano",)
    assert served[0].service.settings.media_domains == frozenset()


def test_nothing_is_counted_and_what_was_sent_goes_with_the_page(served):
    main(["demo", "vl2-nano", "--port", "0"])
    told, folder = served[0].app
    assert told == "the page"
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.path.dirname(os.environ["GRADIO_TEMP_DIR"]) == str(folder.parent)
    assert not folder.parent.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 70000", "--port is 70000"),
        ("--max-num-seqs 0", "--max-num-seqs is 0"),
        ("nowhere", "there is no directory 'nowhere'"),
        ("vl2-nano --model vl2-nano", "demo needs a model, once"),
        ("--host 0.0.0.0", "demo has no flag '--host'"),
        ("--share", "demo has no flag '--share'"),
    ],
)
def test_a_mistake_gets_one_sentence(served, capsys, flags, message):
    with pytest.raises(SystemExit):
        main(["demo", *flags.split()])
    assert message in capsys.readouterr().err
    assert not served


def test_a_missing_extra_is_told_with_the_line_that_adds_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "vl2_jax.serving.page.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit):
        main(["demo", "--port", "0"])
    error = capsys.readouterr().err
    assert "the page needs 'gradio': pip install" in error
    assert "[demo]" in error
