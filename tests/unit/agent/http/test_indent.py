"""`?pretty`, against Python's own indentation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.agent.http.indent import TOKENS, indented

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(value=VALUES, compact=st.booleans(), ascii_only=st.booleans())
def test_what_is_indented_is_what_python_writes(value: Any, compact: bool, ascii_only: bool) -> None:
    body = json.dumps(value, separators=(",", ":") if compact else None, ensure_ascii=ascii_only).encode()
    pretty = json.dumps(value, indent=4, ensure_ascii=ascii_only).encode() + b"\n"
    assert b"".join(indented(body)) == pretty


def test_a_large_body_comes_in_small_pieces() -> None:
    value = [{"Key": f"k{n}", "Flags": n, "Value": "eA=="} for n in range(2000)]
    pieces = list(indented(json.dumps(value).encode()))
    assert len(pieces) > 100
    assert max(piece.count(b'"') for piece in pieces) <= 2 * TOKENS
    assert json.loads(b"".join(pieces)) == value


@pytest.mark.parametrize("body", [b"[ ]", b"{ \n}", b'[{}, [] ,{"a":[]}]'])
def test_empty_lists_and_maps_stay_on_their_line(body: bytes) -> None:
    assert b"".join(indented(body)).decode() == json.dumps(json.loads(body), indent=4) + "\n"
