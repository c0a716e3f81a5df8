"""Greedy answers equal the released code's, token by token, for every recorded case."""

import functools
from functools import partial

import jax
import numpy as np
import pytest

import vl2_jax
from tests.conftest import CASES, CONFIGS, GOLDENS, load_case, with_pictures
from vl2_jax.config import read_config
from vl2_jax.inference.generate import DecodeState, Generator, decode_steps
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.prefill import empty_cache, prefill_chunk
from vl2_jax.inference.sampling import Sampler
from vl2_jax.model.vl2 import VL2Model, init_params

INFERENCE_CASES = [(config, case) for config, case in CASES if not case.startswith("train")]


@functools.cache
def released(config):
    vl2 = vl2_jax.load(GOLDENS / config, dtype="float32", chunk_size=64)
    vl2.processor = vl2.processor.replace(as_released=True)
    return vl2


@pytest.mark.parametrize(("config", "case"), INFERENCE_CASES)
def test_greedy_tokens_equal_the_recorded_ones(config, case):
    info, arrays = load_case(config, case)
    conversations = [with_pictures(c) for c in info["conversations"]]
    answers = released(config).generate(conversations, max_tokens=16, ignore_eos=True)
    assert [a.token_ids for a in answers] == arrays["gen_tokens"].tolist()
    assert all(len(a.logprobs) == 16 for a in answers)


@pytest.mark.parametrize("config", ["nano-tiny", "nano-small", "nano-base"])
def test_a_batch_gives_each_row_what_the_row_gives_alone(config):
    info, _ = load_case(config, "batch3")
    conversations = [with_pictures(c) for c in info["conversations"]]
    options = {"max_tokens": 8, "ignore_eos": True, "temperature": 0.7}
    together = released(config).generate(conversations, seed=3, **options)
    alone = [released(config).generate(c, seed=3 + row, **options)[0] for row, c in enumerate(conversations)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    np.testing.assert_allclose([a.logprobs for a in together], [a.logprobs for a in alone], atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS)
def test_chunks_of_seven_give_the_recorded_last_logits(config):
    """`chunk7_consistent_last_logits` where the batch is padded, `chunk7_last_logits` elsewhere; both in float32."""
    vl2 = released(config)
    generator = Generator(vl2.model, vl2.params, vl2.processor.tokenizer, chunk_size=7)
    for case, key in (("ground_one", "chunk7_last_logits"), ("batch3", "chunk7_consistent_last_logits")):
        info, arrays = load_case(config, case)
        prompts = [vl2.processor.encode(with_pictures(c)) for c in info["conversations"]]
        hidden, _ = generator.prefill(prompts, capacity=256)
        logits = vl2.model.apply({"params": vl2.params}, hidden, method="logits")
        np.testing.assert_allclose(logits, arrays[key], atol=2e-4, rtol=0)


@pytest.mark.parametrize("config", ["nano-tiny", "nano-small"])
def test_a_chat_reuses_its_cache_and_answers_as_if_it_had_none(config):
    vl2 = released(config)
    picture = str(GOLDENS / "images" / "square.png")
    chat = vl2.chat()
    first = chat.ask("<image>\nWhat is this?", [picture], max_tokens=5)
    second = chat.ask("Are you sure?", max_tokens=8, ignore_eos=True)
    assert second.timings.reused_tokens >= first.prompt_tokens
    (fresh,) = vl2.generate([*chat.messages[:-1]], max_tokens=8, ignore_eos=True)
    assert second.token_ids == fresh.token_ids


def test_streamed_text_is_the_answer():
    vl2 = released("nano-tiny")
    pieces = []
    turns = [{"role": "user", "content": "Tell me everything."}]
    (answer,) = vl2.generate(turns, max_tokens=40, on_text=lambda _, text: pieces.append(text))
    assert "".join(pieces) == answer.text == vl2.processor.tokenizer.decode_answer(answer.token_ids)


def test_a_stop_string_ends_the_answer_before_it():
    vl2 = released("nano-tiny")
    turns = [{"role": "user", "content": "Tell me everything."}]
    (whole,) = vl2.generate(turns, max_tokens=40)
    stop = whole.text[5:8]
    pieces = []
    (cut,) = vl2.generate(turns, max_tokens=40, stop=(stop,), on_text=lambda _, text: pieces.append(text))
    assert cut.text == "".join(pieces) == whole.text[: whole.text.find(stop)]
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(("batch", "kind"), [(1, None), (3, None), (3, "int8")])
@pytest.mark.parametrize("config", ["nano-tiny", "nano-small"])
def test_a_long_cache_is_updated_where_it_lies(config, batch, kind, first_layers):
    """A chunk and a decode step need little memory beside a cache of 256 Ki slots: nothing copies it."""
    config, dtype = read_config(first_layers(config)), "float32"  # in which a CPU computes
    model = VL2Model(config, dtype, dtype, cache_kind=kind)
    params = jax.eval_shape(partial(init_params, config, param_dtype=dtype), jax.random.key(0))
    cache = jax.eval_shape(partial(empty_cache, model, batch, 1 << 18))
    size, vocabulary = config.language_config.hidden_size, config.language_config.vocab_size
    ids, numbers = np.zeros((batch, 64), np.int32), np.zeros(batch, np.int32)
    table, hidden = np.zeros((32, config.tokens_per_tile, size), dtype), np.zeros((batch, size), dtype)
    chunk = prefill_chunk.lower(model, params, ids, ids, table, cache, hidden, np.int32(0), numbers)
    state = DecodeState(cache, numbers, numbers, numbers, numbers > 0, np.zeros((batch, vocabulary), bool))
    sampler = Sampler.of(SamplingOptions(), vocabulary, batch)
    steps = decode_steps.lower(model, params, state, numbers > 0, np.int32(1), sampler, numbers, True)
    one_array = cache[0][1].size * cache[0][1].dtype.itemsize
    for program in (chunk, steps):
        assert program.compile().memory_analysis().temp_size_in_bytes < one_array
