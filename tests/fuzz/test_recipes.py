"""Whatever a recipe or a change to one holds, it is read or refused in a sentence."""

import dataclasses
import json
import string
from typing import get_type_hints

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vl2_jax.errors import VL2Error
from vl2_jax.training.recipe import Recipe, build_recipe, read_recipe

TABLES = {table: [f.name for f in dataclasses.fields(kind)] for table, kind in get_type_hints(Recipe).items()}
KNOWN = sorted({key for keys in TABLES.values() for key in keys})
KEYS = sorted({f"{table}.{key}" for table, keys in TABLES.items() for key in keys} | set(TABLES) | {"extends", ""})

words = st.text(max_size=20) | st.sampled_from(["bfloat16", "raise", "none", "1e-4", "[", "{", '"""', "\0", "\ud800"])
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**63, 10**400, True, False])
leaves = st.none() | numbers | words | st.dates() | st.binary(max_size=4)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=3
)
keys = st.sampled_from(KEYS) | st.text(string.printable, max_size=12)
tables = st.dictionaries(
    st.sampled_from(sorted(TABLES)) | words,
    st.dictionaries(st.sampled_from(KNOWN) | words, values, max_size=4) | values,
    max_size=3,
)
changes = st.lists(
    st.builds("{}={}".format, keys, words | numbers.map(str) | values.map(repr)) | st.text(max_size=30), max_size=3
)
contents = (
    st.binary(max_size=60)
    | tables.map(lambda t: json.dumps(t, default=str).encode())
    | words.map(lambda word: word.encode(errors="surrogatepass"))
)
MANY = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))


def refused_in_a_sentence(read):
    told = ""
    try:
        assert isinstance(read(), Recipe)
    except VL2Error as error:
        told = str(error)
    assert len(told) < 1500
    assert told.isprintable(), told


@MANY
@given(tables)
def test_tables_are_built_or_refused(data):
    refused_in_a_sentence(lambda: build_recipe(data))


@MANY
@given(changes)
@example(["loop.steps=" + "9" * 5000])
@example(["model.path=" + "x" * 5000])
@example(["data.sources=" + "[" * 5000])
@example(["a" + ".a" * 5000 + "=1"])
def test_changes_are_laid_over_or_refused(changes):
    refused_in_a_sentence(lambda: read_recipe("sft-nano", changes))


@settings(MANY, max_examples=300)
@given(contents)
@example(b"extends = 3")
@example(b'extends = "\\u0000"')
@example(b"a = " + b"[" * 5000)
@example(b"a = " + b"9" * 5000)
def test_files_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    refused_in_a_sentence(lambda: read_recipe(path))


@pytest.mark.parametrize("name", ["\0", "a" * 5000, "\ud800", ".", ""])
def test_names_that_no_file_can_have_are_refused(name):
    refused_in_a_sentence(lambda: read_recipe(name))
