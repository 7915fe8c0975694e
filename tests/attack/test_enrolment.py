"""Whoever knows `encrypt` may enrol: no name of a living node is taken over so, and no list grows without a bound."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import parse_secrets
from rostra.server import enrolment
from rostra.server import leader as duties
from rostra.server.enrolment import BURST, Pace
from rostra.server.peers import dial
from rostra.server.run import Core
from rostra.wire.errors import Conflict, Denied, NoLeader, RostraError
from rostra.wire.rpc import RpcClient, hello
from tests.support.cores import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.cluster


def identity_of(cluster: Cluster, name: str, directory: str) -> NodeIdentity:
    return NodeIdentity.open(cluster.directory / directory, name, parse_secrets([cluster.secret]))


async def enter(core: Core, identity: NodeIdentity) -> RpcClient:
    """The session of a node that answers no probe. Raises what it is refused with."""
    said = {"name": identity.node_name, "node_id": identity.node_id, "address": "127.0.0.1", "serf_port": 1}
    connection, _, _ = await dial(
        "127.0.0.1", core.rpc_port, identity.client_context(), hello("rpc", **said), key_hash=None
    )
    caller = RpcClient(connection)
    connection.on_frame, connection.on_lost = caller.on_frame, caller.on_lost
    return caller


async def comes_in(core: Core, identity: NodeIdentity) -> None:
    """It is let in in the end; what it was refused with is remembered for a second."""

    async def is_in() -> bool:
        with contextlib.suppress(Conflict):
            return (await enter(core, identity)).open
        return False

    await eventually(is_in, 20)


@contextlib.asynccontextmanager
async def pinging(caller: RpcClient) -> AsyncIterator[None]:
    """An agent that lives."""

    async def ping() -> None:
        with contextlib.suppress(RostraError):
            while caller.open:
                await caller.call("ping")
                await asyncio.sleep(0.2)

    task = asyncio.create_task(ping())
    try:
        yield
    finally:
        task.cancel()


def row(core: Core, name: str) -> Any:
    return core.node.store.tables.members.get(name)


async def fails(cluster: Cluster, name: str) -> None:
    """Nobody hears it, it answers no probe, and every server has applied that it has failed."""

    def is_silent() -> bool:
        core = cluster.leader()
        assert core is not None
        heard = core._leader._heard.get(row(core, name).key_hash, float("-inf"))
        return core.node.clock() - heard > 1.1 and not any(
            name in dict(c._endpoint.agents.heard()) for c in cluster.cores.values()
        )

    await eventually(is_silent, 20)
    await eventually(lambda: all(row(c, name).status == "failed" for c in cluster.cores.values()), 20)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duties, "GRACE_S", 0.0)
    monkeypatch.setattr(duties, "SILENT_S", 0.3)


def leader_and_others(cluster: Cluster) -> tuple[Core, list[Core]]:
    found = cluster.leader()
    assert found is not None
    return found, cluster.followers()


async def test_the_name_of_a_failed_node_is_not_free_while_any_server_has_a_connection_of_it(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        first, (second, third) = leader_and_others(cluster)
        victim, thief = identity_of(cluster, "c2", "victim"), identity_of(cluster, "c2", "thief")
        session = await enter(second, victim)  # and it says nothing more: its loop stands still
        await fails(cluster, "c2")
        for core in (first, second, third):
            name = second.settings.node_name
            with pytest.raises(Conflict, match=f"and that node has a connection to server {name}: choose another"):
                await enter(core, thief)
        assert session.open
        assert row(first, "c2").key_hash == victim.key_hash
        async with pinging(session):
            await eventually(lambda: row(first, "c2").status == "alive")


async def test_a_name_that_goes_to_another_key_takes_the_session_of_the_old_one_and_its_writes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Cluster(tmp_path) as cluster:
        first, (second, _) = leader_and_others(cluster)
        victim, thief = identity_of(cluster, "c2", "victim"), identity_of(cluster, "c2", "thief")
        session = await enter(second, victim)
        await fails(cluster, "c2")

        async def nobody(_member: Any) -> str:
            return ""

        monkeypatch.setattr(first._enrolment, "_holder", nobody)  # the server that has it could not be asked
        stolen = await enter(first, thief)
        await eventually(lambda: not session.open)
        with pytest.raises(RostraError):
            await session.call("write", ("c", 1, 1), "kv.set", {"key": "k", "value": b"x"}, "")
        assert dict(second._endpoint.agents.heard()).get("c2") is None
        async with pinging(stolen):
            for core in (first, second):
                with pytest.raises(Conflict, match=r"'c2' went to another node key .* run `rostra force-leave c2`"):
                    await enter(core, victim)
        said = [json.loads(line) if line.startswith("{") else line for line in capsys.readouterr().err.splitlines()]
        audit = next(str(line) for line in said if "a node name goes to another key" in str(line))
        assert victim.key_hash in audit
        assert thief.key_hash in audit
        assert "127.0.0.1" in audit
        assert any("ended the session of a node whose name belongs to another key" in str(line) for line in said)

        stolen._connection.abort("the thief is gone")
        await fails(cluster, "c2")
        await eventually(lambda: not first._endpoint.agents.holds("c2", thief.key_hash))
        await comes_in(second, victim)
        await eventually(lambda: row(second, "c2").key_hash == victim.key_hash)


async def test_who_shows_another_key_is_not_heard_for_the_node_of_that_name(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core = cluster.cores["s1"]
        await enter(core, identity_of(cluster, "c2", "c2"))
        await eventually(lambda: row(core, "c2") is not None)
        core._leader._heard.clear()
        core._leader.heard([("c2", "f" * 64), ("nobody", "")])
        assert core._leader._heard == {}
        core._leader.heard([("c2", row(core, "c2").key_hash)])
        core._leader.heard([("c2", "")])  # as a follower of an older version says it
        assert list(core._leader._heard) == [row(core, "c2").key_hash]


async def test_what_a_follower_reports_it_reports_with_keys_and_a_malformed_report_is_refused(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        first, (second, _) = leader_and_others(cluster)
        caller = second._peers.client(first._identity.node_id)
        assert caller is not None
        for args in ({"names": ("c2",), "keys": ()}, {"names": ("c2",), "keys": 7}, {"names": (7,), "keys": ([],)}):
            with contextlib.suppress(RostraError):
                await caller.call("act", "heard", args)
        session = await enter(second, identity_of(cluster, "c3", "c3"))
        async with pinging(session):
            await eventually(lambda: row(first, "c3") is not None)
            key = row(first, "c3").key_hash
            first._leader._heard.pop(key, None)
            await eventually(lambda: key in first._leader._heard)


# -- how many ---------------------------------------------------------------------------------------------------------


def test_one_address_enrols_a_whole_deployment_at_once_and_then_one_each_second() -> None:
    pace = Pace()
    assert [pace.takes("10.0.0.1", 0.0) for _ in range(BURST + 1)] == [True] * BURST + [False]
    assert pace.takes("10.0.0.2", 0.0)
    assert [pace.takes("10.0.0.1", 1.0) for _ in range(2)] == [True, False]
    assert not pace.takes("10.0.0.1", 1.9)
    assert [pace.takes("10.0.0.1", 10_000.0) for _ in range(BURST + 1)] == [True] * BURST + [False]


def test_the_addresses_of_one_network_of_ipv6_are_one_source_and_sources_are_bounded() -> None:
    pace = Pace()
    assert sum(pace.takes(f"2001:db8::{n:x}", 0.0) for n in range(2 * BURST)) == BURST
    assert pace.takes("2001:db8:0:1::1", 0.0)
    for n in range(2 * enrolment.SOURCES_MAX):
        pace.takes(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 1.0)
    assert len(pace._left) <= enrolment.SOURCES_MAX


async def test_names_that_somebody_enrols_and_leaves_are_bounded_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "BURST", 6)
    monkeypatch.setattr(enrolment, "EACH_SECOND", 0.001)
    monkeypatch.setattr(duties, "UNUSED_S", 0.2)
    async with Cluster(tmp_path, 1) as cluster:
        core = cluster.cores["s1"]
        for n in range(6):
            (await enter(core, identity_of(cluster, f"x{n}", f"x{n}")))._connection.abort("gone")
        with pytest.raises(Conflict, match=r"6 new node names have come from 127\.0\.0\.1 .* tries again by itself"):
            await enter(core, identity_of(cluster, "x6", "x6"))
        assert row(core, "x6") is None
        await eventually(lambda: not [n for n in core.node.store.tables.members.rows if n.startswith("x")], 5)
        assert not [n for n in core.node.store.tables.nodes.rows if n.startswith("x")]
        assert row(core, "s1").status == "alive"


async def test_where_too_many_names_are_unused_the_next_one_is_told_the_bound_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "UNUSED_MAX", 2)
    async with Cluster(tmp_path, 1) as cluster:
        core = cluster.cores["s1"]
        sessions = [await enter(core, identity_of(cluster, f"x{n}", f"x{n}")) for n in range(2)]
        with pytest.raises(Conflict, match=r"2 node names are enrolled and unused, and 2 are allowed: .*force-leave"):
            await enter(core, identity_of(cluster, "c1", "c1"))
        assert all(s.open for s in sessions)
        anchors = list(core._identity.anchor_hashes)
        await sessions[0].call("act", "node.report", {"anchors": anchors}, "")  # what every agent does at once
        await comes_in(core, identity_of(cluster, "c1", "c1"))
        # Who has a name comes in, however many are unused.
        assert (await enter(core, identity_of(cluster, "x1", "x1"))).open


@pytest.mark.long
async def test_a_thousand_names_in_a_row_from_one_address_leave_no_more_than_the_burst(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, refused, began = cluster.cores["s1"], 0, time.monotonic()
        for n in range(1000):
            try:
                (await enter(core, identity_of(cluster, f"x{n}", f"x{n}")))._connection.abort("gone")
            except (Conflict, Denied, NoLeader):
                refused += 1
        allowed = BURST + time.monotonic() - began + 1
        assert 1000 - refused <= allowed
        assert len(core.node.store.tables.members.rows) <= allowed + 1
