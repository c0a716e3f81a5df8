"""Programs are compiled for few shapes, once, and kept."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import vl2_jax
from tests.conftest import GOLDENS
from vl2_jax.compilation import VARIABLE, counting_compilations, keep_compiled_programs
from vl2_jax.inference.chunks import chunking
from vl2_jax.model.decoder import DecoderLayer


def question(number):
    """Prompts of 60 to 950 tokens, with one to three pictures of different forms."""
    pixels = np.random.default_rng(number).integers(0, 255, (300, 100 + 50 * number, 3), np.uint8)
    pictures = [Image.fromarray(pixels)] * (1 + number % 3)
    text = "<image>\n" * len(pictures) + "What is " + "here " * (8 * number * number)
    return [{"role": "user", "content": text, "images": pictures}]


@pytest.fixture
def fresh(first_layers):
    jax.clear_caches()
    return vl2_jax.load(first_layers("nano-small"), dtype="float32")


def test_ten_prompts_of_ten_lengths_compile_at_most_two_programs_after_the_first_answer(fresh):
    fresh.generate(question(0), max_tokens=3)
    with counting_compilations() as names:
        lengths = {fresh.generate(question(number), max_tokens=3)[0].prompt_tokens for number in range(1, 11)}
    assert len(lengths) == 10
    assert max(lengths) > 6 * min(lengths)
    assert len(names) <= 2, names


def test_a_program_is_compiled_once_whatever_gave_its_arguments(first_layers):
    """Arrays that nothing has placed, and results of programs, are two kinds of arguments to JAX."""
    jax.clear_caches()
    model = vl2_jax.load(first_layers("nano-small"), dtype="bfloat16", chunk_size=64)
    with counting_compilations() as names:
        model.generate(question(5), max_tokens=8)
        model.generate(question(2), max_tokens=8)
    assert {"jit(prefill_chunk)", "jit(_encode_tiles)", "jit(decode_steps)"} <= set(names)
    assert len(names) == len(set(names)), names


def test_layers_of_a_kind_are_traced_once_a_program(monkeypatch):
    """vl2-nano has four layers of two kinds."""
    jax.clear_caches()
    model = vl2_jax.load("vl2-nano")
    trace, traced = DecoderLayer.__call__, []

    def counted(layer, *arguments):
        traced.append(layer.is_moe)
        return trace(layer, *arguments)

    monkeypatch.setattr(DecoderLayer, "__call__", counted)
    with counting_compilations() as names:
        model.generate(question(0), max_tokens=3)
    programs = sum(name in ("jit(prefill_chunk)", "jit(decode_steps)") for name in names)
    assert 0 < traced.count(True) <= programs
    assert 0 < traced.count(False) <= programs


def test_nothing_is_compiled_after_warming_up(fresh):
    fresh.warm_up()
    with counting_compilations() as names:
        fresh.generate(question(0), max_tokens=3)
        fresh.generate(question(9), max_tokens=3, temperature=0.5)
    assert not names


_COUNTED = """
import jax, sys
missed = []
jax.monitoring.register_event_listener(lambda event, **rest: missed.append(event) if "cache_miss" in event else None)
from vl2_jax.cli import main
main(sys.argv[1:])
print(len(missed))
"""


def test_a_second_start_compiles_nothing(tmp_path, first_layers):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    environment = kept | {"XDG_CACHE_HOME": str(tmp_path)}
    command = [
        "generate",
        "--model",
        str(first_layers("nano-small")),
        "--image",
        str(GOLDENS / "images" / "square.png"),
    ]
    command += ["--prompt", "What is written here?", "--max-tokens", "8"]

    def start(*more):
        done = subprocess.run(
            [sys.executable, "-c", _COUNTED, *command, *more],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        *answer, missed = done.stdout.splitlines()
        return answer, int(missed)

    answer, missed = start()
    assert missed > 0
    assert start() == (answer, 0)
    assert list((tmp_path / "vl2-jax" / "compiled").iterdir())


@pytest.mark.parametrize(
    ("variable", "cache", "expected"),
    [("", None, "default"), ("off", None, None), ("{tmp}/mine", None, "{tmp}/mine"), ("", "{tmp}/users", None)],
)
def test_where_programs_are_kept(tmp_path, monkeypatch, variable, cache, expected):
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv(VARIABLE, variable.format(tmp=tmp_path))
    try:
        jax.config.update(names[0], cache and cache.format(tmp=tmp_path))
        folder = keep_compiled_programs()
        if expected == "default":
            assert folder.is_relative_to(tmp_path / "caches" / "vl2-jax")
        else:
            assert folder == (expected and type(tmp_path)(expected.format(tmp=tmp_path)))
        assert jax.config.jax_compilation_cache_dir == (str(folder) if folder else cache and cache.format(tmp=tmp_path))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "folder"))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert keep_compiled_programs() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("platform", "positions", "chunks"),
    [
        ("cpu", 20, [64]),
        ("cpu", 1087, [512, 512, 64]),
        ("cpu", 488, [512]),
        ("tpu", 1087, [1024, 64]),
        ("tpu", 3500, [4096]),
        ("tpu", 4096, [4096]),
    ],
)
def test_a_prompt_is_cut_at_the_least_cost(platform, positions, chunks):
    assert chunking(platform).cut(positions) == chunks


def test_chunks_of_many_prompts_are_shorter():
    assert chunking("tpu").lengths(8) == [1024, 256, 64]
    assert chunking("tpu", devices=8).lengths(8) == [4096, 1024, 256, 64]
    assert chunking("cpu", most=7).cut(20) == [7, 7, 7]


@pytest.mark.parametrize("most", [5, 48, 64, 257, 513, 1000, 1031, 4096])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_chunks_begin_at_multiples_of_the_shortest(platform, most):
    """So that the shortest one has room wherever a chunk may begin."""
    lengths = chunking(platform, most).lengths()
    assert lengths[0] <= most < 2 * lengths[0]
    assert [length % lengths[-1] for length in lengths] == [0] * len(lengths)


def test_every_chunking_holds_all_positions():
    for platform in ("cpu", "tpu"):
        for positions in range(1, 4097, 37):
            cut = chunking(platform).cut(positions, 3)
            assert sum(cut) - cut[-1] < positions <= sum(cut)
