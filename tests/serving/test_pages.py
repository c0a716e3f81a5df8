"""Pages are never lost, never given to two that do not share them, and known as long as they hold what they did."""

import dataclasses

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from PIL import Image

import vl2_jax
from vl2_jax.api import open_answer
from vl2_jax.ops.paging.pages import PAGE
from vl2_jax.serving.pages import SCRATCH, Beginnings, PagePool, tile_digests
from vl2_jax.serving.pictures import TileTable, tiles_shown


class Pool(RuleBasedStateMachine):
    """Against a model: who holds which page, and what each page holds."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(9)
        self.holders = []
        self.written = {}  # page -> the digest of what it holds

    @rule(count=st.integers(0, 5), wanted=st.lists(st.integers(0, 12), max_size=3, unique=True))
    def take(self, count, wanted):
        digests = [bytes([number]) for number in wanted]
        known = self.pool.known(digests)
        assert [self.written[page] for page in known] == digests[: len(known)]
        new = self.pool.take(count)
        if new is None:
            assert self.pool.available < count
            self.pool.give_back(known)
            return
        assert not set(new) & {page for pages in self.holders for page in pages}
        assert not set(new) & set(known)
        for page in new:
            self.written.pop(page, None)
        self.holders.append(known + new)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 100), number=st.integers(0, 12), place=st.integers(0, 100))
    def fill(self, which, number, place):
        pages = self.holders[which % len(self.holders)]
        fresh = [page for page in pages if page not in self.written]
        if fresh:
            page = fresh[place % len(fresh)]
            self.written[page] = bytes([number])
            self.pool.remember(page, bytes([number]))

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 100))
    def give_back(self, which):
        self.pool.give_back(self.holders.pop(which % len(self.holders)))

    @rule()
    def forget(self):
        self.pool.forget()
        held = {page for pages in self.holders for page in pages}
        self.written = dict.fromkeys(held, b"forgotten")

    @invariant()
    def every_page_is_somewhere(self):
        held = {page for pages in self.holders for page in pages}
        assert SCRATCH not in held
        assert self.pool.used == len(held)
        assert self.pool.available == 8 - len(held)


Pool.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase


def test_a_page_given_back_twice_is_noticed():
    pool = PagePool(3)
    pages = pool.take(1)
    pool.give_back(pages)
    with pytest.raises(ValueError, match="page 1 was given back more often"):
        pool.give_back(pages)


@pytest.fixture(scope="module")
def prompt():
    vl2 = vl2_jax.load("vl2-nano", dtype="float32")
    pixels = np.random.default_rng(0).integers(0, 255, (90, 300, 3), np.uint8)
    message = {"role": "user", "content": "<image>\nWhat? " * 12, "images": [Image.fromarray(pixels)] * 12}
    return vl2.processor.encode(open_answer([message]))


def digests(prompt, tiles=None, root=b"", more=()):
    ids = [*prompt.input_ids.tolist(), *more]
    return Beginnings(root, prompt, tiles or tile_digests(prompt)).reach(ids, len(ids) // PAGE)


def test_beginnings_are_equal_only_where_all_that_feeds_the_model_is(prompt):
    known = digests(prompt)
    assert len(known) >= 3
    assert digests(prompt) == known
    assert digests(prompt, root=b"another") != known
    assert digests(prompt, more=[5] * PAGE)[: len(known)] == known
    ids = prompt.input_ids.copy()
    ids[PAGE + 3] += 1
    one_id = digests(dataclasses.replace(prompt, input_ids=ids))
    assert (one_id[0] == known[0], one_id[1] == known[1], one_id[2] == known[2]) == (True, False, False)
    index = prompt.visual_index.copy()
    shown = np.flatnonzero(index >= 2)[0]
    index[shown] += 1
    assert digests(dataclasses.replace(prompt, visual_index=index))[0] != known[0]
    pixels = prompt.tiles.copy()
    pixels[0, 0, 0, 0] ^= 1
    assert digests(dataclasses.replace(prompt, tiles=pixels))[0] != known[0]


def test_rows_of_a_table_are_those_of_its_tiles(prompt):
    """Tiles are replaced by others in the order in which they were used last."""
    table, own = TileTable(groups=3, devices=2), [bytes([number]) for number in range(len(prompt.tiles))]
    shown = tiles_shown(prompt, 0)
    assert shown == list(range(len(prompt.tiles)))
    wanted = [own[number] for number in shown[:2]]
    assert table.missing(wanted) == wanted
    assert table.place(wanted) == 0
    assert table.place([b"x", b"y"]) == 2
    assert table.missing(wanted) == []
    assert table.place([b"z"]) == 4
    assert table.place([b"w"]) == 2  # x and y were used longest ago
    assert table.missing([b"x", own[0]]) == [b"x"]
    index = table.rows_of(prompt, own)
    same = prompt.visual_index < 2 + 2 * prompt.tokens_per_tile
    np.testing.assert_array_equal(index[same], prompt.visual_index[same])
