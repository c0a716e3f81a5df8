"""A release: its version, its notes, the workflow that publishes it, and the container."""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml

from docs.links import ROOT
from docs.release import notes, sections, version
from vl2_jax import __version__

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_version_stands_in_one_place():
    assert version() == __version__ == metadata.version("vl2-jax")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "vl2_jax/__init__.py"
    texts = [ROOT / "README.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.py")]
    assert [path.name for path in texts if f"vl2_jax-{__version__}" in path.read_text()] == []


def test_the_changelog_begins_with_this_version():
    (first, (_, text)), *_ = sections(CHANGELOG).items()
    assert first == __version__
    assert len(re.findall(r"^### ", text, re.MULTILINE)) > 3


def test_a_release_is_told_by_its_section_of_the_changelog():
    this, before = f"## {__version__} - 2026-12-01\n\n### New\n\n- It is there.", "## 0.0.9 - 2026-01-01\n\n- Old."
    changelog = f"# Changelog\n\n{this}\n\n{before}\n"
    assert notes(f"v{__version__}", changelog) == "### New\n\n- It is there."


@pytest.mark.parametrize(
    ("tag", "heading", "message"),
    [
        ("v9.9.9", f"## {__version__} - 2026-12-01\n\n- It.", "the tag is v9.9.9; the version of this checkout"),
        (f"v{__version__}", "## 0.0.1 - 2026-12-01\n\n- It.", "CHANGELOG.md has no section"),
        (f"v{__version__}", f"## {__version__} - 2026-12-01\n\n", "CHANGELOG.md has no section"),
        (f"v{__version__}", f"## {__version__} - not yet released\n\n- It.", "write the date of the release"),
        (f"v{__version__}", f"## {__version__}\n\n- It.", "write the date of the release"),
    ],
)
def test_what_is_not_cut_is_not_released(tag, heading, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        notes(tag, f"# Changelog\n\n{heading}\n")


def test_only_the_job_that_publishes_has_an_identity_and_no_job_has_a_secret():
    jobs = WORKFLOWS["release"]["jobs"]
    assert {name: job.get("permissions") for name, job in jobs.items()} == {
        "build": None,
        "publish": {"id-token": "write"},
        "announce": {"contents": "write"},
    }
    assert WORKFLOWS["release"]["permissions"] == WORKFLOWS["ci"]["permissions"] == {"contents": "read"}
    assert jobs["publish"]["if"] == "vars.PUBLISH == 'pypi'"
    assert jobs["publish"]["environment"] == {"name": "pypi"}
    assert all("secrets." not in str(workflow) for workflow in WORKFLOWS.values())


def test_workflows_run_targets_and_files_that_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for workflow in WORKFLOWS.values():
        for job in workflow["jobs"].values():
            needs = job.get("needs", [])
            assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
            commands = "\n".join(step.get("run", "") for step in job["steps"])
            assert set(re.findall(r"\bmake ([a-z-]+)", commands)) <= targets
            assert [file for file in re.findall(r"python (\S+\.py)", commands) if not (ROOT / file).is_file()] == []


def test_the_container_has_what_the_wheel_needs_and_no_administrator():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {part for line in lines if line.startswith("COPY") for part in line.split()[1:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = build["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert copied == kept == {*wheel["packages"], *wheel["force-include"], "pyproject.toml", "README.md", "LICENSE"}
    users = [line for line in lines if line.startswith("USER")]
    assert users == ["USER 1000:1000"]
    assert lines.index(users[0]) < lines.index('ENTRYPOINT ["vl2"]')
    extras = set(re.findall(r"EXTRAS=([\w,]+)", "\n".join(lines)))
    assert {name for line in extras for name in line.split(",")} <= set(build["project"]["optional-dependencies"])


@pytest.mark.slow
def test_a_wheel_can_be_built_from_what_the_container_copies(tmp_path):
    """The first stage of the Dockerfile, without a container."""
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            *sources, target = line.split()[1:]
            for source in sources:
                where = tmp_path / target / (source if target == "./" else "")
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, where)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path / "dist", tmp_path]
    subprocess.run(command, check=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name == f"vl2_jax-{__version__}-py3-none-any.whl"
