from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.server.state.granules import LEVELS_MAX, after_prefix, directories, directory_of, granule_hash

paths = st.text(alphabet="ab/\U0010ffff", max_size=50)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a", [""]),
        ("a/b", ["", "a/"]),
        ("a/b/", ["", "a/", "a/b/"]),
        ("/a", ["", "/"]),
        ("a//b", ["", "a/", "a//"]),
        ("x/" * 40, ["x/" * n for n in range(LEVELS_MAX)]),
    ],
)
def test_a_key_lies_in_every_directory_above_it(key, expected):
    assert directories(key) == expected


@pytest.mark.parametrize(
    ("prefix", "expected"), [("", ""), ("a", ""), ("a/", "a/"), ("a/b", "a/"), ("x/" * 40, "x/" * 15)]
)
def test_a_prefix_reads_the_directory_that_it_is_cut_to(prefix, expected):
    assert directory_of(prefix) == expected


@given(paths, paths)
def test_every_key_under_a_prefix_touches_the_directory_that_the_prefix_reads(prefix, rest):
    assert directory_of(prefix) in directories(prefix + rest)


@given(paths, paths)
def test_the_range_of_a_prefix_is_exactly_what_begins_with_it(prefix, key):
    end = after_prefix(prefix)
    assert (prefix <= key and (end is None or key < end)) == key.startswith(prefix)


def test_the_hash_of_a_granule_is_the_same_everywhere():
    assert granule_hash("service:web") == 0x61D3186788214B99
    assert granule_hash("service:web") != granule_hash("service:web2")
