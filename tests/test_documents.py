"""The documentation is true: links lead where they say, and every notebook runs."""

import ast
import math
import re
from pathlib import Path

import jupytext
import nbclient
import pytest
import yaml

from docs.links import PAGES, ROOT, wrong_links

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONG = {"finetune", "sharding"}  # one trains for a minute and a half, one compiles for four meshes


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


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_readable_script(notebook):
    paired = jupytext.read(notebook.with_suffix(".py"))
    stored = jupytext.read(notebook)
    assert [(c.cell_type, c.source) for c in stored.cells] == [(c.cell_type, c.source) for c in paired.cells]
    ast.parse(notebook.with_suffix(".py").read_text())


@pytest.mark.parametrize(
    "notebook",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem in LONG)) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(notebook):
    run(notebook, notebook.parent)


def test_the_notebook_of_meshes_runs_with_the_first_layers_of_a_model(tmp_path, first_layers):
    """It takes the model that it finds in `out/nano`."""
    for folder in ("assets", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / "nano").symlink_to(first_layers("nano-small"))
    run(ROOT / "notebooks" / "sharding.ipynb", tmp_path)


def run(notebook: Path, folder: Path) -> None:
    book = jupytext.read(notebook)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
