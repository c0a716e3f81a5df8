"""What a person does on the page: asks about pictures, watches boxes appear, stops, asks again."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from vl2_jax.processing.grounding import COLOURS, draw_boxes, parse_boxes

from ...serving.conftest import wait_until
from ...serving.pictures import png

GROUNDED = (
    "<|ref|>A red circle<|/ref|><|det|>[[100, 100, 400, 500]]<|/det|> and "
    "<|ref|>a star<|/ref|><|det|>[[600, 300, 900, 900]]<|/det|> beside it."
)


def test_text_and_boxes_come_while_the_answer_is_written(site, tab, picture):
    site.engine.script, site.engine.seconds = lambda request: GROUNDED, 0.04
    tab.add(picture)
    tab.ask("<|grounding|>What do you see?", waits=False)
    expect(tab.boxes).to_have_count(1)
    expect(tab.writing).to_have_count(1)
    assert "beside it" not in tab.answers.inner_text()
    tab.wait()
    expect(tab.boxes).to_have_count(2)
    expect(tab.answers.locator(".text")).to_have_text("A red circle and a star beside it.")
    expect(tab.page.locator("#usage")).to_contain_text("of pictures")


def test_boxes_are_drawn_where_they_are_and_show_their_label(site, tab, picture):
    site.engine.script = lambda request: GROUNDED
    tab.add(picture)
    tab.ask("Where?")
    canvas = tab.page.locator(".answer .canvas")
    shown = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
    height, width = shown.shape[:2]
    assert width / height == pytest.approx(1.5, abs=0.02)  # of 300 x 200
    drawn = [np.abs(shown - colour).sum(axis=2) < 12 for colour in COLOURS[:2]]
    for pixels, (x1, y1, x2, y2) in zip(drawn, ((100, 100, 400, 500), (600, 300, 900, 900))):
        rows, columns = np.nonzero(pixels)
        edges = np.asarray([columns.min() / width, rows.min() / height, columns.max() / width, rows.max() / height])
        assert edges == pytest.approx(np.asarray([x1, y1, x2, y2]) / 1000, abs=0.01)  # 4 pixels of 380: its line is 3
        middle = shown[int(height * (y1 + y2) / 2000), int(width * (x1 + x2) / 2000)]
        assert middle.tolist() == [255, 255, 255]
    star = tab.page.get_by_label("a star", exact=True)
    expect(star.locator("b")).to_be_hidden()
    star.hover()
    expect(star.locator("b")).to_be_visible()
    expect(star.locator("b")).to_have_text("a star")


def test_the_picture_with_its_boxes_can_be_saved(site, tab, picture):
    site.engine.script = lambda request: GROUNDED
    tab.add(picture)
    tab.ask("Where?")
    with tab.page.expect_download() as download:
        tab.page.get_by_text("Save picture").click()
    saved = np.asarray(Image.open(download.value.path()))
    expected = draw_boxes(picture[1], parse_boxes(GROUNDED, 300, 200))
    assert download.value.suggested_filename == "boxes.png"
    assert np.array_equal(saved, np.asarray(expected))


def test_several_pictures_and_the_tiles_that_the_model_sees(site, tab, picture):
    tab.add(picture, ("other.jpg", png((100, 100), "blue", kind="JPEG")))
    tab.ask("Which is blue?")
    expect(tab.page.locator(".sent img")).to_have_count(2)
    shown = tab.page.locator("#tiles figure")
    expect(shown).to_have_count(2)
    expect(shown.nth(0)).to_contain_text("300 × 200 pixels → global view + 2 × 2 tiles")
    expect(shown.nth(1)).to_contain_text("100 × 100 pixels → global view alone")
    for image in tab.page.locator("#tiles img, .sent img").all():
        assert image.evaluate("element => element.complete && element.naturalWidth > 0")
    assert len(site.engine.requests[-1].prompt.image_sizes) == 2


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(site, tab, picture, event):
    tab.question.evaluate(
        """(element, [event, data]) => {
            const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "scene.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            element.dispatchEvent(event === "paste"
                ? new ClipboardEvent("paste", { ...options, clipboardData: carried })
                : new DragEvent("drop", { ...options, dataTransfer: carried }));
        }""",
        [event, base64.b64encode(picture[1]).decode()],
    )
    expect(tab.page.locator("#box img")).to_have_count(1)
    tab.ask("What is it?")
    assert site.engine.requests[-1].prompt.image_sizes == ((300, 200),)


def test_a_photograph_goes_into_the_question(site, tab):
    tab.page.click("#camera")
    tab.page.get_by_text("Click to Access Webcam").click()
    wait_until(
        lambda: tab.page.locator("#lens video").evaluate("video => video.readyState > 1 && video.videoWidth > 0")
    )
    tab.page.locator("#lens").get_by_label("capture photo").click()
    expect(tab.page.locator("#box img")).to_have_count(1)
    expect(tab.page.locator("#lens")).to_have_count(0)
    tab.ask("What is it?")
    assert len(site.engine.requests[-1].prompt.image_sizes) == 1


def test_a_question_beside_an_answer_is_told_and_not_lost(site, tab):
    site.engine.script, site.engine.seconds = lambda request: "one two three four " * 20, 0.03
    tab.ask("Count", waits=False)
    expect(tab.answers).to_contain_text("three")
    tab.question.fill("And then?")
    tab.question.press("Enter")
    expect(tab.page.get_by_text("is being answered")).to_be_visible()
    expect(tab.question).to_have_value("And then?")
    tab.page.click("#box .stop-button")
    tab.wait()
    tab.question.press("Enter")
    expect(tab.answers).to_have_count(2)


def test_an_answer_is_stopped_and_the_next_question_knows_what_was_read(site, tab):
    site.engine.script, site.engine.seconds = lambda request: "one two three four " * 20, 0.03
    cancelled = site.engine.cancelled
    tab.ask("Count", waits=False)
    expect(tab.answers).to_contain_text("three")
    tab.page.click("#box .stop-button")
    tab.wait()
    expect(tab.answers).to_contain_text("stopped")
    wait_until(lambda: site.engine.cancelled == cancelled + 1)
    site.engine.script = lambda request: "ten"
    tab.ask("Go on")
    assert tab.said()[-1] == "ten"
    assert "one two three" in site.running.service.processor.tokenizer.decode(site.engine.requests[-1].prompt.input_ids)


def test_an_answer_is_asked_for_again(site, tab, picture):
    tab.add(picture)
    tab.ask("What is it?")
    site.engine.script = lambda request: "A ring."
    tab.press("Retry")
    expect(tab.answers).to_have_text("A ring.")
    tab.wait()
    assert site.engine.requests[-1].prompt.image_sizes == ((300, 200),)


def test_a_past_question_is_changed_and_what_followed_is_forgotten(site, tab, picture):
    site.engine.script = lambda request: f"answer {len(site.engine.requests)}"
    tab.add(picture)
    tab.ask("one <b>")
    tab.ask("two")
    tab.press("Edit", 0)
    box = tab.page.locator("#chat textarea")
    box.fill("three <i>x</i> & y")
    tab.press("Submit", 0)
    expect(tab.answers).to_have_count(1)
    tab.wait()
    assert "three <i>x</i> & y" in tab.said()
    expect(tab.page.locator(".sent img")).to_have_count(1)
    prompt = site.engine.requests[-1].prompt
    text = site.running.service.processor.tokenizer.decode(
        [id_ for id_, row in zip(prompt.input_ids, prompt.visual_index) if row < 0]
    )
    assert "three <i>x</i> & y" in text
    assert "two" not in text
    assert prompt.image_sizes == ((300, 200),)


@pytest.mark.parametrize("how", ["Clear", "new"])
def test_a_conversation_is_begun_anew(site, tab, picture, how):
    tab.add(picture)
    tab.ask("What is it?")
    before = set(site.folder.iterdir())
    tab.page.locator(f"#{how}" if how == "new" else f"#chat button[title={how}]").click()
    expect(tab.answers).to_have_count(0)
    wait_until(lambda: len(before - set(site.folder.iterdir())) == 1)  # its files are gone
    expect(tab.page.locator("#tiles img")).to_have_count(0)
    tab.ask("Hello")
    assert site.engine.requests[-1].prompt.image_sizes == ()


def test_settings_are_those_of_the_answer(site, tab):
    tab.page.get_by_label("System message").fill("Be brief.")
    tab.page.get_by_label("number input for Temperature").fill("0.7")
    tab.page.get_by_label("number input for Top-p").fill("0.5")
    tab.page.get_by_label("number input for Longest answer, in tokens").fill("3")
    tab.page.get_by_label("Seed").fill("42")
    tab.ask("What is it?")
    request = site.engine.requests[-1]
    options = request.options
    assert (options.temperature, options.top_p, options.max_tokens, options.seed) == (0.7, 0.5, 3, 42)
    assert "Be brief." in site.running.service.processor.tokenizer.decode(request.prompt.input_ids)
    expect(tab.answers).to_contain_text("cut at the longest answer")
    tab.page.get_by_label("Seed").fill("lucky")
    tab.ask("And now?")
    expect(tab.answers.last).to_contain_text("Seed is 'lucky'")


def test_an_example_is_asked_with_its_picture(site, tab):
    tab.page.get_by_text("Two pictures").click()
    tab.wait()
    expect(tab.page.locator(".sent img")).to_have_count(2)
    tab.page.click("#new")
    expect(tab.page.locator(".sent img")).to_have_count(0)
    tab.page.get_by_text("Several questions").click()
    expect(tab.answers).to_have_count(3)
    tab.wait()
    assert len(site.engine.requests[-1].prompt.image_sizes) == 1
