"""From a question to its answer, without a browser: the server's service, and an engine that follows a script."""

import asyncio
import io
import threading
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from PIL import Image

from vl2_jax.processing.grounding import draw_boxes, parse_boxes
from vl2_jax.serving.http.decoding import PictureLimits
from vl2_jax.serving.http.service import Service, Settings
from vl2_jax.serving.page.answering import answer
from vl2_jax.serving.page.examples import EXAMPLES
from vl2_jax.serving.page.gallery import Gallery
from vl2_jax.serving.page.talk import Talk
from vl2_jax.serving.requests import Stage

from ..serving.conftest import wait_until
from ..serving.pictures import png
from ..serving.scripted import ScriptedEngine

GROUNDED = "<|ref|>a ring<|/ref|><|det|>[[100, 100, 500, 500]]<|/det|> and <|ref|>a star<|/ref|><|det|>[[1, 2, 9, 9]]"


@pytest.fixture(scope="module")
def service(processor):
    service = Service(Settings(names=("vl2-nano",), pictures=PictureLimits(pixels=100_000)))
    service.begin(ScriptedEngine(processor), processor)
    yield service
    service.close()


@pytest.fixture
def engine(service):
    service.engine.stage = Stage("ready")
    service.engine.seconds, service.engine.script = 0.0, lambda request: "It is a red square."
    return service.engine


@pytest.fixture
def gallery(tmp_path):
    return Gallery(tmp_path / "shown")


@pytest.fixture
def picture(tmp_path):
    """`picture(name, data)` is a file that was uploaded."""

    def make(name="scene.png", data=None):
        path = tmp_path / name
        path.write_bytes(png((300, 200)) if data is None else data)
        return path

    return make


def ask(service, gallery, talk, question, files=(), on_update=lambda turn: None, **wishes):
    """The turn, after its last update."""
    talk.ask(question, files)
    return answered(service, gallery, talk, on_update, wishes)


def answered(service, gallery, talk, on_update=lambda turn: None, wishes=MappingProxyType({})):
    turn = talk.turns[-1]

    async def run():
        async for _ in answer(service, gallery, talk, wishes):
            on_update(turn)

    asyncio.run(run())
    return turn


def kept(gallery):
    """How many files there are of each name."""
    return Counter(path.name for path in gallery.folder.rglob("*.png"))


def test_an_answer_grows_and_ends(service, engine, gallery):
    seen = []
    turn = ask(service, gallery, Talk(), "What is it?", on_update=lambda turn: seen.append((turn.phase, turn.answer)))
    assert turn.answer == "It is a red square."
    assert (turn.ending, turn.problem, turn.phase) == ("stop", "", "")
    assert [phase for phase, text in seen if not text][:2] == ["reading", "thinking"]
    texts = [text for _, text in seen]
    assert texts == sorted(texts, key=len)
    assert len(set(texts)) > 4
    assert turn.usage.new_tokens == len(service.processor.tokenizer.encode(turn.answer)) + 1  # the end of a sentence


def test_boxes_come_while_the_answer_is_written_and_are_drawn_on_the_picture_to_keep(service, engine, gallery, picture):
    engine.script = lambda request: GROUNDED
    counts = []
    file = picture()
    turn = ask(service, gallery, Talk(), "Where?", [file], lambda turn: counts.append((len(turn.boxes), turn.is_over)))
    assert [count for count, _ in counts] == sorted(count for count, _ in counts)
    assert (1, False) in counts
    assert (turn.boxes[0].x1, turn.boxes[0].y1, turn.boxes[0].x2, turn.boxes[0].y2) == (30, 20, 150, 100)
    expected = draw_boxes(file.read_bytes(), parse_boxes(GROUNDED, 300, 200))
    assert np.array_equal(np.asarray(Image.open(turn.saved)), np.asarray(expected))


def test_boxes_belong_to_the_picture_that_is_asked_for(service, engine, gallery, picture):
    engine.script = lambda request: GROUNDED
    files = [picture("a.png", png((300, 200))), picture("b.png", png((100, 100)))]
    last = ask(service, gallery, Talk(), "Where?", files)
    first = ask(service, gallery, Talk(), "Where?", files, boxes_on=1)
    assert [(turn.boxes_on, turn.boxes[0].x2) for turn in (last, first)] == [(1, 50), (0, 150)]
    assert Image.open(first.saved).size == (300, 200)
    none = ask(service, gallery, Talk(), "Where?", files, boxes_on=3)
    assert none.problem == "boxes_on is 3; the messages hold 2 picture(s), counted from 1."


def test_files_that_nothing_shows_any_more_are_removed(service, engine, gallery, picture):
    engine.script = lambda request: GROUNDED
    talk = Talk()
    ask(service, gallery, talk, "Where?", [picture()])
    assert kept(gallery) == {"picture.png": 3, "boxes.png": 1}  # whole, global view, tiles; with boxes
    talk.ask_again(0)
    again = answered(service, gallery, talk)
    assert kept(gallery) == {"picture.png": 3, "boxes.png": 1}
    assert again.saved.exists()
    # Of three pictures none is cut into tiles any more, that of the first question neither.
    ask(service, gallery, talk, "And these?", [picture("b.png"), picture("c.png")])
    assert kept(gallery) == {"picture.png": 6, "boxes.png": 2}
    talk.ask_again(0, "Which?")
    again = answered(service, gallery, talk)
    assert kept(gallery) == {"picture.png": 3, "boxes.png": 1}
    assert all(file.exists() for file in (again.saved, *vars(talk.pictures[0]).values()) if isinstance(file, Path))


