"""What the page shows is safe whatever a model, a user or a file says, and is what was said."""

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageColor

from vl2_jax.processing.grounding import COLOURS, parse_boxes
from vl2_jax.serving.page import view
from vl2_jax.serving.page.talk import Picture, Talk, Turn, Usage
from vl2_jax.serving.requests import Stage

ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload='alert(1)'>",
    "javascript:alert(1)",
    "&lt;b&gt; &#60;i&#62; <!-- -->",
    "</span></div><iframe src=//evil.example>",
)
PIECES = st.lists(
    st.sampled_from(["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "[[1, 2, 30, 40]]", "[[1,2", "a star", *ATTACKS])
    | st.text(max_size=8),
    max_size=12,
)


class Reader(HTMLParser):
    """What a browser would make of it: elements with their attributes, and the text that is seen."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.text, self.open = "", 0
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += tag != "img"

    def handle_endtag(self, tag):
        self.open -= 1

    def handle_data(self, data):
        self.text += data


def picture(name="scene.png", size=(200, 100)) -> Picture:
    files = (Path(f"/shown/{kind}.png") for kind in ("preview", "overview", "raster"))
    return Picture(name, "data:,", size, (2, 1), 61, *files)


def colours(shown: str) -> list[str]:
    """The colour and the label of each mention."""
    found = re.findall(r'<span class="mention (c\d+)">(.*?)</span>', shown, re.DOTALL)
    return [f"{colour} {unescape(label)}" for colour, label in found]


def turn(answer: str, **more) -> Turn:
    boxes = parse_boxes(answer, 200, 100, picture=0)
    return Turn("?", [picture()], answer, boxes=boxes, boxes_on=0, **{"ending": "stop"} | more)


@settings(max_examples=50)
@given(PIECES, st.booleans())
def test_no_element_comes_from_a_model(pieces, is_over):
    answer = "".join(pieces)
    found = Reader(view.answer_html(turn(answer, ending="stop" if is_over else ""), [picture()]))
    for tag, attributes in found.elements:
        assert tag in ("div", "span", "b", "img", "figure", "figcaption"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert attributes.get("src", "gradio_api/file=").startswith("gradio_api/file=")
    assert found.open == 0


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_looks_like_markup_is_read_as_it_was_written(attack):
    problem = view.answer_html(Turn("?", problem=f"no {attack}"), [])
    name = view.sent_html([Picture(attack, "data:,")])
    label = view.answer_html(turn(f"<|ref|>{attack}<|/ref|><|det|>[[0, 0, 9, 9]]<|/det|>"), [picture(attack)])
    status = view.status_html(Stage("loading"), attack, attack)
    for shown in (view.text_html(attack), problem, name, label, status):
        assert attack in Reader(shown).text
        assert not {tag for tag, _ in Reader(shown).elements} & {"script", "svg", "iframe", "i"}


@given(st.text() | st.sampled_from(ATTACKS))
def test_a_question_can_be_edited_as_it_was_typed_and_no_element_comes_from_it(question):
    shown = view.question_text(question)
    assert view.question_of(shown) == question.strip()
    assert Reader(shown).elements == []
    if question.strip():
        assert Reader(shown).text.replace("\r", "") == question.replace("\r", "")


def test_mentions_have_the_colours_of_their_boxes():
    answer = "<|ref|>two stars<|/ref|><|det|>[[0, 0, 99, 99], [500, 500, 999, 999]]<|/det|> and <|ref|>a ring<|/ref|>"
    answer += "<|det|>[[10, 10, 20, 20]]<|/det|> and <|ref|>nothing<|/ref|><|det|>[]<|/det|>."
    found = Reader(view.answer_html(turn(answer), [picture()]))
    assert found.text.startswith("two stars and a ring and nothing.")
    classes = [attributes["class"] for _, attributes in found.elements if "class" in attributes]
    assert [name for name in classes if name.startswith("mention")] == ["mention c0", "mention c2"]
    assert sorted(name.split()[1] for name in classes if name.startswith("box ")) == ["c0", "c1", "c2"]


@pytest.mark.parametrize(
    ("answer", "text", "mentions"),
    [
        ("<|det|>[[0, 0, 9, 9]]<|/det|>Here <|ref|>a<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", "Here a", ["c1 a"]),
        ("<|ref|>a<|/ref|> and <|ref|>b<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>.", "a and b.", ["c0 b"]),
        (
            "<|ref|>a<|/ref|> and <|det|>[[1, 2, 3, 4]]<|/det|>, <|ref|>b<|/ref|><|det|>[[5, 6, 7, 8]]<|/det|>",
            "a and , b",
            ["c0 a", "c1 b"],
        ),
        ("<|ref|>a<|/ref|>, <|ref|>a<|/ref|><|det|>[[9, 9, 1, 1]]<|/det|><|det|>[[1, 2, 3, 4]]", "a, a", ["c0 a"]),
        ("<|ref|>a < b<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>", "a < b", ["c0 a < b"]),
    ],
)
def test_text_is_shown_whole_and_coloured_where_boxes_are(answer, text, mentions):
    shown = view.text_html(answer)
    assert Reader(shown).text == text
    assert colours(shown) == mentions


@given(PIECES)
def test_a_mention_has_the_colour_of_the_first_box_of_its_label(pieces):
    answer = "".join(pieces)
    boxes = parse_boxes(answer, 999, 999)
    for mention in colours(view.text_html(answer)):
        colour, _, label = mention.partition(" ")
        assert boxes[int(colour[1:])].label == label.strip()  # fewer boxes than colours


def test_boxes_stand_where_they_are_on_a_picture_of_any_size_and_never_beside_it():
    answer = "<|ref|>a<|/ref|><|det|>[[250, 500, 500, 999], [900, 0, 1500, 2000]]<|/det|>"
    found = Reader(view.figure_html(picture(), turn(answer).boxes))
    styles = {a["class"]: a["style"] for _, a in found.elements if a.get("class", "").startswith("box ")}
    assert styles["box c0"] == "left:25.00%;top:50.00%;width:25.00%;height:50.00%"
    assert styles["box c1 below left"] == "left:90.00%;top:0.00%;width:10.00%;height:100.00%"


def test_a_tag_that_is_not_whole_yet_is_not_shown():
    answer = "It is <|ref|>a star<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|> <|grounding|>here"
    for end in range(len(answer) + 1):
        shown = Reader(view.text_html(answer[:end], is_over=False)).text
        assert not set(shown) & set("<|>[]"), shown
    assert Reader(view.text_html("a < b", is_over=True)).text == "a < b"


def test_colours_are_those_of_pictures_that_are_saved():
    css = view.colours_css()
    for number, colour in enumerate(COLOURS):
        rule = css.split(f".c{number} {{ --box: ")[1].split(";")[0]
        assert ImageColor.getrgb(rule) == colour


def test_the_footer_has_what_an_answer_took():
    usage = Usage(1412, 387, 128, new_tokens=51, first_seconds=0.314, seconds=2.0)
    told = Reader(view.footer_html(Turn("?", usage=usage))).text
    for fact in ("prompt 1,412", "of pictures 387", "known before 128", "answer 51", "first token 0.31 s", "speed 25 "):
        assert fact in told


def test_tiles_stand_beside_their_picture():
    talk = Talk([Turn("?", [picture(), Picture("unread", "data:,")])])
    found = Reader(view.tiles_html(talk))
    assert "Picture 1 200 × 100 pixels → global view + 2 × 1 tiles, 61 tokens" in found.text
    assert [a["src"] for tag, a in found.elements if tag == "img"] == [
        f"gradio_api/file=/shown/{kind}.png" for kind in ("preview", "overview", "raster")
    ]


def test_a_model_that_is_not_ready_tells_its_phase_and_share():
    found = Reader(view.status_html(Stage("compiling", "compiling", 0.25), "compiling its programs", "vl2-nano"))
    assert "compiling its programs" in found.text
    assert "25%" in found.text
    assert ("progress", {"value": "0.250"}) in found.elements
