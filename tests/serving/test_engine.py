"""The engine gives everyone what they would get alone, and nothing of one request harms another."""

import dataclasses
import functools
import random
import threading
import time

import jax
import numpy as np
import pytest

import vl2_jax
from tests.conftest import GOLDENS
from tests.serving.asking import Asked
from vl2_jax.api import open_answer
from vl2_jax.compilation import counting_compilations
from vl2_jax.errors import ClosedError, ContextLengthError, OverloadedError, RequestError
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.model.decoder import page_bytes
from vl2_jax.serving import programs
from vl2_jax.serving.engine import Engine
from vl2_jax.serving.requests import Failed, Limits, Piece, Request, Started

PICTURES = ("square.png", "wide.png", "tall.png")
WORDS = ("where", "red", "shape", "beside", "what", "stands", "under", "how", "many", "of", "them")


LIMITS = Limits(max_running=3, max_waiting=8, context=1024, pages=10)  # of all engines, which then share programs


@pytest.fixture(scope="module")
def models(first_layers):
    """Models by family."""
    return functools.cache(lambda family: vl2_jax.load(first_layers(family), dtype="float32", chunk_size=48))


@pytest.fixture(scope="module")
def small(models):
    """A model of one family in an engine that all short tests share."""
    vl2 = models("nano-small")
    with Engine(vl2, LIMITS) as engine:
        yield engine, vl2


def conversation(number):
    """Prompts of 10 to 350 tokens with 0 to 3 pictures; many begin alike."""
    chosen = random.Random(number)
    pictures = [str(GOLDENS / "images" / name) for name in sorted(PICTURES)[: number % 4]]
    words = " ".join(chosen.choices(WORDS, k=1 + number * 7 % 50))
    first = {"role": "user", "content": "<image>\n" * len(pictures) + "Look at this. " * 20 + words, "images": pictures}
    if number % 3:
        return [first]
    return [first, {"role": "assistant", "content": "It is there."}, {"role": "user", "content": words}]


def options_of(number, tokens):
    if number % 2:
        return {"max_tokens": tokens, "ignore_eos": True}
    return {"max_tokens": tokens, "ignore_eos": True, "temperature": 0.8, "seed": number, "top_k": 20}


def everyone_gets_what_they_would_get_alone(vl2, requests, tokens, burst):
    """Shuffled arrivals, in bursts, many that begin alike."""
    order = list(range(requests))
    random.Random(7).shuffle(order)
    limits = dataclasses.replace(LIMITS, max_waiting=requests)
    with Engine(vl2, limits) as engine, counting_compilations() as names:
        asked = {}
        for first in range(0, requests, burst):
            with engine._changed:  # all of a burst are there before the next step
                for number in order[first : first + burst]:
                    asked[number] = Asked(engine, vl2, conversation(number), **options_of(number, tokens))
            time.sleep(0.05)
        answers = {number: one.answer(600) for number, one in asked.items()}
        load = engine.load
    assert load.prefix_hits > 0
    assert load.pages_used == 0
    assert load.compilations == 0
    assert names == []
    for number in order:
        (alone,) = vl2.generate(conversation(number), **options_of(number, tokens))
        assert answers[number].token_ids == alone.token_ids, number
        np.testing.assert_allclose(answers[number].logprobs, alone.logprobs, atol=2e-4)


@pytest.mark.parametrize("family", ["nano-tiny", "nano-small", "nano-base"])
def test_everyone_gets_what_they_would_get_alone(models, family):
    everyone_gets_what_they_would_get_alone(models(family), requests=12, tokens=40, burst=12)