def test_a_conversation_takes_no_files_of_another_along(service, engine, gallery, picture):
    one, other = Talk(), Talk()
    for talk in (one, other):
        ask(service, gallery, talk, "What?", [picture()])
    example = gallery.keep(Image.new("RGB", (9, 9)))
    gallery.forget(one.salt)
    gallery.forget(Talk().salt)  # of which there is nothing
    assert [p.preview.exists() for p in (*one.pictures, *other.pictures)] == [False, True]
    assert example.exists()


@pytest.mark.parametrize("phase", ["compiling its programs", "looking at the pictures", "thinking"])
def test_an_answer_of_a_cleared_conversation_touches_nothing_of_the_next(service, engine, gallery, picture, phase):
    engine.stage, talk, before = Stage("compiling"), Talk(), len(engine.requests)

    def clear(turn):
        engine.stage = Stage("ready")
        if turn.phase == phase:
            talk.clear()
            talk.ask("Another?", [picture("b.png")])

    turn = ask(service, gallery, talk, "Where?", [picture()], clear)
    (other,) = talk.turns
    assert (turn.ending, turn.problem, other.phase, other.is_over) == ("stopped", "", "", False)
    assert other.pictures[0].preview is None
    assert not kept(gallery)
    assert len(engine.requests) == before


def test_tiles_are_those_that_the_model_gets(service, engine, gallery, picture):
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 224, 3), np.uint8)).save(data, "PNG")
    talk = Talk()
    ask(service, gallery, talk, "What?", [picture(data=data.getvalue())])
    (sent,) = talk.pictures
    tiles = engine.requests[-1].prompt.tiles
    raster = np.asarray(Image.open(sent.raster))
    assert sent.crop == (2, 1)
    assert np.array_equal(np.asarray(Image.open(sent.overview)), tiles[0])
    assert np.array_equal(raster[:, :112, :3], tiles[1])
    assert np.array_equal(raster[:, -112:, :3], tiles[2])
    assert (raster[:, 112:-112, 3] == 0).all()
    assert np.array_equal(np.asarray(Image.open(sent.preview)), np.asarray(Image.open(data)))
    assert sent.tokens == talk.turns[0].usage.picture_tokens


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x89PNG\r\n\x1a\n, and then nothing", "picture 1 is damaged or not one of the accepted formats"),
        (b"<svg onload='alert(1)'/>", "picture 1 is damaged or not one of the accepted formats"),
        (png()[:-30], "picture 1 cannot be decoded"),
        (png((1000, 101)), "picture 1 has 1000 x 101 = 101,000 pixels, more than the limit of 100,000; scale it down."),
    ],
)
def test_a_bad_picture_is_told_and_the_next_question_is_answered(service, engine, gallery, picture, data, problem):
    talk = Talk()
    bad = ask(service, gallery, talk, "What?", [picture(data=data)])
    assert bad.problem.startswith(problem)
    good = ask(service, gallery, talk, "And now?", [picture("good.png")])
    assert (good.problem, good.answer) == ("", "It is a red square.")
    assert [p.name for p in talk.pictures] == ["good.png"]


def test_a_stopped_answer_keeps_what_was_read_and_frees_the_engine(service, engine, gallery):
    engine.seconds = 0.02
    talk, before = Talk(), engine.cancelled
    turn = ask(service, gallery, talk, "Go on", on_update=lambda turn: len(turn.answer) > 6 and talk.stop())
    assert turn.ending == "stopped"
    assert not turn.problem
    assert "It is a red square.".startswith(turn.answer)
    assert len(turn.answer) < 19
    wait_until(lambda: engine.cancelled == before + 1)


def test_who_leaves_the_page_cancels_the_answer(service, engine, gallery):
    engine.seconds = 0.02
    before, talk = engine.cancelled, Talk()

    async def leave():
        talk.ask("Go on")
        async for _ in (updates := answer(service, gallery, talk, {})):
            if talk.turns[-1].answer:
                break
        await updates.aclose()

    asyncio.run(leave())
    wait_until(lambda: engine.cancelled == before + 1)
    assert not talk.is_busy


def test_an_engine_that_fails_is_told_in_our_words(service, engine, gallery, caplog):
    engine.script = lambda request: RuntimeError("address 0x7f00")
    turn = ask(service, gallery, Talk(), "What?")
    assert turn.problem.startswith("this question failed in the engine")
    assert "0x7f00" in caplog.text


def test_settings_out_of_bounds_are_told_by_name(service, engine, gallery):
    for wishes, problem in (({"temperature": 9}, "temperature is 9"), ({"seed": "x"}, "seed is 'x'")):
        assert ask(service, gallery, Talk(), "What?", **wishes).problem.startswith(problem)
    ask(service, gallery, Talk(), "What?", temperature=0.5, top_p=0.8, max_tokens=7, seed=3)
    options = engine.requests[-1].options
    assert (options.temperature, options.top_p, options.max_tokens, options.seed) == (0.5, 0.8, 7, 3)


def test_a_question_waits_for_a_model_that_is_compiling(processor, gallery):
    service = Service(Settings(names=("vl2-nano",)))
    service.report("compiling", 1, 4)
    seen = []

    def look(turn):
        seen.append((turn.phase, turn.share))
        if len(seen) == 2:
            threading.Thread(target=service.begin, args=(ScriptedEngine(processor), processor)).start()

    turn = ask(service, gallery, Talk(), "What?", on_update=look)
    service.close()
    assert seen[0] == ("compiling its programs", 0.25)
    assert turn.answer == "It is a red square."


def test_examples_show_what_they_ask_about():
    assert len({example.skill for example in EXAMPLES}) == len(EXAMPLES) == 8
    for example in EXAMPLES:
        for scene, image in zip(example.drawn(), example.pictures(), strict=True):
            assert image.size == (scene.width, scene.height)
            assert scene.words
            assert scene.shapes
