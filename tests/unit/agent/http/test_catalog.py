"""Bodies as a Consul 1.8.7 gave them after the same registrations."""

from __future__ import annotations

from typing import Any

import pytest

REGISTRATION = {
    "Node": "n1",
    "Address": "10.0.0.1",
    "Service": {
        "ID": "web-2",
        "Service": "web",
        "Tags": ["a", "b"],
        "Address": "1.2.3.4",
        "Port": 80,
        "Meta": {"m": "1"},
        "Weights": {"Passing": 5, "Warning": 2},
        "TaggedAddresses": {"lan": {"Address": "9.9.9.9", "Port": 3}},
    },
    "Checks": [
        {"CheckID": "c1", "Name": "C1", "Status": "passing", "ServiceID": "web-2"},
        {"Name": "nodecheck", "Status": "warning", "Notes": "nn", "Output": "oo"},
    ],
}
PROXY = {
    "Node": "n1",
    "Address": "10.0.0.1",
    "Service": {
        "Kind": "connect-proxy",
        "ID": "web-proxy",
        "Service": "web-sidecar",
        "Port": 21000,
        "Proxy": {
            "DestinationServiceName": "web",
            "DestinationServiceID": "web-2",
            "LocalServiceAddress": "127.0.0.1",
            "LocalServicePort": 80,
            "Config": {"a_b": 1, "AB": {"c_d": 2}},
            "Upstreams": [{"DestinationName": "db", "LocalBindPort": 9191}],
        },
    },
}


def strip(value):
    """Without indexes, which differ from those of the other implementation."""
    if isinstance(value, dict):
        return {k: strip(v) for k, v in value.items() if k not in ("CreateIndex", "ModifyIndex")}
    return [strip(v) for v in value] if isinstance(value, list) else value


@pytest.fixture
async def filled(api):
    plain = {"Node": "n1", "Address": "10.0.0.1", "Service": {"Service": "web"}}
    for body in (plain, REGISTRATION, PROXY):
        reply = await api.put("/v1/catalog/register", body)
        assert (reply.status, reply.text) == (200, "true"), reply.text
    return api


async def test_nodes_are_listed_with_null_for_empty_maps(filled):
    n1 = next(n for n in (await filled.get("/v1/catalog/nodes")).json if n["Node"] == "n1")
    assert strip(n1) == {
        "ID": "",
        "Node": "n1",
        "Address": "10.0.0.1",
        "Datacenter": "dc1",
        "TaggedAddresses": None,
        "Meta": None,
    }


async def test_services_are_a_map_of_names_to_tags(filled):
    assert (await filled.get("/v1/catalog/services")).json == {"web": ["a", "b"], "web-sidecar": []}


async def test_services_can_be_restricted_to_nodes_by_their_meta(filled):
    await filled.put(
        "/v1/catalog/register",
        {"Node": "n2", "Address": "10.0.0.2", "NodeMeta": {"rack": "r"}, "Service": {"Service": "db"}},
    )
    assert (await filled.get("/v1/catalog/services?node-meta=rack:r")).json == {"db": []}
    assert (await filled.get("/v1/catalog/services?node-meta=rack:x")).json == {}
    assert [n["Node"] for n in (await filled.get("/v1/catalog/nodes?node-meta=rack:r")).json] == ["n2"]
    assert (await filled.get("/v1/catalog/nodes?node-meta=rack")).json == []


async def test_a_service_s_instances_are_flat_objects(filled):
    first, second = (await filled.get("/v1/catalog/service/web")).json
    common: dict[str, Any] = {
        "ID": "",
        "Node": "n1",
        "Address": "10.0.0.1",
        "Datacenter": "dc1",
        "TaggedAddresses": None,
        "NodeMeta": None,
        "ServiceKind": "",
        "ServiceName": "web",
        "ServiceEnableTagOverride": False,
        "ServiceProxy": {"MeshGateway": {}, "Expose": {}},
        "ServiceConnect": {},
    }
    assert strip(first) == {
        **common,
        "ServiceID": "web",
        "ServiceTags": [],
        "ServiceAddress": "",
        "ServiceWeights": {"Passing": 1, "Warning": 1},
        "ServiceMeta": {},
        "ServicePort": 0,
    }
    assert strip(second) == {
        **common,
        "ServiceID": "web-2",
        "ServiceTags": ["a", "b"],
        "ServiceAddress": "1.2.3.4",
        "ServiceTaggedAddresses": {"lan": {"Address": "9.9.9.9", "Port": 3}},
        "ServiceWeights": {"Passing": 5, "Warning": 2},
        "ServiceMeta": {"m": "1"},
        "ServicePort": 80,
    }


