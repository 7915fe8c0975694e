"""Bodies as a Consul 1.8.7 gave them after the same registrations."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.agent.http.test_catalog import REGISTRATION, strip

CHECK_C8: dict[str, Any] = {
    "CheckID": "c8",
    "Name": "C8",
    "Definition": {
        "HTTP": "http://x",
        "Interval": "10s",
        "Timeout": "1s",
        "DeregisterCriticalServiceAfter": "1m",
        "Header": {"a": ["b"]},
    },
}


@pytest.fixture
async def filled(api):
    await api.put("/v1/catalog/register", {"Node": "n1", "Address": "10.0.0.1", "Service": {"Service": "web"}})
    await api.put("/v1/catalog/register", REGISTRATION)
    return api


def ids(reply):
    return [row["Service"]["ID"] for row in reply.json]


async def test_an_instance_has_its_node_and_the_node_s_checks_before_its_own(filled):
    _, row = (await filled.get("/v1/health/service/web")).json
    assert set(row) == {"Node", "Service", "Checks"}
    assert strip(row["Service"]) == {
        "ID": "web-2",
        "Service": "web",
        "Tags": ["a", "b"],
        "Address": "1.2.3.4",
        "TaggedAddresses": {"lan": {"Address": "9.9.9.9", "Port": 3}},
        "Meta": {"m": "1"},
        "Port": 80,
        "Weights": {"Passing": 5, "Warning": 2},
        "EnableTagOverride": False,
        "Proxy": {"MeshGateway": {}, "Expose": {}},
        "Connect": {},
    }
    assert strip(row["Checks"]) == [
        {
            "Node": "n1",
            "CheckID": "nodecheck",
            "Name": "nodecheck",
            "Status": "warning",
            "Notes": "nn",
            "Output": "oo",
            "ServiceID": "",
            "ServiceName": "",
            "ServiceTags": [],
            "Type": "",
            "Definition": {},
        },
        {
            "Node": "n1",
            "CheckID": "c1",
            "Name": "C1",
            "Status": "passing",
            "Notes": "",
            "Output": "",
            "ServiceID": "web-2",
            "ServiceName": "web",
            "ServiceTags": ["a", "b"],
            "Type": "",
            "Definition": {},
        },
    ]


async def test_a_check_s_definition_is_kept_with_canonical_durations(filled):
    await filled.put("/v1/catalog/register", {"Node": "n1", "Address": "10.0.0.1", "Check": CHECK_C8})
    check = next(c for c in (await filled.get("/v1/health/node/n1")).json if c["CheckID"] == "c8")
    assert (check["Type"], check["Status"]) == ("http", "critical")
    assert check["Definition"] == {**CHECK_C8["Definition"], "DeregisterCriticalServiceAfter": "1m0s"}


async def test_passing_leaves_out_every_instance_with_another_check(filled):
    assert ids(await filled.get("/v1/health/service/web?passing")) == []
    await filled.put("/v1/catalog/deregister", {"Node": "n1", "CheckID": "nodecheck"})
    await filled.put(
        "/v1/catalog/register",
        {"Node": "n1", "Address": "10.0.0.1", "Check": {"CheckID": "c1", "ServiceID": "web-2", "Status": "critical"}},
    )
    assert ids(await filled.get("/v1/health/service/web?passing=1")) == ["web"]
    for everything in ("passing=false", "passing=0", ""):
        assert ids(await filled.get(f"/v1/health/service/web?{everything}")) == ["web", "web-2"]
    refused = await filled.get("/v1/health/service/web?passing=zz")
    assert (refused.status, refused.text) == (400, "Invalid value for ?passing")


async def test_instances_are_filtered_by_tags_and_node_meta(filled):
    assert ids(await filled.get("/v1/health/service/web?tag=a")) == ["web-2"]
    assert ids(await filled.get("/v1/health/service/web?tag=a&tag=zz")) == []
    assert ids(await filled.get("/v1/health/service/web?node-meta=a:b")) == []


async def test_near_is_accepted_and_keeps_the_order(filled):
    assert ids(await filled.get("/v1/health/service/web?near=_agent")) == ["web", "web-2"]


async def test_catalog_and_health_list_instances_in_the_same_order(filled):
    for i in range(12):
        await filled.put(
            "/v1/catalog/register", {"Node": f"m{i}", "Address": "a", "Service": {"ID": f"w{11 - i}", "Service": "web"}}
        )
    catalog = [(s["Node"], s["ServiceID"]) for s in (await filled.get("/v1/catalog/service/web")).json]
    health = [(s["Node"]["Node"], s["Service"]["ID"]) for s in (await filled.get("/v1/health/service/web")).json]
    assert catalog == health


async def test_checks_are_shown_by_node_service_and_state(filled):
    assert [c["CheckID"] for c in (await filled.get("/v1/health/node/n1")).json] == ["c1", "nodecheck"]
    assert [c["CheckID"] for c in (await filled.get("/v1/health/checks/web")).json] == ["c1"]
    assert [c["CheckID"] for c in (await filled.get("/v1/health/state/any")).json] == ["c1", "nodecheck", "serfHealth"]
    assert [c["CheckID"] for c in (await filled.get("/v1/health/state/warning")).json] == ["nodecheck"]


async def test_unknown_names_are_empty_lists(api):
    for path in ("service/nope", "connect/nope", "node/nope", "checks/nope", "state/bogus"):
        reply = await api.get(f"/v1/health/{path}")
        assert (reply.status, reply.text) == (200, "[]")


async def test_connect_shows_proxies_and_native_instances(api):
    proxy = {"Kind": "connect-proxy", "Service": "web-sidecar", "Port": 1, "Proxy": {"DestinationServiceName": "web"}}
    await api.put("/v1/catalog/register", {"Node": "n1", "Address": "a", "Service": proxy})
    await api.put(
        "/v1/catalog/register",
        {"Node": "n1", "Address": "a", "Service": {"Service": "nat", "Connect": {"Native": True}}},
    )
    assert ids(await api.get("/v1/health/connect/web")) == ["web-sidecar"]
    (native,) = (await api.get("/v1/health/connect/nat")).json
    assert native["Service"]["Connect"] == {"Native": True}


async def register(api, node, meta, status="critical"):
    check = {"CheckID": "c", "Name": "c", "Status": status}
    body = {"Node": node, "Address": "10.9.0.1", "NodeMeta": meta, "Check": check}
    assert (await api.put("/v1/catalog/register", body)).status == 200


async def test_checks_in_a_state_are_restricted_to_nodes_by_their_meta(api):
    await register(api, "ext", {"external-node": "true", "a": "b"})
    await register(api, "other", {"external-node": "false"})

    async def nodes(query):
        return [c["Node"] for c in (await api.get("/v1/health/state/" + query)).json]

    assert await nodes("any?node-meta=external-node:true") == ["ext"]
    assert await nodes("critical?node-meta=external-node:true&node-meta=a:b") == ["ext"]
    assert await nodes("passing?node-meta=external-node:true") == []
    assert await nodes("any?node-meta=external-node:maybe") == []


@pytest.mark.parametrize("change", ["a check", "the node"])
async def test_who_waits_for_checks_of_some_nodes_hears_of_checks_and_of_nodes(api, change):
    await register(api, "n", {"external-node": "true" if change == "a check" else "false"})
    path = "/v1/health/state/any?node-meta=external-node:true"
    first = await api.get(path)
    waiting = asyncio.ensure_future(api.get(f"{path}&index={first.index}&wait=20s"))
    await asyncio.sleep(0)
    await register(api, "n", {"external-node": "true"}, "warning" if change == "a check" else "critical")
    second = await waiting
    assert [(c["Node"], c["Status"]) for c in second.json] == [("n", "warning" if change == "a check" else "critical")]
    assert second.index > first.index
