"""A caller without rights walks over every route of an agent: not one byte of what is stored reaches it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rostra.acl.authorizer import EVERYTHING
from rostra.agent.context import Agent
from rostra.agent.http.app import HttpServer, all_routes
from rostra.agent.http.permissions import anybody, at_servers, row_by_row
from rostra.agent.leaf import Leaves
from rostra.agent.local import LocalAgent
from rostra.agent.proxycfg import ProxyConfigs
from rostra.agent.results import Results
from rostra.server.state.catalog import Register
from rostra.server.state.intention import SetIntention
from rostra.server.state.kv import SetKey
from rostra.server.state.session import CreateSession
from rostra.wire.caller import Caller
from tests.support.authorizers import Nothing
from tests.support.cores import Cluster
from tests.support.waiting import eventually
from tests.unit.agent.http.conftest import Api

#: In every name, value and text that is stored.
MARK = "zq9"
SESSION = "5f0b9a1e-0000-4000-8000-00000000009f"
#: What stands for each placeholder of a path.
PARAMETERS = {
    "key": f"{MARK}/key",
    "service": f"{MARK}-web",
    "node": f"{MARK}-node",
    "id": f"{MARK}-web",
    "name": f"{MARK}-web",
    "session": SESSION,
    "intention": "x",
    "state": "any",
    "address": "127.0.0.1:1",
}
QUERIES = ("", "recurse", "keys", f"by=destination&name={MARK}-db", f"source={MARK}-web&destination={MARK}-db", "stale")


def refuse(caller: Caller) -> Any:
    return EVERYTHING if caller.token == "owner" else Nothing()


def path_of(template: str) -> str:
    for name, value in PARAMETERS.items():
        template = template.replace("{" + name + "}", value)
    assert "{" not in template, template
    return template


async def test_a_walk_over_all_routes_gets_nothing(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = cluster.leader()
        assert core is not None
        session = cluster.session(core)
        owner = Caller("owner")
        service = {"id": f"{MARK}-web", "name": f"{MARK}-web", "address": "192.0.2.1", "tags": (f"{MARK}-tag",)}
        check = {"id": f"{MARK}-check", "name": f"{MARK}-check", "status": "passing", "output": MARK}
        for command in (
            SetKey(f"{MARK}/key", MARK.encode()),
            Register(f"{MARK}-node", "192.0.2.2", service=service, checks=(check,)),
            SetIntention(f"{MARK}-web", f"{MARK}-db", "deny", description=MARK),
            CreateSession(SESSION, f"{MARK}-node", name=f"{MARK}-session", node_checks=()),
        ):
            await session.write(command, caller=owner)
        results = Results(session)
        local = LocalAgent(node=f"{MARK}-node", random=lambda: 0.0, port_is_busy=lambda address, port: False)
        leaves = Leaves(session, results, datacenter="dc1")
        proxies = ProxyConfigs(local, leaves, results, datacenter="dc1", bind_address="127.0.0.1")
        await local.start()
        await local.register_service({"Name": f"{MARK}-web", "Tags": [MARK], "Check": {"TTL": "10m", "Notes": MARK}})
        agent = Agent(
            session, results, node_name=f"{MARK}-node", local=local, leaves=leaves, proxies=proxies, authorize=refuse
        )
        server = HttpServer(agent, routes=all_routes())
        await server.start()
        api = Api(*await server.listen_tcp("127.0.0.1", 0), servers=session, agent=agent, server=server)  # type: ignore[arg-type]
        core.node._authorize = refuse
        tables = core.node.store.tables

        def stored() -> list[Any]:
            theirs = [row for row in tables.services.rows.values() if row.name != "consul"]
            return [dict(t.rows) for t in (tables.kv, tables.intentions, tables.sessions, tables.autopilot)] + [theirs]

        before = stored()
        try:
            for route in all_routes():
                for query in QUERIES if route.method == "GET" else QUERIES[:1]:
                    target = path_of(route.path) + f"?{query}"
                    body = json.dumps({"Name": "x", "Node": f"{MARK}-node", "Address": "x"}).encode()
                    reply = await api.call(route.method, target, None if route.method == "GET" else body)
                    said = reply.body
                    for value in PARAMETERS.values():
                        if value in target:  # what was asked for may be repeated, and nothing else
                            said = said.replace(value.encode(), b"")
                    assert MARK.encode() not in said, (route.method, target, reply.body)
                    assert b"192.0.2." not in said
                    assert reply.status in (200, 400, 401, 403, 404, 500), (route.method, target, reply)
            assert stored() == before
            assert list(local.services) == [f"{MARK}-web"]
            owns = await api.get(f"/v1/kv/{MARK}/key?raw&token=owner")
            assert owns.body == MARK.encode()
            again = await api.get(f"/v1/kv/{MARK}/key?raw")  # what the owner read is not stored for it
            assert (again.status, MARK.encode() in again.body) == (403, False)
            blocked = await api.get(f"/v1/health/service/{MARK}-web?index=1&wait=10ms")
            assert blocked.body == b"[]"
        finally:
            await server.close(1.0)
            await local.stop()
            await leaves.stop()
            await results.close()


def test_every_route_says_what_it_asks_of_its_caller() -> None:
    open_to_all = {(r.method, r.path) for r in all_routes() if r.may is anybody and "/v1/acl/" not in r.path}
    assert open_to_all == {
        ("GET", "/v1/agent/version"),
        ("GET", "/v1/catalog/datacenters"),
        ("POST", "/v1/internal/acl/authorize"),
    }
    at_the_agent = {r.path for r in all_routes() if r.path.startswith("/v1/agent/") and r.may is at_servers}
    assert at_the_agent == {"/v1/agent/connect/authorize", "/v1/agent/connect/ca/roots"}
    assert {r.path for r in all_routes() if r.may is row_by_row} == {
        "/v1/agent/members",
        "/v1/agent/services",
        "/v1/agent/service/{id}",
        "/v1/agent/checks",
        "/v1/agent/health/service/id/{id}",
        "/v1/agent/health/service/name/{name}",
    }


async def test_a_watch_that_is_refused_is_an_answer_and_no_hang(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        core = cluster.leader()
        assert core is not None
        session = cluster.session(core)
        await session.write(SetKey(MARK, b"x"))
        core.node._authorize = refuse
        results = Results(session)
        agent = Agent(session, results, authorize=refuse)
        server = HttpServer(agent, routes=all_routes())
        await server.start()
        api = Api(*await server.listen_tcp("127.0.0.1", 0), servers=session, agent=agent, server=server)  # type: ignore[arg-type]
        try:
            reply = await eventually(lambda: api.get(f"/v1/kv/{MARK}?index=1&wait=1s"))
            assert (reply.status, reply.body) == (403, b"Permission denied: kv.get")
        finally:
            await server.close(1.0)
            await results.close()
