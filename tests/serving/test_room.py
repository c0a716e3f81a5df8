"""What fits is told before anything is loaded, with the number that does."""

from pathlib import Path

import pytest

from vl2_jax.config import VL2Config
from vl2_jax.errors import RequestError
from vl2_jax.model.decoder import page_bytes
from vl2_jax.serving.requests import Limits
from vl2_jax.serving.room import pages_for
from vl2_jax.weights import stored_and_computed

TINY = VL2Config.preset("vl2-tiny")
WEIGHTS, _ = stored_and_computed(Path("nowhere"), TINY, "float32", None)
PAGE_BYTES = page_bytes(TINY.language_config, "float32")


def test_sizes_are_those_of_the_model():
    assert pytest.approx(4 * 3.37e9, rel=0.01) == WEIGHTS
    assert PAGE_BYTES == 128 * 12 * 2 * 1280 * 4
    eight_bits = page_bytes(TINY.language_config, "float32", "int8")
    assert eight_bits == 128 * 12 * 2 * 10 * (128 + 4)  # a byte a number, and a scale of each head's row
    narrow, computed = stored_and_computed(Path("nowhere"), TINY, None, "int4")
    assert narrow == pytest.approx(3.0e9, rel=0.02)
    assert computed == "float32"


def test_the_cache_takes_what_all_requests_need_and_no_more():
    assert pages_for(TINY, WEIGHTS, "float32", Limits(max_running=2), memory=10**12, platform="cpu") == 1 + 2 * 32
    assert (
        pages_for(TINY, WEIGHTS, "float32", Limits(max_running=2, context=1000), memory=10**12, platform="cpu")
        == 1 + 2 * 8
    )


def test_the_cache_takes_a_share_of_what_the_weights_leave():
    memory = WEIGHTS + 4 * 101 * PAGE_BYTES
    assert pages_for(TINY, WEIGHTS, "float32", Limits(max_running=64), memory=memory, platform="cpu") == 1 + 100
    assert pages_for(TINY, WEIGHTS, "float32", Limits(max_running=64), "int8", memory, "cpu") == 101 * 512 // 132


@pytest.mark.parametrize(
    ("limits", "pages", "message"),
    [
        (Limits(), 20, r"a request of 4096 positions takes 0\.5 GB of cache, .* 2560 positions fit"),
        (Limits(max_running=50, context=256), 20, "50 requests at once need a page each; the memory holds 20 pages"),
        (Limits(pages=100), 20, "100 pages do not fit into the memory beside the weights; 20 do"),
        (Limits(), -1000, "0 positions fit"),
    ],
)
def test_more_than_memory_holds_is_refused_with_the_number_that_fits(limits, pages, message):
    memory = WEIGHTS + 4 * (pages + 1) * PAGE_BYTES
    with pytest.raises(RequestError, match=message):
        pages_for(TINY, WEIGHTS, "float32", limits, memory=memory, platform="cpu")
