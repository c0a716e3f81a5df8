"""Boxes of whole and of unfinished answers, in pixels and onto the picture, their labels inside of it and apart."""

import io
import time
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.processing.picture_files import exif, saved, turned
from vl2_jax.processing.grounding import COLOURS, Box, draw_boxes, parse_boxes, write_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.processing.labels import place_labels


def found(text, **options):
    """(label, numbers) of every box."""
    return [(box.label, box.raw) for box in parse_boxes(text, 999, 999, **options)]


def ref(label):
    return f"<|ref|>{label}<|/ref|>"


def det(*boxes):
    return f"<|det|>{[list(box) for box in boxes]}<|/det|>"


ONE, TWO, THREE = (1, 2, 300, 400), (5, 6, 700, 800), (9, 9, 99, 99)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{ref('a')}{det(ONE)}, {ref('b')}<|det|>[[5, 6", [("a", ONE)]),
        (f"{ref('a')}{det(ONE)}, <|ref|>b", [("a", ONE)]),
        (f"{ref('a')}{det(ONE)}, {ref('b')}<|det|>[[5, 6, 700, 800], [9, 9, 9", [("a", ONE), ("b", TWO)]),
        (f"{ref('a')}{det(ONE, TWO)[:-3]}", [("a", ONE), ("a", TWO)]),
        (f"{ref('a')} and {ref('b')}{det(ONE)}", [("b", ONE)]),
        (f"{ref('a')}{det(ONE)} {ref('b')} {ref('c')}{det(TWO)}", [("a", ONE), ("c", TWO)]),
        (f"{ref('a')}{det()}{ref('b')}{det(ONE)}", [("b", ONE)]),
        (f"{ref('a')}{det(ONE)}{det(TWO)}", [("a", ONE), ("a", TWO)]),
        (f"{ref('a')}{ref('b')}{det(ONE)}{det(TWO)}", [("a", ONE), ("b", TWO)]),
        (f"{ref('a')}{ref('b')}{det(ONE)}{det(TWO)}{det(THREE)}", [("a", ONE), ("b", TWO), ("b", THREE)]),
        (f"{ref('two' + chr(10) + 'lines')}{det(ONE)}", [("two\nlines", ONE)]),
        (f"{ref('a')}{det(ONE, TWO).replace(', ', ',' + chr(10))}", [("a", ONE), ("a", TWO)]),
        (f"{ref('a' + ref('b'))}{det(ONE)}", [("ab", ONE)]),
        (f"{ref('a')}<|det|>{det(ONE)}<|/det|>", [("a", ONE)]),
        (f"<|ref|>a{det(ONE)} <|ref|>b{det(TWO)}", [("a", ONE), ("b", TWO)]),
        (f"{ref('a')}<|det|>[[1, 2, 300, 400]], {ref('b')}{det(TWO)}", [("a", ONE), ("b", TWO)]),
        (f"{ref('a')}<|det|>[1, 2, 300, 400]<|/det|>", [("a", ONE)]),
        (det(ONE), [("", ONE)]),
        ("[[1, 2, 300, 400]]<|/det|>", [("", ONE)]),
        (f"the cat<|/ref|>{det(ONE)}", [("the cat", ONE)]),
        (f"2, 300, 400], [5, 6, 700, 800]]<|/det|>, {ref('b')}{det(ONE)}", [("", TWO), ("b", ONE)]),
        ("[[1, 2, 300, 400]]", []),
        (f"{ref('a')}{det((300, 400, 1, 2))}", []),
        (f"{ref('a')}<|det|>[[x, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4, 5]]<|/det|>", []),
        (f"{ref('a')}<|det|>[[1.5, 2.25, 300.75, 400]]<|/det|>", [("a", (1.5, 2.25, 300.75, 400))]),
    ],
)
def test_every_complete_box_is_read(text, expected):
    assert found(text) == expected


def test_as_released_an_answer_that_is_not_whole_has_no_boxes():
    for text in (f"{ref('a')}{det(ONE)}, {ref('b')}<|det|>[[5, 6", det(ONE), f"{ref('a' + chr(10))}{det(ONE)}"):
        assert parse_boxes(text, 999, 999, as_released=True) == []
    assert found(f"{ref('a')}{det(ONE)}{ref('b')}{det(TWO)}", as_released=True) == [("a", ONE), ("b", TWO)]


