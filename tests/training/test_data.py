"""Packing: what a document costs in a packed row is what it costs alone, and a stream goes on where it stopped."""

import itertools
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import psutil
import pytest

import vl2_jax
from tests.conftest import GOLDENS
from tests.training.conftest import PICTURES
from vl2_jax.errors import ConfigError, ConversationError
from vl2_jax.model.decoder import _causal_mask
from vl2_jax.model.layers import attend
from vl2_jax.model.vl2 import apply
from vl2_jax.ops.flash_attention.segments import BRANCH
from vl2_jax.ops.flash_attention.xla import flash_attention
from vl2_jax.processing.batch import IGNORED, TEXT
from vl2_jax.training.data import SampleError, batches
from vl2_jax.training.formats import questions_apart, to_conversation
from vl2_jax.training.objective import next_token_loss, token_losses
from vl2_jax.training.packing import pack
from vl2_jax.training.step import shown_tiles

SQUARE = str(GOLDENS / "images" / "square.png")


def documents(processor, data_file):
    lines = data_file.read_text().splitlines()
    return [processor.encode(to_conversation(json.loads(line), data_file.parent), inference=False) for line in lines]


@pytest.mark.parametrize("model", ["nano-tiny", "nano-small", "nano-base"])
def test_a_packed_document_has_the_loss_it_has_alone(model, data_file, first_layers):
    vl2 = vl2_jax.load(first_layers(model), dtype="float32")
    samples = documents(vl2.processor, data_file)
    size, tiles = vl2.processor.config.tile_size, sum(len(sample.tiles) for sample in samples)

    @jax.jit
    def losses_of(batch):
        inputs = (batch.input_ids, batch.segments, batch.visual_index, batch.tiles, batch.positions)
        return token_losses(apply(vl2.model, vl2.params, *inputs).logits[:, :-1], batch.labels[:, 1:])

    def sums(rows, length):
        batch = pack(rows, length, tiles, vl2.processor.tokenizer.pad_id, size)
        losses = np.asarray(losses_of(batch))
        return [
            losses[row][batch.segments[row, 1:] == number].sum()
            for row, part in enumerate(rows)
            for number in range(1, len(part) + 1)
        ]

    length = max(sum(map(len, samples[:3])), sum(map(len, samples[3:])))
    together = sums([samples[:3], samples[3:]], length)
    alone = [sums([[sample]], length)[0] for sample in samples]
    np.testing.assert_allclose(together, alone, rtol=2e-5)


@pytest.mark.parametrize("model", ["nano-tiny", "nano-small", "nano-base"])
def test_questions_apart_have_the_losses_they_have_alone(model, first_layers):
    vl2 = vl2_jax.load(first_layers(model), dtype="float32")
    pictures = [str(GOLDENS / "images" / name) for name in ("tall.png", "tiny.png")]
    pairs = [("How many?", "Two."), ("Which is taller?", "The first of both."), ("And smaller?", "The other.")]
    messages = [m for q, a in pairs for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    messages[0] |= {"content": "<image>\n<image>\nHow many?", "images": pictures}
    alone = [vl2.processor.encode(talk, inference=False) for talk in questions_apart(messages)]
    assert [len(document.tiles) for document in alone] == [len(alone[0].tiles)] * 3
    # A question's first token follows the pictures in no row that is shared, so it is no target; nor are they, here.
    begin = np.flatnonzero(alone[0].visual_index != TEXT)[-1] + 2
    alone = [replace(d, labels=np.where(np.arange(len(d)) < begin, IGNORED, d.labels)) for d in alone]
    together = vl2.processor.encode_apart(questions_apart(messages))
    assert len(together.tiles) == len(alone[0].tiles)
    together = replace(together, labels=np.where(together.branches == 0, IGNORED, together.labels))
    assert len(together) < sum(map(len, alone)) - 2 * (alone[0].visual_index >= 0).sum()
    length, tiles = len(together) + len(alone[0]) + 8, 2 * len(together.tiles)

    @jax.jit
    def losses_of(batch):
        inputs = (batch.input_ids, batch.segments, batch.visual_index, batch.tiles, batch.positions)
        return token_losses(apply(vl2.model, vl2.params, *inputs).logits[:, :-1], batch.labels[:, 1:])

    def sums(documents):
        batch = pack([documents], length, tiles, vl2.processor.tokenizer.pad_id, vl2.processor.config.tile_size)
        losses = np.asarray(losses_of(batch))[0]
        return {segment: losses[batch.segments[0, 1:] == segment].sum() for segment in np.unique(batch.segments)}

    expected = [sums([document])[1] for document in alone]
    found = sums([alone[0], together])
    np.testing.assert_allclose([found[2 + BRANCH * branch] for branch in (1, 2, 3)], expected, rtol=2e-5)
    np.testing.assert_allclose(found[1], expected[0], rtol=2e-5)
    assert found[2] == found[0] == 0


def test_packed_rows_attend_as_the_mask_says():
    segments = np.array([[1] * 5 + [2] * 4 + [2 + BRANCH] * 6 + [2 + 2 * BRANCH] * 5 + [0] * 12] * 2)
    queries, keys, values = jax.random.normal(jax.random.key(0), (3, 2, 32, 2, 8))
    mask = _causal_mask(segments, segments)
    assert mask[0, 14].tolist() == [False] * 5 + [True] * 10 + [False] * 17
    ours = flash_attention(queries, keys, values, segments, 0.3)
    np.testing.assert_allclose(ours[:, :20], attend(queries, keys, values, mask, 0.3)[:, :20], atol=1e-5)


def test_questions_apart_need_their_pictures_at_the_beginning():
    user, answer = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}
    with pytest.raises(ConversationError, match="a later one shows some"):
        questions_apart([user, answer, user | {"images": ["a.png"]}, answer])
    with pytest.raises(ConversationError, match="pairs of user and assistant, got user, user"):
        questions_apart([user, user])
    system = {"role": "system", "content": "Be short."}
    first, second = questions_apart([system, user, answer, user, answer])
    assert first == [system, user, answer]
    assert second == [system, user | {"images": []}, answer]
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    shown = {"role": "user", "content": "<image>\nWhat is it?", "images": [SQUARE]}
    with pytest.raises(ConversationError, match="must be alike until after their last picture"):
        processor.encode_apart([[shown, answer], [user, answer]])


