from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rostra.agent.leaf import Leaves
from rostra.agent.local import LocalAgent
from rostra.agent.proxycfg import ProxyConfigs, intentions_in_order
from rostra.agent.results import Results
from rostra.connect_proxy.snapshot import ProxySnapshot
from rostra.server.state.catalog import Register
from rostra.server.state.intention import DeleteIntention, SetIntention
from rostra.server.state.rows import IntentionRow
from rostra.wire.errors import BadRequest, Denied, NotFound, Timeout
from tests.support.local_servers import TRUST_DOMAIN, LocalServers

UPSTREAM = {"DestinationName": "api", "LocalBindPort": 9001, "Config": {"connect_timeout_ms": 700}}


class World:
    def __init__(self) -> None:
        self.servers = LocalServers()
        self.results = Results(self.servers)
        self.local = LocalAgent(node="n", port_is_busy=lambda address, port: False)
        self.leaves = Leaves(self.servers, self.results, datacenter="dc1")
        self.proxies = ProxyConfigs(
            self.local, self.leaves, self.results, datacenter="dc1", bind_address="127.0.0.7", default_allow=True
        )

    async def register(self, name: str = "web", **sidecar: Any) -> str:
        await self.local.register_service({"Name": name, "Port": 80, "Connect": {"SidecarService": sidecar}})
        return f"{name}-sidecar-proxy"

    def instance(self, node: str, status: str, *, port: int = 21000, address: str = "") -> None:
        """An instance of api's proxy on another node."""
        proxy = {"destination_service_name": "api"}
        service = {"name": "api-proxy", "kind": "connect-proxy", "port": port, "address": address, "proxy": proxy}
        check = {"id": "c", "status": status, "service_id": "api-proxy"}
        self.servers.apply(Register(node, address=f"10.0.0.{node[1:]}", service=service, checks=(check,)))


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    w = World()
    await w.local.start()
    await w.proxies.start()
    try:
        yield w
    finally:
        await w.proxies.stop()
        await w.leaves.stop()
        await w.local.stop()
        await w.results.close()


def test_intentions_are_in_the_order_in_which_they_decide() -> None:
    pairs = [("*", "*", "deny"), ("a", "*", "allow"), ("*", "web", "deny"), ("a", "web", "allow"), ("b", "web", "deny")]
    rows = [IntentionRow(*pair, id="i") for pair in pairs]
    shown = [(i["Source"], i["Action"], i["Precedence"]) for i in intentions_in_order(rows)]
    assert shown == [("b", "deny", 9), ("a", "allow", 9), ("*", "deny", 8), ("a", "allow", 6), ("*", "deny", 5)]


async def test_a_snapshot_is_what_the_proxy_accepts_and_complete() -> None:
    async with world() as w:
        w.instance("n1", "passing")
        w.instance("n2", "passing", address="10.9.9.9")
        w.instance("n3", "warning")
        w.servers.apply(SetIntention("api", "web", "deny"))
        snapshot, digest = await w.proxies.snapshot(await w.register(Proxy={"Upstreams": [UPSTREAM]}))
        accepted = ProxySnapshot.from_json(snapshot)
        assert accepted.service == "web"
        assert accepted.trust_domain == TRUST_DOMAIN
        assert str(accepted.public) == "127.0.0.7:21000"
        assert str(accepted.local) == "127.0.0.1:80"
        assert [(r.source, r.action, r.precedence) for r in accepted.intentions] == [("api", "deny", 9)]
        (upstream,) = accepted.upstreams
        assert (str(upstream.bind), upstream.connect_timeout_ms) == ("127.0.0.1:9001", 700)
        assert upstream.identity == f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/api"
        assert [(e.address, e.port) for e in upstream.endpoints] == [("10.0.0.1", 21000), ("10.9.9.9", 21000)]
        assert len(digest) == 16


async def test_an_unchanged_snapshot_keeps_its_hash_and_waits() -> None:
    async with world() as w:
        proxy_id = await w.register()
        snapshot, digest = await w.proxies.snapshot(proxy_id)
        assert await w.proxies.wait(proxy_id, digest, 0.02) == (snapshot, digest)


async def test_an_intention_reaches_the_proxy_at_once() -> None:
    async with world() as w:
        proxy_id = await w.register()
        _, digest = await w.proxies.snapshot(proxy_id)
        for command, left in (
            (SetIntention("api", "web", "deny"), 1),
            (DeleteIntention("api", "web"), 0),
            (SetIntention("api", "WEB", "deny"), 1),
        ):
            waiting = asyncio.create_task(w.proxies.wait(proxy_id, digest, 60.0))
            await asyncio.sleep(0)
            w.servers.apply(command)
            snapshot, digest = await waiting
            assert len(snapshot["Intentions"]) == left


