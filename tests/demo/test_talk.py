"""Turns of a conversation: asked, answered, stopped, asked again; and what of them is told to the model."""

import base64

import pytest

from vl2_jax.errors import ConversationError, ImageError, RequestError
from vl2_jax.serving.http.bodies import ChatBody, checked
from vl2_jax.serving.page import talk as talks
from vl2_jax.serving.page.talk import Talk

from ..serving.pictures import png


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "scene.png"
    path.write_bytes(png())
    return path


def answered(*pairs) -> Talk:
    talk = Talk()
    for question, answer in pairs:
        talk.ask(question)
        talk.turns[-1].answer, talk.turns[-1].ending = answer, "stop"
    return talk


def said(talk: Talk) -> list[tuple[str, str]]:
    body = checked(ChatBody, talk.body("vl2-nano"))
    texts = [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in body.messages]
    return [(message["role"], text) for message, text in zip(body.messages, texts)]


def test_a_question_is_asked_with_what_was_said_before():
    talk = answered(("one", "1"), ("two", "2"))
    talk.ask(" three ")
    assert said(talk) == [
        ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2"), ("user", "three"),
    ]  # fmt: skip


def test_what_failed_or_was_stopped_before_a_word_is_not_said_and_what_was_read_is():
    talk = answered(("one", "1"), ("two", ""), ("three", "beginning"))
    talk.turns[1].ending = talk.turns[2].ending = "stopped"
    talk.ask("four")
    talk.turns[-1].answer, talk.turns[-1].problem = "half", "it failed."
    talk.ask("five")
    assert [text for _, text in said(talk)] == ["one", "1", "three", "beginning", "five"]


def test_pictures_are_sent_as_they_are(file):
    talk = Talk()
    talk.ask("", [file, file])
    parts = talk.body("vl2-nano")["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert base64.b64decode(parts[0]["image_url"]["url"].partition(",")[2]) == file.read_bytes()
    assert [picture.name for picture in talk.pictures] == ["scene.png", "scene.png"]


def test_asking_again_forgets_what_follows_and_keeps_the_pictures(file):
    talk = answered(("one", "1"))
    talk.turns[0].pictures = [talks.Picture.from_file(file)]
    kept = talk.turns[0].pictures[0]
    talk.ask("two")
    talk.turns[-1].ending = "stop"
    talk.ask_again(0, "ONE")
    assert said(talk) == [("user", "ONE")]
    assert talk.pictures == [kept]
    assert talk.is_busy


def test_mistakes_are_told():
    talk = Talk()
    with pytest.raises(ConversationError, match="there is no question"):
        talk.ask("  ")
    with pytest.raises(ConversationError, match="there is no turn 0; this conversation has 0"):
        talk.ask_again(0)
    talk.ask("one")
    for again in (lambda: talk.ask("two"), lambda: talk.ask_again(0)):
        with pytest.raises(ConversationError, match="being answered"):
            again()


def test_a_file_that_is_too_large_is_not_read(file, monkeypatch):
    monkeypatch.setattr(talks, "MOST_BYTES", 10)
    with pytest.raises(ImageError, match=r"'scene.png' has \d+ bytes, more than the limit of 10; scale it down"):
        Talk().ask("What is it?", [file])


def test_too_many_files_are_not_read(tmp_path):
    with pytest.raises(RequestError, match="17 pictures are too many for a question; send at most 16"):
        Talk().ask("What are they?", [tmp_path / "nothing.png"] * 17)


def test_a_file_that_was_removed_meanwhile_is_told(tmp_path):
    talk = Talk()
    with pytest.raises(ImageError, match=r"'scene.png' was sent so long ago that it was removed; send it again"):
        talk.ask("What is it?", [tmp_path / "scene.png"])
    assert not talk.turns


def test_conversations_share_no_computed_prompts():
    one, other = answered(("a", "1")), answered(("a", "1"))
    salts = {talk.body("m")["cache_salt"] for talk in (one, other)}
    one.clear()
    one.ask("a")
    assert len(salts | {one.body("m")["cache_salt"]}) == 3


def test_settings_become_fields_of_a_request_and_what_is_not_set_is_left_out():
    talk = Talk()
    talk.ask("one")
    body = talk.body("m", system="Be brief.", boxes_on=0, temperature=0.5, seed=None)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["temperature"] == 0.5
    assert not body.keys() & {"seed", "boxes_on"}
