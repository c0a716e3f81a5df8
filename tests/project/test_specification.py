"""docs/specification.md: every citation has its place, and its tables are what the configurations make."""

import dataclasses
import json
import re

import pytest

from convert.weight_map import plan, torch_shapes
from docs.links import ROOT
from vl2_jax.config import LanguageConfig, VisionConfig, VL2Config, read_preset
from vl2_jax.processing.tiling import select_best_resolution, visual_token_count

TEXT = (ROOT / "docs" / "specification.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^###? ([\d.]+) .*\n((?:(?!^##).*\n?)*)", TEXT, re.MULTILINE))
CITING = [
    *(p for d in ("vl2_jax", "convert", "tests", "benchmarks", "notebooks") for p in sorted((ROOT / d).rglob("*.py"))),
    *sorted((ROOT / "configs").rglob("*.toml")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
SIZES = ("vl2-tiny", "vl2-small", "vl2-base")
_NUMBER = r"\d+(?:\.\d+)?"
_CITATION = re.compile(rf"(?:SPEC |§)({_NUMBER}(?:(?:, | to | and ){_NUMBER}\b)*)")


def places(citation: str) -> list[str]:
    """`"4.10, 6.5"` is two sections, `"10.3, 24"` a section and an item of it, written `"10.3, 24"`."""
    found: list[str] = []
    for number in re.findall(_NUMBER, citation):
        is_item = found and "." not in number and "." in found[0]
        found.append(f"{found[0]}, {number}" if is_item else number)
    return found


def exists(place: str) -> bool:
    """A heading; or in its section a numbered line of a list or of a table."""
    section, _, item = place.partition(", ")
    is_numbered = re.search(rf"^(?:{item}\. |\| {item} \|)", SECTIONS.get(section, ""), re.MULTILINE)
    return section in SECTIONS and (not item or bool(is_numbered))


def table(section: str) -> list[list[str]]:
    """The cells of all rows of all tables of a section."""
    rows = re.findall(r"^\| (.*) \|$", SECTIONS[section], re.MULTILINE)
    return [[cell.replace("\\|", "|").strip() for cell in re.split(r" \| ", row)] for row in rows]


def test_everything_that_is_cited_stands_in_the_specification():
    cited = {
        (place, path.relative_to(ROOT).as_posix())
        for path in CITING
        for citation in _CITATION.findall(path.read_text(encoding="utf-8"))
        for place in places(citation)
    }
    assert len(cited) > 50
    assert sorted(c for c in cited if not exists(c[0])) == []


@pytest.mark.parametrize("place", ["4.99", "12", "10.3, 26", "5.2, 8"])
def test_a_citation_of_nothing_is_found(place):
    assert not exists(place)


def test_sections_and_traps_are_numbered_in_order():
    numbers = [tuple(map(int, section.split("."))) for section in SECTIONS]
    assert numbers == sorted(numbers)
    rows = [row for section in SECTIONS if section.startswith("10.") for row in table(section)]
    traps = [int(row[0]) for row in rows if row[0].isdigit()]
    assert traps == list(range(1, 60))


@pytest.mark.parametrize(("column", "size"), enumerate(SIZES, 1))
def test_sizes_are_those_of_the_configurations(column, size):
    config = VL2Config.preset(size)
    fields = {f.name for f in dataclasses.fields(LanguageConfig)} - {"source"}
    rows = {row[0]: json.loads(row[column]) for row in table("1.1") if row[0] in fields}
    assert rows == {name: getattr(config.language_config, name) for name in fields}
    vision = {row[0]: json.loads(row[1]) for row in table("1.1") if len(row) == 3 and hasattr(VisionConfig, row[0])}
    assert len(vision) == 7
    assert vision == {name: getattr(config.vision_config, name) for name in vision}
    rasters = re.findall(r"\b(\d+)x(\d+)\b", SECTIONS["1.1"])
    assert [(int(w), int(h)) for w, h in rasters] == [tuple(pair) for pair in config.candidate_resolutions]


def test_defaults_are_those_of_the_classes():
    rows = {row[0]: json.loads(row[-1]) for row in table("1.1") if hasattr(LanguageConfig, row[0])}
    assert rows == {name: getattr(LanguageConfig(), name) for name in rows}
    vision = {row[0]: json.loads(row[2]) for row in table("1.1") if len(row) == 3 and hasattr(VisionConfig, row[0])}
    assert vision == {name: getattr(VisionConfig(), name) for name in vision}


@pytest.mark.parametrize(("column", "size"), enumerate(SIZES, 1))
def test_every_tensor_is_named_with_its_shape(column, size):
    """Of the model with one block and two layers: the others are alike."""
    config = VL2Config.preset(size)
    config = config.replace(
        vision_config=config.vision_config.replace(layers=1),
        language_config=config.language_config.replace(num_hidden_layers=2),
    )
    written = {}
    for key, *shapes in (row for row in table("7.2") if row[0].startswith("`")):
        shape = shapes[column - 1 if len(shapes) > 1 else 0]
        if shape != "none":
            written[key.strip("`")] = tuple(json.loads(shape))
    tensors = torch_shapes(plan(config))
    named = {_with_letters(key): shape for key, shape in tensors.items()}
    assert written == named


def _with_letters(key: str) -> str:
    key = re.sub(r"blocks\.\d+\.", "blocks.{i}.", key)
    key = re.sub(r"layers\.\d+\.(?=self_attn|input_|post_)", "layers.{i}.", key)
    key = re.sub(r"model\.layers\.[1-9]\d*\.(?=mlp)", "model.layers.{L}.", key)
    return re.sub(r"experts\.\d+\.", "experts.{e}.", key)


def test_special_tokens_are_those_of_the_presets():
    rows = [(row[0].strip("`"), *map(int, row[1:])) for row in table("4.8") if row[0].startswith("`")]
    for column, size in ((1, "vl2-tiny"), (1, "vl2-base"), (2, "vl2-small")):
        assert {row[0]: row[column] for row in rows} == read_preset(size)["tokens"]


def test_token_counts_follow_from_the_rasters():
    pairs = re.findall(r"\b(\d)x(\d) \| (\d+)", SECTIONS["3.5"])
    assert len(pairs) == 23
    assert all(visual_token_count((int(w), int(h)), 14) == int(n) for w, h, n in pairs)


def test_rasters_are_those_that_are_chosen():
    candidates = VL2Config.preset("vl2-tiny").candidate_resolutions
    rows = re.findall(r"\b(\d+)x(\d+) \| (\d+)x(\d+) \| (\d+)", SECTIONS["4.1"])
    assert len(rows) == 18
    for ow, oh, w, h, n in (map(int, row) for row in rows):
        assert select_best_resolution((ow, oh), candidates) == (w, h)
        assert visual_token_count((w // 384, h // 384), 14) == n
