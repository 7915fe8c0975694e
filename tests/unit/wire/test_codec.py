from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.wire.codec import Unknown, Vocabulary, decode_row, encode_value
from rostra.wire.errors import BadRequest
from rostra.wire.frames import pack, unpack


@dataclass(frozen=True, slots=True)
class Write:
    kind: ClassVar[str] = "test.write"
    key: str
    value: bytes
    count: int = 0
    on: bool = False
    note: str | None = None
    tags: tuple[str, ...] = ()
    pairs: tuple[tuple[str, int], ...] = ()
    meta: dict[str, str] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    service: dict[str, Any] | None = None

    def apply(self, tx: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Ask:
    kind: ClassVar[str] = "test.ask"
    key: str


class Row(NamedTuple):
    name: str
    port: int = 0
    tags: tuple[str, ...] = ()
    index: int = 0  # type: ignore[assignment]  # named as in the rows, over tuple.index


VOCABULARY = Vocabulary([Write, Ask])


def test_a_value_becomes_its_kind_and_the_fields_that_are_not_default():
    assert encode_value(Write("a", b"1", note="x")) == ("test.write", {"key": "a", "value": b"1", "note": "x"})
    assert encode_value(Write("a", b"", meta={}, tags=())) == ("test.write", {"key": "a", "value": b""})


@given(
    st.builds(
        Write,
        key=st.text(),
        value=st.binary(),
        count=st.integers(0, 2**64 - 1),
        on=st.booleans(),
        note=st.none() | st.text(),
        tags=st.lists(st.text()).map(tuple),
        pairs=st.lists(st.tuples(st.text(), st.integers(0, 9))).map(tuple),
        meta=st.dictionaries(st.text(), st.text()),
        anything=st.dictionaries(st.text(), st.integers(0, 9) | st.text() | st.none()),
    )
)
def test_a_value_crosses_the_wire_unchanged(value):
    kind, fields = unpack(pack(encode_value(value)))
    assert VOCABULARY.decode(kind, fields) == value


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"key": 7}, "field 'key' must be a string, not int"),
        ({"key": b"a"}, "field 'key' must be a string, not bytes"),
        ({"value": "a"}, "field 'value' must be bytes, not str"),
        ({"count": True}, "field 'count' must be an integer, not bool"),
        ({"count": "1"}, "field 'count' must be an integer, not str"),
        ({"on": 1}, "field 'on' must be true or false, not int"),
        ({"note": 1}, "field 'note' must be a string or nothing, not int"),
        ({"tags": "abc"}, "field 'tags' must be a list, not str"),
        ({"tags": ("a", 1)}, "field 'tags': expected a string, not int"),
        ({"pairs": (("a",),)}, "field 'pairs': expected 2 items, not 1"),
        ({"pairs": (("a", "b"),)}, "field 'pairs': expected an integer, not str"),
        ({"pairs": ("ab",)}, "field 'pairs': expected a list, not str"),
        ({"meta": {"a": 1}}, "field 'meta': expected a string, not int"),
        ({"meta": {1: "a"}}, "field 'meta': expected a string, not int"),
        ({"meta": ()}, "field 'meta' must be a map, not tuple"),
        ({"service": ()}, "field 'service' must be a map or nothing, not tuple"),
    ],
)
def test_a_wrong_type_is_refused_by_the_name_of_its_field(fields, text):
    with pytest.raises(BadRequest) as e:
        VOCABULARY.decode("test.write", {"key": "a", "value": b"", **fields})
    assert str(e.value) == f"test.write: {text}"


def test_a_missing_field_is_refused_by_name():
    with pytest.raises(BadRequest, match=r"^test\.write: missing field key, value$"):
        VOCABULARY.decode("test.write", {"count": 1, "on": True})


def test_a_field_of_a_newer_version_is_ignored_in_a_query_and_refused_in_a_command():
    assert VOCABULARY.decode("test.ask", {"key": "a", "near": "b", 7: 7}) == Ask("a")
    with pytest.raises(Unknown, match="unknown field 'ttl'"):
        VOCABULARY.decode("test.write", {"key": "a", "value": b"", "ttl": 1})


@pytest.mark.parametrize("kind", ["test.other", "", 7, None, ("x",), {}])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(Unknown, match="unknown kind"):
        VOCABULARY.decode(kind, {})


@pytest.mark.parametrize("fields", [None, (), [], "x", 1])
def test_fields_must_be_a_map(fields):
    with pytest.raises(BadRequest, match="must be a map"):
        VOCABULARY.decode("test.ask", fields)


def test_lists_become_tuples():
    value = VOCABULARY.decode("test.write", {"key": "a", "value": b"", "tags": ["a"], "pairs": [["a", 1]]})
    assert (value.tags, value.pairs) == (("a",), (("a", 1),))


def test_two_types_cannot_share_a_kind():
    with pytest.raises(ValueError, match=r"test\.ask"):
        Vocabulary([Ask, Ask])


def test_a_vocabulary_tells_what_it_knows():
    assert "test.ask" in VOCABULARY
    assert list(VOCABULARY) == ["test.write", "test.ask"]
    assert VOCABULARY.get("test.ask") is Ask
    assert VOCABULARY.get("other") is None


def test_a_row_is_made_from_names_and_fixed_fields_win():
    assert decode_row(Row, {"name": "a", "tags": ["x"], "index": 9}, "row", index=3) == Row("a", 0, ("x",), 3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "^row: missing field name$"),
        ({"name": "a", "port": "1"}, "^row: field 'port' must be an integer, not str$"),
        ({"name": "a", "prot": 1}, "^row: unknown field 'prot'$"),
        ({"name": "a", ("x",): 1}, "^row: unknown field"),
        ({"name": "a", "tags": (1,)}, "^row: field 'tags': expected a string, not int$"),
        ((), "^row must be a map, not tuple$"),
    ],
)
def test_a_wrong_row_is_refused_by_the_name_of_its_field(fields, text):
    with pytest.raises(BadRequest, match=text):
        decode_row(Row, fields, "row")