@pytest.mark.parametrize(("query", "ids"), [("", ["web", "web-2"]), ("?tag=A&tag=b", ["web-2"]), ("?tag=a&tag=z", [])])
async def test_repeated_tags_must_all_be_there(filled, query, ids):
    assert [s["ServiceID"] for s in (await filled.get(f"/v1/catalog/service/web{query}")).json] == ids


async def test_a_proxy_s_configuration_keeps_the_user_s_own_names(filled):
    (proxy,) = (await filled.get("/v1/catalog/connect/web")).json
    assert proxy["ServiceKind"] == "connect-proxy"
    assert proxy["ServiceProxy"] == {
        "DestinationServiceName": "web",
        "DestinationServiceID": "web-2",
        "LocalServiceAddress": "127.0.0.1",
        "LocalServicePort": 80,
        "Config": {"a_b": 1, "AB": {"c_d": 2}},
        "Upstreams": [
            {
                "DestinationType": "",
                "DestinationName": "db",
                "Datacenter": "",
                "LocalBindPort": 9191,
                "Config": None,
                "MeshGateway": {},
            }
        ],
        "MeshGateway": {},
        "Expose": {},
    }


async def test_a_node_is_shown_with_its_services_as_a_map_and_as_a_list(filled):
    node = (await filled.get("/v1/catalog/node/n1")).json
    assert node["Node"]["Node"] == "n1"
    assert list(node["Services"]) == ["web", "web-2", "web-proxy"]
    assert strip(node["Services"]["web"]) == {
        "ID": "web",
        "Service": "web",
        "Tags": [],
        "Address": "",
        "Meta": None,
        "Port": 0,
        "Weights": {"Passing": 1, "Warning": 1},
        "EnableTagOverride": False,
        "Proxy": {"MeshGateway": {}, "Expose": {}},
        "Connect": {},
    }
    assert node["Services"]["web-proxy"]["Kind"] == "connect-proxy"
    listed = (await filled.get("/v1/catalog/node-services/n1")).json
    assert listed["Services"] == list(node["Services"].values())


async def test_nothing_is_null_or_empty_as_clients_know_it(api):
    assert (await api.get("/v1/catalog/node/nope")).text == "null"
    assert (await api.get("/v1/catalog/node-services/nope")).text == '{"Node":null,"Services":null}'
    assert (await api.get("/v1/catalog/service/nope")).text == "[]"
    assert (await api.get("/v1/catalog/connect/nope")).text == "[]"
    assert (await api.get("/v1/catalog/services")).text == "{}"
    assert (await api.get("/v1/catalog/datacenters")).json == ["dc1"]


async def test_registering_the_same_again_moves_no_index(filled):
    before = (await filled.get("/v1/catalog/service/web")).index
    await filled.put("/v1/catalog/register", REGISTRATION)
    await filled.put("/v1/kv/unrelated", b"1")
    assert (await filled.get("/v1/catalog/service/web")).index == before


