"""`vl2 eval`: how often a model is right: about a benchmark's questions, or about drawn scenes it has not seen."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vl2_jax.cli.flags import ONE_DEVICE, Model, OnDevices, Place, Repeated, in_all_processes
from vl2_jax.cli.terminal import messages, print_json, tell, write
from vl2_jax.errors import RequestError, shown
from vl2_jax.progress import Display
from vl2_jax.scenes import SceneSizes

_DATA_OF_VLMEVALKIT = "LMUData"  # the variable of the environment that names its folder
_COUNT, _SEED, _LONGEST_SIDE = 100, 1_000_000, SceneSizes.longest_side  # of drawn scenes
_OF_A_MODEL = ("*.safetensors", "*config.json", "tokenizer.json", "manifest.json")


@dataclass(frozen=True)
class BenchmarkFlags:
    """A benchmark instead of scenes.

    Attributes:
      data: A benchmark's file, a folder of Parquet files, or a name such as DocVQA_VAL whose TSV is in this folder, in
        $LMUData or in ~/LMUData; may be given several times. Nothing is downloaded.
      benchmark: Whose questions these are, such as ChartQA, or a rule: vqa, anls, relaxed, exact, contains, yes-no,
        option, grounding. By default what the file's name says.
      images: Where relative paths of pictures begin; by default the folder of the file.
      out: Folder of answers and results; a run that was ended goes on there. By default evaluations/DATA-MODEL.
      limit: The first rows only.
      shard: 2/4 asks the second of four shares of the rows. With one --out, the last run without it puts them together.
      max_tokens: Longest answer; by default 2048, as the released adapter of VLMEvalKit has it.
      max_num_seqs: Answers that are written at once.
    """

    data: Repeated = ()
    benchmark: str | None = None
    images: Place | None = None
    out: Path | None = None
    limit: int | None = None
    shard: str | None = None
    max_tokens: int | None = None
    max_num_seqs: int = 16


@in_all_processes
def evaluate(
    model: Model,
    benchmark: tyro.conf.OmitArgPrefixes[BenchmarkFlags] = BenchmarkFlags(),
    count: int = _COUNT,
    seed: int = _SEED,
    longest_side: int = _LONGEST_SIDE,
    json: bool = False,
    devices: OnDevices = ONE_DEVICE,
) -> None:
    """Ask a model a benchmark's questions, or about drawn scenes it has not seen, and print how often it is right.

    Scenes in float32, unless --dtype is given.

    Example: vl2 eval --model vl2-nano --count 20

    Args:
        count: Conversations to draw; each holds about six questions, asked one by one.
        seed: Of the scenes.
        longest_side: Of the pictures, in pixels.
        json: Print one object.
    """
    if benchmark.data:
        scenes = {"count": (count, _COUNT), "seed": (seed, _SEED), "longest-side": (longest_side, _LONGEST_SIDE)}
        _refuse(scenes, "drawn scenes; leave it out, or take the first rows of --data with --limit")
        _benchmark(model, benchmark, json, devices)
        return
    given = {f.name.replace("_", "-"): (getattr(benchmark, f.name), f.default) for f in dataclasses.fields(benchmark)}
    _refuse(given, "a benchmark; give its file with --data")
    from vl2_jax.scenes.evaluation import ask_all, table

    if count < 1:
        raise RequestError(f"--count is {count}; expected at least 1.")
    sizes = SceneSizes(longest_side=longest_side)
    vl2, _ = model.load(devices, dtype=model.dtype or "float32")
    with Display(messages) as report:
        rows = table(ask_all(vl2, count, seed, sizes, report))
    if json:
        print_json({row.skill: {"questions": row.questions, "score": row.score} for row in rows})
        return
    for row in rows:
        print(f"{row.skill:22} {row.questions:6} questions {100 * row.score:6.1f} %")


def _benchmark(model: Any, of: BenchmarkFlags, json: bool, devices: Any) -> None:
    from vl2_jax.api import find_model
    from vl2_jax.evaluation import answers
    from vl2_jax.evaluation.benchmarks import MAX_TOKENS
    from vl2_jax.evaluation.run import evaluate as ask
    from vl2_jax.evaluation.run import rows_left
    from vl2_jax.serving.engine import Engine
    from vl2_jax.serving.requests import Limits
    from vl2_jax.sharding.processes import wait_for_all

    share = _share(of.shard, devices.mesh)
    samples, rows, name, benchmark = _questions(of)
    folder = of.out or Path("evaluations") / f"{_stem(Path(of.data[0]))}-{_stem(Path(model.model))}"
    settings = {
        "model": Path(model.model).name,
        "model_files": _fingerprint_of(find_model(model.model)),
        "adapters": None if model.adapters is None else _fingerprint_of(model.adapters),
        "dtype": model.dtype,
        "weights": model.weights,
        "cache": model.cache,
        "merge": model.options(devices).get("merge"),
        "data": samples.fingerprints(),
        "benchmark": name,
        "max_tokens": of.max_tokens or MAX_TOKENS,
    }
    answers.begin(folder, settings)
    hash_ = answers.settings_hash(settings)
    if rows_left(answers.read(folder, hash_), rows, share):
        vl2, _ = model.load(devices)
        limits = Limits(max_running=of.max_num_seqs, max_waiting=of.max_num_seqs)
        at_once = limits.max_running + limits.max_waiting
        with Display(messages) as report, Engine(vl2, limits, report=report) as engine:
            ask(engine, vl2.processor, samples, benchmark, folder, settings, rows, share, at_once, report)
    wait_for_all("evaluated")
    if messages.quiet:  # another process puts together what all have answered
        return
    known = answers.read(folder, hash_)  # again: other processes answered meanwhile
    if left := rows_left(known, rows):
        tell(f"{len(left)} of {rows} rows are other shares'; run this without --shard once they are in {folder}")
        return
    _report(name, benchmark, [a for a in known.values() if a.row < rows], samples, settings, folder, json)


def _questions(of: BenchmarkFlags) -> tuple[Any, int, str, Any]:
    """The questions, how many rows of them are asked, and whose they are: all that can be wrong before weights load."""
    from vl2_jax.evaluation.benchmarks import benchmark_of
    from vl2_jax.evaluation.samples import Samples, files_of

    for name, value in {"limit": of.limit, "max-tokens": of.max_tokens, "max-num-seqs": of.max_num_seqs}.items():
        if value is not None and value < 1:
            raise RequestError(f"--{name} is {value}; expected at least 1.")
    files = files_of(of.data, [Path(), Path(os.environ.get(_DATA_OF_VLMEVALKIT) or Path.home() / "LMUData")])
    samples = Samples(files, of.images)
    name, benchmark = benchmark_of(of.benchmark or _stem(Path(of.data[0])))
    rows = min(len(samples), of.limit or len(samples))
    first = next(filter(None, map(samples.__getitem__, range(rows))), None)
    if first is None:
        raise RequestError(f"none of the first {rows} rows of {shown(str(files[0]))} has a picture; nothing is left.")
    benchmark.check(first[0])
    if not first[0].answers and first[0].box is None:
        tell(
            f"{first[0].where} has no right answer, in a column 'answer' or 'answers'; answers are kept for the "
            "benchmark's own server, and not scored",
            "yellow",
        )
    return samples, rows, name, benchmark


def _report(
    name: str, benchmark: Any, answered: list[Any], samples: Any, settings: dict[str, Any], folder: Path, json: bool
) -> None:
    from vl2_jax.evaluation import results
    from vl2_jax.evaluation.page import page
    from vl2_jax.training.folder import write as write_file

    found = results.results_of(name, benchmark, answered, settings)
    results.save(folder, found, answered)
    if found.lines:
        html = page(found, answered, samples)
        write_file(folder / results.PAGE_FILE, html.encode("utf-8", "backslashreplace"))
    if json:
        print_json(dataclasses.asdict(found) | {"score": found.score})
    else:
        write(results.table(found))
    tell(f"answers, numbers and wrong answers with their pictures are in {folder}")


def _refuse(flags: dict[str, tuple[Any, Any]], belongs_to: str) -> None:
    """Flags that were given, though what they are for is not asked; (value, default) by name."""
    if given := [name for name, (value, default) in flags.items() if value != default]:
        raise RequestError(f"--{given[0]} is for {belongs_to}.")


def _fingerprint_of(directory: Path) -> dict[str, str]:
    """What changes when weights or tokenizer of a model do, by file; a model on a bucket is its address."""
    from vl2_jax.files import is_remote
    from vl2_jax.training.sources import fingerprint

    if is_remote(directory):
        return {"": str(directory)}
    return {file.name: fingerprint(file) for kind in _OF_A_MODEL for file in sorted(directory.glob(kind))}


def _stem(path: Path) -> str:
    return path.name.split(".")[0] or "model"


def _share(shard: str | None, mesh: str | None) -> Any:
    """Which rows this process asks: of `--shard`, or of the processes of a slice."""
    import jax

    from vl2_jax.evaluation.answers import Share

    if jax.process_count() > 1:
        if shard or mesh:
            raise RequestError(
                "processes that know each other share the rows by themselves, each with a whole model: leave "
                "--shard and --mesh out, or start each on its own, with --shard and without --coordinator."
            )
        return Share(jax.process_index() + 1, jax.process_count())
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", shard or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RequestError(f"--shard is {shown(shard)}; expected I/N, such as 2/4 for the second of four shares.")
    return Share(int(match[1]), int(match[2]))