def test_every_tile_that_is_shown_counts_once():
    """The only tile of a small picture stands twice in its row: as the tile, and as the global view."""
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    pictures = [GOLDENS / "images" / name for name in PICTURES]
    turns = [{"role": "user", "content": "<image>\nAnd?", "images": [p]} for p in pictures]
    encoded = [processor.encode([turn, {"role": "assistant", "content": "!"}], inference=False) for turn in turns]
    batch = pack([[e] for e in encoded], 1200, 40, 0, processor.config.tile_size)
    stored = [len(e.tiles) for e in encoded]
    assert 1 in stored
    assert int(shown_tiles(processor.config.token_grid**2, batch)) == sum(stored)


def test_logits_of_a_chunk_are_the_most_that_is_held():
    vl2 = vl2_jax.load(GOLDENS / "nano-small", dtype="float32")
    language = vl2.config.language_config
    hidden, labels = np.zeros((8, 96, language.hidden_size), np.float32), np.zeros((8, 96), np.int32)
    traced = jax.make_jaxpr(
        jax.value_and_grad(lambda hidden: next_token_loss(vl2.model, vl2.params, hidden, labels, chunk=64))
    )(hidden)
    held = re.findall(rf"f32\[([\d,]+),{language.vocab_size}\]", str(traced))
    held = {shape for shape in held if shape != str(language.hidden_size)}  # the vocabulary's weights
    assert held == {"8,8"}


def test_chunks_of_the_vocabulary_loss_add_up(data_file):
    vl2 = vl2_jax.load(GOLDENS / "nano-small", dtype="float32")
    samples = documents(vl2.processor, data_file)[:2]
    batch = pack([samples], 900, 24, 0, vl2.processor.config.tile_size)
    hidden = jax.random.normal(jax.random.key(0), (1, 900, vl2.config.language_config.hidden_size))

    def loss(hidden, chunk):
        return next_token_loss(vl2.model, vl2.params, hidden, batch.labels, chunk)

    whole, parts = (jax.value_and_grad(loss)(hidden, chunk) for chunk in (900, 77))
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-6)


def test_no_document_predicts_the_next_ones_first_token(recipe):
    described = recipe("data.epochs=1")
    batch = next(iter(batches(described.data, vl2_jax.load(GOLDENS / "nano-base").processor)))
    first = batch.positions == 0
    assert (batch.labels[first] == IGNORED).all()
    assert (np.diff(batch.segments, axis=1)[batch.segments[:, 1:] > 0] >= 0).all()


def test_a_stream_goes_on_exactly_where_it_stopped(recipe):
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    described = recipe().data
    stream = iter(batches(described, processor))
    states, expected = [], []
    for _ in range(6):
        states.append(json.loads(json.dumps(stream.get_state())))
        expected.append(next(stream))
    for state, batch in zip(states, expected):
        again = iter(batches(described, processor))
        again.set_state(state)
        np.testing.assert_array_equal(next(again).input_ids, batch.input_ids)


