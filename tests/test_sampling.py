"""The sampling filters equal the recorded ones, and options of any kind are taken or refused in a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import GOLDENS
from vl2_jax.errors import RequestError
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.sampling import Sampler, choose, keep_likeliest, penalise_repetition, with_extras


def test_filters_equal_the_recorded_ones():
    with np.load(GOLDENS / "units" / "sampling.npz") as arrays:
        logits, vocabulary = arrays["logits"], arrays["logits"].shape[1]
        seen = np.zeros(logits.shape, bool)
        np.put_along_axis(seen, arrays["input_ids"], True, axis=1)
        penalised = penalise_repetition(jnp.asarray(logits), jnp.asarray(seen), np.full(len(logits), 1.1, np.float32))
        np.testing.assert_allclose(penalised, arrays["after_repetition_penalty_1_1"], rtol=1e-6)
        heated = penalised / 0.4
        np.testing.assert_allclose(heated, arrays["after_temperature_0_4"], rtol=1e-6)
        kept = keep_likeliest(heated, *options_of(len(logits), vocabulary, 0.9))
        np.testing.assert_allclose(kept, arrays["after_top_p_0_9"], rtol=1e-6)


choosing = jax.jit(choose, static_argnums=4)


def options_of(rows, top_k, top_p):
    return np.full(rows, top_k, np.int32), np.full(rows, top_p, np.float32)


def kept_by_sorting(logits, top_k, top_p):
    """What is kept, said plainly: sort, of equals the lower id first, cut at `top_k`, cut where the mass is reached."""
    kept = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits):
        order = np.argsort(-values, kind="stable")[:top_k]
        mass = np.exp(values[order] - values[order[0]]).astype(np.float64)
        before = np.cumsum(mass) - mass
        kept[row, order[before < top_p * mass.sum()] if top_p < 1 else order] = True
    return kept


def logits_of(kind, rows, size):
    random = np.random.default_rng(size)
    normal = random.normal(size=(rows, size)).astype(np.float32)
    half = random.random((rows, size)) < 0.5
    return {
        "spread": normal,
        "far apart": normal * 100,
        "tied": np.round(normal) + np.float32(0),
        "all alike": np.zeros_like(normal),
        "of both zeros": np.where(half, np.float32(-0.0), np.float32(0)),
        "impossible": np.where(half, -np.inf, normal).astype(np.float32),
        "extreme": np.where(half, -3e38, normal).astype(np.float32),
    }[kind]


KINDS = ("spread", "far apart", "tied", "all alike", "of both zeros", "impossible", "extreme")


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_keep_what_sorting_keeps(kind):
    keep = jax.jit(keep_likeliest)
    for size in (7, 1000):
        logits = logits_of(kind, 4, size)
        for top_k in (1, 2, 5, size // 2, size):
            for top_p in (0.05, 0.33, 0.77, 0.9, 0.999, 1.0):
                found = keep(logits, *options_of(4, top_k, top_p))
                expected = kept_by_sorting(logits, top_k, top_p) & (logits > -np.inf)
                np.testing.assert_array_equal(found > -np.inf, expected, err_msg=f"{size} {top_k} {top_p}")
                np.testing.assert_array_equal(np.asarray(found)[expected], logits[expected])


def test_rows_of_a_batch_may_differ_in_every_option():
    logits = logits_of("spread", 4, 64) * 5
    differing = ((0, 0.9, 50, 1.0), (1.0, 0.5, 5, 2.0), (30.0, 1.0, 0, 1.0), (0.3, 0.9, 2, 1.5))
    one = [
        SamplingOptions(temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=penalty, seed=number)
        for number, (temperature, top_p, top_k, penalty) in enumerate(differing)
    ]
    samplers = [Sampler.of(options, 64, 1) for options in one]
    together = Sampler.of_each(one, 64, 1)
    seen = jnp.asarray(np.random.default_rng(1).random((4, 64)) < 0.3)
    step = jnp.arange(4)
    found = choosing(jnp.asarray(logits), together, seen, step, False)[0]
    for row, (options, sampler) in enumerate(zip(one, samplers)):
        part = slice(row, row + 1)
        alone = choosing(jnp.asarray(logits[part]), sampler, seen[part], step[part], options.is_greedy)[0]
        assert found[row] == alone[0]


def test_extras_change_logits_as_they_say():
    logits = np.asarray(logits_of("spread", 1, 64), np.float32)
    options = SamplingOptions(
        presence_penalty=0.5, frequency_penalty=-0.25, logit_bias={3: 7.0, 9: -100, 10**6: 5}, min_tokens=4,
        stop_token_ids=[11],
    )  # fmt: skip
    extras = Sampler.of_each([options], 64, 1, eos=2).extras
    counts = np.zeros((1, 64), np.int32)
    counts[0, [3, 5]] = 1, 4
    expected = logits.copy()
    expected[0, [3, 5, 9]] += 7 - 0.5 + 0.25, -0.5 + 1, -100
    np.testing.assert_allclose(with_extras(logits, extras, counts, np.asarray([4])), expected, rtol=1e-6)
    expected[0, [2, 11]] = -np.inf
    np.testing.assert_allclose(with_extras(logits, extras, counts, np.asarray([3])), expected, rtol=1e-6)


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.1, 0.1, 0.06, 0.04]]))
    options = [
        SamplingOptions(temperature=1, top_p=1, top_k=0, min_p=0.2, repetition_penalty=1, seed=s) for s in range(200)
    ]
    rows = jnp.tile(logits, (200, 1))
    counts, step = jnp.zeros(rows.shape, jnp.int32), jnp.zeros(200, jnp.int32)
    found = choosing(rows, Sampler.of_each(options, 6, 1), rows > 0, step, False, counts)[0]
    assert set(np.asarray(found).tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("stop", "stops"), [("yellow", ("yellow",)), (None, ()), (["a", "b"], ("a", "b")), ((), ()), ({"a"}, ("a",))]
)
def test_one_string_is_one_stop_string_and_none_is_none(stop, stops):
    assert SamplingOptions(stop=stop).stops == stops


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": None}, {"max_tokens": 0}, {"max_tokens": 2.0}, {"max_tokens": True}, {"max_tokens": "5"},
        {"temperature": None}, {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
        {"temperature": 10**400}, {"temperature": "warm"}, {"temperature": 1j},
        {"top_p": 0}, {"top_p": 1.5}, {"top_p": None}, {"top_p": float("nan")}, {"top_p": 1e-50},
        {"top_k": -1}, {"top_k": 0.5}, {"top_k": None},
        {"presence_penalty": 2.1}, {"frequency_penalty": None}, {"min_p": 1.1}, {"min_tokens": 513}, {"min_tokens": -1},
        {"logit_bias": {1: 101}}, {"logit_bias": {"a": 1}}, {"logit_bias": {-1: 1}}, {"logit_bias": [1]},
        {"stop_token_ids": [-1]}, {"stop_token_ids": "1"}, {"stop_token_ids": [1] * 9}, {"stop_token_ids": 7},
        {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"repetition_penalty": float("inf")},
        {"repetition_penalty": 1e-39}, {"repetition_penalty": "no"},
        {"seed": 2**63}, {"seed": -(2**63) - 1}, {"seed": 1.5}, {"seed": "one"}, {"seed": [1, None]}, {"seed": True},
        {"ignore_eos": None}, {"ignore_eos": 1},
        {"stop": ""}, {"stop": [""]}, {"stop": [1]}, {"stop": b"x"}, {"stop": 5}, {"stop": [["x"]]}, {"stop": "x" * 0},
    ],
    ids=repr,
)  # fmt: skip
def test_options_of_another_kind_or_range_are_refused_by_name(options):
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingOptions(**options)


def test_an_unknown_option_is_told_with_the_one_that_is_meant():
    with pytest.raises(RequestError, match="did you mean 'max_tokens'"):
        SamplingOptions.of({"max_token": 5})


def test_numbers_of_numpy_are_numbers():
    options = SamplingOptions(max_tokens=np.int64(3), temperature=np.float32(0.5), top_k=np.uint8(4), seed=np.arange(2))
    assert (options.max_tokens, options.temperature, options.top_k) == (3, 0.5, 4)
    assert options.seeds(2) == [0, 1]


def chosen(logits, rows=4, **options):
    sampler = Sampler.of(SamplingOptions(**options), logits.shape[-1], rows)
    many = jnp.broadcast_to(logits, (rows, logits.shape[-1]))
    is_greedy = SamplingOptions(**options).is_greedy
    return choosing(many, sampler, jnp.zeros(many.shape, bool), jnp.zeros(rows, jnp.int32), is_greedy)[0].tolist()


LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=64).astype(np.float32) * 20)


@pytest.mark.parametrize("temperature", [0, 1e-45, 1e-39, 1e-38, 2e-38, 1e-30, 1e-10])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature):
    assert chosen(LOGITS, temperature=temperature, seed=1) == [int(LOGITS.argmax())] * 4


def test_no_number_of_top_k_is_too_large():
    assert chosen(LOGITS, temperature=1.0, top_k=2**40, seed=5) == chosen(LOGITS, temperature=1.0, top_k=0, seed=5)


def test_rows_of_a_batch_have_seeds_of_their_own():
    flat = jnp.zeros(64)
    batch = chosen(flat, rows=8, temperature=1.0, top_p=1.0, top_k=0, seed=7)
    assert len(set(batch)) > 4
    alone = [chosen(flat, rows=1, temperature=1.0, top_p=1.0, top_k=0, seed=7 + row)[0] for row in range(8)]
    assert batch == alone
    assert batch == chosen(flat, rows=8, temperature=1.0, top_p=1.0, top_k=0, seed=list(range(7, 15)))


def test_seeds_that_differ_in_their_upper_half_alone_are_different_seeds():
    seeds = [3, 3 + 2**32, 3 + 2**40, 3 - 2**40, -(2**63), 2**63 - 1]
    assert len({tuple(row) for row in Sampler.of(SamplingOptions(seed=seeds), 64, 6).seeds.tolist()}) == 6


def test_without_a_seed_there_are_new_numbers_each_time():
    flat = jnp.zeros(64)
    drawn = [chosen(flat, rows=8, temperature=1.0, top_p=1.0, top_k=0) for _ in range(3)]
    assert len({tuple(row) for row in drawn}) == 3


def test_another_number_of_seeds_than_rows_is_refused():
    with pytest.raises(RequestError, match="2 seeds were given for 3 answers"):
        Sampler.of(SamplingOptions(seed=(1, 2)), 64, 3)