@pytest.mark.parametrize("family", ["nano-tiny", "nano-small"])
def test_pages_of_whole_numbers_answer_as_a_contiguous_cache_of_them_does(first_layers, family):
    """Log-probabilities may differ by a number that lies between two steps and is rounded to the other one."""
    vl2 = vl2_jax.load(first_layers(family), dtype="float32", chunk_size=48, cache="int8")
    with Engine(vl2, LIMITS) as engine:
        asked = [Asked(engine, vl2, conversation(number), max_tokens=12, ignore_eos=True) for number in (1, 4, 5)]
        answers = [one.answer() for one in asked]
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._device.cache))
        assert held == (engine.load.pages + 1) * page_bytes(vl2.config.language_config, "float32", "int8")
    for number, answer in zip((1, 4, 5), answers):
        (alone,) = vl2.generate(conversation(number), max_tokens=12, ignore_eos=True)
        assert answer.token_ids == alone.token_ids
        np.testing.assert_allclose(answer.logprobs, alone.logprobs, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nano-tiny", "nano-small", "nano-base"])
def test_sixty_four_get_what_they_would_get_alone(models, family):
    everyone_gets_what_they_would_get_alone(models(family), requests=64, tokens=64, burst=5)


def test_who_goes_back_to_wait_goes_on_as_if_nothing_was(small):
    """Three answers that need fifteen pages, of which there are ten."""
    engine, vl2 = small
    before = engine.load.preemptions
    options = {"max_tokens": 560, "ignore_eos": True, "salt": "room"}
    asked = [Asked(engine, vl2, conversation(0), **options, temperature=0.5 * n, seed=n) for n in range(3)]
    answers = [one.answer() for one in asked]
    assert engine.load.preemptions > before
    for n, answer in enumerate(answers):
        (alone,) = vl2.generate(conversation(0), max_tokens=560, ignore_eos=True, temperature=0.5 * n, seed=n)
        assert answer.token_ids == alone.token_ids


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 3), (60.0, 1)])
def test_a_step_reads_prompts_for_as_long_as_those_who_run_may_wait(small, monkeypatch, seconds, steps):
    engine, vl2 = small
    monkeypatch.setattr("vl2_jax.serving.engine._SECONDS_OF_READING", seconds)
    started = []

    def watch(event):
        if isinstance(event, Started):
            started.append(engine.load.steps)

    with engine._changed:  # all are there before the next step
        hello = [{"role": "user", "content": "hello"}]
        asked = [Asked(engine, vl2, hello, on_event=watch, max_tokens=9, ignore_eos=True) for _ in range(3)]
    for one in asked:
        one.answer()
    assert len(set(started)) == steps


def test_options_of_all_kinds_hold_beside_one_another(small):
    engine, vl2 = small
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9},
        {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"temperature": 0.7, "seed": 2, "min_p": 0.1, "top_k": 0},
        {"temperature": 0, "logit_bias": {40: 100}},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "min_tokens": 5},
    ]
    common = {"max_tokens": 12}
    asked = [Asked(engine, vl2, conversation(1), **common, **kind) for kind in kinds]
    for kind, one in zip(kinds, asked):
        (alone,) = vl2.generate(conversation(1), **common, **kind)
        assert one.answer().token_ids == alone.token_ids, kind
    assert set(asked[4].answer().token_ids) == {40}


def test_stop_ids_and_strings_end_an_answer(small):
    engine, vl2 = small
    whole = Asked(engine, vl2, conversation(2), max_tokens=12, ignore_eos=True).answer()
    third = whole.token_ids[2]
    first = whole.token_ids.index(third)
    cut = Asked(engine, vl2, conversation(2), max_tokens=12, ignore_eos=True, stop_token_ids=[third]).answer()
    assert cut.token_ids == whole.token_ids[: first + 1]
    assert cut.finish_reason == "stop"


def test_the_likeliest_tokens_are_told(small):
    engine, vl2 = small
    asked = Asked(engine, vl2, conversation(1), top_logprobs=5, max_tokens=6, ignore_eos=True)
    asked.answer()
    for token in asked.tokens:
        assert len(token.alternatives) == 5
        assert token.alternatives[0][0] == token.id  # greedy
        assert token.alternatives[0][1] == pytest.approx(token.logprob, abs=1e-5)
        logprobs = [logprob for _, logprob in token.alternatives]
        assert logprobs == sorted(logprobs, reverse=True)