def test_worker_processes_give_the_same_batches(recipe):
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    alone, helped = (iter(batches(recipe(f"data.workers={n}").data, processor)) for n in (0, 1))
    for _ in range(3):
        a, b = next(alone), next(helped)
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.tiles, b.tiles)
    state = json.loads(json.dumps(helped.get_state()))
    expected = next(helped)
    helped.close()
    again = batches(recipe("data.workers=0").data, processor)  # a place does not depend on who reads
    again.set_state(state)
    np.testing.assert_array_equal(next(again).input_ids, expected.input_ids)


READER = """
import sys, time
import psutil
from vl2_jax.api import load
from vl2_jax.training.data import batches
from vl2_jax.training.recipe import read_recipe

if __name__ == "__main__":
    stream = batches(read_recipe(sys.argv[1], ["data.workers=1"]).data, load(sys.argv[2]).processor)
    next(stream)
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_a_run_that_is_killed(recipe_file, tmp_path, kind):
    (tmp_path / "reader.py").write_text(READER)
    command = [sys.executable, str(tmp_path / "reader.py"), str(recipe_file()), str(GOLDENS / "nano-base")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        children = [psutil.Process(int(pid)) for pid in run.stdout.readline().split()]
        assert children
        run.send_signal(kind)
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
        assert run.stdout.read() == ""  # nobody holds the terminal either


def test_a_stream_goes_on_with_another_number_of_processes(recipe, tmp_path):
    rows = [json.dumps({"question": "?", "answer": f"record {number}."}) for number in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    changes = (f"data.sources=[{{path='{tmp_path / 'rows.jsonl'}'}}]", "data.rows=6", "data.sequence_length=24")
    processor = vl2_jax.load(GOLDENS / "nano-base").processor

    def records(stream, most):
        batches_ = list(itertools.islice(stream, most))
        return re.findall(r"record (\d+)", "".join(processor.tokenizer.decode(b.input_ids.ravel()) for b in batches_))

    two = [batches(recipe(*changes, "data.epochs=1").data, processor, share, 2) for share in range(2)]
    read = records(two[0], 1) + records(two[1], 4)
    states = json.loads(json.dumps([stream.get_state() for stream in two]))
    three = [batches(recipe(*changes, "data.epochs=2").data, processor, share, 3) for share in range(3)]  # and longer
    for stream in three:
        stream.set_state(*states)
        read += records(stream, None)
    assert sorted(map(int, read)) == sorted(2 * list(range(60)))


def test_hosts_read_different_samples_and_together_all(recipe):
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    described = recipe("data.epochs=1").data
    answers = []
    for host in range(2):
        for batch in batches(described, processor, host, 2):
            assert batch.input_ids.shape == (1, 256)
            answers.append(processor.tokenizer.decode(batch.input_ids.ravel()))
    text = "".join(answers)
    assert all(text.count(answer) == 1 for answer in ("a square", "a tower", "two things", "no picture at all"))


@pytest.fixture
def bad_file(tmp_path, data_file):
    path = tmp_path / "bad.jsonl"
    good = data_file.read_text().splitlines()[-1]
    rows = [
        json.dumps({"image": "missing.png", "question": "?", "answer": "!"}),
        "{not json",
        json.dumps({"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "x"}]}),
        json.dumps({"question": "?" * 600, "answer": "!"}),
        json.dumps({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]}),
        json.dumps({"question": "<bbox>", "answer": "!", "image": SQUARE, "objects": {"bbox": [[math.nan, 0, 1, 1]]}}),
        json.dumps({"image": "long" * 100, "question": "?", "answer": "!"}),
        '{"question": ' + 5000 * "9" + "}",
        "[" * 100_000,
        good,
    ]
    path.write_text("\n".join(rows))
    return path


def test_bad_samples_are_counted_and_named_by_line(recipe, bad_file):
    described = recipe(f"data.sources=[{{path='{bad_file}'}}]", "data.epochs=1").data
    stream = iter(batches(described, vl2_jax.load(GOLDENS / "nano-base").processor))
    batch = next(stream)
    assert batch.segments.max() == 1
    assert stream.skipped == 9
    lines = sorted(int(report.where.rsplit(":", 1)[1]) for report in stream.reports)
    assert lines == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_data_of_which_nothing_can_be_used_ends_the_run(recipe, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"nothing": 1}\n{"else": 2}\n' * 500)  # shuffling few takes 10 ms a record
    described = recipe(f"data.sources=[{{path='{tmp_path / 'bad.jsonl'}'}}]").data
    processor = vl2_jax.load(GOLDENS / "nano-base", dtype="float32").processor
    with pytest.raises(SampleError, match=r"1000 samples one after another cannot be .*bad\.jsonl:\d+: "):
        next(iter(batches(described, processor)))


def test_a_bad_sample_ends_the_run_where_asked_to(recipe, bad_file):
    described = recipe(f"data.sources=[{{path='{bad_file}'}}]", "data.on_bad_sample=raise", "data.epochs=1").data
    stream = iter(batches(described, vl2_jax.load(GOLDENS / "nano-base").processor))
    with pytest.raises(SampleError, match=r"bad.jsonl:\d+: "):
        list(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources=[{path='none.jsonl'}]", "no data file 'none.jsonl'"),
        ("data.sources=[{path='x', scenes=1}]", "either a path or scenes"),
        ("data.sources=[{scenes=1, images='x'}]", "images of a data source is the folder of a path's pictures"),
        ("data.on_bad_sample=ignore", "expected 'skip' or 'raise'"),
    ],
)
def test_wrong_data_settings_are_named(recipe, change, message):
    with pytest.raises(ConfigError, match=message):
        batches(recipe(change).data, vl2_jax.load(GOLDENS / "nano-base").processor)


def test_mixtures_draw_by_weight(recipe, tmp_path):
    for name in ("often", "seldom"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": "?", "answer": name}) + "\n")
    sources = ", ".join(f"{{path='{tmp_path}/{name}.jsonl', weight={n}}}" for name, n in (("often", 3), ("seldom", 1)))
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    batch = next(iter(batches(recipe(f"data.sources=[{sources}]", "data.rows=8").data, processor)))
    text = processor.tokenizer.decode(batch.input_ids.ravel())
    often, seldom = text.count("often"), text.count("seldom")
    assert often + seldom > 100
    assert abs(often / (often + seldom) - 0.75) < 0.03


def test_every_host_sees_the_whole_mixture_and_epochs_every_record(recipe, tmp_path):
    for name, records in (("large", 60), ("small", 4)):
        rows = [json.dumps({"question": "?", "answer": f"{name} {n}."}) for n in range(records)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = "data.sources=[" + ", ".join(f"{{path='{tmp_path}/{name}.jsonl'}}" for name in ("large", "small")) + "]"
    processor = vl2_jax.load(GOLDENS / "nano-base").processor

    def texts(shares, *changes):
        described = recipe(sources, "data.rows=4", *changes).data
        for share in range(shares):
            stream = batches(described, processor, share, shares)
            yield "".join(processor.tokenizer.decode(b.input_ids.ravel()) for b in itertools.islice(stream, 4))

    for text in texts(2):
        assert abs(text.count("large") / (text.count("large") + text.count("small")) - 0.5) < 0.05
    for shares in (1, 2):
        text = "".join(texts(shares, "data.epochs=1"))
        assert (text.count("large"), text.count("small")) == (60, 4)


def test_questions_are_learned_only_where_asked_for(recipe):
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    text = processor.tokenizer.decode
    alone, both = (next(iter(batches(recipe(f"data.learn_prompts={to}").data, processor))) for to in ("false", "true"))
    learned, too = (text(batch.labels[batch.labels != IGNORED]) for batch in (alone, both))
    assert "a tower" in learned
    assert "What is it?" not in learned
    assert "What is it?" in too


def test_scenes_are_a_source_like_any_other(recipe):
    described = recipe("data.sources=[{scenes=1, sizes={longest_side=112, turns=2}}]", "data.tiles=40").data
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    first, second = (next(iter(batches(described, processor))) for _ in range(2))
    np.testing.assert_array_equal(first.tiles, second.tiles)
    assert first.segments.max() >= 1
    assert (first.visual_index >= 0).any()


def test_a_json_list_is_read_like_lines(recipe, data_file, tmp_path):
    path = tmp_path / "train.json"
    path.write_text("[" + ",".join(data_file.read_text().splitlines()) + "]")
    processor = vl2_jax.load(GOLDENS / "nano-base").processor
    by_line, whole = (
        next(iter(batches(recipe(f"data.sources=[{{path='{p}'}}]").data, processor))) for p in (data_file, path)
    )
    np.testing.assert_array_equal(by_line.input_ids, whole.input_ids)
    path.write_text("[{]")
    with pytest.raises(ConfigError, match="begins like a JSON list"):
        batches(recipe(f"data.sources=[{{path='{path}'}}]").data, processor)
