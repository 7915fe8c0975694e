"""HCL1 and JSON text → data with positions."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rostra.agent.hcl import SyntaxProblem, parse_hcl, parse_json

TYPICAL = """
# an agent
datacenter = "dc1"
data_dir = "/var/lib/rostra"   // where it keeps things
/* two servers
   and a half */
ports { dns = 53, http = 8500 }
retry_join = ["10.0.0.1", "10.0.0.2",]
service {
  name = "web" port = 80
  tags = ["a", "b"]
  check { http = "http://127.0.0.1/health" interval = "10s" }
  connect { sidecar_service { proxy { upstreams = [ { destination_name = "api", local_bind_port = 9000 } ] } } }
}
service { name = "api" port = 81 }
"""


def test_a_typical_file_becomes_plain_data() -> None:
    assert parse_hcl(TYPICAL).value == {
        "datacenter": "dc1",
        "data_dir": "/var/lib/rostra",
        "ports": {"dns": 53, "http": 8500},
        "retry_join": ["10.0.0.1", "10.0.0.2"],
        "service": [
            {
                "name": "web",
                "port": 80,
                "tags": ["a", "b"],
                "check": {"http": "http://127.0.0.1/health", "interval": "10s"},
                "connect": {
                    "sidecar_service": {"proxy": {"upstreams": [{"destination_name": "api", "local_bind_port": 9000}]}}
                },
            },
            {"name": "api", "port": 81},
        ],
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a = 1", 1),
        ("a = -0x1F", -31),
        ("a = 010", 8),
        ("a = 1.5e3", 1500.0),
        ("a = -2.25", -2.25),
        ("a = true", True),
        ('a = "q\\"\\\\\\n\\u00e9\\x41"', 'q"\\\né' + "A"),
        ('a = "${ f("x") } and { }"', '${ f("x") } and { }'),
        ("a = <<EOF\none\n  two\nEOF", "one\n  two\n"),
        ("a = <<-EOF\n    one\n      two\n    EOF\n", "one\n  two\n"),
        ("a = <<-EOF\n one\n    EOF\n", " one\n"),
        ("a = []", []),
        ("a = [1, 2,]", [1, 2]),
        ("a = [[1], {b = 2}]", [[1], {"b": 2}]),
        ("a {}", {}),
        ('"a" = {"b c" = 1}', {"b c": 1}),
        ('a "label" { b = 1 }', {"label": {"b": 1}}),
        ('a "x" "y" { b = 1 }', {"x": {"y": {"b": 1}}}),
        ('a "x" {} a "y" {}', [{"x": {}}, {"y": {}}]),
        ("a { b = 1 } a = [{ b = 2 }] a { b = 3 }", [{"b": 1}, {"b": 2}, {"b": 3}]),
        ("a {\r\n b = 1\r\n}\r\n", {"b": 1}),
        ("\ufeffa = 1", 1),
    ],
)
def test_hcl_values(text: str, value: Any) -> None:
    assert parse_hcl(text).value == {"a": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = \nb = 2", "x.hcl:2:1: expected a value for 'a', found 'b'"),
        ("a = foo", "x.hcl:1:5: the value of 'a' needs quotes: \"foo\""),
        ("ports {\n  dns = 53\n", "x.hcl:3:1: expected '}' to close the block opened in line 1, found end of file"),
        ("a = [1,\n 2", "x.hcl:2:3: expected ',' or ']' in the list 'a', found end of file"),
        ("a = [1,\n", "x.hcl:2:1: expected ']' to close the list opened in line 1, found end of file"),
        ("a = [1 2]", "x.hcl:1:8: expected ',' or ']' in the list 'a', found '2'"),
        ('\n\n  a = "b\n', "x.hcl:3:7: string not closed: '\"' is missing at the end of the line"),
        ("a = 12ab", "x.hcl:1:5: unexpected character '1'"),
        ("a b = 1", "x.hcl:1:5: expected '{' after the labels of 'a', found '='"),
        ("a\n}", "x.hcl:2:1: expected '=' or '{' after 'a', found '}'"),
        ("a = 1 }", "x.hcl:1:7: expected a key, found '}'"),
        ("/* a", "x.hcl:1:1: comment not closed: '*/' is missing"),
        ("a = <<EOF\nx\n", "x.hcl:1:5: heredoc not closed: no line holds EOF alone"),
        ('a = "\\q"', "x.hcl:1:6: unknown escape '\\q' in a string"),
        ("a = " + "[" * 200, "x.hcl:1:105: nested more than 100 levels deep"),
    ],
)
def test_hcl_errors_name_line_and_column(text: str, message: str) -> None:
    with pytest.raises(SyntaxProblem) as e:
        parse_hcl(text, "x.hcl")
    assert str(e.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "x.json:1:8: a comma after the last entry is not JSON"),
        ('{"a" 1}', "x.json:1:6: expected ':' after the key 'a', found '1'"),
        ('{"a": 1\n "b": 2}', "x.json:2:2: expected ',' or '}' after the value of 'a', found \"b\""),
        ('{"a": [1 2]}', "x.json:1:10: expected ',' or ']' in the list, found '2'"),
        ("{a: 1}", "x.json:1:2: unexpected character 'a'"),
        ('{"a": }', "x.json:1:7: expected a value, found '}'"),
        ('{"a": "b', "x.json:1:7: string not closed: '\"' is missing at the end of the line"),
        ('{"a": 1', "x.json:1:8: expected ',' or '}' after the value of 'a', found end of file"),
        ("[1]", "x.json:1:1: expected an object that starts with '{', found '['"),
        ("", "x.json:1:1: expected an object that starts with '{', found end of file"),
        ("{} 1", "x.json:1:4: nothing may follow the object, found '1'"),
    ],
)
def test_json_errors_name_line_and_column(text: str, message: str) -> None:
    with pytest.raises(SyntaxProblem) as e:
        parse_json(text, "x.json")
    assert str(e.value) == message


def test_keys_and_items_know_where_they_stand() -> None:
    document = parse_hcl('a = 1\nservice {\n  name = "x"\n}\n  service { tags = ["p",\n "q"] }\n', "f.hcl")
    first, second = document.value["service"]
    assert document.where(document.value, "a") == "f.hcl:1:1"
    assert document.where(document.value["service"], 1) == "f.hcl:5:3"
    assert document.where(first, "name") == "f.hcl:3:3"
    assert document.where(second["tags"], 1) == "f.hcl:6:2"
    assert document.where() == "f.hcl"


def test_scalars_given_twice_are_remembered_and_the_last_one_counts() -> None:
    document = parse_hcl('a = 1\nb { a = 2 }\na = "3"', "f.hcl")
    assert document.value["a"] == "3"
    assert [key for _container, key in document.repeated] == ["a"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), JSON_VALUES, max_size=5), st.sampled_from([None, 2, "\t"]), st.booleans())
def test_json_is_read_as_the_standard_library_reads_it(value: Any, indent: Any, ascii_only: Any) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parse_json(text).value == value
    assert parse_hcl(text).value == value


@given(st.text(alphabet='a1 ={}[],"\\\n#/*<E$-.', max_size=40))
def test_any_text_is_parsed_or_refused_with_a_position(text: str) -> None:
    for parse in (parse_hcl, parse_json):
        try:
            parse(text, "f")
        except SyntaxProblem as e:
            problem = e
        else:
            continue
        assert problem.line >= 1
        assert problem.column >= 1
        assert "\n" not in str(problem)


def test_a_typical_file_is_parsed_in_milliseconds() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        parse_hcl(TYPICAL)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.005
