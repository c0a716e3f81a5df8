"""`vl2 demo` as it is: its own process, the model that comes with the project, and the examples of the page."""

import re
import signal
import subprocess
import sys

import pytest
from playwright.sync_api import expect

from vl2_jax.processing.grounding import Box
from vl2_jax.scenes.drawing import Scene
from vl2_jax.scenes.evaluation import matched
from vl2_jax.serving.page.examples import EXAMPLES

ANSWERS = {  # of the scenes that are drawn, by what was drawn
    "Describe": ["A large purple ring, the word JUMP in purple and a small blue circle."],
    "Count": ["2"],
    "Read": ["LAND"],
    "Locate": ["the square"],
    "Describe with boxes": ["a large green diamond, the word BOX in orange and a small yellow cross."],
    "Two pictures": ["the first"],
    "What is not there": ["red ring"],
    "Several questions": ["A large purple ring, the word JUMP in purple and a small blue circle.", "2", "JUMP"],
}
_SECONDS = 120  # for loading and compiling


def things_of(scene: Scene, answer: str) -> list[Box]:
    """Where the things of a scene are that an answer speaks of, in hundredths of the picture."""
    whole = (scene.width, scene.height) * 2
    return [
        Box("", *(round(100 * edge / side) for edge, side in zip(thing.box, whole)))
        for thing in scene.things
        if thing.kind in answer
    ]


def box_of(element) -> Box:
    """The same of a box on the page."""
    left, top, width, height = map(float, re.findall(r"[\d.]+(?=%)", element.get_attribute("style")))
    return Box("", *map(round, (left, top, left + width, top + height)))


@pytest.fixture(scope="module")
def address():
    command = [sys.executable, "-m", "vl2_jax.cli", "demo", "vl2-nano", "--port", "0", "--max-num-seqs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    yield next(found[0] for line in process.stderr if (found := re.search(r"http://127.0.0.1:\d+", line)))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


def test_every_example_is_answered_rightly(address, browser):
    page = browser.new_page()
    page.goto(address)
    seen = set()
    for _ in range(_SECONDS):
        seen |= set(re.findall("loading|compiling|ready", page.locator("#status").inner_text()))
        if "ready" in seen:
            break
        page.wait_for_timeout(1000)
    assert seen >= {"compiling", "ready"}
    for example in EXAMPLES:
        page.get_by_text(example.skill, exact=True).click()
        texts = page.locator(".answer .text")
        expect(texts).to_have_text(ANSWERS[example.skill], timeout=60_000)
        expect(page.locator("#box .submit-button")).to_be_visible()
        boxes = page.locator(".answer .box")
        expect(boxes).to_have_count({"Locate": 1, "Describe with boxes": 3}.get(example.skill, 0))
        if boxes.count():
            things = things_of(example.drawn()[0], ANSWERS[example.skill][0])
            assert matched(things, [box_of(one) for one in boxes.all()]) == 1.0
        page.click("#new")
        expect(texts).to_have_count(0)
    page.close()
