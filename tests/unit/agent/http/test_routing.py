from __future__ import annotations

import pytest

from rostra.agent.http.permissions import anybody
from rostra.agent.http.routing import JsonObject, Query, Request, Route, Router, load_json
from rostra.wire.errors import BadRequest


async def handler(request, agent):
    raise AssertionError


ROUTER = Router(
    Route(method, path, handler, anybody)
    for method, path in [
        ("GET", "/v1/kv/{key}"),
        ("PUT", "/v1/kv/{key}"),
        ("GET", "/v1/query"),
        ("GET", "/v1/query/{id}"),
        ("GET", "/v1/query/{id}/execute"),
        ("GET", "/v1/connect/intentions/match"),
        ("GET", "/v1/connect/intentions/{id}"),
    ]
)


@pytest.mark.parametrize(
    ("path", "pattern", "params"),
    [
        ("/v1/kv/a/b", "/v1/kv/{key}", {"key": "a/b"}),
        ("/v1/kv/a%2Fb%20c", "/v1/kv/{key}", {"key": "a/b c"}),
        ("/v1/kv/", "/v1/kv/{key}", {"key": ""}),
        ("/v1/query", "/v1/query", {}),
        ("/v1/query/1", "/v1/query/{id}", {"id": "1"}),
        ("/v1/query/1%2F2/execute", "/v1/query/{id}/execute", {"id": "1/2"}),
        ("/v1/connect/intentions/match", "/v1/connect/intentions/match", {}),
        ("/v1/connect/intentions/matches", "/v1/connect/intentions/{id}", {"id": "matches"}),
    ],
)
def test_a_path_leads_to_the_most_literal_route_and_the_last_placeholder_takes_the_rest(path, pattern, params):
    match = ROUTER.find(path)
    assert match is not None
    assert match.routes["GET"].path == pattern
    assert match.params == params


def test_allow_names_options_and_then_the_methods_in_their_order():
    match = ROUTER.find("/v1/kv/a")
    assert match is not None
    assert match.allow == "OPTIONS,GET,PUT"


def test_a_path_that_lacks_its_last_slash_is_redirected():
    match = ROUTER.find("/v1/kv")
    assert match is not None
    assert match.redirect == "/v1/kv/"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/", "/v2/kv/a", "*", "", "/v1/connect"])
def test_other_paths_lead_nowhere(path):
    assert ROUTER.find(path) is None


def test_query_parameters_are_decoded_and_repeated_ones_are_kept():
    query = Query("tag=a&tag=b%26c&x&y=1+2&=z")
    assert query.all("tag") == ["a", "b&c"]
    assert query.get("y") == "1 2"
    assert query.has("x")
    assert query.get("x", "default") == ""
    assert query.get("none", "default") == "default"


@pytest.mark.parametrize(
    ("text", "value"), [("p", True), ("p=1", True), ("p=true", True), ("p=false", False), ("", False)]
)
def test_flags_may_be_given_with_and_without_a_value(text, value):
    assert Query(text).flag("p") is value


def test_a_flag_with_another_value_is_refused():
    with pytest.raises(BadRequest, match=r"Invalid value for \?p"):
        Query("p=zz").flag("p")


def test_json_fields_are_found_whatever_their_case_and_keep_their_spelling():
    value = load_json(b'{"ttl": "15s", "Checks": [{"checkid": 1}], "Meta": {"aB": "x"}}')
    assert value["TTL"] == "15s"
    assert value.get("checks")[0]["CheckID"] == 1
    assert "TtL" in value
    assert list(value["meta"]) == ["aB"]
    assert isinstance(value, JsonObject)
    with pytest.raises(KeyError):
        value["none"]


def test_malformed_json_is_named_with_its_position():
    with pytest.raises(BadRequest, match=r"^Request decode failed: .* at line 2 column \d+"):
        load_json(b'{"a": 1,\n "b": }')


@pytest.mark.parametrize(
    ("target", "headers", "token"),
    [
        ("/x?token=q", {"X-Consul-Token": "h"}, "q"),
        ("/x", {"X-Consul-Token": "h", "Authorization": "Bearer b"}, "h"),
        ("/x", {"Authorization": "bearer b "}, "b"),
        ("/x", {"Authorization": "Basic b"}, ""),
        ("/x", {}, ""),
    ],
)
def test_the_token_is_the_parameter_or_the_header_or_the_bearer(target, headers, token):
    assert Request("GET", target, headers=headers).token == token


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_that_nests_too_deep_is_refused_before_it_costs_anything(opening):
    closing = b"]" if opening == b"[" else b"}"
    assert load_json(opening * 100 + b"1" + closing * 100)
    for depth in (101, 500, 1000, 1024, 100_000):
        with pytest.raises(BadRequest, match="Request decode failed"):
            load_json(opening * depth + b"1" + closing * depth)


def test_a_body_has_so_many_arrays_and_objects_and_items_and_its_texts_count_for_nothing():
    few, items = b",".join([b"{}"] * 4_000), b",".join([b"1"] * 20_000)
    assert len(load_json(b"[" + few + b"]")) == 4_000
    assert len(load_json(b"[" + items + b"]")) == 20_000
    assert load_json(b'{"a":"' + b'{[,\\"' * 50_000 + b'"}')["a"] == '{[,"' * 50_000
    for body in (
        b"[" + few + b"," + few + b"]",
        b"[" + items + b",1,1]",
        b"[" * 6_000,
        b'["",' + b'"",' * 170_000,
        b"{" * 9_000 + b'"' + b'\\"' * 250_000,
    ):
        with pytest.raises(BadRequest, match="Request decode failed"):
            load_json(body)


def test_a_request_has_so_many_parameters():
    assert len(list(Query("&".join(f"p{i}" for i in range(1_000))).names())) == 1_000
    with pytest.raises(BadRequest, match="more than 1000 parameters"):
        Query("&" * 1_000)
