"""The documentation site: `make docs` writes it to out/website/site, which is read without a server or a network.

The pages are those that are read on a code host, in the same folders, so that their links stay as they are. Added are
pages that are made when the site is: the notebooks with their outputs, the flags of every command, the docstrings,
and every source file that a page links to, with its lines numbered.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from docs import links
from vl2_jax.cli import main
from vl2_jax.cli.parsing import COMMANDS

ROOT = links.ROOT
OUT = ROOT / "out" / "website"  # pages, configuration, site
PAGES = [page.relative_to(ROOT) for page in links.PAGES]
TITLES: dict[str, dict[str, str]] = {  # of sections and pages
    "Start": {
        "README.md": "Overview",
        "docs/quickstart.md": "Quickstart",
        "notebooks/quickstart.ipynb.md": "Notebook: quickstart",
    },
    "Use": {
        "docs/demo.md": "Web page",
        "docs/serving.md": "Serve",
        "docs/fine-tuning.md": "Fine-tune",
        "docs/training.md": "Train",
        "docs/converting.md": "Convert",
        "docs/quantisation.md": "Quantise",
        "docs/evaluation.md": "Evaluate",
        "docs/tpu.md": "On Cloud TPU",
        "docs/troubleshooting.md": "Troubleshooting",
    },
    "Notebooks": {
        "notebooks/serve.ipynb.md": "Serve",
        "notebooks/finetune.ipynb.md": "Fine-tune",
        "notebooks/convert.ipynb.md": "Convert",
        "notebooks/quantise.ipynb.md": "Quantise",
        "notebooks/evaluate.ipynb.md": "Evaluate",
        "notebooks/sharding.ipynb.md": "Meshes",
    },
    "Reference": {
        "reference/commands.md": "Command line",
        "reference/python.md": "Python modules",
        "docs/data-formats.md": "Data formats",
        "docs/specification.md": "Specification of the model",
    },
    "Trust": {
        "docs/reliability.md": "Reliability",
        "docs/security.md": "Security",
        "docs/modelled-numbers.md": "How numbers were modelled",
        "CHANGELOG.md": "Changelog",
    },
    "Inside": {
        "docs/architecture.md": "Architecture",
        "docs/visual-encoder.md": "Visual encoder",
        "docs/multimodal-fusion.md": "Multimodal fusion",
        "docs/from-vl-to-vl2.md": "From DeepSeek-VL to VL2",
        "docs/expert-dispatch.md": "Expert dispatch",
        "docs/attention.md": "Attention",
        "docs/whole-steps.md": "Whole steps",
        "docs/vl2-nano.md": "vl2-nano",
        "CONTRIBUTING.md": "Contributing",
    },
}
API = {  # what programs import
    "vl2_jax.api": "Load a model, ask it, talk with it",
    "vl2_jax.inference.answers": "Answers",
    "vl2_jax.inference.options": "Options of an answer",
    "vl2_jax.processing.batch": "From messages and pictures to arrays",
    "vl2_jax.processing.images": "Reading pictures",
    "vl2_jax.processing.grounding": "Boxes",
    "vl2_jax.config": "Configurations",
    "vl2_jax.errors": "Errors",
    "vl2_jax.serving.engine": "The engine of the server",
    "vl2_jax.serving.requests": "Requests to the engine",
    "vl2_jax.training.recipe": "Recipes of training",
    "vl2_jax.training.loop": "Training",
    "vl2_jax.training.export": "Models of training runs",
    "vl2_jax.sharding.mesh": "Meshes",
    "vl2_jax.planning.plan": "Plans for slices",
    "vl2_jax.scenes.drawing": "Drawn scenes",
    "convert.from_torch": "Conversion from the released layout",
    "convert.to_torch": "Conversion to it",
    "convert.checkpoint": "Converted checkpoints",
}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)(?P<file>[^)#\s]+)(?:#(?P<anchor>[^)]+))?(?=\))")
_FENCE = re.compile(r"^(?P<fence>```+).*?^(?P=fence)$", re.MULTILINE | re.DOTALL)
_WORKER = "iframe-worker.js"
_PICTURES = (".png", ".jpg")
_LANGUAGES = {".py": "python", ".toml": "toml", ".yaml": "yaml", ".json": "json", ".jsonl": "json"}


def assemble() -> None:
    """Writes every page to `OUT/pages`, and the configuration beside it."""
    shutil.rmtree(OUT, ignore_errors=True)
    pages = OUT / "pages"
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        texts[notebook.relative_to(ROOT).with_suffix(".ipynb.md")] = _of_notebook(notebook, pages / "notebooks")
    texts |= {Path("reference/commands.md"): _commands(), Path("reference/python.md"): _list_of_modules()}
    texts |= {
        Path(f"reference/{module}.md"): f"# {title}\n\n`{module}`\n\n::: {module}\n" for module, title in API.items()
    }
    linked: set[Path] = set()
    for name, text in texts.items():
        (pages / name).parent.mkdir(parents=True, exist_ok=True)
        (pages / name).write_text(_with_links(text, name, linked), encoding="utf-8")
    for path in linked:
        _write_source(path, pages)
    (OUT / "zensical.toml").write_text(_configuration(pages), encoding="utf-8")


def _with_links(text: str, page: Path, linked: set[Path]) -> str:
    """A page whose links to files that are no pages lead to pages of these files, which are added to `linked`."""

    def changed(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(page.parent / match["file"]))
        anchor = f"#{match['anchor']}" if match["anchor"] else ""
        if not (ROOT / target).exists() or target in PAGES:
            return match[0]
        if target.suffix in _PICTURES:
            linked.add(target)
            return match[0]
        if target.suffix == ".ipynb":
            return f"{match['file']}.md{anchor}"
        linked.add(target)
        line = re.fullmatch(r"#L(\d+)", anchor)
        return f"{match['file'].rstrip('/')}.md{f'#__codelineno-0-{line[1]}' if line else anchor}"

    # Code that looks like a link is none.
    parts, begun = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(changed, text[begun : fence.start()]), fence[0]]
        begun = fence.end()
    return "".join([*parts, _LINK.sub(changed, text[begun:])])


def _write_source(path: Path, pages: Path) -> None:
    """A file that a page links to: a picture as it is, a folder as a list, anything else as a page of its lines."""
    source, target = ROOT / path, pages / f"{path}.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in _PICTURES:
        shutil.copy(source, pages / path)
    elif source.is_dir():
        names = sorted(p.name + "/" * p.is_dir() for p in source.iterdir() if not p.name.startswith(("_", ".")))
        target.write_text(f"# {path}/\n\n" + "".join(f"- `{name}`\n" for name in names), encoding="utf-8")
    else:
        text = source.read_text(encoding="utf-8")
        language = _LANGUAGES.get(source.suffix, "text")
        body = f'````{language} linenums="1"\n{text}````\n'
        target.write_text(f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n{body}", encoding="utf-8")


def _of_notebook(path: Path, folder: Path) -> str:
    """A notebook as a page, with its outputs; pictures are written beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, pictures = [], 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name, pictures = f"{path.stem}-{pictures}.png", pictures + 1
                (folder / name).write_bytes(base64.b64decode("".join(data["image/png"])))
                parts.append(f"![output]({name})")
            elif printed := "".join(output.get("text", data.get("text/plain", ()))).strip("\n"):
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    parts = ["# Command line\n\nMade from the flags themselves. `vl2 COMMAND --help` prints the same.\n"]
    for name in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([name, "--help"])
        plain = re.sub(r"\x1b\[[\d;]*m", "", printed.getvalue()).strip("\n")
        parts.append(f"## vl2 {name}\n\n```text\n{plain}\n```\n")
    return "\n".join(parts)


