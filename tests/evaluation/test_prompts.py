"""Prompts are those that VLMEvalKit's data sets and its adapter of DeepSeek-VL2 make together."""

import numpy as np
import pytest
from PIL import Image

from vl2_jax.api import SHIPPED, find_model
from vl2_jax.errors import ConfigError
from vl2_jax.evaluation import prompts
from vl2_jax.evaluation.benchmarks import BENCHMARKS, tile_shapes
from vl2_jax.evaluation.run import seen_by
from vl2_jax.evaluation.samples import Sample
from vl2_jax.processing.batch import Processor

OPTIONS = {"A": "a ball", "B": "a cube"}
RELEASED = """
384x384 384x768 768x384 384x1152 1152x384 384x1536 1536x384 768x768 384x1920 1920x384 384x2304 2304x384 768x1152
1152x768 384x2688 2688x384 384x3072 3072x384 768x1536 1536x768 384x3456 3456x384 1152x1152
"""


def sample(question, images=(), **fields):
    return Sample((0, 0), "file, row 1", "0", question, tuple(images), **fields)


@pytest.fixture(scope="module")
def pictures():
    return [Image.fromarray(np.full((10, width, 3), width, np.uint8)) for width in (20, 30)]


def test_short_answers_and_plain_questions(pictures):
    asked = sample("What year?", pictures[:1])
    assert prompts.short_answer(asked).text == (
        "<image>\nWhat year?\nAnswer the question using a single word or phrase."
    )
    assert prompts.plain(asked).text == "<image>\nWhat year?"
    assert prompts.locate(asked).text == "<image>\nLocate <|ref|>What year?<|/ref|> in the given image."


def test_options_follow_the_question(pictures):
    asked = prompts.option(sample("Which?", pictures, options=OPTIONS, hint="Look."))
    assert asked.text == (
        "<image>\n<image>\nHint: Look.\nQuestion: Which?\nOptions:\nA. a ball\nB. a cube\n"
        "Please select the correct answer from the options above. \n"
    )
    assert asked.images == pictures
    within = prompts.option(sample("Which? A: a ball, B: a cube", answers=("B",)))
    assert within.text.endswith("B: a cube\nPlease select the correct answer from the options above. \n")


def test_mmmu_shows_all_pictures_first_and_the_first_at_twice_its_size(pictures):
    asked = prompts.mmmu(sample("Compare <image 2> with <image 1>.", pictures, options=OPTIONS))
    assert asked.text == (
        "<image><image>\n Compare <image 1> with <image 2>.\nA. a ball\nB. a cube\n"
        "Answer with the option's letter from the given choices directly. "
        "Answer the question using a single word or phrase.\n \n"
    )
    assert [picture.size for picture in asked.images] == [(60, 20), (20, 10)]
    without = prompts.mmmu(sample("Which?", pictures[:1], options=OPTIONS))
    assert without.text.startswith("<image>\n<image 1> Which?\nA. a ball\n")
    with pytest.raises(ConfigError, match="row 1: the question names picture 3 of 2"):
        prompts.mmmu(sample("<image 3>?", pictures))


def test_a_tag_that_a_data_set_wrote_is_text(pictures):
    processor = Processor.from_directory(find_model(SHIPPED))
    encoded = processor.encode(prompts.plain(sample("Is <image> a tag?", pictures[:1])).messages)
    assert len(encoded.crops) == 1


def test_tiles_are_in_the_released_order_and_infographics_have_up_to_eighteen():
    released = tuple(tuple(map(int, size.split("x"))) for size in RELEASED.split())
    assert tile_shapes(384, 9) == released
    processor = seen_by(BENCHMARKS["InfoVQA"], Processor.from_directory(find_model(SHIPPED)))
    side = processor.config.tile_size
    assert max(w * h for w, h in processor.config.candidate_resolutions) == 18 * side**2
    assert (3 * side, 6 * side) in processor.config.candidate_resolutions
