"""Rules against those of lmms-eval, on cases that are easy to get wrong and on any text."""

import string
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lmms_eval.api.metrics import anls as lmms_anls
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.chartqa.utils import relaxed_correctness
from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
from lmms_eval.tasks.refcoco.utils_rec import compute_iou
from lmms_eval.tasks.textvqa.utils import textvqa_process_results

from vl2_jax.evaluation import metrics
from vl2_jax.evaluation.metrics import normalised
from vl2_jax.evaluation.samples import Sample
from vl2_jax.processing.grounding import iou

TEXT = st.text(string.ascii_letters + string.digits + " .,;:'\"!?-/()[]%\n\t", max_size=24)
WORDS = st.lists(
    st.sampled_from(["a", "the", "two", "red", "U.S.", "don't", "3.5", "1,000", "cat's", "-", "(x)", "none", "ten"]),
    max_size=6,
)
ANSWER = st.one_of(TEXT, WORDS.map(" ".join))
_EVALAI = EvalAIAnswerProcessor()


def sample(*answers, **groups):
    return Sample((0, 0), "file, row 1", "0", "?", answers=answers, groups=groups)


@pytest.mark.parametrize("word", sorted({**EvalAIAnswerProcessor.CONTRACTIONS, **EvalAIAnswerProcessor.NUMBER_MAP}))
def test_every_contraction_and_number_of_evalai(word):
    assert normalised(word) == _EVALAI(word)


@settings(max_examples=500, deadline=None)
@given(ANSWER)
def test_answers_are_normalised_as_lmms_eval_does(answer):
    assert normalised(answer) == _EVALAI(answer)


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS.map(" ".join), min_size=2, max_size=10), WORDS.map(" ".join))
def test_vqa_accuracy(answers, text):
    theirs = textvqa_process_results({"answers": list(answers), "question_id": 0}, [text])["exact_match"]
    assert metrics.vqa_accuracy(sample(*answers), text) == pytest.approx(theirs)


@settings(max_examples=500, deadline=None)
@given(st.lists(ANSWER, min_size=1, max_size=4), ANSWER)
def test_anls(answers, text):
    theirs = lmms_anls(references=answers, predictions=[text])["anls"]
    assert metrics.anls(sample(*answers), text) == pytest.approx(theirs)


NUMBER = st.one_of(st.floats(-1e4, 1e4).map(lambda x: f"{x:.3g}"), st.integers(-200, 200).map(str))
MAYBE_PERCENT = st.tuples(NUMBER, st.sampled_from(["", "%"])).map("".join)


@settings(max_examples=500, deadline=None)
@given(st.one_of(MAYBE_PERCENT, ANSWER), st.one_of(MAYBE_PERCENT, ANSWER))
def test_relaxed_accuracy(answer, text):
    assert metrics.relaxed_accuracy(sample(answer), text) == relaxed_correctness(text, answer)


@settings(max_examples=300, deadline=None)
@given(st.lists(ANSWER, min_size=1, max_size=3), ANSWER, st.booleans())
def test_containment(answers, text, is_formula):
    kind = "Handwritten Mathematical Expression Recognition" if is_formula else "Scene Text-centric VQA"
    doc = {"answer": answers, "dataset": "HME100k" if is_formula else "x", "question_type": kind}
    theirs = ocrbench_process_results(doc, [text])["ocrbench_accuracy"]["score"]
    assert metrics.containment(sample(*answers, question_type=kind), text.strip()) == theirs


BOX = st.tuples(*[st.floats(0, 500)] * 2, *[st.floats(501, 1000)] * 2)


@settings(max_examples=300, deadline=None)
@given(BOX, BOX)
def test_iou(a, b):
    assert iou(a, b) == pytest.approx(compute_iou(a, b), rel=1e-9, abs=sys.float_info.min)
