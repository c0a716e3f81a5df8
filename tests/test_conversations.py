"""Many callers, one model: every conversation answers as it does alone, and nothing of it is left behind."""

import random
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

import vl2_jax
from vl2_jax.errors import ConversationError, RequestError
from vl2_jax.inference import prefill
from vl2_jax.scenes.drawing import render, sample_scene

THREADS, CONVERSATIONS = 8, 12


@pytest.fixture(scope="module")
def vl2(first_layers):
    return vl2_jax.load(first_layers("nano-small"), dtype="float32")


def picture(seed):
    return render(sample_scene(np.random.default_rng(seed), most_shapes=2, longest_side=112, most_words=1))


def talk(vl2, number):
    """Two turns about a picture; what they say, and which probabilities they had."""
    chat = vl2.chat()
    first = chat.ask("<image>\nWhat do you see?", [picture(number)], max_tokens=6, ignore_eos=True)
    second = chat.ask("What is written here?", max_tokens=3, ignore_eos=True)
    assert second.timings.reused_tokens >= first.prompt_tokens
    return [(a.token_ids, np.round(a.logprobs, 3).tolist()) for a in (first, second)]


def test_conversations_in_threads_answer_as_they_do_alone(vl2):
    alone = [talk(vl2, number) for number in range(CONVERSATIONS)]
    assert len({str(answers) for answers in alone}) > CONVERSATIONS // 2  # they can be told apart

    def caller(seed):
        order = random.Random(seed).sample(range(CONVERSATIONS), CONVERSATIONS)
        return {number: talk(vl2, number) for number in order}

    with ThreadPoolExecutor(THREADS) as pool:
        for answers in pool.map(caller, range(THREADS)):
            assert [answers[number] for number in range(CONVERSATIONS)] == alone


def test_answering_changes_nothing_on_what_was_called(vl2):
    before = dict(vars(vl2)), dict(vars(vl2.generator)), dict(vars(vl2.processor))
    vl2.generate([{"role": "user", "content": "<image>\nWhat?", "images": [picture(0)]}], max_tokens=2)
    after = vars(vl2), vars(vl2.generator), vars(vl2.processor)
    for old, new in zip(before, after):
        assert old.keys() == new.keys()
        assert all(new[name] is old[name] or new[name] == old[name] for name in old if name != "params")
    assert after[0]["params"] is before[0]["params"]


def test_another_conversation_may_be_held_while_text_comes(vl2):
    alone = talk(vl2, 3)
    meanwhile = []
    asked = vl2.chat()

    def on_text(*_):
        if not meanwhile:
            with ThreadPoolExecutor(1) as pool:  # another thread, whose answer is waited for
                meanwhile.append(pool.submit(talk, vl2, 3).result())
            meanwhile.append(talk(vl2, 3))  # and this one

    options = {"max_tokens": 6, "ignore_eos": True}
    answer = asked.ask("<image>\nWhat do you see?", [picture(5)], on_text, **options)
    assert meanwhile == [alone, alone]
    assert answer.token_ids == vl2.chat().ask("<image>\nWhat do you see?", [picture(5)], **options).token_ids


def test_one_conversation_does_not_begin_a_turn_within_a_turn(vl2):
    chat = vl2.chat()
    with pytest.raises(ConversationError, match="is being answered"):
        chat.ask("hello", on_text=lambda *_: chat.ask("again", max_tokens=1), max_tokens=3, ignore_eos=True)
    assert chat.messages == []
    assert chat.ask("hello", max_tokens=1).prompt_tokens


def test_an_interrupted_turn_leaves_the_conversation_as_it_was(vl2):
    chat, fresh = vl2.chat(), vl2.chat()
    first = chat.ask("<image>\nWhat do you see?", [picture(1)], max_tokens=4)
    fresh.ask("<image>\nWhat do you see?", [picture(1)], max_tokens=4)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("What is written here?", on_text=stop, max_tokens=5, ignore_eos=True)
    assert [message["content"] for message in chat.messages] == ["<image>\nWhat do you see?", first.text]
    options = {"max_tokens": 5, "ignore_eos": True}
    expected = fresh.ask("What is written here?", **options).token_ids
    assert chat.ask("What is written here?", **options).token_ids == expected


