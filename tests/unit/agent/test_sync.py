from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rostra.agent.local import LocalAgent
from rostra.agent.results import Results
from rostra.agent.sync import NodeIdentity, Picture, Sync, plan, tags_to_adopt
from rostra.runtime import log
from rostra.server.state.catalog import Deregister, NodeServices, Register
from rostra.server.state.health import NodeChecks
from rostra.server.state.rows import CheckRow, NodeRow, ServiceRow
from rostra.wire.errors import Denied, NoLeader
from tests.support.local_servers import LocalServers
from tests.support.waiting import eventually

NODE_ID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
IDENTITY = NodeIdentity("n", NODE_ID, "127.0.0.1", "dc1", {"lan": "127.0.0.1"}, {"rack": "1"})
KNOWN = NodeRow("n", NODE_ID, "127.0.0.1", "dc1", {"lan": "127.0.0.1"}, {"rack": "1"}, 5, 6)


def picture(
    node: NodeRow | None = KNOWN, services: tuple[ServiceRow, ...] = (), checks: tuple[CheckRow, ...] = ()
) -> Picture:
    return Picture(node, {s.id: s for s in services}, {c.id: c for c in checks})


def commands(services: Any = (), checks: Any = (), catalog: Picture | None = None, **options: Any) -> list[Any]:
    of_services, of_checks = {s.id: s for s in services}, {c.id: c for c in checks}
    return [step.command for step in plan(IDENTITY, of_services, of_checks, catalog or picture(), **options)]


WEB = ServiceRow("n", "w1", "web", port=80, proxy={"upstreams": ({"destination_name": "b"},)})
CHECK = CheckRow("n", "c1", "c", "passing", service_id="w1", service_name="web")


def test_equal_pictures_need_nothing() -> None:
    there = WEB._replace(create_index=7, modify_index=9, proxy={"upstreams": [{"destination_name": "b"}]})
    assert commands([WEB], [CHECK], picture(services=(there,), checks=(CHECK._replace(modify_index=9),))) == []


def test_a_node_that_is_not_there_comes_first() -> None:
    first, second = commands([WEB], [CHECK], picture(node=None))
    assert (first.node, first.address, first.node_id, first.skip_node_update) == ("n", "127.0.0.1", NODE_ID, False)
    assert first.service is None
    assert second.skip_node_update
    assert second.service["name"] == "web"
    assert [c["id"] for c in second.checks] == ["c1"]


def test_a_changed_address_or_meta_registers_the_node_anew() -> None:
    assert [c.service for c in commands(catalog=picture(KNOWN._replace(address="9.9.9.9")))] == [None]
    assert [c.service for c in commands(catalog=picture(KNOWN._replace(meta={})))] == [None]


def test_of_ids_that_differ_by_case_only_one_is_written_and_then_nothing() -> None:
    first, last = ServiceRow("n", "App-1", "app", port=1), ServiceRow("n", "app-1", "app", port=2)
    checks = [CHECK._replace(id="C1", service_id="App-1"), CHECK._replace(id="c2", service_id="app-1")]
    (command,) = commands([first, last], checks, picture(services=(first,)))
    assert (command.service["id"], [(c["id"], c["service_id"]) for c in command.checks]) == (
        "app-1",
        [("C1", "app-1"), ("c2", "app-1")],
    )
    there = tuple(check._replace(service_id="app-1") for check in checks)
    assert commands([first, last], checks, picture(services=(last,), checks=there)) == []


def test_a_changed_check_goes_without_its_service() -> None:
    there = picture(services=(WEB,), checks=(CHECK._replace(status="critical"),))
    (command,) = commands([WEB], [CHECK], there)
    assert command.service is None
    assert [c["status"] for c in command.checks] == ["passing"]


def test_an_output_alone_waits_where_it_is_deferred_and_a_status_does_not() -> None:
    there = picture(services=(WEB,), checks=(CHECK,))
    changed = CHECK._replace(output="new")
    assert commands([WEB], [changed], there, deferred=frozenset({"c1"})) == []
    assert len(commands([WEB], [changed], there)) == 1
    assert len(commands([WEB], [changed._replace(status="warning")], there, deferred=frozenset({"c1"}))) == 1


def test_what_the_agent_does_not_know_is_removed_except_serf_health() -> None:
    serf = CheckRow("n", "serfHealth", status="passing")
    stray = CheckRow("n", "stray")
    there = picture(services=(WEB,), checks=(CHECK, serf, stray))
    assert commands(catalog=there) == [Deregister("n", service_id="w1"), Deregister("n", check_id="stray")]


def test_a_server_leaves_the_service_consul_alone_and_a_client_does_not() -> None:
    consul = ServiceRow("n", "consul", "consul", port=8300)
    assert commands(catalog=picture(services=(consul,)), is_server=True) == []
    assert commands(catalog=picture(services=(consul,))) == [Deregister("n", service_id="consul")]


