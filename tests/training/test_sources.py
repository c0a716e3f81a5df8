"""Data files of every kind give the same records, in little memory; what is none is named at once."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import tracemalloc

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

import vl2_jax.training.tables
from tests.conftest import GOLDENS
from vl2_jax.errors import ConfigError, ConversationError
from vl2_jax.processing.batch import IGNORED, Processor
from vl2_jax.training.data import batches
from vl2_jax.training.formats import to_conversation
from vl2_jax.training.sources import fingerprint, open_source, parsed

PICTURE = (GOLDENS / "images" / "square.png").read_bytes()
RECORDS = [{"question": f'What is "{n}"? [é漢\\', "answer": f"it is, {{{n}", "n": n} for n in range(7)]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()


def as_csv(delimiter):
    stream = io.StringIO()
    table = csv.DictWriter(stream, ["question", "answer", "image"], delimiter=delimiter)
    table.writeheader()
    table.writerows({"question": r["question"], "answer": r["answer"] + "\nnew line", "image": ""} for r in RECORDS)
    return stream.getvalue().encode()


def as_parquet():
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), stream, row_group_size=3)
    return stream.getvalue()


def as_arrow(file):
    stream, table = io.BytesIO(), pyarrow.Table.from_pylist(RECORDS)
    with (pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream)(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return stream.getvalue()


def as_feather():
    stream = io.BytesIO()
    pyarrow.feather.write_feather(pyarrow.Table.from_pylist(RECORDS), stream)
    return stream.getvalue()


FILES = {
    "lines.jsonl": LINES,
    "blank.jsonl": b"\xef\xbb\xbf\n\n" + LINES.replace(b"\n", b"\r\n\n"),
    "list.json": json.dumps(RECORDS).encode(),
    "indented.json": b"\xef\xbb\xbf \n" + json.dumps(RECORDS, indent=2, ensure_ascii=False).encode() + b"\n\n",
    "lines.jsonl.gz": gzip.compress(LINES),
    "list.json.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "lines.jsonl.bz2": bz2.compress(LINES),
    "lines.jsonl.xz": lzma.compress(LINES),
    "rows.csv": b"\xef\xbb\xbf" + as_csv(","),
    "rows.tsv": as_csv("\t"),
    "excel.csv": as_csv(";"),
    "rows.csv.gz": gzip.compress(as_csv(",")),
    "rows.parquet": as_parquet(),
    "rows.arrow": as_arrow(True),
    "stream.arrow": as_arrow(False),
    "rows.feather": as_feather(),
}


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return written


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_records(name, write):
    source = pickle.loads(pickle.dumps(open_source(write(name, FILES[name]))))  # as workers get it
    assert len(source) == len(RECORDS)
    assert len({source[n]["where"] for n in range(len(RECORDS))}) == len(RECORDS)
    for number in (6, 0, 3, 5, 1):
        record = parsed(source[number]["record"])
        assert record["question"] == RECORDS[number]["question"]
        assert record["answer"].removesuffix("\nnew line") == RECORDS[number]["answer"]
        assert source[number]["folder"] == source[0]["folder"]
        assert to_conversation(record, source[number]["folder"])[0]["images"] == []


def test_a_line_is_named_by_its_number(write):
    source = open_source(write("x.jsonl", b'\n{"question": 1}\n\n{"question": 2}'))
    assert [source[n]["where"].rsplit(":", 1)[1] for n in range(2)] == ["2", "4"]


def test_pictures_inside_of_a_table_are_bytes(write):
    stream = io.BytesIO()
    rows = [{"images": [{"bytes": PICTURE, "path": None}], "texts": [{"user": "?", "assistant": "red"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    record = open_source(write("x.parquet", stream.getvalue()))[0]
    assert to_conversation(record["record"], record["folder"])[0]["images"] == [PICTURE]


def test_parts_of_a_table_are_let_go_beyond_a_limit(write, monkeypatch):
    monkeypatch.setattr(vl2_jax.training.tables, "_KEPT", 100)
    source = open_source(write("x.parquet", as_parquet()))
    for number in (0, 3, 6, 0):
        assert source[number]["record"]["n"] == number
        assert len(source._kept) == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_takes_as_little_memory_as_lines(write, indent, monkeypatch):
    monkeypatch.setattr("vl2_jax.training.sources._WINDOW", 1 << 16)
    rows = [{"question": "[" * (n % 90), "answer": "é" * (n % 70), "n": [n, -1.5e3, None]} for n in range(20_000)]
    path = write("x.json", json.dumps(rows, indent=indent, ensure_ascii=False).encode())
    tracemalloc.start()
    source = open_source(path)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 25 * len(rows)
    assert most < path.stat().st_size / 4
    assert all(parsed(source[n]["record"]) == rows[n] for n in range(0, len(rows), 997))


def test_an_element_larger_than_a_window_is_read(write, monkeypatch):
    monkeypatch.setattr("vl2_jax.training.sources._WINDOW", 64)
    rows = [{"n": n, "text": '\\"]' * 10**n} for n in range(4)]
    source = open_source(write("x.json", json.dumps(rows).encode()))
    assert [parsed(source[n]["record"]) for n in range(4)] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[{]", "begins like a JSON list and is not one: Expecting property name"),
        ("x.json", b'[{"a": 1} {"a": 2}]', "no comma at byte 10"),
        ("x.json", b'[{"a": 1},]', "begins like a JSON list"),
        ("x.json", b'[{"a": 1}', "it ends too early"),
        ("x.json", b'[{"a": 1}]\n[{"a": 1}]', "goes on behind its end, at byte 10"),
        ("x.json", b"[" * 100_000, "lists in lists"),
        ("x.json", b"[]", "holds no record"),
        ("x.jsonl", b"\n \n", "holds no record"),
        ("x.json", b'{\n  "data": [\n    {"a": 1}\n  ]\n}', "one JSON object over several lines"),
        ("x.txt", b"hello\nworld", "no line at the beginning of .* is a JSON object; expected JSON lines"),
        ("x.jsonl", LINES.decode().encode("utf-16"), "is UTF-16"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\0\0\0", "of a kind that is not read"),
        ("x.zip", b"PK\3\4\0\0", "of a kind that is not read"),
        ("x.jsonl.gz", gzip.compress(LINES)[:-9], "may be damaged or incomplete"),
        ("x.parquet", as_parquet()[:-9], "may be damaged or incomplete"),
        ("x.arrow", as_arrow(True)[:30], "may be damaged or incomplete"),
        ("x.csv", "é,b\n1,2".encode("latin-1"), "not UTF-8"),
        ("x.csv", b"question,answer\n", "holds no record"),
    ],
)
def test_what_holds_no_records_is_named_at_once(name, content, message, write):
    with pytest.raises(ConfigError, match=message) as error:
        open_source(write(name, content))
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_here_is_named(tmp_path):
    for path, message in (
        (tmp_path / "none.jsonl", "there is no data file"),
        (tmp_path, "is a folder"),
        ("x" * 5000, "there is no data file"),
        ("a\0b", "there is no data file"),
        ("gs://bucket/x.jsonl", "is not on this machine"),
        ("https://example.com/x.jsonl", "is not on this machine"),
    ):
        for read in (open_source, fingerprint):
            with pytest.raises(ConfigError, match=message):
                read(path)


def test_a_missing_pyarrow_is_named_with_the_line_that_adds_it(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install"):
        open_source(write("x.parquet", as_parquet()))


@pytest.mark.parametrize("name", ["lines.jsonl", "rows.parquet"])
def test_pictures_can_be_in_another_folder(name, write, tmp_path, monkeypatch):
    (tmp_path / "coco").mkdir()
    source = open_source(write(name, FILES[name]), tmp_path / "coco")
    assert source[0]["folder"] == tmp_path / "coco"
    (user, _) = to_conversation({"image": "a.png", "question": "?", "answer": "!"}, source[0]["folder"])
    assert user["images"] == [str(tmp_path / "coco" / "a.png")]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder 'none' for the pictures"):
        open_source(tmp_path / name, "none")


def test_a_recipe_names_the_folder_of_pictures_and_that_only_last_answers_are_learned(write, tmp_path, recipe):
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.png").write_bytes(PICTURE)
    record = {"image": "a.png", "query": "?", "response": "the last", "history": [["What?", "the first"]]}
    path = write("x.jsonl.gz", gzip.compress(json.dumps(record).encode()))
    processor = Processor.from_directory(GOLDENS / "nano-base")
    for last_only in ("true", "false"):
        source = f"{{path='{path}', images='{tmp_path / 'coco'}', last_answer_only={last_only}}}"
        batch = next(iter(batches(recipe(f"data.sources=[{source}]", "data.epochs=1").data, processor)))
        learned = processor.tokenizer.decode(batch.labels[batch.labels != IGNORED])
        assert (batch.visual_index >= 0).any()
        assert "the last" in learned
        assert ("the first" in learned) == (last_only == "false")


@pytest.mark.parametrize("content", [b"\xff{}", b'{"n": ' + b"9" * 5000 + b"}", b"{", b"[" * 100_000, b""])
def test_a_record_that_is_not_json_gets_one_sentence(content):
    with pytest.raises(ConversationError, match="it is not") as error:
        parsed(content)
    assert len(str(error.value)) < 200


def test_a_fingerprint_tells_whether_a_file_changed(write, monkeypatch):
    path = write("x.jsonl", LINES)
    before = fingerprint(path)
    assert fingerprint(str(path)) == before == fingerprint(write("y.jsonl", LINES))
    assert fingerprint(write("x.jsonl", LINES.replace(b"0", b"1", 1))) != before  # of the same size
    monkeypatch.setattr("vl2_jax.training.sources._HASHED_WHOLE", 100)
    monkeypatch.setattr("vl2_jax.training.sources._WINDOW", 10)
    large = bytearray(10_000)
    before = fingerprint(write("large", large))
    for place in (0, 9_999):
        changed = large.copy()
        changed[place] = 1
        assert fingerprint(write("large", changed)) != before
    assert fingerprint(write("large", large + b"\0")) != before
