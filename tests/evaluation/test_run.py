"""A run that is killed goes on, several share the work, and what comes out can be read by anyone."""

import contextlib
import dataclasses
import json
import re

import pytest

from tests.evaluation.drawn import boxes, questions, write_parquet, write_refcoco, write_tsv
from tests.serving.scripted import ScriptedEngine
from vl2_jax.api import SHIPPED, find_model
from vl2_jax.cli import main
from vl2_jax.cli.flags import ModelFlags
from vl2_jax.errors import ConfigError, ContextLengthError
from vl2_jax.evaluation import answers
from vl2_jax.evaluation.answers import Share
from vl2_jax.evaluation.benchmarks import BENCHMARKS
from vl2_jax.evaluation.run import evaluate
from vl2_jax.evaluation.samples import Samples
from vl2_jax.processing.batch import Processor

ROWS = list({row["question"]: row for row in questions(4)}.values())  # a question tells its row
SETTINGS = {"model": "scripted", "max_tokens": 64}
EXACT = BENCHMARKS["exact"]


@pytest.fixture(scope="module")
def processor():
    return Processor.from_directory(find_model(SHIPPED))


def asks(request, row):
    return f"\n{row['question']}\n" in request.prompt.text


def right(request):
    """What is right about the scene that a prompt asks about."""
    return next(row["answer"] for row in ROWS if asks(request, row))


@pytest.fixture
def engine(processor):
    made = ScriptedEngine(processor, right)
    yield made
    made.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tsv(tmp_path_factory.mktemp("data") / "drawn.tsv", ROWS)


def ask(engine, data, folder, rows=None, **options):
    answers.begin(folder, SETTINGS)
    evaluate(engine, engine.processor, Samples([data]), EXACT, folder, SETTINGS, rows or len(ROWS), **options)
    return answers.read(folder, answers.settings_hash(SETTINGS))


def test_a_run_that_was_killed_asks_only_what_is_left(engine, data, tmp_path):
    def fails_at_the_last(request):
        return OSError("killed") if asks(request, ROWS[-1]) else right(request)

    engine.script = fails_at_the_last
    with pytest.raises(OSError, match="killed"):
        ask(engine, data, tmp_path, in_flight=1)
    file = tmp_path / "answers.jsonl"
    written = file.read_text().splitlines()
    assert 0 < len(written) < len(ROWS)
    file.write_text("\n".join(written[:-1]) + "\n" + written[-1][:40])  # the last line was being written
    engine.script, engine.requests = right, []
    found = ask(engine, data, tmp_path)
    assert len(engine.requests) == len(ROWS) - len(written) + 1
    assert [found[row, 0].text for row in range(len(ROWS))] == [row["answer"] for row in ROWS]
    assert all(answer.score == 1 for answer in found.values())
    engine.requests = []
    assert ask(engine, data, tmp_path) == found
    assert engine.requests == []


def test_many_questions_are_in_the_engine_at_once(processor, data, tmp_path):
    engine, most = ScriptedEngine(processor, seconds=0.002), 0

    def script(request):
        nonlocal most
        most = max(most, len(engine.running) + len(engine.waiting))
        return "yes"

    engine.script = script
    ask(engine, data, tmp_path, in_flight=6)
    assert most > 2
    engine.close()


def test_shares_are_disjoint_and_come_to_the_whole(engine, data, tmp_path):
    for number in (1, 2, 3):
        found = ask(engine, data, tmp_path, share=Share(number, 3))
    assert sorted(found) == [(row, 0) for row in range(len(ROWS))]
    assert len(engine.requests) == len(ROWS)
    assert sorted(file.name for file in tmp_path.glob("answers*")) == [f"answers-{n}-of-3.jsonl" for n in (1, 2, 3)]
    ask(engine, data, tmp_path)
    assert len(engine.requests) == len(ROWS)


def test_answers_of_other_settings_are_not_mixed_in(engine, data, tmp_path):
    ask(engine, data, tmp_path, rows=1)
    with pytest.raises(ConfigError, match=r"answers of another max_tokens \(64, now 65\); choose another --out"):
        answers.begin(tmp_path, SETTINGS | {"max_tokens": 65})
    assert answers.read(tmp_path, "another hash") == {}


def test_prompts_that_are_too_long_are_wrong_and_others_go_on(engine, data, tmp_path, monkeypatch):
    def check(request):
        if len(engine.requests) == 1:
            engine.requests.append(None)
            raise ContextLengthError("the prompt is too long.")

    monkeypatch.setattr(engine, "check", check)
    found = ask(engine, data, tmp_path, rows=3, in_flight=1)
    assert [found[row, 0].score for row in range(3)] == [1, 0, 1]
    assert found[1, 0].error == "the prompt is too long."


def test_a_damaged_picture_ends_the_run_with_its_row(engine, tmp_path):
    rows = [ROWS[0], ROWS[1] | {"image": ROWS[1]["image"][:200]}]
    with pytest.raises(ConfigError, match=r"drawn.tsv, row 2: the image of 200 bytes .*damaged"):
        ask(engine, write_tsv(tmp_path / "drawn.tsv", rows), tmp_path, rows=2)


# The command, with an engine that follows a script.


