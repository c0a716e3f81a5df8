"""Memory goes back to the system."""

import platform

import jax
import jax.numpy as jnp
import psutil
import pytest

from vl2_jax import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")

_MB = 1 << 20


@pytest.fixture
def freed():
    """100 MB in small pieces, of which every fiftieth is still in use: glibc keeps all of it."""
    pieces = [bytearray(20_000) for _ in range(5_000)]
    kept = pieces[::50]
    del pieces
    yield
    del kept


def held():
    return psutil.Process().memory_info().rss


def test_what_was_freed_between_what_is_used_goes_back(freed):
    before = held()
    heap.give_back()
    assert before - held() > 60 * _MB


def test_a_compilation_gives_back_what_it_leaves(freed, monkeypatch):
    heap.give_back_after_compiling()
    heap.give_back_after_compiling()  # a second model
    numbers = jnp.ones(17)
    jax.jit(jnp.cos).lower(numbers).compile()  # the compiler has its own memory from here on
    monkeypatch.setattr(heap, "_LONG_ENOUGH", 0)
    before = held()
    jax.jit(jnp.sin).lower(numbers).compile()
    assert before - held() > 60 * _MB


def test_where_there_is_no_such_function_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_trim", lambda: None)
    heap.give_back()