def test_a_prompt_that_is_known_is_not_computed_again(small):
    engine, vl2 = small

    def reused(**changes):
        asked = Asked(engine, vl2, changes.pop("conversation", conversation(13)), max_tokens=3, **changes)
        asked.answer()
        return next(event for event in asked.events if isinstance(event, Started)).reused_tokens

    changed = conversation(13)
    changed[0]["images"] = [str(GOLDENS / "images" / "tall.png")]
    assert len(vl2.processor.encode(open_answer(conversation(13)))) > 128
    assert reused(salt="own") == 0
    assert reused(salt="own") >= 128
    assert reused(salt="another's") == 0
    assert reused(salt="own", conversation=changed) == 0


def test_a_cancelled_request_gives_back_what_it_holds(small):
    engine, vl2 = small
    before = engine.load.pages_used
    running = threading.Event()
    asked = Asked(
        engine, vl2, conversation(5), max_tokens=700, ignore_eos=True,
        on_event=lambda event: running.set() if isinstance(event, Piece) else None,
    )  # fmt: skip
    assert running.wait(60)
    assert engine.load.pages_used > before
    asked.submission.cancel()
    assert asked.last(10).answer.finish_reason == "cancelled"
    assert len(asked.tokens) < 700
    assert engine.load.pages_used == before
    asked.submission.cancel()  # nothing happens


def test_requests_of_all_ends_leave_no_page_behind(small):
    engine, vl2 = small
    chosen = random.Random(3)
    for _ in range(6):
        asked = [
            Asked(engine, vl2, conversation(n), max_tokens=40, ignore_eos=True) for n in chosen.sample(range(40), 4)
        ]
        for one in asked[::2]:
            time.sleep(chosen.random() * 0.05)
            one.submission.cancel()
        for one in asked:
            one.last()
    load = engine.load
    assert (load.running, load.waiting, load.pages_used) == (0, 0, 0)


def test_a_listener_that_raises_ends_its_own_request_alone(small):
    engine, vl2 = small

    def broken(event):
        raise RuntimeError("of the listener")

    asked = Asked(engine, vl2, conversation(2), max_tokens=300, ignore_eos=True, on_event=broken)
    other = Asked(engine, vl2, conversation(1), max_tokens=10)
    assert other.answer().token_ids == vl2.generate(conversation(1), max_tokens=10)[0].token_ids
    assert asked.last().answer.finish_reason == "cancelled"


@pytest.mark.parametrize("where", ["prefill_chunk", "begin", "decode", "encode_some"])
@pytest.mark.parametrize("loses_memory", [False, True])
def test_a_step_that_fails_harms_only_whom_it_concerns(small, monkeypatch, where, loses_memory):
    """Also where the device has given up the memory that the failed program was to update."""
    from vl2_jax.serving import device as chapter

    engine, vl2 = small
    expected = {n: vl2.generate(conversation(n), max_tokens=15, ignore_eos=True)[0].token_ids for n in (1, 2, 3)}
    place = programs if where in ("begin", "decode") else chapter
    real, failures = getattr(place, where), []

    def failing(*arguments, **named):
        if not failures:
            failures.append(where)
            if loses_memory:
                for layer in engine._device.cache:
                    layer[0].delete()
            raise RuntimeError("the device says no")
        return real(*arguments, **named)

    engine._device.tiles.forget()
    monkeypatch.setattr(place, where, failing)
    options = {"max_tokens": 15, "ignore_eos": True, "salt": f"{where} {loses_memory}"}  # so that all is computed
    asked = {n: Asked(engine, vl2, conversation(n), **options) for n in (1, 2, 3)}
    ends = {n: one.last() for n, one in asked.items()}
    assert failures
    failed = [n for n, end in ends.items() if isinstance(end, Failed)]
    assert len(failed) <= 1
    for n, end in ends.items():
        if n not in failed:
            assert end.answer.token_ids == expected[n], n
    assert engine.load.pages_used == 0


