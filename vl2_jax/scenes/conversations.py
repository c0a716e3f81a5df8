"""Questions about scenes, with their answers, as conversations in the format that everything else reads.

Every question is answered by the scene's description alone, and refers to things by words that fit exactly one of
them. Boxes are in the model's coordinates, 0 to 999 of the picture's width and height (SPEC 4.10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from vl2_jax.errors import ConfigError
from vl2_jax.processing.conversation import IMAGE_TAG
from vl2_jax.processing.grounding import LARGEST, write_boxes
from vl2_jax.scenes.drawing import COLOURS, SHAPES, SHORTEST_SIDE, Scene, Thing, render, sample_scene

SKILLS = (
    "caption", "grounded caption", "count", "colour", "size", "shape", "relation", "read", "locate", "presence",
    "which is not there", "compare", "position",
)  # fmt: skip
_ATTEMPTS = 100
_CLEARLY = 0.1  # of a side: things that are closer are not asked which is left or above
_ACROSS, _DOWN = ("left of", "right of"), ("above", "below")
_UNITS = 10  # of the model's coordinates, a hundredth


@dataclass(frozen=True)
class Turn:
    """A question and its only right answer."""

    skill: str
    question: str
    answer: str


@dataclass(frozen=True)
class SceneSizes:
    """How much a conversation about scenes may hold.

    Attributes:
      turns: most questions.
      most_shapes, most_words: of a scene.
      longest_side: of a picture, in pixels.
      two_pictures: share of conversations about two pictures.
      skills: that are asked for, of `SKILLS`; empty is all. Scenes that none of them fits are drawn again.

    Raises:
      ConfigError: sizes of which no scene or no question can be made.
    """

    turns: int = 6
    most_shapes: int = 3
    most_words: int = 1
    longest_side: int = 320
    two_pictures: float = 0.12
    skills: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lowest = {"turns": 1, "most_shapes": 0, "most_words": 0, "longest_side": SHORTEST_SIDE}
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} of scenes is {getattr(self, name)}; expected at least {least}.")
        if not self.most_shapes and not self.most_words:
            raise ConfigError("most_shapes and most_words of scenes are both 0; one must be at least 1.")
        if not 0 <= self.two_pictures <= 1:
            raise ConfigError(f"two_pictures of scenes is {self.two_pictures}; expected a share between 0 and 1.")
        unknown = [skill for skill in self.skills if skill not in SKILLS]
        if unknown:
            raise ConfigError(f"skills of scenes has {unknown[0]!r}; choose from {', '.join(SKILLS)}.")

    def draw(self, random: np.random.Generator) -> Scene:
        """A scene that holds no more than this."""
        return sample_scene(random, self.most_shapes, self.longest_side, self.most_words)


@dataclass(frozen=True)
class SceneSource:
    """Conversations by number, for as long as one likes; a random-access data source.

    Attributes:
      seed: of the whole source; another seed holds other pictures.
      length: number of conversations.
    """

    seed: int
    sizes: SceneSizes = SceneSizes()
    length: int = 1 << 30

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = f"scene {index} of seed {self.seed}"
        return {"where": where} | scene_conversation((self.seed, int(index)), self.sizes)


def scene_conversation(seed: int | Sequence[int], sizes: SceneSizes = SceneSizes()) -> dict[str, Any]:
    """`{"messages": [...], "skills": [...]}`: pictures, questions and answers, one skill a question.

    Raises:
      ConfigError: scenes of these sizes cannot be asked for any of these skills.
    """
    random = np.random.default_rng(seed)
    for _ in range(_ATTEMPTS):
        pictures = 2 if random.random() < sizes.two_pictures else 1
        scenes = [sizes.draw(random) for _ in range(pictures)]
        asked = two_picture_turns(random, scenes[0], scenes[1]) if pictures == 2 else turns_about(random, scenes[0])
        asked = [turn for turn in asked if turn.skill in (sizes.skills or SKILLS)]
        if asked:
            break
    else:
        raise ConfigError(
            f"skills of scenes is {list(sizes.skills)}, which those of at most {sizes.most_shapes} shapes and "
            f"{sizes.most_words} words, {sizes.two_pictures:.0%} of them in twos, are never asked for; ask for others, "
            "or allow more in a scene."
        )
    chosen = _spread(random, asked, sizes.turns)
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(chosen):
        question: dict[str, Any] = {"role": "user", "content": turn.question, "images": []}
        if number == 0:
            question["content"] = f"{IMAGE_TAG}\n" * pictures + turn.question
            question["images"] = [render(scene) for scene in scenes]
        messages += [question, {"role": "assistant", "content": turn.answer}]
    return {"messages": messages, "skills": [turn.skill for turn in chosen]}


def turns_about(random: np.random.Generator, scene: Scene) -> list[Turn]:
    """Every kind of question that this scene can answer, a few of each."""
    makers: list[Callable[[np.random.Generator, Scene], list[Turn]]] = [
        _captions, _counts, _attributes, _relations, _reading, _locating, _absence, _positions,
    ]  # fmt: skip
    return [turn for maker in makers for turn in maker(random, scene)]


def two_picture_turns(random: np.random.Generator, first: Scene, second: Scene) -> list[Turn]:
    """Questions about two pictures together, and about either of them."""
    kind, colour = _pick(random, SHAPES), _pick(random, tuple(COLOURS))
    if random.random() < 0.7:
        thing = _pick(random, (*first.things, *second.things))
        kind, colour = (kind if thing.is_word else thing.kind), thing.colour
    things = [len(scene.things) for scene in (first, second)]
    turns = [
        Turn("compare", "Which picture shows more things?", _which(*things)),
        Turn("compare", f"Which picture has more {plural(kind)}?", _which(*(_count(s, kind) for s in (first, second)))),
        Turn("compare", f"Which picture shows a {kind}?", _shown(*(_count(s, kind) > 0 for s in (first, second)))),
        Turn(
            "compare",
            f"Which picture shows something {colour}?",
            _shown(*(_has(s, colour) for s in (first, second))),
        ),
    ]
    for ordinal, scene in (("first", first), ("second", second)):
        turns.append(Turn("caption", f"Describe the {ordinal} picture.", describe(scene)))
        turns.append(Turn("presence", f"Is there a {kind} in the {ordinal} picture?", _yes(_count(scene, kind) > 0)))
        turns.append(
            Turn("presence", f"Is there something {colour} in the {ordinal} picture?", _yes(_has(scene, colour)))
        )
        turns.append(Turn("count", f"How many things are in the {ordinal} picture?", str(len(scene.things))))
        if len(scene.words) == 1:
            turns.append(Turn("read", f"What is written in the {ordinal} picture?", scene.words[0].text))
    return turns


def describe(scene: Scene, grounded: bool = False) -> str:
    """All things from left to right: "a large red circle, a small blue star and the word HOTEL in green"."""
    parts = []
    for thing in sorted(scene.things, key=lambda thing: thing.centre):
        name = (
            f"the word {thing.text} in {thing.colour}"
            if thing.is_word
            else f"a {thing.size} {thing.colour} {thing.kind}"
        )
        parts.append(f"<|ref|>{name}<|/ref|>{boxes(scene, [thing])}" if grounded else name)
    text = _joined(parts)
    return text[0].upper() + text[1:] + "."


def boxes(scene: Scene, things: Sequence[Thing]) -> str:
    """Where things are, from left to right, as the model writes it, to the nearest hundredth of the picture.

    Finer digits would mostly be noise: a pixel of a tile is a hundredth.
    """
    sizes = (scene.width, scene.height) * 2
    ordered = sorted(things, key=lambda thing: thing.centre)
    hundredths = [[round(100 * edge / whole) for edge, whole in zip(thing.box, sizes)] for thing in ordered]
    return write_boxes([[_UNITS * edge for edge in box] for box in hundredths], LARGEST, LARGEST)


def plural(kind: str) -> str:
    """Of a kind of shape."""
    return {"cross": "crosses"}.get(kind, f"{kind}s")


def _captions(random: np.random.Generator, scene: Scene) -> list[Turn]:
    question = _pick(random, ("Describe the picture.", "What is in the picture?", "What do you see?"))
    turns = [Turn("caption", question, describe(scene))]
    if len(scene.things) <= 3:
        turns.append(Turn("grounded caption", f"<|grounding|>{question}", describe(scene, grounded=True)))
    return turns


def _counts(random: np.random.Generator, scene: Scene) -> list[Turn]:
    kind = _pick(random, [t.kind for t in scene.shapes] or SHAPES) if random.random() < 0.8 else _pick(random, SHAPES)
    colour = _pick(random, [t.colour for t in scene.shapes] or list(COLOURS))
    return [
        Turn("count", f"How many {plural(kind)} are there?", str(_count(scene, kind))),
        Turn("count", "How many shapes are there?", str(len(scene.shapes))),
        Turn("count", f"How many {colour} shapes are there?", str(sum(t.colour == colour for t in scene.shapes))),
    ]


def _attributes(random: np.random.Generator, scene: Scene) -> list[Turn]:
    turns = []
    for thing in scene.shapes:
        if _count(scene, thing.kind) == 1:
            turns.append(Turn("colour", f"What colour is the {thing.kind}?", thing.colour))
            turns.append(Turn("size", f"Is the {thing.kind} small or large?", thing.size))
        if sum(t.colour == thing.colour for t in scene.shapes) == 1:
            turns.append(Turn("shape", f"What shape is {thing.colour}?", thing.kind))
    for word in scene.words:
        if len(scene.words) == 1:
            turns.append(Turn("colour", "What colour is the word?", word.colour))
    return turns


def _relations(random: np.random.Generator, scene: Scene) -> list[Turn]:
    turns = []
    named = [(thing, name) for thing in scene.things if (name := refer(random, scene, thing))]
    if len(named) < 2:
        return []
    # Each pair once: an answer that follows from one before it is not about the picture.
    for i, j in random.permutation(list(combinations(range(len(named)), 2)))[:3]:
        (a, a_name), (b, b_name) = (named[k] for k in random.permutation([i, j]))
        dx, dy = ((a.centre[k] - b.centre[k]) / whole for k, whole in enumerate((scene.width, scene.height)))
        if max(abs(dx), abs(dy)) < _CLEARLY:
            continue
        sides, offset = (_ACROSS, dx) if abs(dx) > abs(dy) else (_DOWN, dy)
        answer, asked, form = sides[offset > 0], _pick(random, sides), int(random.integers(3))
        if form == 0:
            question, answer = f"Is {a_name} {asked} {b_name}?", _yes(asked == answer)
        elif form == 1:
            question = f"Where is {a_name}, seen from {b_name}: {sides[0]} or {sides[1]} it?"
        else:
            question, answer = f"Is {a_name} {_either(sides)} {b_name}?", answer.removesuffix(" of")
        turns.append(Turn("relation", question, answer))
    return turns


def _reading(random: np.random.Generator, scene: Scene) -> list[Turn]:
    turns = []
    if len(scene.words) == 1:
        question = _pick(random, ("What does the text say?", "Read the word.", "What is written here?"))
        turns.append(Turn("read", question, scene.words[0].text))
    for word in scene.words:
        if sum(other.colour == word.colour for other in scene.words) == 1:
            turns.append(Turn("read", f"What does the {word.colour} word say?", word.text))
    return turns


def _locating(random: np.random.Generator, scene: Scene) -> list[Turn]:
    turns = []
    for thing in scene.things:
        name = refer(random, scene, thing)
        if name:
            form = _pick(
                random,
                ("Locate <|ref|>{}<|/ref|> in the given image.", "Where is <|ref|>{}<|/ref|>?", "<|ref|>{}<|/ref|>"),
            )
            turns.append(Turn("locate", form.format(name), f"<|ref|>{name}<|/ref|>{boxes(scene, [thing])}"))
    kind = _pick(random, [t.kind for t in scene.shapes] or SHAPES)
    all_of_kind = [thing for thing in scene.shapes if thing.kind == kind]
    if len(all_of_kind) > 1:
        name = f"the {plural(kind)}"
        answer = f"<|ref|>{name}<|/ref|>{boxes(scene, all_of_kind)}"
        turns.append(Turn("locate", f"Locate <|ref|>{name}<|/ref|> in the given image.", answer))
    return turns


def _absence(random: np.random.Generator, scene: Scene) -> list[Turn]:
    present = [f"{thing.colour} {thing.kind}" for thing in scene.shapes]
    absent = f"{_pick(random, tuple(COLOURS))} {_pick(random, SHAPES)}"
    while absent in present:
        absent = f"{_pick(random, tuple(COLOURS))} {_pick(random, SHAPES)}"
    turns = [Turn("presence", f"Is there a {absent}?", "no")]
    if present:
        turns.append(Turn("presence", f"Is there a {_pick(random, present)}?", "yes"))
    if len(set(present)) >= 2:
        options = [*(str(o) for o in random.permutation(sorted(set(present)))[:2]), absent]
        options = [options[i] for i in random.permutation(3)]
        question = f"Which of these is not there: {', '.join(options[:2])} or {options[2]}?"
        turns.append(Turn("which is not there", question, absent))
    return turns


def _positions(random: np.random.Generator, scene: Scene) -> list[Turn]:
    turns = []
    for thing in scene.things:
        name = refer(random, scene, thing)
        if name is None:
            continue
        for centre, whole, sides in zip(thing.centre, (scene.width, scene.height), (_ACROSS, _DOWN)):
            offset = centre / whole - 0.5
            if abs(offset) >= _CLEARLY / 2:
                question = f"Is {name} {_either(sides)} the centre?"
                turns.append(Turn("position", question, sides[offset > 0].removesuffix(" of")))
    return turns


def refer(random: np.random.Generator, scene: Scene, thing: Thing) -> str | None:
    """Words that fit this thing and no other, or None."""
    if thing.is_word:
        names = [
            ("the word", lambda t: t.is_word),
            (f"the {thing.colour} word", lambda t: (t.is_word, t.colour) == (True, thing.colour)),
        ]
    else:
        names = [
            (f"the {thing.kind}", lambda t: t.kind == thing.kind),
            (f"the {thing.colour} {thing.kind}", lambda t: (t.kind, t.colour) == (thing.kind, thing.colour)),
            (
                f"the {thing.size} {thing.colour} {thing.kind}",
                lambda t: (t.kind, t.colour, t.size) == (thing.kind, thing.colour, thing.size),
            ),
        ]
    fitting = [name for name, fits in names if sum(map(fits, scene.things)) == 1]
    return _pick(random, fitting) if fitting else None


def _spread(random: np.random.Generator, turns: list[Turn], most: int) -> list[Turn]:
    """Some of the turns in random order, skill after skill, so that common skills do not crowd out rare ones."""
    by_skill: dict[str, list[Turn]] = {}
    for i in random.permutation(len(turns)):
        by_skill.setdefault(turns[i].skill, []).append(turns[i])
    chosen: list[Turn] = []
    skills = list(by_skill)
    while len(chosen) < most and any(by_skill.values()):
        for i in random.permutation(len(skills)):
            if by_skill[skills[i]] and len(chosen) < most:
                chosen.append(by_skill[skills[i]].pop())
    return [chosen[i] for i in random.permutation(len(chosen))]


def _count(scene: Scene, kind: str) -> int:
    return sum(thing.kind == kind for thing in scene.things)


def _has(scene: Scene, colour: str) -> bool:
    return any(thing.colour == colour for thing in scene.things)


def _which(first: int, second: int) -> str:
    return "the same" if first == second else "the first" if first > second else "the second"


def _shown(first: bool, second: bool) -> str:
    return {(True, True): "both", (True, False): "the first", (False, True): "the second"}.get((first, second), "none")


def _either(sides: tuple[str, str]) -> str:
    """ "left or right of", "above or below"."""
    return f"{sides[0].removesuffix(' of')} or {sides[1]}"


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _pick(random: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(random.integers(len(choices)))]
