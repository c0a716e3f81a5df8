"""Drawn scenes are the same everywhere, and every question about one has the answer that the picture gives."""

import numpy as np
import pytest

from vl2_jax.errors import ConfigError
from vl2_jax.processing.grounding import Box, iou, parse_boxes, write_boxes
from vl2_jax.scenes import SceneSizes, SceneSource, scene_conversation
from vl2_jax.scenes.conversations import describe, refer, turns_about
from vl2_jax.scenes.drawing import COLOURS, Scene, Thing, render, sample_scene
from vl2_jax.scenes.evaluation import matched

WHITE = (255, 255, 255)


def test_a_number_gives_the_same_conversation_again():
    first, second = (SceneSource(5)[17] for _ in range(2))
    texts = [[message["content"] for message in conversation["messages"]] for conversation in (first, second)]
    assert texts[0] == texts[1]
    for a, b in zip(first["messages"][0]["images"], second["messages"][0]["images"], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert texts[0] != [message["content"] for message in SceneSource(6)[17]["messages"]]


@pytest.mark.parametrize("seed", range(30))
def test_things_stand_inside_of_the_picture_where_their_boxes_say(seed):
    scene = sample_scene(np.random.default_rng(seed), most_shapes=5, longest_side=400, most_words=2)
    pixels = np.asarray(render(scene)).astype(int)
    assert 1 <= len(scene.things) <= 7
    for thing in scene.things:
        x1, y1, x2, y2 = thing.box
        assert 0 <= x1 < x2 <= scene.width
        assert 0 <= y1 < y2 <= scene.height
        inside = pixels[y1 : y2 + 1, x1 : x2 + 1]
        assert (np.abs(inside - COLOURS[thing.colour]).max(axis=-1) < 30).any()


def test_names_fit_one_thing_only():
    red, blue = (Thing("circle", colour, (0, 0, 9, 9), "small") for colour in ("red", "blue"))
    scene = Scene(100, 100, WHITE, (red, blue))
    random = np.random.default_rng(0)
    assert {refer(random, scene, red) for _ in range(50)} == {"the red circle", "the small red circle"}
    assert refer(random, Scene(100, 100, WHITE, (red, red)), red) is None


def test_descriptions_go_from_left_to_right():
    star = Thing("star", "blue", (60, 10, 80, 30), "small")
    word = Thing("word", "green", (5, 40, 30, 50), text="HOTEL", font_size=12)
    scene = Scene(100, 100, WHITE, (star, word))
    assert describe(scene) == "The word HOTEL in green and a small blue star."
    assert {turn.answer for turn in turns_about(np.random.default_rng(0), scene) if turn.skill == "read"} == {"HOTEL"}


def test_places_are_told_from_the_picture_and_each_pair_once():
    star, ring, word = (
        Thing("star", "blue", (60, 10, 80, 30), "small"),
        Thing("ring", "red", (2, 50, 22, 70), "small"),
        Thing("word", "green", (40, 48, 52, 52), text="HOTEL", font_size=12),
    )
    scene, random = Scene(100, 100, WHITE, (star, ring, word)), np.random.default_rng(0)
    across, down = {"star": "right", "ring": "left"}, {"star": "above", "ring": "below"}
    for _ in range(20):
        turns = turns_about(random, scene)
        for turn in (turn for turn in turns if turn.skill == "position"):  # the word is at the centre
            kind = next(kind for kind in across if kind in turn.question)
            assert turn.answer == (across if "left or right" in turn.question else down)[kind]
        relations = [turn for turn in turns if turn.skill == "relation"]
        pairs = [frozenset(kind for kind in ("star", "ring", "word") if kind in turn.question) for turn in relations]
        assert len(set(pairs)) == len(pairs) == 3
    pair = Scene(100, 100, WHITE, (star, ring))
    asked = {turn for _ in range(60) for turn in turns_about(random, pair) if turn.skill == "relation"}
    for turn in asked:
        first = min(("star", "ring"), key=turn.question.index)
        side = {"ring": "left of", "star": "right of"}[first]
        if turn.question.startswith("Where"):
            assert turn.answer == side
        elif " or " in turn.question:
            assert turn.answer == side.removesuffix(" of")
        else:
            assert turn.answer == ("yes" if side in turn.question else "no")
    assert len(asked) > 20


def test_boxes_that_are_written_are_read_back():
    (box,) = parse_boxes("<|ref|>it<|/ref|>" + write_boxes([(10, 20, 200, 133)], 400, 133), 400, 133)
    assert iou(box.corners, (10, 20, 200, 133)) > 0.97


def test_overlap_counts_each_box_once():
    a, b = Box("a", 0, 0, 10, 10), Box("b", 0, 5, 10, 15)
    assert iou(a.corners, b.corners) == pytest.approx(50 / 150)
    assert iou(a.corners, a.corners) == 1
    assert matched([a, a], [a]) == 0.5
    assert matched([a], [a, b]) == 0.5
    assert matched([a], []) == 0


def test_a_conversation_holds_what_was_asked_for():
    for number in range(20):
        conversation = scene_conversation(number, SceneSizes(turns=3, longest_side=112))
        assert len(conversation["skills"]) == len(conversation["messages"]) // 2 <= 3
        assert all(max(image.size) <= 112 for image in conversation["messages"][0]["images"])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_as_many_conversations_are_about_two_pictures_as_was_said(share):
    sizes = SceneSizes(longest_side=112, two_pictures=share)
    assert {len(scene_conversation(n, sizes)["messages"][0]["images"]) for n in range(20)} == {1 + int(share)}


def test_only_the_skills_that_were_asked_for_are_asked():
    for number in range(10):
        assert set(scene_conversation(number, SceneSizes(skills=("read", "count")))["skills"]) <= {"read", "count"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"turns": 0}, "turns of scenes is 0; expected at least 1"),
        ({"most_shapes": -1}, "most_shapes of scenes is -1"),
        ({"longest_side": 50}, "longest_side of scenes is 50; expected at least 112"),
        ({"most_shapes": 0, "most_words": 0}, "one must be at least 1"),
        ({"two_pictures": 1.5}, "two_pictures of scenes is 1.5; expected a share between 0 and 1"),
        ({"skills": ("reed",)}, "has 'reed'; choose from caption, "),
    ],
)
def test_sizes_of_which_nothing_can_be_made_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        SceneSizes(**sizes)


def test_a_skill_that_these_scenes_never_need_is_refused():
    for sizes in (SceneSizes(most_words=0, skills=("read",)), SceneSizes(two_pictures=0.0, skills=("compare",))):
        with pytest.raises(ConfigError, match="never asked for"):
            scene_conversation(0, sizes)
