"""Options of any kind are taken, or refused by a `RequestError` that is short."""

from decimal import Decimal
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
from hypothesis import example, given, settings

from vl2_jax.errors import RequestError
from vl2_jax.inference.options import SamplingOptions
from vl2_jax.inference.sampling import Sampler

NAMES = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "ignore_eos", "stop")
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4),
    st.integers(1000, 2000).map("x".__mul__), st.complex_numbers(), st.just(Decimal("0.5")), st.just(Fraction(1, 3)),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**400, 1e-38, 5e-324, np.float16(0.3), np.int8(3), np.nan]),
    st.just(np.zeros(3)), st.just(np.arange(2)), st.just(object()), st.just(range(3)),
)  # fmt: skip
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.sets(st.text(max_size=3))))
OPTIONS = st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=6)), VALUES, max_size=3)


@settings(max_examples=2000, deadline=None)
@given(OPTIONS, st.integers(1, 4))
@example({"temperature": 10**400}, 1)  # too large for a float, which is drawn in few runs
def test_whatever_is_asked_for_is_taken_or_refused_in_a_sentence(options, rows):
    told = ""
    try:
        taken = SamplingOptions.of(options)
        sampler = Sampler.of(taken, 64, rows)
    except RequestError as error:
        told = str(error)
    assert len(told) < 400
    if told:
        return
    assert options.keys() <= set(NAMES)
    numbers = (sampler.temperature, sampler.top_p, sampler.top_k, sampler.penalty)
    assert all(np.isfinite(number).all() for number in numbers)
    assert sampler.seeds.shape == (rows, 2)
    assert all(isinstance(stop, str) and stop for stop in taken.stops)