def bytes_held():
    return sum(array.nbytes for array in jax.live_arrays())


def test_one_cache_at_a_time_and_none_afterwards(vl2, monkeypatch):
    make, held = prefill.empty_cache, []

    def spy(*arguments):
        cache = jax.block_until_ready(make(*arguments))
        held.append((bytes_held(), sum(leaf.nbytes for leaf in jax.tree.leaves(cache))))
        return cache

    monkeypatch.setattr(prefill, "empty_cache", spy)
    questions = [[{"role": "user", "content": f"What colour is {i}?"}] for i in range(4)]
    vl2.generate(questions, max_tokens=2)
    before = bytes_held()
    vl2.generate(questions, max_tokens=2)
    assert bytes_held() == before
    assert held[1] == held[0]
    assert held[0][0] - before < 1.5 * held[0][1]


def test_a_conversation_that_outgrows_its_cache_keeps_the_larger_one_alone(vl2, monkeypatch):
    monkeypatch.setattr(prefill, "_ALWAYS_WHOLE", 0)
    before, chat = bytes_held(), vl2.chat()
    chat.ask("hello", max_tokens=2, ignore_eos=True)
    small = bytes_held() - before
    chat.ask("go on", max_tokens=2 * 256, stop=[chat.messages[-1]["content"][:1] or "a"])
    assert bytes_held() - before == 3 * small


def test_answers_of_one_prompt_differ_and_each_is_that_of_its_seed(vl2):
    turn = [{"role": "user", "content": "<image>\nWhat do you see?", "images": [picture(4)]}]
    options = {"max_tokens": 5, "temperature": 50.0, "top_p": 1.0, "top_k": 0, "ignore_eos": True}
    answers = vl2.generate([turn, turn], n=2, seed=11, **options)
    assert len({tuple(a.token_ids) for a in answers}) == 4
    alone = vl2.generate(turn, seed=13, **options)
    assert answers[2].token_ids == alone[0].token_ids
    np.testing.assert_allclose(answers[2].logprobs, alone[0].logprobs, atol=1e-3)
    assert answers[0].timings.prompt_tokens == 2 * alone[0].prompt_tokens  # each prompt is computed once


def test_conversations_of_one_batch_may_have_options_of_their_own(vl2):
    questions = [[{"role": "user", "content": text}] for text in ("hello", "What colour is it?", "And now?", "Why?")]
    each = [
        {"max_tokens": 3},
        {"temperature": 20.0, "top_p": 1.0, "top_k": 0, "seed": 5},
        {"temperature": 2.0, "top_k": 7, "seed": 8, "ignore_eos": False},
        {"repetition_penalty": 3.0, "stop": "a"},
    ]
    common = {"max_tokens": 6, "ignore_eos": True}
    together = vl2.generate(questions, each=each, **common)
    alone = [vl2.generate(question, **{**common, **own})[0] for question, own in zip(questions, each)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in alone]
    twice = vl2.generate(questions[:2], each=each[:2], n=2, **common)
    assert [twice[0].token_ids, twice[2].token_ids] == [a.token_ids for a in alone[:2]]
    assert twice[2].token_ids != twice[3].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"each": [{}, {}]}, "2 options were given for 1 conversations"),
        ({"each": [{"top_q": 1}]}, "did you mean 'top_"),
        ({"boxes_on": 1}, "boxes_on is 1; the conversation has 1 picture"),
        ({"boxes_on": -2}, "boxes_on is -2"),
        ({"seed": [1, 2]}, "2 seeds were given for 1 answers"),
        ({"max_token": 3}, "did you mean 'max_tokens'"),
    ],
)
def test_a_request_outside_of_its_range_is_one_sentence(vl2, options, message):
    turn = [{"role": "user", "content": "<image>\nWhat?", "images": [picture(0)]}]
    with pytest.raises(RequestError, match=message):
        vl2.generate(turn, **options)