def test_more_than_may_wait_is_refused_before_anything_is_computed(small):
    engine, vl2 = small
    running = [Asked(engine, vl2, conversation(0), max_tokens=400, ignore_eos=True) for _ in range(3)]
    waiting = []

    def ask_on():
        while True:
            waiting.append(Asked(engine, vl2, conversation(0), max_tokens=5))

    with pytest.raises(OverloadedError, match="requests wait already; try again in") as error:
        ask_on()
    assert error.value.retry_after >= 1
    assert len(waiting) == 8
    for one in running:
        one.submission.cancel()
    assert all(one.answer().token_ids for one in waiting)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"top_logprobs": 21}, RequestError, "top_logprobs is 21; expected 0 to 20"),
        ({"boxes_on": 7}, RequestError, "boxes_on is 7"),
    ],
)
def test_what_can_never_be_answered_is_refused_at_the_door(small, changes, error, message):
    engine, vl2 = small
    prompt = vl2.processor.encode(open_answer(conversation(1)))
    with pytest.raises(error, match=message):
        engine.submit(Request(prompt, SamplingOptions(), **changes), print)


def test_a_prompt_beyond_the_context_is_refused_at_the_door(small):
    engine, vl2 = small
    long = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(ContextLengthError, match="the context holds 1024"):
        Asked(engine, vl2, long)


def test_an_engine_that_drains_ends_what_runs_and_takes_nothing_on(models):
    vl2 = models("nano-small")
    with Engine(vl2, LIMITS) as engine:
        ends = Asked(engine, vl2, conversation(0), max_tokens=30, ignore_eos=True)
        never = Asked(engine, vl2, conversation(4), max_tokens=100_000, ignore_eos=True)
        never_limit = never
        engine.drain(0.5)
        assert engine.stage.name == "draining"
        assert len(ends.answer().token_ids) == 30
        assert never_limit.last().answer.finish_reason in ("cancelled", "length")
        with pytest.raises(ClosedError, match="draining and takes nothing on"):
            Asked(engine, vl2, conversation(0))


def test_closing_ends_what_is_in_the_engine(models):
    vl2 = models("nano-small")
    engine = Engine(vl2, LIMITS)
    asked = [Asked(engine, vl2, conversation(0), max_tokens=400, ignore_eos=True) for _ in range(3)]
    engine.close()
    assert any(isinstance(one.last(), Failed) and isinstance(one.last().error, ClosedError) for one in asked)


def test_an_engine_that_cannot_go_on_says_so_and_ends_everyone(models, monkeypatch, caplog):
    """A step lost the memory of the device, and there is no more of it."""
    from vl2_jax.serving import device as chapter

    def no_memory(*_):
        raise RuntimeError("the device has no memory")

    vl2 = models("nano-small")
    with Engine(vl2, LIMITS) as engine:

        def lost(*_):
            engine._device.cache[0][0].delete()
            no_memory()

        monkeypatch.setattr(chapter, "prefill_chunk", lost)
        monkeypatch.setattr(programs, "empty", no_memory)
        with engine._changed:
            asked = [Asked(engine, vl2, conversation(0), max_tokens=5) for _ in range(3)]
        assert all(isinstance(one.last(20), Failed) for one in asked)
        assert engine.stage.name == "failed"
        with pytest.raises(ClosedError, match="the engine is failed and takes nothing on"):
            Asked(engine, vl2, conversation(0))
        engine.drain(5)
    assert "the engine has failed" in caplog.text


@pytest.mark.parametrize("limits", [Limits(max_running=0), Limits(pages=1), Limits(max_waiting=-1)])
def test_limits_that_serve_nobody_are_refused(models, limits):
    with pytest.raises(RequestError, match="cannot serve anybody"):
        Engine(models("nano-small"), limits)


@pytest.mark.parametrize(("family", "mesh"), [("nano-tiny", "data=4,tensor=2"), ("nano-small", "expert=8")])
def test_a_mesh_of_devices_answers_as_one_device_does(first_layers, models, family, mesh):
    spread = vl2_jax.load(first_layers(family), dtype="float32", chunk_size=48, mesh=mesh)
    limits = Limits(max_running=2, context=512)
    with Engine(spread, limits) as engine:
        asked = [Asked(engine, spread, conversation(n), max_tokens=8, ignore_eos=True) for n in (1, 2, 3)]
        answers = [one.answer() for one in asked]
        assert engine.load.compilations == 0
    for n, answer in zip((1, 2, 3), answers):
        (alone,) = models(family).generate(conversation(n), max_tokens=8, ignore_eos=True)
        assert answer.token_ids == alone.token_ids