async def test_an_upstream_that_fails_leaves_the_snapshot() -> None:
    async with world() as w:
        w.instance("n1", "passing")
        proxy_id = await w.register(Proxy={"Upstreams": [UPSTREAM]})
        snapshot, digest = await w.proxies.snapshot(proxy_id)
        assert len(snapshot["Upstreams"][0]["Endpoints"]) == 1
        w.instance("n1", "critical")
        snapshot, _ = await w.proxies.wait(proxy_id, digest, 5.0)
        assert snapshot["Upstreams"][0]["Endpoints"] == []


async def test_a_renewed_leaf_and_a_new_root_make_a_new_snapshot() -> None:
    async with world() as w:
        w.leaves._root_change_spread_s = 0.0
        proxy_id = await w.register()
        first, digest = await w.proxies.snapshot(proxy_id)
        w.servers.rotate_root()
        while True:
            snapshot, digest = await w.proxies.wait(proxy_id, digest, 5.0)
            if snapshot["Leaf"]["SerialNumber"] != first["Leaf"]["SerialNumber"]:
                break
        assert len(snapshot["Roots"]) == 2
        assert snapshot["Roots"][1] == first["Roots"][0]  # the active one first


async def test_a_proxy_that_is_registered_differently_gets_another_snapshot() -> None:
    async with world() as w:
        proxy_id = await w.register()
        _, digest = await w.proxies.snapshot(proxy_id)
        waiting = asyncio.create_task(w.proxies.wait(proxy_id, digest, 5.0))
        await asyncio.sleep(0)
        await w.register(Proxy={"Upstreams": [UPSTREAM]})
        snapshot, _ = await waiting
        assert [u["Name"] for u in snapshot["Upstreams"]] == ["api"]


async def test_a_waiting_proxy_hears_that_it_was_deregistered() -> None:
    async with world() as w:
        proxy_id = await w.register()
        _, digest = await w.proxies.snapshot(proxy_id)
        waiting = asyncio.create_task(w.proxies.wait(proxy_id, digest, 5.0))
        await asyncio.sleep(0)
        await w.local.deregister_service("web")
        with pytest.raises(NotFound):
            await waiting


async def test_a_refused_watch_is_told_to_the_proxy_and_asked_for_again_next_time() -> None:
    async with world() as w:
        w.servers.refuse["intention.match"] = Denied("no")
        proxy_id = await w.register()
        with pytest.raises(Denied):
            await w.proxies.snapshot(proxy_id)
        w.servers.refuse.clear()
        assert (await eventually_snapshot(w, proxy_id))["ProxyID"] == proxy_id


async def eventually_snapshot(w: World, proxy_id: str) -> dict[str, Any]:
    """The watch that was refused is tried again after a moment; until then its refusal is the answer."""
    async with asyncio.timeout(30):
        while True:
            try:
                return (await w.proxies.snapshot(proxy_id))[0]
            except Denied:
                await asyncio.sleep(0.01)


async def test_what_is_not_a_proxy_has_no_snapshot() -> None:
    async with world() as w:
        await w.register()
        with pytest.raises(BadRequest, match="web is not a connect-proxy"):
            await w.proxies.snapshot("web")
        with pytest.raises(NotFound, match="unknown service ID: nope"):
            await w.proxies.snapshot("nope")


async def test_the_listener_binds_where_config_or_the_sidecar_says() -> None:
    async with world() as w:
        own = await w.register("own", Address="127.0.0.8", Port=22000)
        configured = await w.register("configured", Proxy={"Config": {"bind_address": "127.0.0.9", "bind_port": 5}})
        assert (await w.proxies.snapshot(own))[0]["Public"] == {"Address": "127.0.0.8", "Port": 22000}
        assert (await w.proxies.snapshot(configured))[0]["Public"] == {"Address": "127.0.0.9", "Port": 5}


async def test_a_proxy_that_waits_while_the_agent_stops_is_told_so() -> None:
    async with world() as w:
        proxy_id = await w.register()
        _, digest = await w.proxies.snapshot(proxy_id)
        waiting = asyncio.create_task(w.proxies.wait(proxy_id, digest, 60.0))
        await asyncio.sleep(0)
        await w.proxies.stop()
        with pytest.raises(Timeout, match="this agent is stopping"):
            await waiting