async def test_services_checks_and_nodes_are_deregistered(filled):
    for body in ({"Node": "n1", "CheckID": "zz"}, {"Node": "zz"}, {"Node": "n1", "ServiceID": "web-2"}):
        assert (await filled.put("/v1/catalog/deregister", body)).text == "true"
    assert [s["ServiceID"] for s in (await filled.get("/v1/catalog/service/web")).json] == ["web"]
    await filled.put("/v1/catalog/deregister", {"Node": "n1"})
    assert (await filled.get("/v1/catalog/services")).json == {}


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("register", b"", 400, "Request decode failed: EOF"),
        ("register", {}, 500, "Must provide node"),
        ("register", {"Node": "n1"}, 500, "Must provide address if SkipNodeUpdate is not set"),
        ("register", {"Node": "n1", "Address": "1.1.1.1", "Datacenter": "dc9"}, 500, "No path to datacenter"),
        ("register", {"Node": 1}, 400, "Request decode failed: Node must be a string"),
        (
            "register",
            {"Node": "n", "Address": "a", "Service": []},
            400,
            "Request decode failed: Service must be an object",
        ),
        (
            "register",
            {"Node": "n", "Address": "a", "Checks": [{"Name": "c"}, {"Name": 1}]},
            400,
            "Request decode failed: Checks[1].Name must be a string",
        ),
        (
            "register",
            {"Node": "n", "Address": "a", "Service": {"Service": "s", "Port": 1.5}},
            400,
            "Request decode failed: Service.Port must be an integer",
        ),
        ("deregister", b"", 400, "Request decode failed: EOF"),
        ("deregister", {}, 500, "Must provide node"),
    ],
)
async def test_mistakes_in_a_registration_are_named(api, path, body, status, text):
    reply = await api.put(f"/v1/catalog/{path}", body)
    assert (reply.status, reply.text) == (status, text)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v1/catalog/service/", "Missing service name"),
        ("/v1/catalog/node/", "Missing node name"),
        ("/v1/health/service/", "Missing service name"),
        ("/v1/health/state/", "Missing check state"),
        ("/v1/health/node/", "Missing node name"),
    ],
)
async def test_a_missing_name_is_400(api, path, text):
    reply = await api.get(path)
    assert (reply.status, reply.text) == (400, text)


async def test_filter_expressions_are_refused_clearly_for_now(api):
    reply = await api.get("/v1/catalog/nodes?filter=Node==o")
    assert reply.status == 400
    assert "not supported yet" in reply.text


async def test_ids_with_slashes_survive(api):
    await api.put("/v1/catalog/register", {"Node": "n/1", "Address": "a", "Service": {"ID": "pg/1", "Service": "pg"}})
    assert list((await api.get("/v1/catalog/node/n%2F1")).json["Services"]) == ["pg/1"]


async def test_ids_of_services_and_checks_do_not_differ_by_case(api):
    body = {"Node": "n9", "Address": "10.9.0.1"}
    for service_id, port in (("App-1", 1), ("app-1", 2)):
        await api.put("/v1/catalog/register", {**body, "Service": {"ID": service_id, "Service": "app", "Port": port}})
    (row,) = (await api.get("/v1/catalog/service/app")).json
    assert (row["ServiceID"], row["ServicePort"]) == ("app-1", 2)
    for check_id, status in (("C1", "passing"), ("c1", "warning")):
        check = {"CheckID": check_id, "ServiceID": "APP-1", "Status": status}
        assert (await api.put("/v1/catalog/register", {**body, "Check": check})).status == 200
    (row,) = (await api.get("/v1/health/checks/app")).json
    assert (row["CheckID"], row["Status"], row["ServiceID"]) == ("c1", "warning", "app-1")
    await api.put("/v1/catalog/deregister", {"Node": "N9", "CheckID": "C1"})
    await api.put("/v1/catalog/deregister", {"Node": "N9", "ServiceID": "APP-1"})
    assert (await api.get("/v1/catalog/node/n9")).json["Services"] == {}
    assert (await api.get("/v1/health/node/n9")).json == []


async def test_a_check_that_names_another_node_is_refused_with_everything_else(api):
    body = {
        "Node": "e2",
        "Address": "10.9.0.1",
        "Checks": [{"Node": "e2", "CheckID": "a"}, {"Node": "E2", "CheckID": "b"}],
    }
    reply = await api.put("/v1/catalog/register", body)
    assert (reply.status, reply.text) == (500, 'check node "E2" does not match node "e2"')
    assert (await api.get("/v1/catalog/node/e2")).json is None


async def test_the_services_of_a_node_without_any_are_null_in_the_list(api):
    assert (await api.get("/v1/catalog/node-services/s1")).json["Services"] is None
    assert (await api.get("/v1/catalog/node/s1")).json["Services"] == {}


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "[::]"])
async def test_an_address_that_stands_for_all_addresses_is_none_of_a_service(api, address):
    reply = await api.put(
        "/v1/catalog/register", {"Node": "n", "Address": "10.0.0.1", "Service": {"Service": "s", "Address": address}}
    )
    assert (reply.status, reply.text) == (500, "Invalid service address")
    assert "s" not in (await api.get("/v1/catalog/services")).json
    assert (await api.put("/v1/catalog/register", {"Node": "n", "Address": address})).status == 200  # as Consul