@pytest.fixture
def command(processor, monkeypatch, capsys, tmp_path):
    """`command(script, "--data ...")` gives what the command wrote."""

    @dataclasses.dataclass
    class Loaded:
        processor: Processor

    def run(script, *arguments):
        @contextlib.contextmanager
        def engine(_vl2, limits, report):
            made = ScriptedEngine(processor, script, limits=limits)
            yield made
            made.close()

        monkeypatch.setattr(ModelFlags, "load", lambda self, devices: (Loaded(processor), 0.0))
        monkeypatch.setattr("vl2_jax.serving.engine.Engine", engine)
        out = ["--out", str(tmp_path / "out")] if "--data" in arguments else []
        main(["eval", "--model", SHIPPED, *out, *map(str, arguments)])
        return capsys.readouterr()

    return run


def test_the_command_prints_a_table_and_keeps_numbers_and_wrong_answers(command, data, tmp_path):

    def script(request):
        return "<b>no & never</b>" if asks(request, ROWS[2]) else right(request)

    shown = command(script, "--data", data, "--benchmark", "exact")
    score = 100 * (len(ROWS) - 1) / len(ROWS)
    assert re.match(rf"all +{len(ROWS)} questions +{score:.1f} %\n", shown.out)
    assert f"category: {ROWS[0]['skill']}" in shown.out
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (kept["score"], kept["answered"], kept["benchmark"]) == (pytest.approx(score), len(ROWS), "exact")
    page = (tmp_path / "out" / "wrong.html").read_text()
    assert page.count("<article>") == page.count("data:image/jpeg;base64,") == 1
    assert "&lt;b&gt;no &amp; never&lt;/b&gt;" in page
    assert not re.search(r"<b>|<script|https?://|src=\"(?!data:)", page)


def test_shares_of_the_command_are_put_together_by_the_last(command, data, tmp_path, monkeypatch):
    flags = ["--data", data, "--benchmark", "exact", "--limit", 5]
    first = command(right, *flags, "--shard", "1/2")
    assert first.out == ""
    assert "2 of 5 rows are other shares'" in first.err
    assert json.loads(command(right, *flags, "--json").out)["score"] == 100
    assert not (tmp_path / "out" / "answers-2-of-2.jsonl").exists()
    monkeypatch.setattr("vl2_jax.cli.evaluate.Display", None)  # nothing is left to ask, so nothing is loaded
    main(["eval", "--model", SHIPPED, "--out", str(tmp_path / "out"), *map(str, flags)])


@pytest.mark.parametrize("flags", [["--cache", "int8"], ["--merge"], ["--no-merge"]], ids=lambda flags: flags[0])
def test_a_folder_that_was_answered_in_another_way_is_refused(command, data, tmp_path, capsys, flags):
    asked = ["--data", data, "--benchmark", "exact", "--limit", 1]
    command(right, *asked)
    with pytest.raises(SystemExit):
        command(right, *asked, *flags)
    assert f"answers of another {flags[0][2:].removeprefix('no-')} (None, now" in capsys.readouterr().err


def test_grounding_is_drawn_with_both_boxes(command, tmp_path):
    rows = boxes(3)
    data = write_refcoco(tmp_path, rows)
    written = "<|ref|>it<|/ref|><|det|>[[0, 0, 3, 3]]<|/det|>"
    shown = command(lambda request: written, "--data", data)
    assert f"all                      {len(rows):7} questions     0.0 %" in shown.out
    assert "the paper, testA         Tiny 87.8, Small 95.3, Base 96.7 %" in shown.out
    assert (tmp_path / "out" / "wrong.html").read_text().count("data:image") == len(rows)


def test_answers_that_nobody_here_can_score_are_kept_for_the_server(command, tmp_path):
    file = write_parquet(tmp_path / "DocVQA_TEST.parquet", [row | {"answer": None} for row in ROWS[:3]])
    shown = command(lambda request: "It is 12.", "--data", file)
    assert "DocVQA_TEST.parquet, row 1 has no right answer" in shown.err
    assert "3 answers; the data has no right ones" in shown.out
    kept = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert kept == [{"questionId": number, "answer": "It is 12"} for number in range(3)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data nothing.tsv", "there is no data file"),
        ("--data NotHere", "nothing is downloaded here"),
        ("--data {data}", "'drawn' is not the name of a benchmark"),
        ("--data {data} --benchmark nonsense", "'nonsense' is not the name of a benchmark"),
        ("--data {data} --benchmark RefCOCO", "drawn.tsv, row 1: the rule 'found box' needs a column 'bbox'"),
        ("--data {data} --benchmark exact --limit 0", "--limit is 0"),
        ("--data {data} --benchmark exact --shard 3/2", "--shard is '3/2'; expected I/N"),
        ("--data {data} --benchmark exact --images /nowhere", "there is no folder '/nowhere'"),
        ("--data {empty}", "holds no record"),
        ("--data {no_pictures} --benchmark exact", "none of the first 1 rows of"),
        ("--data {data} --benchmark exact --count 5", "--count is for drawn scenes"),
        ("--limit 3", "--limit is for a benchmark"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_sentence(command, data, tmp_path, capsys, flags, message):
    files = {name: tmp_path / f"{name}.tsv" for name in ("empty", "no_pictures")}
    files["empty"].write_text("index\timage\tquestion\tanswer\n")
    files["no_pictures"].write_text("index\timage\tquestion\tanswer\n1\t\t?\ta\n")
    with pytest.raises(SystemExit):
        command(right, *flags.format(data=data, **files).split())
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
