"""Whatever is typed after `vl2`, it is done or refused in one line, and nothing long of the user's comes back."""

import contextlib
import io
import sys

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vl2_jax.cli import main
from vl2_jax.cli.parsing import COMMANDS

LINES = (
    "generate --model nowhere --prompt x --image nowhere.png --temperature 0.5 --save-boxes b.png --json --no-merge",
    "generate --model nowhere --prompt - --system s --stop . --n 2 --seed 1 --mesh auto --dispatch ring",
    "chat --model nowhere --system s --max-tokens 3 --allow-urls",
    "convert nowhere there --dtype bfloat16",
    "export nowhere there --adapters --step best",
    "train nowhere.toml --out run --set loop.steps=3 --set optimizer.learning_rate=1e-4",
    "eval --model nowhere --count 3 --seed 1 --longest-side 64 --json",
    "verify nowhere nowhere --json",
    "plan --model nowhere --topology v5e:2x4 --for train --batch 8 --recipe nowhere.toml --save p.png",
    "serve nowhere --port 0 --api-key k --max-num-seqs 2 --served-model-name n --allowed-media-domains example.org",
    "demo nowhere --port 0 --max-num-seqs 2 --mesh auto",
    "chat --server http://127.0.0.1:9 --api-key k",
    "batch --model nowhere --out there --data nowhere.parquet --engines 2 --devices 4 --id n",
    "info nowhere --json",
    "info vl2-nano",
    "doctor",
)
LONGEST = 1500  # characters of a line about what was typed
typed = (
    st.sampled_from([word for line in LINES for word in line.split()])
    | st.sampled_from(["", "-", "--", "---", "=", "--=", "--help=1", "None", "nan", "-1", "1e999", "[/]", "\0", "\n"])
    | st.sampled_from(
        ["x" * 5000, "word " * 2000, "[" * 3000, "\x1b[2J" * 999, "é" * 4000, "/x" * 2500, "\udce9" * 300]
    )
    | st.sampled_from([f"{scheme}://host/model" for scheme in ("http", "ftp", "gs", "s3", "az", "hf", "foo")])
    | st.sampled_from(
        ["gs://", "hf://one", "foo:/", "http://[::1", "https://x]y:-3", "gs://b/\0", "file:///nowhere", "://"]
    )
    | st.sampled_from(["9" * 5000, "--" + "y" * 3000, "--prompt=" + "z" * 4000, "--image=" + "q" * 4000])
    | st.text(max_size=12)
)
kinds = st.sampled_from(["value", "value", "value", "drop", "insert", "swap", "cut", "join"])
changes = st.lists(st.tuples(kinds, st.integers(0, 40), typed), max_size=3)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_fetched_or_written(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("vl2_jax.serving.http.server.run", lambda *_: None)  # what would serve until a signal comes
        patch.chdir(tmp_path_factory.mktemp("typed"))
        yield


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(LINES), changes)
@example("info nowhere", [("value", 0, "x" * 5000)])
@example("info nowhere", [("value", 0, "a/" + "x" * 5000)])
@example("info nowhere", [("value", 0, "~nobody-by-this-name")])
@example("chat --server http://127.0.0.1:9 --api-key k", [("value", 0, "http://[::1")])
@example("chat --server http://127.0.0.1:9 --api-key k", [("value", 0, "https://x]y:99999999")])
def test_a_command_line_is_done_or_refused_in_one_line(line, changed):
    _refused_in_one_line(_changed(line.split(), changed))


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([*COMMANDS, "", "genrate"]), st.lists(typed, max_size=6))
@example("chat", ["--model", "http://127.0.0.1:9"])
@example("info", ["foo:/bar"])
def test_any_words_are_done_or_refused_in_one_line(command, words):
    _refused_in_one_line([command, *words])


def _changed(words: list[str], changed: list[tuple[str, int, str]]) -> list[str]:
    for kind, place, word in changed:
        at = place % max(1, len(words))
        if kind == "insert":
            words.insert(at, word)
        elif words and kind == "drop":
            words.pop(at)
        elif kind == "value":
            values = [i for i, given in enumerate(words) if i and not given.startswith("--")] or [len(words)]
            words[(at := values[place % len(values)]) : at + 1] = [word]
        elif words and kind == "swap":
            words[0], words[at] = words[at], words[0]
        elif words and kind == "cut":
            words[at] = words[at][: place % 7]
        elif words and kind == "join":
            words[at] += "=" + word
    return words


def _refused_in_one_line(words: list[str]) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(3)]
    streams[2].reconfigure(errors="backslashreplace")
    code: object = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        for name, stream in zip(("stdin", "stdout", "stderr"), streams):
            patch.setattr(sys, name, stream)
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code
    told = streams[2].buffer.getvalue().decode()
    assert code in (None, 0, 1, 2)
    assert len(told) < LONGEST
    assert (told.count("\n") == 1 and told.startswith("vl2: ")) if code else "Traceback" not in told
    assert all(long not in told for word in words if len(word) > 200 and (long := word[:201]))
