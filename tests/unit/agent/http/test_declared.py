"""What nobody reads is refused, or the answer says that it was ignored: as Consul 1.8.7 refuses and ignores."""

from __future__ import annotations

import re

import pytest

from rostra.agent.http.app import all_routes
from rostra.agent.http.declared import Body, MapOf

NODE = {"Node": "n9", "Address": "10.9.0.1"}
INTENTION = {"SourceName": "a", "DestinationName": "b", "Action": "deny"}
ENTERPRISE = "Namespaces are a Consul Enterprise feature"


def with_service(**fields):
    return {**NODE, "Service": {"Service": "s", **fields}}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({**NODE, "Foo": 1}, "Foo"),
        ({**NODE, "node_meta": {}}, "node_meta"),
        (with_service(Foo=1), "Foo"),
        (with_service(Name="s"), "Name"),
        (with_service(Weights={"Passing": 1, "Foo": 1}), "Foo"),
        (with_service(TaggedAddresses={"lan": {"Address": "10.0.0.1", "Foo": 1}}), "Foo"),
        (with_service(Proxy={"Foo": 1}), "Foo"),
        (with_service(Proxy={"Upstreams": [{}, {"Foo": 1}]}), "Foo"),
        (with_service(Proxy={"Expose": {"Paths": [{"Foo": 1}]}}), "Foo"),
        ({**NODE, "Check": {"Name": "c", "Foo": 1}}, "Foo"),
        ({**NODE, "Checks": [{"Name": "c"}, {"Name": "d", "HTTP": "http://x"}]}, "HTTP"),
    ],
)
async def test_an_unknown_field_of_a_registration_is_refused_at_every_depth(api, body, field):
    reply = await api.put("/v1/catalog/register", body)
    assert (reply.status, reply.text) == (400, f'Request decode failed: json: unknown field "{field}"')
    assert (await api.get("/v1/catalog/node/n9")).json is None


async def test_a_misspelled_deregistration_removes_nothing(api):
    await api.put("/v1/catalog/register", with_service())
    reply = await api.put("/v1/catalog/deregister", {"Node": "n9", "Name": "s"})
    assert (reply.status, reply.text) == (400, 'Request decode failed: json: unknown field "Name"')
    assert "s" in (await api.get("/v1/catalog/node/n9")).json["Services"]


@pytest.mark.parametrize("body", [{**NODE, "Namespace": "t"}, with_service(Namespace="t")])
async def test_a_namespace_in_a_registration_is_refused_by_name(api, body):
    reply = await api.put("/v1/catalog/register", body)
    assert (reply.status, reply.text) == (
        400,
        f'Request decode failed: json: unknown field "Namespace" - {ENTERPRISE}',
    )


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/v1/connect/intentions", 500, 'Failed to decode request body: json: unknown field "Foo"'),
        (
            "PUT",
            "/v1/connect/intentions/" + 36 * "1",
            400,
            'Bad request: Request decode failed: json: unknown field "Foo"',
        ),
        (
            "PUT",
            "/v1/operator/autopilot/configuration",
            400,
            'Bad request: Error parsing autopilot config: json: unknown field "Foo"',
        ),
    ],
)
async def test_other_strict_routes_refuse_in_their_own_words(api, method, path, status, text):
    reply = await api.call(method, path, {"Foo": 1})
    assert (reply.status, reply.text) == (status, text)


