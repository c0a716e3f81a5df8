"""Answers are learned with boxes that can be read again; what cannot be mended without guessing is refused."""

import re

import pytest

from tests.conftest import GOLDENS
from vl2_jax.errors import ConversationError
from vl2_jax.processing.grounding import parse_boxes
from vl2_jax.processing.images import load_image
from vl2_jax.training.boxes import with_boxes_that_can_be_read
from vl2_jax.training.formats import to_conversation

A, B = "<|ref|>a<|/ref|>", "<|ref|>b<|/ref|>"
ONE, TWO = "<|det|>[[1, 2, 3, 4]]<|/det|>", "<|det|>[[1, 2, 3, 4], [5, 6, 7, 8]]<|/det|>"


@pytest.mark.parametrize(
    ("answer", "mended"),
    [
        ("no boxes, [1, 2, 3, 4]", "no boxes, [1, 2, 3, 4]"),
        (f"{A}{TWO} and {B}{ONE}.", f"{A}{TWO} and {B}{ONE}."),
        (f"{A}<|det|>[1,2,3,4]<|/det|>.", f"{A}{ONE}."),
        (f"{A}<|det|>1, 2, 3, 4<|/det|>", f"{A}{ONE}"),
        (f"{A}<|det|>[1, 2, 3, 4], [5, 6, 7, 8]<|/det|>", f"{A}{TWO}"),
        (f"{A}<|det|>[[[1, 2, 3, 4]]]<|/det|>", f"{A}{ONE}"),
        (f"{A}<|det|>[[1.2, 2.0, 2.9, 4]]<|/det|>", f"{A}{ONE}"),
        (f"{A}{ONE}<|det|>[[5, 6, 7, 8]]<|/det|> x", f"{A}{TWO} x"),
        (f"{A}{ONE}, <|det|>[[5, 6, 7, 8]]<|/det|>", f"{A}{TWO}"),
        (f"{A}<|det|>[[1, 2, 3, 4]]", f"{A}{ONE}"),
        (f"{A}<|det|>[[1, 2, 3, 4]] and {B}{ONE}", f"{A}{ONE} and {B}{ONE}"),
        (f"<|ref|>a{ONE}", f"{A}{ONE}"),
        (f"{A}[[1, 2, 3, 4]]<|/det|>", f"{A}{ONE}"),
        (f"<|ref|>a\n b<|/ref|>{ONE}", f"<|ref|>a b<|/ref|>{ONE}"),
    ],
)
def test_an_answer_is_mended_where_there_is_one_way(answer, mended):
    assert with_boxes_that_can_be_read(answer, "") == mended
    if "<|det|>" in mended:
        assert len(parse_boxes(mended, 999, 999)) == len(re.findall(r"\[\d", mended))


def test_boxes_without_a_label_get_the_only_one_of_their_question():
    assert with_boxes_that_can_be_read(ONE, f"Find {A}, please; {A}!") == f"{A}{ONE}"
    assert with_boxes_that_can_be_read(f"{ONE} and {ONE}", f"Find {A}") == f"{A}{ONE} and {A}{ONE}"


@pytest.mark.parametrize(
    "answer",
    [
        f"{A}<|det|>[[3, 2, 1, 4]]<|/det|>",  # corners, or a width
        f"{A}<|det|>[[1, 2, 3, 1004]]<|/det|>",
        f"{A}<|det|>[[1, 2, 3, 1000]]<|/det|>",
        f"{A}<|det|>[[-1, 2, 3, 4]]<|/det|>",
        f"{A}<|det|>[[0.1, 0.2, 0.3, 0.4]]<|/det|>",
        f"{A}<|det|>[[1, 2, 3]]<|/det|>",
        f"{A}<|det|>[[1, 2, 3, 4], [5, 6<|/det|>",
        f"{A}<|det|>[[1, 2, 3, 4], [5, 6",
        f"{A}<|det|>[1, 2, 3, 4], [5, 6",
        f"{A}<|det|>(1, 2), (3, 4)<|/det|>",
        f"{A}<|det|>[]<|/det|>",
        f"{A}<|det|><|/det|>",
        f"{A}<|det|>",
        f"a<|/ref|>{ONE}",
        "<|ref|>a",
        f"{A} is at 1, 2, 3, 4<|/det|>",
        f"{A}<|det|>[[1, 2, 3, 4]{' ' * 50_000}x<|/det|>",
    ],
)
def test_what_would_have_to_be_guessed_is_refused_in_one_line(answer):
    with pytest.raises(ConversationError) as error:
        with_boxes_that_can_be_read(answer, "")
    assert len(str(error.value)) < 300
    assert "\n" not in str(error.value)


def swift(answer, objects, question="<image>Find <ref-object>", images=("square.png",)):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    record = {"messages": messages, "images": list(images), "objects": {"bbox_type": "norm1", **objects}}
    return to_conversation(record, GOLDENS / "images")[1]["content"]


def test_placeholders_one_after_another_are_one_list_of_the_label_that_was_asked_for():
    boxes = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    listed = "<|det|>[[0, 0, 500, 500], [500, 500, 999, 999]]<|/det|>"
    assert swift("<bbox><bbox>", {"ref": ["sheep"], "bbox": boxes}) == f"<|ref|>sheep<|/ref|>{listed}"
    assert swift("<ref-object><bbox>, <bbox>", {"ref": ["x", "y"], "bbox": boxes}) == f"<|ref|>y<|/ref|>{listed}"


def test_a_box_is_of_its_own_picture():
    objects = {"ref": ["x"], "bbox": [[0, 0, 10, 10]] * 2, "image_id": [0, 1], "bbox_type": "real"}
    sizes = [load_image(GOLDENS / "images" / name).size for name in ("square.png", "tall.png")]
    edges = [round(10 / side * 999) for size in sizes for side in size]
    answer = swift("<bbox><bbox>", objects, "<image><image>Find <ref-object>", ("square.png", "tall.png"))
    assert re.findall(r"\d+", answer) == [str(n) for n in (0, 0, *edges[:2], 0, 0, *edges[2:])]
