"""The documentation is true: links lead where they say, what is named exists."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from docs.links import PAGES, ROOT, wrong_links
from vl2_jax.cli import main
from vl2_jax.cli.parsing import COMMANDS
from vl2_jax.training.formats import to_conversation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_the_lines_that_do_it(page):
    assert wrong_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_and_pictures_that_are_linked_exist(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_headings_that_are_linked_exist(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8"))
    pages = [(page.parent / file if file else page, anchor) for file, anchor in targets if not file.endswith(".py")]
    assert [(to.name, anchor) for to, anchor in pages if anchor not in anchors(to)] == []


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_records_of_the_chapter_about_data_are_read(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "photo.jpg")
    blocks = re.findall(
        r"```json\n(.*?)```", (ROOT / "docs" / "data-formats.md").read_text(encoding="utf-8"), re.DOTALL
    )
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 9
    for line in lines:
        *_, question, answer = to_conversation(json.loads(line), tmp_path)
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert "photo.jpg" in str(question["images"]) or "instruction" in line
        assert answer["content"] in ("The second.", "<|ref|>the leak<|/ref|><|det|>[[156, 416, 468, 832]]<|/det|>")


def test_the_tests_that_show_what_is_promised_exist():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| (.*) \| `(tests/[\w/]+\.py)::(\w+)` \|$", page, re.MULTILINE)
    assert len(named) > 30
    for promise, file, name in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        found = re.search(rf"^((?:@.*\n| .*\n|\).*\n)*)def {name}\(", source, re.MULTILINE)
        assert found, name
        is_slow = "@pytest.mark.slow" in found[1] or re.search(r"^pytestmark = .*mark\.slow", source, re.MULTILINE)
        assert ("(slow)" in promise) == bool(is_slow), name


def test_the_readme_has_a_row_for_each_command_and_no_flag_that_is_none(capsys):
    table = (ROOT / "README.md").read_text().partition("## Commands")[2].partition("##")[0]
    rows = re.findall(r"^\| `vl2 (\w+)(.*)", table, re.MULTILINE)
    assert [command for command, _ in rows] == list(COMMANDS)
    for command, row in rows:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert set(re.findall(r"--[a-z][a-z-]*", row)) - shown == set()


def test_the_manifest_of_slices_fits_together():
    """Chips, hosts and the mesh; what drains ends in time; what is mounted and selected is there."""
    replica, service = yaml.safe_load_all((ROOT / "docs" / "gke-vllm.yaml").read_text())
    template = replica["spec"]["leaderWorkerTemplate"]
    leader = template["leaderTemplate"]
    for pod in (leader["spec"], template["workerTemplate"]["spec"]):
        (container,) = pod["containers"]
        sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
        chips = template["size"] * container["resources"]["limits"]["google.com/tpu"]
        assert chips == math.prod(map(int, sides))
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    (server,) = leader["spec"]["containers"]
    command = server["args"][0]
    assert f"--mesh expert={chips} " in command
    before, drains = (
        server["lifecycle"]["preStop"]["exec"]["command"][1],
        re.search(r"--drain-seconds (\d+)", command)[1],
    )
    assert int(before) + int(drains) < leader["spec"]["terminationGracePeriodSeconds"]
    (port,) = server["ports"]
    assert server["readinessProbe"]["httpGet"] == {"path": "/health", "port": port["containerPort"]}
    assert service["spec"]["ports"][0]["targetPort"] == port["containerPort"]
    assert service["spec"]["selector"].items() <= leader["metadata"]["labels"].items()
    assert yaml.safe_load((ROOT / "docs" / "gke-jobset.yaml").read_text())["kind"] == "JobSet"