def _list_of_modules() -> str:
    rows = (f"| [`{module}`]({module}.md) | {title} |" for module, title in API.items())
    return "# Python\n\nMade from the docstrings.\n\n| module | what it is for |\n|---|---|\n" + "\n".join(rows) + "\n"


def _configuration(pages: Path) -> str:
    sections = []
    for title, entries in TITLES.items():
        sections.append(f"  {_section(title, {name: page for page, name in entries.items()})},\n")
        if title == "Reference":
            modules = {name: f"reference/{module}.md" for module, name in API.items()}
            sections.append(f"  {_section('Python', modules)},\n")
    places = f'docs_dir = "pages"\nsite_dir = "site"\nnav = [\n{"".join(sections)}]\n'
    return (
        (ROOT / "docs" / "zensical.toml").read_text(encoding="utf-8").replace("[project]\n", f"[project]\n{places}", 1)
    )


def _section(title: str, pages: dict[str, str]) -> str:
    listed = ", ".join(f"{{ {json.dumps(name)} = {json.dumps(page)} }}" for name, page in pages.items())
    return f"{{ {json.dumps(title)} = [{listed}] }}"


def bring_the_worker(site: Path) -> None:
    """The script that lets pages search when they are read as files is one of the site, not of another host."""
    shutil.copy(ROOT / "docs" / _WORKER, site / "assets" / _WORKER)
    for page in site.rglob("*.html"):
        here = os.path.relpath(site / "assets" / _WORKER, page.parent)
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace("https://unpkg.com/iframe-worker/shim", here), encoding="utf-8")


def fetched_from_elsewhere(site: Path) -> list[str]:
    """What pages would ask other hosts for while they are read: scripts, styles, fonts, pictures."""
    foreign = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\s\"'>]+")
    kept = re.compile(r"rel=[\"']?(?:canonical|next|prev)")
    found = ((page, match[0]) for page in site.rglob("*.html") for match in foreign.finditer(page.read_text("utf-8")))
    return sorted({f"{page.relative_to(site)}: {tag}" for page, tag in found if not kept.search(tag)})


if __name__ == "__main__":
    assemble()
    if subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=OUT).returncode:
        sys.exit(1)
    bring_the_worker(OUT / "site")
    sys.exit("\n".join(fetched_from_elsewhere(OUT / "site")) or 0)
