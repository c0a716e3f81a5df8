"""Events of the page that a browser does not send as it is, but who speaks to its routes can."""

import asyncio

import pytest

from vl2_jax.serving.page.gallery import Gallery
from vl2_jax.serving.page.talk import Talk


@pytest.fixture
def events(site):
    from vl2_jax.serving.page.events import Events  # after Gradio's settings, see `serve_page`

    return Events(site.running.service, Gallery(site.folder), [])


def asked(events, talk, *settings):
    async def ask():
        async for _ in events.ask({"text": "What is it?", "files": []}, talk, *settings):
            pass

    asyncio.run(ask())
    return talk.turns[-1]


def test_settings_that_are_missing_are_those_of_an_empty_panel(events):
    turn = asked(events, Talk(), None, 0, 0.9, 10, None, 0)
    assert (turn.answer, turn.problem) == ("It is a red square.", "")


def test_settings_of_another_kind_leave_no_turn_open(events):
    talk = Talk()
    with pytest.raises(TypeError):
        asked(events, talk, "", 0, 0.9, 10, 3.5, 0)
    assert not talk.is_busy
    assert asked(events, talk, "", 0, 0.9, 10, "", 0).answer == "It is a red square."
