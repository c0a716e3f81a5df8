"""How right an answer is, by the rules of the benchmarks: 1 is right, 0 is wrong.

Each rule is the one of the script that its benchmark is scored with; where VLMEvalKit's differs, with which the numbers
of the paper were compared (SPEC 8.5), its docstring says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vl2_jax.evaluation.samples import LETTERS, Sample
from vl2_jax.processing.grounding import BOX_IS_RIGHT, LARGEST, iou, parse_boxes

_CONTRACTIONS = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_WHOLE_WORDS = (
    {  # by what they are without one of their apostrophes
        word[:place] + word[place + 1 :]: word
        for word in _CONTRACTIONS.split()
        for place, character in enumerate(word)
        if character == "'"
    }
    | {"somebody'd": "somebodyd"}
)
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MOST_PERIODS = 32  # that the original takes away: it passes a flag where the number stands
_NEAREST_TEXT = 0.5  # ANLS: what is less alike is wrong
_NUMBER_IS_RIGHT = 0.05  # ChartQA: of the right number
_BETWEEN_OPTIONS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MOST_OPTIONS = 8  # of a question that holds its options
NO_OPTION, _ANOTHER = "Z", "Other Answers"  # as VLMEvalKit writes them


def said(text: str) -> str:
    """What of an answer is scored: the released adapter takes periods off its end (SPEC 8.5)."""
    return text.rstrip(".").strip()


def vqa_accuracy(sample: Sample, text: str) -> float:
    """Of ten people's answers without one of them, how many agree, three being enough; the mean over who is left out.

    VQAv2, TextVQA. `normalised` is EvalAI's; VLMEvalKit's leaves commas and "'s" in.
    """
    given, answer = [normalised(other) for other in sample.answers], normalised(text)
    agreeing = given.count(answer)
    return sum(min(1.0, (agreeing - (other == answer)) / 3) for other in given) / len(given)


def normalised(answer: str) -> str:
    """An answer as VQA compares it: without punctuation and articles, numbers as digits, contractions whole."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    bare = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_DIGITS.get(word, word) for word in bare.lower().split()]
    return " ".join(_WHOLE_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str) -> str:
    """A mark that stands beside a blank anywhere is left out everywhere, another becomes a blank, as VQA has it."""
    bare, has_thousands = text, re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        stands_apart = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if stands_apart or has_thousands else " ")
    return re.sub(r"\.(?!\d)", "", bare, count=_MOST_PERIODS)


def anls(sample: Sample, text: str) -> float:
    """How alike the letters are, of the most alike right answer; less than half is nothing (DocVQA, InfographicVQA)."""
    return max(_likeness(answer, text) for answer in sample.answers)


def _likeness(answer: str, text: str) -> float:
    changes = edits(" ".join(answer.lower().split()), " ".join(text.lower().split()))
    longest = max(len(answer), len(text))
    likeness = 1 - changes / longest if longest else 1.0
    return likeness if likeness >= _NEAREST_TEXT else 0.0


def edits(a: str, b: str) -> int:
    """Letters that are put in, left out or changed to make one text of another (Levenshtein)."""
    row = list(range(len(b) + 1))
    for number, letter in enumerate(a, 1):
        before, row[0] = row[0], number
        for place, other in enumerate(b, 1):
            before, row[place] = row[place], min(before + (letter != other), row[place] + 1, row[place - 1] + 1)
    return row[-1]


def relaxed_accuracy(sample: Sample, text: str) -> float:
    """A number within 5 % of the right one, or the same text (ChartQA). "%" divides by 100, and 0 must be written 0."""
    return max(float(_is_near(answer, text)) for answer in sample.answers)


def _is_near(answer: str, text: str) -> bool:
    right, found = _number(answer), _number(text)
    if found is not None and right:
        return abs(found - right) / abs(right) <= _NUMBER_IS_RIGHT
    return answer.lower() == text.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact(sample: Sample, text: str) -> float:
    """The same text but for case (OCRVQA, GQA)."""
    return float(text.lower() in {answer.strip().lower() for answer in sample.answers})


def containment(sample: Sample, text: str) -> float:
    """A right answer stands in the text, blanks apart where it is a formula (OCRBench)."""
    is_formula = "Handwritten Mathematical Expression Recognition" in (sample.groups or {}).values()

    def folded(value: str) -> str:
        value = value.strip().replace("\n", " ")
        return value.replace(" ", "") if is_formula else value.lower()

    return float(any(folded(answer) in folded(text) for answer in sample.answers))


def choice(sample: Sample, text: str) -> float:
    """The right option is the one that `chosen` finds.

    Options that stand in the question itself (MMStar and RealWorldQA of lmms-eval) are known by their letters alone. An
    open question is the choice between its answer and others.

    MMBench, MMStar, AI2D, MMMU, RealWorldQA, MMT-Bench.
    """
    if sample.options:
        return float(chosen(text, sample.options) == sample.answers[0].strip())
    if is_letter(sample.answers):
        return float(chosen(text, dict.fromkeys(LETTERS[:_MOST_OPTIONS], "")) == sample.answers[0].strip())
    return float(any(chosen(text, {"A": answer, "B": _ANOTHER}) == "A" for answer in sample.answers))


def is_letter(answers: Sequence[str]) -> bool:
    return len(answers) == 1 and answers[0].strip() in tuple(LETTERS[:_MOST_OPTIONS])


def chosen(text: str, options: Mapping[str, str]) -> str:
    """The letter of the option that a text chooses: VLMEvalKit's exact matching, without another model that judges.

    The one letter that stands by itself; else the one option whose words stand in the text; else `NO_OPTION`. This is
    the rule of December 2024, when the numbers that SPEC 8.5 compares with were made; since July 2025 long answers are
    left to the model that judges.
    """
    if any(refusal in text for refusal in _REFUSALS):
        return NO_OPTION
    words = text.translate(_BETWEEN_OPTIONS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and NO_OPTION in words:
        return NO_OPTION
    named = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else NO_OPTION


def yes_or_no(sample: Sample, text: str) -> float:
    """One of the two words stands in the text and is the right one (MME, POPE)."""
    words = without_punctuation(text.lower()).split()
    found = [word for word in ("yes", "no") if word in words]
    return float(found == [sample.answers[0].strip().lower()])


def found_box(sample: Sample, text: str) -> float:
    """The first box that is written has IoU 0.5 at least with the right one (RefCOCO, RefCOCO+, RefCOCOg)."""
    assert sample.box is not None
    boxes = parse_boxes(text, LARGEST, LARGEST)
    if not boxes:
        return 0.0
    corners = [value / LARGEST * whole for value, whole in zip(boxes[0].raw, sample.size * 2)]
    return float(iou(corners, sample.box) >= BOX_IS_RIGHT)
