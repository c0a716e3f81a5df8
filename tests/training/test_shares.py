"""Samples are shared out so that however often the number of processes changes, none is lost and none is read twice."""

import grain
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl2_jax.training.shares import Rest, ShareDataset


def shares_of(total, rest, count, taken=None):
    order = grain.MapDataset.range(total)
    return [ShareDataset(order, rest, share, count, (taken or [0] * count)[share]) for share in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 60))
def test_what_several_numbers_of_processes_take_is_everything_once(data, total):
    rest, had = Rest(), []
    for count in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)):
        shares = shares_of(total, rest, count)
        taken = [data.draw(st.integers(0, len(share))) for share in shares]
        had += [share[i] for share, number in zip(shares, taken) for i in range(number)]
        rest = rest.after(taken)
        assert rest.length(total) == total - len(had)
    had += [place for share in shares_of(total, rest, 3) for place in share]
    assert sorted(had) == list(range(total))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_share_goes_on_after_what_was_taken_of_it(count):
    whole = [list(share) for share in shares_of(20, Rest((1, 4), 7), count)]
    later = [list(share) for share in shares_of(20, Rest((1, 4), 7), count, [2] * count)]
    assert later == [share[2:] for share in whole]


def test_a_longer_order_begins_with_the_same_shares():
    """Epochs may grow while a run waits."""
    short, long = (shares_of(total, Rest(), 3) for total in (10, 20))
    assert all(list(a) == list(b)[: len(a)] for a, b in zip(short, long))


@pytest.mark.parametrize(("count", "period"), [(2, 2), (4, 2), (2, 4)])
def test_every_process_sees_the_whole_of_an_order_that_repeats_itself(count, period):
    for share in shares_of(800, Rest(), count):
        places = [place % period for place in share]
        # Drawn by lot, 200 or 400 of them: four deviations. Dealt in turn, a process would see half of the places.
        assert all(abs(places.count(p) / len(places) - 1 / period) < 0.13 for p in range(period))