def test_tags_of_others_are_adopted_only_where_the_service_allows_it() -> None:
    tagged = WEB._replace(tags=("theirs",))
    allowing = WEB._replace(enable_tag_override=True)
    assert tags_to_adopt({"w1": WEB}, picture(services=(tagged,))) == {}
    assert tags_to_adopt({"w1": allowing}, picture(services=(tagged,))) == {"w1": ("theirs",)}
    assert tags_to_adopt({"w1": allowing}, picture()) == {}


# -- the loop ---------------------------------------------------------------------------------------------------------


class World:
    def __init__(self) -> None:
        self.servers = LocalServers()
        self.local = LocalAgent(node="n", random=lambda: 0.0)
        self.results = Results(self.servers)
        self.sync = Sync(self.local, self.servers, self.results, IDENTITY, retry_s=0.05, random=lambda: 0.0)

    def services(self) -> dict[str, ServiceRow]:
        rows = self.servers.rows(NodeServices("n"))
        return {key[1]: row for key, row in rows.items() if key[0] == "s"}

    def checks(self) -> dict[str, str]:
        return {key: row.status for key, row in self.servers.rows(NodeChecks("n")).items()}


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    w = World()
    await w.local.start()
    await w.sync.start()
    try:
        yield w
    finally:
        await w.sync.stop()
        await w.local.stop()
        await w.results.close()


async def test_the_node_and_its_services_appear_in_the_catalog() -> None:
    async with world() as w:
        await eventually(lambda: ("",) in w.servers.rows(NodeServices("n")))
        await w.local.register_service({"Name": "web", "Port": 80, "Check": {"TTL": "1h"}})
        await eventually(lambda: "web" in w.services(), within_s=0.5)
        assert w.checks() == {"service:web": "critical"}
        await w.local.set_ttl_status("service:web", "passing")
        await eventually(lambda: w.checks() == {"service:web": "passing"}, within_s=0.5)
        await w.local.deregister_service("web")
        await eventually(lambda: not w.services() and not w.checks(), within_s=0.5)


async def test_a_catalog_that_agrees_is_not_written_to() -> None:
    async with world() as w:
        await w.local.register_service({"Name": "web", "Connect": {"SidecarService": {}}})
        assert not await w.sync.settled(within_s=5.0)
        written = len(w.servers.written)
        w.sync.trigger()
        assert not await w.sync.settled(within_s=5.0)
        assert len(w.servers.written) == written


async def test_a_service_that_the_catalog_loses_comes_back_within_a_second() -> None:
    async with world() as w:
        await w.local.register_service({"Name": "web", "Check": {"TTL": "1h"}})
        assert not await w.sync.settled(within_s=5.0)
        w.servers.apply(Deregister("n", service_id="web"))
        await eventually(lambda: "web" in w.services() and "service:web" in w.checks(), within_s=1.0)


async def test_a_whole_node_that_the_catalog_loses_comes_back() -> None:
    async with world() as w:
        await w.local.register_service({"Name": "web"})
        assert not await w.sync.settled(within_s=5.0)
        w.servers.apply(Deregister("n"))
        await eventually(lambda: "web" in w.services(), within_s=1.0)


async def test_a_foreign_service_on_this_node_is_removed_and_serf_health_stays() -> None:
    async with world() as w:
        await eventually(lambda: ("",) in w.servers.rows(NodeServices("n")))
        serf = {"id": "serfHealth", "status": "passing"}
        w.servers.apply(Register("n", skip_node_update=True, checks=(serf,)))
        w.servers.apply(Register("n", skip_node_update=True, service={"id": "stray", "name": "stray"}))
        await eventually(lambda: not w.services(), within_s=1.0)
        assert w.checks() == {"serfHealth": "passing"}


async def test_tags_written_by_others_stay_where_the_service_allows_it() -> None:
    async with world() as w:
        await w.local.register_service({"Name": "free", "EnableTagOverride": True})
        await w.local.register_service({"Name": "fixed"})
        assert not await w.sync.settled(within_s=5.0)
        for name in ("free", "fixed"):
            row = {**w.services()[name]._asdict(), "tags": ("theirs",)}
            service = {k: v for k, v in row.items() if k not in ("node", "create_index", "modify_index")}
            w.servers.apply(Register("n", skip_node_update=True, service=service))
        await eventually(lambda: w.services()["fixed"].tags == () and w.local.services["free"].row.tags == ("theirs",))
        assert w.services()["free"].tags == ("theirs",)


async def test_what_changed_while_the_servers_were_away_is_written_when_they_are_back() -> None:
    async with world() as w:
        await eventually(lambda: ("",) in w.servers.rows(NodeServices("n")))
        w.servers.cut()
        await w.local.register_service({"Name": "web"})
        assert not w.services()
        w.servers.heal()
        await eventually(lambda: "web" in w.services())


async def test_a_refused_registration_does_not_hold_up_the_others_and_is_tried_again() -> None:
    async with world() as w:
        await w.local.register_service({"Name": "old"})
        assert not await w.sync.settled(within_s=5.0)
        w.servers.refuse["catalog.deregister"] = Denied("no")
        await w.local.deregister_service("old")
        await w.local.register_service({"Name": "new"})
        await eventually(lambda: "new" in w.services())
        assert "old" in w.services()
        w.servers.refuse.clear()
        await eventually(lambda: set(w.services()) == {"new"})


