"""Files are read as they are published; what is wrong in one is told with file and row."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import GOLDENS
from vl2_jax.errors import ConfigError
from vl2_jax.evaluation.benchmarks import BENCHMARKS, benchmark_of
from vl2_jax.evaluation.samples import Samples, files_of
from vl2_jax.processing.images import load_image

PICTURES = [(GOLDENS / "images" / name).read_bytes() for name in ("square.png", "tall.png")]
ENCODED = [base64.b64encode(picture).decode() for picture in PICTURES]
SIZES = [load_image(picture).size for picture in PICTURES]


@pytest.fixture
def tsv(tmp_path):
    """`tsv(header, row, ...)` of cells."""

    def write(*rows, name="drawn.tsv"):
        path = tmp_path / name
        path.write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")
        return Samples([path])

    return write


def test_vlmevalkit_options_hints_categories_and_a_picture_of_another_row(tsv):
    head = ["index", "question", "hint", "A", "B", "C", "answer", "category", "l2-category", "image"]
    samples = tsv(
        head,
        [7, "Which?", "Look.", "a ball", "a cube", "", "B", "shapes", "things", ENCODED[0]],
        [1000007, "Which?", "", "a cube", "a ball", "", "A", "shapes", "things", "7"],
    )
    (first,), (second,) = samples[0], samples[1]
    assert (first.name, first.question, first.hint, first.answers) == ("7", "Which?", "Look.", ("B",))
    assert first.options == {"A": "a ball", "B": "a cube"}
    assert first.groups == {"category": "shapes", "l2-category": "things"}
    assert first.pair == second.pair == "7"
    assert load_image(second.images[0]).size == SIZES[0]


def test_vlmevalkit_several_pictures_and_answers_are_lists_as_python_writes_them(tsv):
    (sample,) = tsv(["index", "image", "question", "answer"], [1, ENCODED, "<image 1>?", ["a", "b's"]])[0]
    assert [load_image(image).size for image in sample.images] == SIZES
    assert sample.answers == ("a", "b's")


def test_rows_without_a_picture_are_left_out_as_vlmevalkit_does(tsv):
    samples = tsv(["index", "image", "question", "answer"], [1, "", "?", "a"], [2, ENCODED[0], "?", "a"])
    assert samples[0] == []
    assert len(samples[1]) == 1


def parquet(path, **columns):
    pq.write_table(pa.table({name: [value] for name, value in columns.items()}), path)
    return Samples([path])


def test_hugging_face_rows(tmp_path):
    image = {"bytes": PICTURES[0], "path": None}
    (doc,) = parquet(tmp_path / "a", questionId="12", question="Who?", answers=["x", "y"], image=image)[0]
    assert (doc.name, doc.answers, load_image(doc.images[0]).size) == ("12", ("x", "y"), SIZES[0])
    (ai2d,) = parquet(tmp_path / "b", question="?", options=["sun", "moon"], answer="1", image=image)[0]
    assert (ai2d.options, ai2d.answers) == ({"A": "sun", "B": "moon"}, ("B",))
    (vqa,) = parquet(tmp_path / "c", question="?", answers=[{"answer": "x", "answer_id": 1}], image=image)[0]
    assert vqa.answers == ("x",)


def test_mmmu_rows_of_hugging_face_have_a_column_for_each_picture(tmp_path):
    images = {f"image_{n}": {"bytes": picture, "path": None} for n, picture in enumerate(PICTURES, 1)}
    (sample,) = parquet(
        tmp_path / "m", id="validation_Art_1", question="<image 2>?", options="['one', 'two']", answer="B", **images
    )[0]
    assert [load_image(image).size for image in sample.images] == SIZES
    assert sample.options == {"A": "one", "B": "two"}


def test_grounding_of_qwen_and_of_lmms_eval_have_their_own_corners(tmp_path):
    (tmp_path / "p.png").write_bytes(PICTURES[0])
    lines = tmp_path / "refcoco_val.jsonl"
    lines.write_text(json.dumps({"image": "p.png", "sent": "the cat", "bbox": [10, 20, 30, 50]}) + "\n")
    (sample,) = Samples([lines])[0]
    assert (sample.question, sample.box) == ("the cat", (10, 20, 30, 50))
    assert load_image(sample.images[0]).size == SIZES[0]
    image = {"bytes": PICTURES[0], "path": None}
    both = parquet(
        tmp_path / "q", question="?", answer=["a cat", "left cat"], bbox=[10.0, 20.0, 20.0, 30.0], image=image
    )
    assert [(s.question, s.box, s.key) for s in both[0]] == [
        ("a cat", (10, 20, 30, 50), (0, 0)),
        ("left cat", (10, 20, 30, 50), (0, 1)),
    ]


def test_a_folder_of_tables_is_one_benchmark(tmp_path):
    for number in range(2):
        parquet(tmp_path / f"test-0000{number}-of-00002.parquet", question=f"q{number}", answer="a")
    samples = Samples(files_of([str(tmp_path)], []))
    assert [samples[row][0].question for row in range(len(samples))] == ["q0", "q1"]


def test_a_name_is_looked_for_where_vlmevalkit_keeps_its_files(tmp_path, tsv):
    tsv(["index", "question"], [1, "?"], name="ChartQA_TEST.tsv")
    assert files_of(["ChartQA_TEST"], [tmp_path / "other", tmp_path]) == [tmp_path / "ChartQA_TEST.tsv"]
    with pytest.raises(ConfigError, match=r"no data 'DocVQA_VAL' .*download the benchmark's file"):
        files_of(["DocVQA_VAL"], [tmp_path])
    with pytest.raises(ConfigError, match=r"holds no \*.parquet"):
        files_of([str(tmp_path)], [])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "?", "answer": "a"}, "no column of the question among 'q, answer'"),
        ({"question": "?", "image": "A" * 80 + "!", "answer": "a"}, "neither base64 of a picture nor a file"),
        ({"question": "?", "image": "AAAA" * 40, "answer": "a"}, "neither base64 of a picture nor a file"),
        ({"index": 1, "question": "?", "image": "5", "answer": "a"}, "'5', which is neither base64 nor the index"),
        ({"sent": "it", "bbox": [1, 2, 3]}, "'bbox' must be four numbers"),
        ({"sent": "it", "bbox": [5, 2, 3, 4]}, "is no rectangle"),
        (["question"], "a row must be an object"),
    ],
)
def test_what_is_wrong_in_a_row_is_told_with_its_place(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "?"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        Samples([path])[1]
    assert str(caught.value).startswith(f"{path}:2: ")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("RefCOCO", {"question": "?", "answer": "a"}, "'found box' needs a column 'bbox'"),
        ("ChartQA", {"sent": "it", "bbox": [1, 2, 3, 4]}, "is one of grounding; the rule 'relaxed accuracy' is not"),
        ("TextVQA", {"question": "?", "answer": "a"}, "counts people who agree"),
        ("MMStar", {"question": "?", "answer": "a ball"}, "needs options"),
    ],
)
def test_a_rule_that_does_not_fit_the_data_is_refused(tmp_path, benchmark, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match=message) as caught:
        BENCHMARKS[benchmark].check(Samples([path])[0][0])
    assert str(caught.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("DocVQA_VAL", "DocVQA"),
        ("InfoVQA_TEST", "InfoVQA"),
        ("MMBench_DEV_EN_V11", "MMBench"),
        ("refcoco+_testA", "RefCOCO+"),
        ("refcocog_val", "RefCOCOg"),
        ("AI2D_TEST_NO_MASK", "AI2D"),
        ("MMT-Bench_VAL", "MMT-Bench"),
        ("MMMU_DEV_VAL", "MMMU"),
    ],
)
def test_a_file_is_named_as_its_benchmark(file, name):
    assert benchmark_of(file)[0] == name


@pytest.mark.parametrize("name", ["MathVista_MINI", "mme_realworld", "validation-00000-of-00003", ""])
def test_names_that_mean_nothing_are_refused(name):
    with pytest.raises(ConfigError, match="--benchmark"):
        benchmark_of(name)
