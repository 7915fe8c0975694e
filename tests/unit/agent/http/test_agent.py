"""`/v1/agent/`, compared with what Consul 1.8.7 answers to the same requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest

from rostra.agent.context import Agent
from rostra.agent.http import mesh
from rostra.agent.http.agent import ROUTES, add_gauges
from rostra.agent.http.errors import error_response
from rostra.agent.http.routing import Request, Response, Router
from rostra.agent.leaf import Leaves
from rostra.agent.local import LocalAgent
from rostra.agent.metrics import Metrics
from rostra.agent.proxycfg import ProxyConfigs
from rostra.agent.results import Results
from rostra.server.state.cluster import BindNode
from rostra.server.state.intention import SetIntention
from rostra.wire.errors import Conflict, NotFound
from tests.support.local_servers import TRUST_DOMAIN, LocalServers


class Api:
    def __init__(self) -> None:
        self.servers = LocalServers()
        self.results = Results(self.servers)
        self.local = LocalAgent(node="o", random=lambda: 0.0, port_is_busy=lambda address, port: False)
        self.leaves = Leaves(self.servers, self.results, datacenter="dc1")
        self.proxies = ProxyConfigs(self.local, self.leaves, self.results, datacenter="dc1", bind_address="127.0.0.1")
        self.agent = Agent(
            self.servers,
            self.results,
            node_name="o",
            node_id="id-o",
            local=self.local,
            leaves=self.leaves,
            proxies=self.proxies,
        )
        self.router = Router(ROUTES + mesh.ROUTES)

    async def call(self, method: str, target: str, body: Any = None) -> Response:
        path = target.partition("?")[0]
        match = self.router.find(path)
        assert match is not None, path
        data = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
        request = Request(method, target, headers={}, body=data, params=match.params)
        try:
            return await match.routes[method].handler(request, self.agent)
        except Exception as error:
            return error_response(error)

    async def put(self, target: str, body: Any = None) -> tuple[int, str]:
        response = await self.call("PUT", target, body)
        return response.status, response.body.decode()

    async def get(self, target: str) -> Any:
        response = await self.call("GET", target)
        assert response.status == 200, response.body
        return json.loads(response.body)


@asynccontextmanager
async def api() -> AsyncIterator[Api]:
    a = Api()
    await a.local.start()
    await a.proxies.start()
    try:
        yield a
    finally:
        await a.proxies.stop()
        await a.leaves.stop()
        await a.local.stop()
        await a.results.close()


Y1 = {
    "Name": "y",
    "ID": "y1",
    "Port": 8,
    "Checks": [{"TTL": "10m", "Status": "passing"}, {"CheckID": "mine", "Name": "My", "TTL": "15m"}],
}
SHOWN = {
    "ID": "y1",
    "Service": "y",
    "Tags": [],
    "Meta": {},
    "Port": 8,
    "Address": "",
    "Weights": {"Passing": 1, "Warning": 1},
    "EnableTagOverride": False,
}


async def test_a_registered_service_is_shown_as_consul_shows_it() -> None:
    async with api() as a:
        assert await a.put("/v1/agent/service/register", Y1) == (200, "")
        assert await a.get("/v1/agent/services") == {"y1": SHOWN}
        shown = await a.get("/v1/agent/service/y1")
        assert {**SHOWN, "ContentHash": shown["ContentHash"]} == shown
        assert (await a.get("/v1/agent/checks"))["mine"] == {
            "Node": "o",
            "CheckID": "mine",
            "Name": "My",
            "Status": "critical",
            "Notes": "",
            "Output": "",
            "ServiceID": "y1",
            "ServiceName": "y",
            "ServiceTags": [],
            "Type": "ttl",
            "Definition": {},
            "CreateIndex": 0,
            "ModifyIndex": 0,
        }


async def test_a_sidecar_is_shown_as_consul_shows_it() -> None:
    upstream = {"DestinationName": "b", "LocalBindPort": 99, "Config": {"a": {"B": 1}}}
    sidecar = {"Proxy": {"Upstreams": [upstream], "Config": {"supervise": False}}}
    async with api() as a:
        body = {"Name": "x", "ID": "x1", "Port": 80, "Tags": ["a"], "Connect": {"SidecarService": sidecar}}
        await a.put("/v1/agent/service/register", body)
        shown = await a.get("/v1/agent/service/x1-sidecar-proxy")
        assert shown.pop("ContentHash")
        assert shown == {
            "Kind": "connect-proxy",
            "ID": "x1-sidecar-proxy",
            "Service": "x-sidecar-proxy",
            "Tags": ["a"],
            "Meta": {},
            "Port": 21000,
            "Address": "",
            "Weights": {"Passing": 1, "Warning": 1},
            "EnableTagOverride": False,
            "Proxy": {
                "DestinationServiceName": "x",
                "DestinationServiceID": "x1",
                "LocalServiceAddress": "127.0.0.1",
                "LocalServicePort": 80,
                "Config": {"supervise": False},
                "Upstreams": [{"DestinationType": "service", **upstream, "MeshGateway": {}}],
                "MeshGateway": {},
                "Expose": {},
            },
        }


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("service/register", {}, 400, "Missing service name"),
        ("service/register", b"", 400, "Request decode failed: EOF"),
        ("service/register", {"Name": "x", "Chck": 1}, 400, 'Request decode failed: json: unknown field "Chck"'),
        (
            "service/register",
            {"Name": "x", "Check": {"TTL": "bogus"}},
            400,
            'Request decode failed: time: invalid duration "bogus"',
        ),
        (
            "service/register",
            {"Name": "x", "Check": {"Args": ["true"], "Interval": "1s"}},
            500,
            "Scripts are disabled on this agent from remote calls; to enable, configure 'enable_script_checks' to true",
        ),
        ("service/deregister/nope", None, 200, ""),
        ("service/deregister/", None, 500, "ServiceID missing"),
        ("check/deregister/nope", None, 200, ""),
        ("check/register", {}, 400, "Missing check name"),
        ("check/register", {"Name": "a", "TTL": "1s", "ServiceID": "zz"}, 500, 'ServiceID "zz" does not exist'),
        ("check/register", {"Name": "a", "TTL": "1s", "Status": "zz"}, 400, "Bad check status"),
        ("check/pass/nope", None, 500, 'CheckID "nope" does not have associated TTL'),
        ("check/update/nope", {"Status": "weird"}, 400, "Invalid check status: 'weird'"),
        ("check/update/nope", {"Status": "passing"}, 500, 'CheckID "nope" does not have associated TTL'),
        ("service/maintenance/y1", None, 400, "Missing value for enable"),
        ("service/maintenance/y1?enable=zz", None, 400, 'Invalid value for enable: "zz"'),
        ("service/maintenance/?enable=true", None, 400, "Missing service ID"),
        ("service/maintenance/nope?enable=true", None, 404, 'No service registered with ID "nope"'),
        ("maintenance", None, 400, "Missing value for enable"),
        ("leave", None, 500, "leave is not yet available on this agent"),
    ],
)
async def test_what_is_wrong_is_told_with_consuls_status_and_words(
    path: str, body: Any, status: int, text: str
) -> None:
    async with api() as a:
        assert await a.put(f"/v1/agent/{path}", body) == (status, text)


async def test_force_leave_passes_the_node_on_and_says_when_there_is_none() -> None:
    told = []

    async def force_leave(node: str, prune: bool) -> None:
        told.append((node, prune))
        if node == "nope":
            raise NotFound("no member is called 'nope'")
        if node == "alive":
            raise Conflict("node 'alive' is alive: stop its agent first")

    async with api() as a:
        a.agent = replace(a.agent, force_leave=force_leave)
        assert await a.put("/v1/agent/force-leave/c1") == (200, "")
        assert await a.put("/v1/agent/force-leave/c%2F1?prune") == (200, "")
        assert told == [("c1", False), ("c/1", True)]
        assert await a.put("/v1/agent/force-leave/") == (400, "Missing node name")
        assert await a.put("/v1/agent/force-leave/nope") == (500, "agent: No node found with name 'nope'")
        assert await a.put("/v1/agent/force-leave/alive") == (409, "node 'alive' is alive: stop its agent first")


async def test_an_unknown_service_is_not_found() -> None:
    async with api() as a:
        response = await a.call("GET", "/v1/agent/service/nope")
        assert (response.status, response.body) == (404, b"unknown service ID: nope")


async def test_an_id_with_a_slash_is_one_id() -> None:
    async with api() as a:
        await a.put("/v1/agent/service/register", {"Name": "pg", "ID": "pg/node1"})
        assert (await a.get("/v1/agent/service/pg%2Fnode1"))["ID"] == "pg/node1"
        await a.put("/v1/agent/service/deregister/pg%2Fnode1")
        assert await a.get("/v1/agent/services") == {}


async def test_ttl_checks_take_status_and_note() -> None:
    async with api() as a:
        await a.put("/v1/agent/check/register", {"Name": "t", "TTL": "10m"})
        for verb, status in (("pass", "passing"), ("warn", "warning"), ("fail", "critical")):
            assert await a.put(f"/v1/agent/check/{verb}/t?note=hello%20there") == (200, "")
            shown = (await a.get("/v1/agent/checks"))["t"]
            assert (shown["Status"], shown["Output"]) == (status, "hello there")
        await a.put("/v1/agent/check/update/t", {"status": "passing", "output": "fine"})
        assert (await a.get("/v1/agent/checks"))["t"]["Output"] == "fine"


async def test_health_of_a_service_is_its_status_code() -> None:
    async with api() as a:
        await a.put("/v1/agent/service/register", {"Name": "y", "ID": "y1", "Check": {"TTL": "10m"}})
        for verb, code, text in (("pass", 200, b"passing"), ("warn", 429, b"warning"), ("fail", 503, b"critical")):
            await a.put(f"/v1/agent/check/{verb}/service:y1")
            by_id = await a.call("GET", "/v1/agent/health/service/id/y1?format=text")
            by_name = await a.call("GET", "/v1/agent/health/service/name/y")
            assert (by_id.status, by_id.body, by_id.headers["X-Consul-Reason"]) == (code, text, text.decode())
            assert by_name.status == code
            assert [s["AggregatedStatus"] for s in json.loads(by_name.body)] == [text.decode()]
        await a.put("/v1/agent/maintenance?enable=true&reason=why")
        by_id = await a.call("GET", "/v1/agent/health/service/id/y1?format=text")
        assert (by_id.status, by_id.body) == (503, b"maintenance")


async def test_health_of_what_is_not_there_is_404() -> None:
    async with api() as a:
        by_id = await a.call("GET", "/v1/agent/health/service/id/nope")
        by_name = await a.call("GET", "/v1/agent/health/service/name/nope")
        assert (by_id.status, by_id.headers["X-Consul-Reason"]) == (404, "ServiceId nope not found")
        assert json.loads(by_id.body) == {"AggregatedStatus": "critical", "Service": None, "Checks": None}
        assert (by_name.status, by_name.body) == (404, b"[]")


async def test_a_hash_waits_for_a_change_of_the_service() -> None:
    async with api() as a:
        await a.put("/v1/agent/service/register", Y1)
        digest = (await a.get("/v1/agent/service/y1"))["ContentHash"]
        assert (await a.get(f"/v1/agent/service/y1?hash={digest}&wait=20ms"))["ContentHash"] == digest
        waiting = asyncio.create_task(a.get(f"/v1/agent/service/y1?hash={digest}&wait=5s"))
        await asyncio.sleep(0)
        await a.put("/v1/agent/service/register", {**Y1, "Port": 9})
        assert (await waiting)["Port"] == 9


async def test_self_has_what_clients_read() -> None:
    async with api() as a:
        a.servers.apply(BindNode("o", "key", "client", "127.0.0.35", node_id="id-o"))
        shown = await a.get("/v1/agent/self")
        config = shown["Config"]
        assert (config["Datacenter"], config["NodeName"], config["NodeID"]) == ("dc1", "o", "id-o")
        assert (config["Version"], config["Server"], config["SessionTTLMin"]) == ("1.8.7", False, 10_000_000_000)
        assert (shown["Member"]["Addr"], shown["Member"]["Tags"]["role"]) == ("127.0.0.35", "node")
        assert shown["Stats"]["consul"]["leader_addr"] == "127.0.0.1:8300"
        assert {"DebugConfig", "Coord", "Meta"} <= set(shown)


async def test_self_answers_without_servers() -> None:
    async with api() as a:
        a.servers.cut()
        shown = await a.get("/v1/agent/self")
        assert shown["Member"]["Name"] == "o"
        assert shown["Stats"]["consul"]["leader_addr"] == ""


async def test_members_of_the_wan_are_the_servers_under_the_names_and_the_port_that_consul_gives_them() -> None:
    async with api() as a:
        a.servers.apply(BindNode("o", "key", "client", "127.0.0.35", node_id="id-o"))
        for query in ("wan=1", "wan=true"):
            (server,) = await a.get(f"/v1/agent/members?{query}")
            assert (server["Name"], server["Port"], server["Tags"]["role"]) == ("s1.dc1", 8302, "consul")
            assert "wan_join_port" not in server["Tags"]
        for query in ("wan", "wan=", "segment=_all"):
            lan = {m["Name"]: m for m in await a.get(f"/v1/agent/members?{query}")}
            assert set(lan) == {"s1", "o"}
            assert lan["s1"]["Tags"]["wan_join_port"] == "8302"


async def test_members_have_the_fields_that_consuls_cli_prints() -> None:
    async with api() as a:
        a.servers.apply(BindNode("o", "key", "client", "127.0.0.35", node_id="id-o"))
        server = next(m for m in await a.get("/v1/agent/members") if m["Tags"]["role"] == "consul")
        client = next(m for m in await a.get("/v1/agent/members") if m["Name"] == "o")
        assert (server["Name"], server["Status"], server["Tags"]["port"]) == ("s1", 1, "8300")
        assert (client["Addr"], client["Port"], client["Status"]) == ("127.0.0.35", 8301, 1)
        assert (client["Tags"]["build"], client["ProtocolCur"]) == ("1.8.7:", 2)


async def test_a_leaf_is_shown_as_consul_shows_it_and_waits_by_index() -> None:
    async with api() as a:
        response = await a.call("GET", "/v1/agent/connect/ca/leaf/web")
        shown = json.loads(response.body)
        assert set(shown) == {
            *("SerialNumber", "CertPEM", "PrivateKeyPEM", "Service", "ServiceURI"),
            *("ValidAfter", "ValidBefore", "CreateIndex", "ModifyIndex"),
        }
        assert shown["ServiceURI"] == f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web"
        assert shown["PrivateKeyPEM"].startswith("-----BEGIN EC PRIVATE KEY-----")
        index = response.headers["X-Consul-Index"]
        assert await a.get(f"/v1/agent/connect/ca/leaf/web?index={index}&wait=20ms") == shown


async def test_authorize_tells_which_intention_decided() -> None:
    uri = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web"

    async def ask(**body: str) -> tuple[int, Any]:
        response = await a.call("POST", "/v1/agent/connect/authorize", body)
        return response.status, json.loads(response.body) if response.status == 200 else response.body.decode()

    async with api() as a:
        a.servers.apply(SetIntention("web", "x", "deny", id="the-id"))
        assert await ask() == (400, "Bad request: Target service must be specified")
        assert await ask(Target="x") == (400, "Bad request: ClientCertURI not a valid Connect identifier")
        status, denied = await ask(Target="x", ClientCertURI=uri, ClientCertSerial="01")
        assert denied == {
            "Authorized": False,
            "Reason": "Matched intention: DENY default/web => default/x (ID: the-id, Precedence: 9)",
        }
        status, allowed = await ask(Target="z", ClientCertURI=uri)
        assert (status, allowed["Authorized"]) == (200, True)
        other = uri.replace("1111", "2222")
        assert (await ask(Target="z", ClientCertURI=other))[1]["Authorized"] is False


async def test_a_proxy_polls_its_snapshot_by_hash() -> None:
    async with api() as a:
        await a.put("/v1/agent/service/register", {"Name": "web", "Port": 80, "Connect": {"SidecarService": {}}})
        path = "/v1/agent/connect/proxy/web-sidecar-proxy"
        first = await a.call("GET", path)
        digest = first.headers["X-Consul-ContentHash"]
        assert json.loads(first.body)["ProxyID"] == "web-sidecar-proxy"
        waiting = asyncio.create_task(a.call("GET", f"{path}?hash={digest}&wait=5s"))
        await asyncio.sleep(0)
        a.servers.apply(SetIntention("api", "web", "deny"))
        assert json.loads((await waiting).body)["Intentions"][0]["Source"] == "api"


async def test_metrics_are_served_as_json_and_for_prometheus() -> None:
    async with api() as a:
        a.agent.metrics.count("http.requests")
        assert (await a.get("/v1/agent/metrics"))["Counters"][0]["Name"] == "consul.http.requests"
        prometheus = await a.call("GET", "/v1/agent/metrics?format=prometheus")
        assert b"consul_http_requests 1" in prometheus.body


async def test_the_numbers_of_the_core_beside_the_agent_are_shown_with_its_own() -> None:
    nested = {"raft": {"term": 3, "leader": "a", "commit": {"count": 3, "buckets": {"0.1": 1, "inf": 2}}}, "up": True}
    metrics = Metrics()
    add_gauges(metrics, "server", nested)
    text = metrics.to_prometheus()
    for line in ("server_raft_term 3", 'server_raft_commit_bucket{le="+Inf"} 3', "server_up 1"):
        assert f"consul_{line}\n" in text


async def test_the_host_and_the_version_are_told() -> None:
    async with api() as a:
        assert (await a.get("/v1/agent/host"))["Memory"]["total"] > 0
        assert (await a.get("/v1/agent/version"))["HumanVersion"] == "1.8.7"


async def test_a_namespace_in_a_registration_is_refused() -> None:
    async with api() as a:
        for path, body in (
            ("service/register", {"Name": "x", "Namespace": "t"}),
            ("check/register", {"Name": "x", "TTL": "10s", "Namespace": "t"}),
        ):
            response = await a.call("PUT", f"/v1/agent/{path}", body)
            assert (response.status, b"Namespaces are a Consul Enterprise feature" in response.body) == (400, True)


async def test_what_nobody_reads_in_a_body_is_refused() -> None:
    async with api() as a:
        for method, path, body, text in (
            ("PUT", "check/update/c", {"Status": "passing", "Foo": 1}, "Request"),
            ("POST", "connect/authorize", {"Target": "x", "Foo": 1}, "Bad request: Request"),
        ):
            response = await a.call(method, f"/v1/agent/{path}", body)
            assert (response.status, response.body.decode()) == (
                400,
                f'{text} decode failed: json: unknown field "Foo"',
            )


async def test_authorize_finds_the_target_in_any_spelling() -> None:
    uri = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web"
    async with api() as a:
        a.servers.apply(SetIntention("web", "DB", "deny"))
        for target in ("db", "DB", "Db"):
            response = await a.call("POST", "/v1/agent/connect/authorize", {"Target": target, "ClientCertURI": uri})
            assert json.loads(response.body)["Authorized"] is False


IP, IP6, GIVEN = "10.0.0.5", "2001:db8::1", {"wan": {"Address": "1.2.3.4", "Port": 9}}


@pytest.mark.parametrize(
    ("address", "given", "shown"),
    [
        (IP, {}, {"lan_ipv4": {"Address": IP, "Port": 7}, "wan_ipv4": {"Address": IP, "Port": 7}}),
        (IP6, {}, {"lan_ipv6": {"Address": IP6, "Port": 7}, "wan_ipv6": {"Address": IP6, "Port": 7}}),
        (IP, GIVEN, {**GIVEN, "lan_ipv4": {"Address": IP, "Port": 7}, "wan_ipv4": {"Address": IP, "Port": 7}}),
        (
            IP,
            {"lan_ipv4": {"Address": "9.9.9.9", "Port": 3}},
            {"lan_ipv4": {"Address": "9.9.9.9", "Port": 3}, "wan_ipv4": {"Address": IP, "Port": 7}},
        ),
        ("", GIVEN, GIVEN),
        ("www.example.com", {}, None),
        (f"[{IP6}]", {}, None),
        ("", {}, None),
    ],
)
async def test_an_ip_address_of_a_service_is_among_its_tagged_ones(address: str, given: Any, shown: Any) -> None:
    async with api() as a:
        body = {"Name": "x", "Address": address, "Port": 7, "TaggedAddresses": given}
        assert await a.put("/v1/agent/service/register", body) == (200, "")
        service = await a.get("/v1/agent/service/x")
        assert service.get("TaggedAddresses") == shown
        assert shown is None or list(service["TaggedAddresses"]) == sorted(shown)


async def test_a_sidecar_with_an_address_has_its_own_port_among_the_tagged_ones() -> None:
    async with api() as a:
        await a.put(
            "/v1/agent/service/register",
            {"Name": "x", "Port": 80, "Connect": {"SidecarService": {"Address": "10.0.0.6"}}},
        )
        shown = await a.get("/v1/agent/service/x-sidecar-proxy")
        assert shown["TaggedAddresses"]["lan_ipv4"] == {"Address": "10.0.0.6", "Port": 21000}


def _proxy(expose: Any) -> dict[str, Any]:
    upstreams = [{"DestinationName": "b", "LocalBindPort": 4}]
    return {
        "Name": "p",
        "Kind": "connect-proxy",
        "Port": 3,
        "Proxy": {"DestinationServiceName": "x", "Upstreams": upstreams, "Expose": expose},
    }


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (None, {}),
        ({"Checks": False}, {}),
        ({"Paths": None}, {}),
        ({"Checks": True}, {"Checks": True}),
        (
            {"Paths": [{"Path": "/x", "LocalPathPort": 1, "ListenerPort": 2}]},
            {"Paths": [{"ListenerPort": 2, "Path": "/x", "LocalPathPort": 1, "ParsedFromCheck": False}]},
        ),
        (
            {"paths": [{"path": "/x", "local_path_port": 1, "listener_port": 2, "protocol": "http2"}]},
            {
                "Paths": [
                    {
                        "ListenerPort": 2,
                        "Path": "/x",
                        "LocalPathPort": 1,
                        "Protocol": "http2",
                        "ParsedFromCheck": False,
                    }
                ]
            },
        ),
    ],
)
async def test_what_a_proxy_exposes_is_shown_as_consul_shows_it(given: Any, shown: Any) -> None:
    async with api() as a:
        assert await a.put("/v1/agent/service/register", _proxy(given)) == (200, "")
        proxy = (await a.get("/v1/agent/service/p"))["Proxy"]
        assert proxy["Expose"] == shown
        assert "Config" not in proxy["Upstreams"][0]


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([{"Path": "", "ListenerPort": 2}], "empty path exposed"),
        ([{"Path": "/x", "ListenerPort": 70000}], "invalid listener port: 70000"),
        ([{"Path": "/x", "ListenerPort": 2, "Protocol": "foo"}], "protocol 'foo' not supported for path: /x"),
        ([{"Path": "/x", "ListenerPort": 2}] * 2, "duplicate paths exposed"),
        ([{"Path": "/x", "ListenerPort": 2}, {"Path": "/y", "ListenerPort": 2}], "duplicate listener ports exposed"),
        ([{"Path": "/x", "Foo": 1}], 'unknown field "Proxy.Expose.Paths.Foo"'),
    ],
)
async def test_what_cannot_be_exposed_is_refused(paths: Any, said: str) -> None:
    async with api() as a:
        status, text = await a.put("/v1/agent/service/register", _proxy({"Paths": paths}))
        assert (status, said in text) == (400, True), text


async def test_null_is_not_set_in_a_body_at_every_depth() -> None:
    body = {
        "Name": "x",
        "Port": None,
        "Tags": [None, "a"],
        "Meta": {"k": None},
        "Weights": None,
        "TaggedAddresses": {"lan": None},
        "Checks": [None, {"TTL": "1h", "Notes": None, "Header": {"H": None}}],
        "Proxy": None,
        "Connect": {"SidecarService": None},
    }
    async with api() as a:
        assert await a.put("/v1/agent/service/register", body) == (200, "")
        shown = await a.get("/v1/agent/service/x")
        assert (shown["Tags"], shown["Meta"], shown["Port"]) == (["", "a"], {"k": ""}, 0)
        assert shown["TaggedAddresses"] == {"lan": {"Address": "", "Port": 0}}
        assert (await a.put("/v1/agent/service/register", b"null"))[0] == 400