async def test_while_there_is_no_leader_it_is_told_once_and_not_at_every_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, attempts = io.StringIO(), []
    log.configure("warn", stream=told)
    try:
        async with world() as w:
            await eventually(lambda: ("",) in w.servers.rows(NodeServices("n")))

            async def write(command: Any, **_: Any) -> None:
                attempts.append(command)
                raise NoLeader

            monkeypatch.setattr(w.servers, "write", write)
            await w.local.register_service({"Name": "web"})
            await eventually(lambda: len(attempts) >= 4)
            assert told.getvalue().count("the catalog could not be brought up to date") == 1
    finally:
        log.configure("info")


# -- who waits for the catalog -----------------------------------------------------------------------------------------


async def test_what_was_settled_is_in_the_catalog_whatever_came_just_before() -> None:
    async with world() as w:
        for _ in range(20):
            await w.local.register_service({"Name": "web", "Check": {"TTL": "1h"}})
            assert await w.sync.settled("web") == ""
            assert "web" in w.services()
            await w.local.set_ttl_status("service:web", "passing")
            assert await w.sync.settled("web") == ""
            assert w.checks() == {"service:web": "passing"}
            await w.local.deregister_service("web")
            assert await w.sync.settled("web") == ""
            assert not w.services()
            assert not w.checks()


async def test_a_watch_that_shows_the_past_brings_nothing_of_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as w:
        assert await w.sync.settled() == ""
        services = w.results.live(NodeServices("n"))
        monkeypatch.setattr(services, "_take", lambda delta: None)  # from now on it is late
        for _ in range(3):
            await w.local.register_service({"Name": "web"})
            assert await w.sync.settled("web") == ""
            assert "web" in w.services()
            await w.local.deregister_service("web")
            assert await w.sync.settled("web") == ""
            assert not w.services()


async def test_changes_that_come_while_a_round_is_under_way_share_the_next_one() -> None:
    async with world() as w:
        assert await w.sync.settled() == ""
        rounds = 0
        compare = w.sync._compare

        async def counted(catalog: Picture) -> bool:
            nonlocal rounds
            rounds += 1
            return await compare(catalog)

        w.sync._compare = counted  # type: ignore[method-assign]

        async def register(i: int) -> str:
            await w.local.register_service({"Name": f"s{i}"})
            return await w.sync.settled(f"s{i}")

        assert await asyncio.gather(*(register(i) for i in range(64))) == [""] * 64
        assert len(w.services()) == 64
        assert rounds <= 8


async def test_a_refusal_is_told_to_those_whom_it_concerns() -> None:
    async with world() as w:
        await w.local.register_service({"Name": "old"})
        assert await w.sync.settled("old") == ""
        w.servers.refuse["catalog.deregister"] = Denied("no deregistering here")
        await w.local.deregister_service("old")
        assert "no deregistering here" in await w.sync.settled("old")
        await w.local.register_service({"Name": "new"})
        assert await w.sync.settled("new") == ""
        assert "new" in w.services()


async def test_without_servers_the_first_waits_and_the_others_are_told_at_once() -> None:
    async with world() as w:
        assert await w.sync.settled() == ""
        w.servers.cut()
        await w.local.register_service({"Name": "web"})
        assert await w.sync.settled("web", within_s=0.2)
        began = time.monotonic()
        for i in range(50):
            await w.local.register_service({"Name": f"s{i}"})
            assert await w.sync.settled(f"s{i}", within_s=0.2)
        assert time.monotonic() - began < 0.2 * 50 / 2
        w.servers.heal()
        await eventually(lambda: len(w.services()) == 51)
        await w.local.deregister_service("web")
        assert await w.sync.settled("web") == ""


async def test_who_no_longer_waits_leaves_nothing_behind() -> None:
    async with world() as w:
        assert await w.sync.settled() == ""
        w.servers.cut()
        await w.local.register_service({"Name": "web"})
        waiting = asyncio.ensure_future(w.sync.settled("web", within_s=30.0))
        await eventually(lambda: w.sync._waiting)
        waiting.cancel()
        await eventually(lambda: not w.sync._waiting)


async def test_no_round_begins_while_a_write_of_the_last_one_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world() as w:
        assert await w.sync.settled() == ""
        held, release, order = asyncio.Event(), asyncio.Event(), []
        plain = w.servers.write

        async def write(command: Any, **options: Any) -> Any:
            name = (command.service or {}).get("name") if isinstance(command, Register) else command.service_id
            if name == "slow" and not release.is_set():
                held.set()
                await release.wait()
            if name == "lost" and not release.is_set():
                raise NoLeader
            order.append((command.kind, name))
            return await plain(command, **options)

        monkeypatch.setattr(w.servers, "write", write)
        for name in ("slow", "lost"):
            await w.local.register_service({"Name": name})
        await held.wait()
        await w.local.deregister_service("slow")
        release.set()
        assert await w.sync.settled("slow") == ""
        await eventually(lambda: set(w.services()) == {"lost"})
        assert order[-1] != ("catalog.register", "slow")