LABELLED = st.lists(
    st.tuples(
        st.text("abc 图\t", min_size=1, max_size=6).map(str.strip),
        st.lists(st.tuples(*[st.integers(0, 999)] * 4), max_size=3),
    ),
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(LABELLED)
def test_both_rules_agree_on_answers_that_are_whole(answer):
    text = ", ".join(f"{ref(label)}{det(*boxes)}" for label, boxes in answer)
    assert parse_boxes(text, 640, 480) == parse_boxes(text, 640, 480, as_released=True)


@settings(max_examples=300, deadline=None)
@given(LABELLED, st.integers(0, 400))
def test_cutting_an_answer_loses_no_box_before_the_cut(answer, length):
    text = ", ".join(f"{ref(label)}{det(*boxes)}" for label, boxes in answer)
    cut = found(text[:length])
    assert cut == found(text)[: len(cut)]
    assert len(cut) >= len(found(text[:length].rpartition("<|/det|>")[0] + "<|/det|>"))


def test_a_box_knows_its_numbers_and_its_picture():
    (box,) = parse_boxes(f"{ref('a')}{det((0, 250, 500, 999))}", 200, 100, picture=1)
    assert box == Box("a", 0, 25, 100, 100, raw=(0, 250, 500, 999), picture=1)
    assert asdict(box)["raw"] == (0, 250, 500, 999)


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize(
    "piece",
    ["<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|det|>[[", "[", "[1,", "[1 , 2 ,", " ", "<|", "9", "[[1, 2, 3, 4]",
     "<|ref|>a<|/ref|>", "<|ref|>a<|/ref|><|det|>[[1, 2", "<|det|><|ref|>"],
)  # fmt: skip
def test_reading_takes_linear_time(piece, as_released):
    for text in (piece * (200_000 // len(piece)), f"{ref('a')}<|det|>[[1, 2, 3, {piece * (200_000 // len(piece))}"):
        begun = time.perf_counter()
        parse_boxes(text, 640, 480, as_released=as_released)
        assert time.perf_counter() - begun < 2


# Onto the picture


def test_boxes_are_drawn_where_they_are():
    boxes = parse_boxes(f"{ref('cat')}{det((250, 250, 750, 750))}", 200, 200)
    drawn = draw_boxes(Image.new("RGB", (200, 200), "white"), boxes)
    assert drawn.getpixel((100, 150)) == COLOURS[0]
    assert drawn.getpixel((100, 100)) == (255, 255, 255)


def test_boxes_are_drawn_on_the_upright_picture_which_stays_as_it_was():
    data = saved(Image.new("RGB", (240, 160), "white"), format="JPEG", exif=exif(turned()))
    lying = Image.open(io.BytesIO(data))
    boxes = [Box("", 20, 200, 140, 230)]
    for picture in (lying, data, load_image(data)):
        drawn = draw_boxes(picture, boxes)
        assert drawn.size == (160, 240)
        assert drawn.getpixel((80, 230)) == COLOURS[0]
    assert lying.size == (240, 160)


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


LABELS = st.text(max_size=30) | st.sampled_from(
    [
        "cat",
        "the word WOOD in orange",
        "x" * 400,
        "a b " * 200,
        "图中的猫 🙂",
        "two\nlines\tand more",
        "\ud800\0\u202e",
        "",
    ]
)
NEAR = st.integers(-50, 700)
FAR = NEAR | st.integers(-(10**9), 10**9)
CORNERS = st.tuples(FAR, FAR, NEAR, NEAR).map(lambda c: (c[0], c[1], c[0] + max(0, c[2]), c[1] + max(0, c[3])))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(LABELS, CORNERS), max_size=12), st.tuples(st.integers(1, 640), st.integers(1, 480)))
def test_labels_stay_inside_and_off_one_another(labelled, size):
    texts, boxes = [text for text, _ in labelled], [box for _, box in labelled]
    labels = [label for label in place_labels(texts, boxes, size) if label is not None]
    rectangles = [label.rectangle for label in labels]
    for number, (left, top, right, bottom) in enumerate(rectangles):
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert not any(overlap(rectangles[number], other) for other in rectangles[:number])
    drawn = draw_boxes(Image.new("RGB", size), [Box(text, *box) for text, box in labelled])
    assert drawn.size == size


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.text("abcdef ghi", min_size=1, max_size=40), CORNERS), min_size=1, max_size=8))
def test_every_label_is_written_where_there_is_room(labelled):
    labelled = [("a" + text, box) for text, box in labelled]
    labels = place_labels([text for text, _ in labelled], [box for _, box in labelled], (400, 300))
    assert None not in labels


@pytest.mark.parametrize("text", ["the word WOOD in orange", "图中的猫 gjpqyÅ", "x" * 300, "many words " * 20])
@pytest.mark.parametrize("size", [(247, 247), (120, 60), (40, 200)])
def test_letters_stay_on_their_label(text, size):
    """Nothing is drawn outside of the label's rectangle, wherever its box is."""
    for box in ((0, 0, 5, 5), (size[0] - 3, 0, size[0], 4), (5, size[1] - 2, 9, size[1]), (-90, -90, -80, -80)):
        (label,) = place_labels([text], [box], size)
        with_text, without = (draw_boxes(Image.new("RGB", size), [Box(t, *box)]) for t in (text, ""))
        changed = (np.asarray(with_text) != np.asarray(without)).any(axis=-1)
        left, top, right, bottom = label.rectangle
        assert changed[top:bottom, left:right].any()
        changed[top:bottom, left:right] = False
        assert not changed.any()


def test_a_long_label_is_whole_where_the_picture_has_room_and_ends_in_dots_where_not():
    text = "the word WOOD in orange"
    (wide,), (narrow,) = (place_labels([text], [(200, 40, 240, 90)], (side, 100)) for side in (247, 60))
    assert wide.text.split() == text.split()
    assert narrow.text.split() == text.split()
    (tiny,) = place_labels([text], [(0, 0, 9, 9)], (30, 14))
    assert tiny.text.endswith("…")


def test_a_picture_too_small_for_letters_gets_boxes_alone():
    assert place_labels(["cat"], [(0, 0, 4, 4)], (8, 8)) == [None]
    drawn = draw_boxes(Image.new("RGB", (8, 8)), [Box("cat", 1, 1, 6, 6)])
    assert drawn.getpixel((1, 3)) == COLOURS[0]
    assert drawn.getpixel((3, 3)) == (0, 0, 0)


def test_hundreds_of_labels_find_a_place():
    boxes = [(n % 300, n // 3, n % 300 + 60, n // 3 + 80) for n in range(240)]
    labels = place_labels([f"person {n % 7}" for n in range(240)], boxes, (640, 480))
    assert sum(label is not None for label in labels) > 100


def test_what_is_written_is_read():
    (box,) = parse_boxes(ref("it") + write_boxes([(10, 20, 200, 133)], 400, 133), 400, 133)
    assert (box.x1, box.y2, box.label) == (10, 133, "it")