async def test_a_field_that_consul_ignores_has_no_effect_and_the_answer_says_so(api):
    reply = await api.put("/v1/session/create", {"lock_delay": "3s", "ServiceChecks": [], "Fo\r\no": 1, "Name": "n"})
    assert reply.status == 200
    assert reply.headers["X-Rostra-Warning"] == r'unknown field "lock_delay", unknown field "Fo\r\no" were ignored'
    (row,) = (await api.get("/v1/session/list")).json
    assert (row["Name"], row["LockDelay"]) == ("n", 15 * 10**9)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/kv/a"),
        ("PUT", "/v1/kv/a"),
        ("DELETE", "/v1/kv/a"),
        ("GET", "/v1/health/service/web"),
        ("GET", "/v1/health/state/any"),
        ("GET", "/v1/catalog/services"),
        ("PUT", "/v1/session/create"),
        ("PUT", "/v1/catalog/register"),
    ],
)
async def test_a_namespace_is_refused_and_an_empty_one_is_none(api, method, path):
    by_query = await api.call(method, path + "?ns=team1", b"")
    assert (by_query.status, by_query.text) == (400, f'Bad request: Invalid query parameter: "ns" - {ENTERPRISE}')
    header = {"X-Consul-Namespace": "team1"}
    by_header = await api.call(method, path, b"", header)
    assert (by_header.status, by_header.text) == (
        400,
        f'Bad request: Invalid header: "X-Consul-Namespace" - {ENTERPRISE}',
    )
    body = {"Node": "n", "Address": "10.0.0.1"} if path.endswith("register") else b""
    empty = await api.call(method, path + "?ns=", body, {"X-Consul-Namespace": ""})
    assert empty.status in (200, 404)
    assert "X-Rostra-Warning" not in empty.headers


async def test_a_parameter_that_nobody_reads_is_named_in_each_answer(api):
    for _ in range(3):  # the third comes from what is stored
        reply = await api.get("/v1/catalog/nodes?near=_agent&stale&tag=x")
        assert (reply.status, reply.headers["X-Rostra-Warning"]) == (
            200,
            'parameter "near", parameter "tag" were ignored',
        )
    assert "X-Rostra-Warning" not in (await api.get("/v1/catalog/nodes?stale&pretty&dc=dc1&node-meta=a:b")).headers
    reply = await api.call("GET", "/v1/catalog/nodes", headers={"X-Consul-Namespace": "t"})
    assert reply.headers["X-Rostra-Warning"] == "header X-Consul-Namespace was ignored"


async def test_many_unknown_names_make_a_short_warning(api):
    query = "&".join(f"x{i}{'y' * 500}=1" for i in range(50))
    warning = (await api.get("/v1/catalog/nodes?" + query)).headers["X-Rostra-Warning"]
    assert len(warning) < 1000
    assert warning.endswith(" and 42 more were ignored")


@pytest.mark.parametrize("route", [r for r in all_routes() if not r.path.startswith("/ui")])
def test_every_route_says_which_parameters_it_reads(route):
    assert route.query is not None


def test_a_body_finds_its_fields_in_lists_and_maps_and_whatever_their_case():
    body = Body("A", B=Body("C", is_strict=False), D=MapOf("E"))
    unread: list[str] = []
    body.look({"a": {"x": 1}, "b": [{"c": 1, "z": 1}, 7, None], "D": {"any": {"e": 1}, "other": 2}}, unread)
    assert unread == ["z"]


OF_THE_CLUSTER = [route for route in all_routes() if route.datacenter]


@pytest.mark.parametrize(
    "route",
    [r for r in OF_THE_CLUSTER if not r.path.startswith("/v1/agent/")],
    ids=lambda route: f"{route.method} {route.path}",
)
async def test_what_is_of_the_cluster_is_refused_for_another_datacenter(api, route):
    path = re.sub(r"{\w+}", "x", route.path)
    index = api.servers.store.index
    reply = await api.call(route.method, f"{path}?dc=elsewhere", b"{}" if route.method != "GET" else b"")
    assert (reply.status, reply.text) == (500, "No path to datacenter")
    assert api.servers.store.index == index


def test_what_is_of_this_agent_alone_says_nothing_about_datacenters():
    of_the_agent = {route.path for route in all_routes() if not route.datacenter}
    served_by_servers = {"/v1/agent/connect/ca/roots", "/v1/agent/connect/ca/leaf/{service}"}
    acl = ("/v1/acl/", "/v1/internal/acl/")
    assert {path for path in of_the_agent if not path.startswith(("/v1/agent/", *acl))} == {"/v1/catalog/datacenters"}
    assert {route.path for route in OF_THE_CLUSTER if route.path.startswith("/v1/agent/")} == served_by_servers
