"""Every rule against values that were worked out by hand from the text of the benchmark."""

import pytest

from vl2_jax.evaluation import metrics
from vl2_jax.evaluation.answers import Scored
from vl2_jax.evaluation.benchmarks import every_order, mean, mme, points
from vl2_jax.evaluation.metrics import NO_OPTION, chosen, edits, normalised, said
from vl2_jax.evaluation.samples import Sample
from vl2_jax.processing.grounding import iou


def sample(*answers, **fields):
    return Sample((0, 0), "file, row 1", "0", "?", answers=answers, **fields)


TEN = ["red"] * 2 + ["Red!"] + ["blue"] * 6 + ["dark red"]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # Three say red. Without one of them two are left, of three that are needed; without another, all three.
        ("red", (3 * 2 / 3 + 7 * 1) / 10),
        ("The red.", (3 * 2 / 3 + 7 * 1) / 10),
        ("blue", 1.0),
        ("dark red", 9 * (1 / 3) / 10),
        ("green", 0.0),
    ],
)
def test_vqa_accuracy_leaves_one_of_ten_people_out(text, score):
    assert metrics.vqa_accuracy(sample(*TEN), text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("The two  dogs.", "2 dogs"),
        ("A well-known U.S. sign", "well known us sign"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("none", "0"),
        ("man's hat", "man 's hat"),
        ("left - right", "left right"),
        ("what?\n", "what"),
    ],
)
def test_answers_are_normalised_as_evalai_does(answer, same):
    assert normalised(answer) == same


def test_anls_is_the_likeness_of_the_nearest_answer_and_nothing_below_half():
    assert edits("kitten", "sitting") == 3
    assert metrics.anls(sample("kitten"), "sitting") == pytest.approx(1 - 3 / 7)
    assert metrics.anls(sample("ten", "kitten"), "kitten") == 1
    assert metrics.anls(sample("New York"), "new  york") == pytest.approx(1)
    assert metrics.anls(sample("abcd"), "abxy") == 0.5
    assert metrics.anls(sample("abcde"), "abxyz") == 0
    assert metrics.anls(sample("a"), "") == 0


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ("100", "105", 1),
        ("100", "105.1", 0),
        ("100", "95", 1),
        ("-2", "-2.05", 1),
        ("50%", "0.51", 1),
        ("0.5", "51%", 1),
        ("50", "50%", 0),
        ("0", "0.0", 0),
        ("0", "0", 1),
        ("Yes", "yes", 1),
        ("Yes", "yes it is", 0),
        ("2019", "2,019", 0),
    ],
)
def test_relaxed_accuracy_takes_numbers_within_five_per_cent(answer, text, score):
    assert metrics.relaxed_accuracy(sample(answer), text) == score


def test_exact_answers_may_differ_in_case_only():
    assert metrics.exact(sample("Stephen King"), "stephen king") == 1
    assert metrics.exact(sample("Stephen King"), "king") == 0


def test_ocrbench_looks_for_the_answer_in_the_text():
    assert metrics.containment(sample("CENTRE"), "It says Centre\nPoint") == 1
    assert metrics.containment(sample("centre point", "x"), "Centre\nPoint") == 1
    assert metrics.containment(sample("centre"), "cent re") == 0
    formula = {"category": "Handwritten Mathematical Expression Recognition"}
    assert metrics.containment(sample("x ^ { 2 }", groups=formula), "y = x^{2}") == 1
    assert metrics.containment(sample("X"), "x") == 1
    assert metrics.containment(sample("X", groups=formula), "x") == 0  # case tells letters of formulas apart


OPTIONS = {"A": "a red ball", "B": "a blue ball", "C": "None of them"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. a blue ball", "B"),
        ("The answer is B", "B"),
        ("A or B", NO_OPTION),
        ("It is a blue ball", "B"),
        ("a red ball, not a blue ball", NO_OPTION),
        ("b", NO_OPTION),
        ("Z", NO_OPTION),
        ("a blue ball " + "and more " * 20, "B"),
        ("Cannot determine the answer. B", NO_OPTION),
        ("none of them", "C"),
    ],
)
def test_an_option_is_chosen_by_its_letter_or_by_its_words(text, letter):
    assert chosen(text, OPTIONS) == letter
    assert metrics.choice(sample("B", options=OPTIONS), text) == (letter == "B")


def test_an_open_question_is_the_choice_between_its_answer_and_others():
    assert metrics.choice(sample("12.5"), "It is 12.5 m") == 1
    assert metrics.choice(sample("12.5"), "13") == 0
    assert metrics.choice(sample("six", "6"), "6") == 1


def test_options_that_the_question_holds_are_known_by_their_letters():
    assert metrics.choice(sample("B"), "B.") == 1
    assert metrics.choice(sample("B"), "The answer is (B)") == 1
    assert metrics.choice(sample("B"), "a blue ball") == 0
    assert metrics.choice(sample("B"), "A or B") == 0


@pytest.mark.parametrize(
    ("text", "score"), [("Yes, it is", 1), ("yes", 1), ("No", 0), ("yes or no", 0), ("eyes", 0), ("It is.", 0)]
)
def test_yes_and_no_are_words_by_themselves(text, score):
    assert metrics.yes_or_no(sample("Yes"), text) == score


def test_a_box_is_right_from_half_of_the_shared_area_on():
    assert iou((0, 0, 10, 10), (0, 0, 10, 5)) == 0.5
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    wanted = sample(box=(0.0, 0.0, 999.0, 999.0), size=(1998, 999))
    written = "<|ref|>it<|/ref|><|det|>[[0, 0, {}, 999]]<|/det|>"
    assert metrics.found_box(wanted, written.format(500)) == 1  # 1000 of 1998 pixels, almost what is wanted
    assert metrics.found_box(wanted, written.format(999)) == 1  # twice as wide: exactly half is shared
    assert metrics.found_box(wanted, written.format(249)) == 0  # 498 of 999 pixels
    assert metrics.found_box(wanted, "<|det|>[[0, 0, 9, 9], [0, 0, 500, 999]]<|/det|>") == 0  # the first one counts
    assert metrics.found_box(wanted, "nowhere") == 0


def test_periods_at_the_end_are_not_said():
    assert said(" 42. ") == "42."
    assert said("A..") == "A"
    assert said("3.5") == "3.5"


def row(score, pair="", **groups):
    return Scored(0, score=score, pair=pair, groups=groups)


def test_scores_add_up_as_each_benchmark_says():
    assert mean([row(1), row(0), row(0.5), row(0.5)]) == 50
    assert points([row(1), row(1), row(0)]) == 2
    assert every_order([row(1, "7"), row(1, "7"), row(1, "8"), row(0, "8")]) == 50
    # Colour: 3 of 4 right, and one of two pictures: 75 + 50. Count: all right: 200.
    colour = [row(1, "a", category="color"), row(1, "a", category="color")]
    colour += [row(1, "b", category="color"), row(0, "b", category="color")]
    assert mme([*colour, row(1, "a", category="count"), row(1, "a", category="count")]) == 325
