"""The leader's duties when something goes wrong in the middle of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from rostra.server import leader as duties
from rostra.server.run import Core
from rostra.server.state.catalog import Register
from rostra.server.state.cluster import BindNode
from rostra.server.state.kv import DeleteKey, ListKeys, SetKey
from rostra.server.state.session import CreateSession, DestroySession, ExpireSession
from rostra.wire.codec import encode_value
from rostra.wire.errors import Conflict, NoLeader, NotFound
from tests.support.cores import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.cluster

WEB = {"id": "web", "name": "web", "port": 80}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duties, "TICK_S", 0.02)


def server_of(cluster: Cluster) -> tuple[Core, Any, duties.LeaderDuties]:
    core = cluster.cores["s1"]
    return core, core.node, core._leader


def status(core: Core, node: str) -> tuple[str, str]:
    """(of the member, of its serfHealth)."""
    tables = core.node.store.tables
    member, check = tables.members.get(node), tables.checks.get((node, "serfHealth"))
    return member.status if member else "", check.status if check else ""


async def enrol(core: Core, name: str) -> None:
    """A member that answers no probe."""
    await core.node.own_write(
        BindNode(name=name, key_hash=name, role="client", address="127.0.0.1", node_id=str(uuid.uuid4()), serf_port=1)
    )


async def test_a_node_that_failed_is_critical_although_leadership_was_lost_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await enrol(core, "a1")
        await eventually(lambda: status(core, "a1") == ("alive", "passing"))
        real = node.own_write
        refused: list[Any] = []

        async def own_write(command: Any, **how: Any) -> Any:
            if isinstance(command, Register) and command.checks[0]["status"] == "critical" and not refused:
                refused.append(command)
                raise NoLeader
            return await real(command, **how)

        monkeypatch.setattr(node, "own_write", own_write)
        monkeypatch.setattr(duties, "GRACE_S", 0.0)
        await eventually(lambda: refused)
        await eventually(lambda: status(core, "a1") == ("failed", "critical"), within_s=3.0)


async def test_a_node_that_is_heard_while_others_are_probed_is_not_declared_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, leader = server_of(cluster)
        await enrol(core, "a1")
        await enrol(core, "a2")
        await eventually(lambda: status(core, "a2") == ("alive", "passing"))
        failed = []

        async def probe(member: Any) -> bool:
            leader.heard([("a1", "")])  # its session is back
            return False

        real = node.own_write

        async def own_write(command: Any, **how: Any) -> Any:
            if getattr(command, "status", "") == "failed":
                failed.append(command.name)
            return await real(command, **how)

        monkeypatch.setattr(node, "own_write", own_write)
        monkeypatch.setattr(leader, "_probe", probe)
        monkeypatch.setattr(duties, "GRACE_S", 0.0)
        await eventually(lambda: "a2" in failed)
        assert failed == ["a2"]


async def test_a_session_renewed_while_another_is_expired_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, leader = server_of(cluster)
        await eventually(lambda: status(core, "s1") == ("alive", "passing"))
        ids = sorted(str(uuid.uuid4()) for _ in range(2))
        for session_id in ids:
            await node.own_write(CreateSession(id=session_id, node="s1", ttl_ms=30_000, node_checks=()))
        real, expired = node.own_write, []

        async def own_write(command: Any, **how: Any) -> Any:
            if isinstance(command, ExpireSession):
                expired.append(command.id)
                for session_id in ids:
                    if session_id not in expired:
                        assert leader.renew(session_id) is not None
            return await real(command, **how)

        monkeypatch.setattr(node, "own_write", own_write)
        for session_id in ids:
            node.session_seen[session_id] = time.monotonic() - 100
        await eventually(lambda: len(node.store.tables.sessions.rows) < 2)
        await asyncio.sleep(0.2)
        assert len(expired) == 1
        assert len(node.store.tables.sessions.rows) == 1


async def test_a_node_that_cannot_be_registered_does_not_keep_the_leader_from_its_other_duties(
    tmp_path: Path,
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await eventually(lambda: status(core, "s1") == ("alive", "passing"))
        check = {"id": "serfHealth", "name": "x", "status": "passing"}
        await node.own_write(Register(node="a1", address="10.9.9.9", node_id=str(uuid.uuid4()), checks=(check,)))
        await enrol(core, "a1")  # its name is taken in the catalog, by something that is not a member
        await enrol(core, "a2")
        await eventually(lambda: status(core, "a2") == ("alive", "passing"), within_s=3.0)
        session_id = str(uuid.uuid4())
        await node.own_write(CreateSession(id=session_id, node="s1", ttl_ms=50, node_checks=()))
        await eventually(lambda: session_id not in node.store.tables.sessions.rows, within_s=3.0)


async def test_a_node_whose_address_is_none_does_not_keep_the_leader_from_its_other_duties(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duties, "GRACE_S", 0.0)
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await eventually(lambda: status(core, "s1") == ("alive", "passing"))
        address = "x" * 70 + ".example"  # no name that could be looked up
        await node.own_write(BindNode(name="a1", key_hash="a1", role="client", address=address))
        await eventually(lambda: status(core, "a1") == ("failed", "critical"), within_s=3.0)
        session_id = str(uuid.uuid4())
        await node.own_write(CreateSession(id=session_id, node="s1", ttl_ms=50, node_checks=()))
        await eventually(lambda: session_id not in node.store.tables.sessions.rows, within_s=3.0)


async def test_a_node_made_to_leave_is_left_and_out_of_the_catalog_until_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path) as cluster:
        core = cluster.leader()
        assert core is not None
        tables = core.node.store.tables
        await enrol(core, "c1")
        await eventually(lambda: status(core, "c1") == ("alive", "passing"))
        await core.node.own_write(Register(node="c1", address="127.0.0.1", skip_node_update=True, service=WEB))
        session = cluster.session(cluster.followers()[0])  # the act is passed on to the leader
        await session.act("member.force-leave", {"name": "c1", "prune": False})
        assert tables.members.rows["c1"].status == "left"
        assert "c1" not in tables.nodes.rows
        assert ("c1", "web") not in tables.services.rows
        await session.act("member.force-leave", {"name": "c1", "prune": False})
        core._leader.heard([("c1", "")])
        await eventually(lambda: status(core, "c1") == ("alive", "passing"))


async def test_what_was_decided_about_a_server_is_not_written_once_it_is_made_to_leave(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, leader = server_of(cluster)
        await enrol(core, "c1")
        await eventually(lambda: status(core, "c1") == ("alive", "passing"))
        member = node.store.tables.members.rows["c1"]
        core._roster.leaving.add("c1")
        await leader._change(member, leader._mark, "failed")
        assert status(core, "c1") == ("alive", "passing")
        core._roster.leaving.discard("c1")
        await leader._change(member, leader._mark, "failed")
        assert status(core, "c1") == ("failed", "critical")


async def test_a_pruned_node_is_no_member_and_its_name_is_free(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await enrol(core, "c1")
        session = cluster.session(core)
        await session.act("member.force-leave", {"name": "c1", "prune": True})
        assert "c1" not in node.store.tables.members.rows
        await node.own_write(BindNode(name="c1", key_hash="another", role="client", address="127.0.0.1"))


async def test_who_is_alive_a_server_or_unknown_is_not_made_to_leave(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, leader = server_of(cluster)
        session = cluster.session(core)
        await enrol(core, "c1")
        leader.heard([("c1", "")])
        with pytest.raises(Conflict, match=r"'c1' .* is alive: stop its agent first"):
            await session.act("member.force-leave", {"name": "c1", "prune": False})
        with pytest.raises(Conflict, match=r"'s1' .* is alive: stop its agent first, or .*remove-peer"):
            await session.act("member.force-leave", {"name": "s1", "prune": True})
        with pytest.raises(NotFound, match="no member is called 'c9'"):
            await session.act("member.force-leave", {"name": "c9", "prune": False})
        assert node.store.tables.members.rows["c1"].status == "alive"


async def test_a_node_that_answers_a_probe_is_alive_although_nobody_heard_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, _, leader = server_of(cluster)

        async def probe(member: Any) -> bool:
            return True

        monkeypatch.setattr(leader, "_probe", probe)
        await enrol(core, "c1")
        with pytest.raises(Conflict, match="is alive"):
            await leader.force_leave("c1", prune=False)


async def test_a_catalog_entry_of_another_node_stays_when_a_member_of_its_name_is_made_to_leave(
    tmp_path: Path,
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        _, node, leader = server_of(cluster)
        check = {"id": "serfHealth", "name": "x", "status": "passing"}
        await node.own_write(Register(node="c1", address="10.9.9.9", node_id=str(uuid.uuid4()), checks=(check,)))
        await node.own_write(BindNode(name="c1", key_hash="c1", role="client", address="x", node_id=str(uuid.uuid4())))
        await leader.force_leave("c1", prune=False)
        assert node.store.tables.nodes.rows["c1"].address == "10.9.9.9"


async def test_a_quiet_cluster_writes_nothing(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await node.own_write(Register(node="WEB1", address="10.9.9.9"))
        await enrol(core, "web1")
        await eventually(lambda: status(core, "WEB1")[1] == "passing")
        await eventually(lambda: node.store.tables.members.rows["s1"].anchors == core._identity.anchor_hashes)
        await asyncio.sleep(0.3)
        before = node.store.index
        await asyncio.sleep(0.5)
        assert node.store.index == before


async def test_deletions_are_forgotten_once_they_are_old_and_no_index_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duties, "TOMBSTONE_S", 0.6)
    monkeypatch.setattr(duties, "NOTED_EVERY_S", 0.05)
    monkeypatch.setattr(duties, "REAPED_AT_ONCE", 10)
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await eventually(lambda: status(core, "s1") == ("alive", "passing"))
        for i in range(25):
            await node.own_write(SetKey(f"d/{i}", b""))
            await node.own_write(DeleteKey(f"d/{i}"))
        tombstones = node.store.tables.tombstones.rows
        assert tombstones  # not at once
        before = node.store.evaluate(ListKeys("d")).index
        await eventually(lambda: not tombstones)
        assert node.store.evaluate(ListKeys("d")).index >= before
        assert node.store.reapable(node.store.index + 1, 1) == 0  # nothing is left to write


async def test_lock_delays_that_are_over_are_forgotten(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await eventually(lambda: status(core, "s1") == ("alive", "passing"))
        for round_ in range(3):
            session_id = str(uuid.uuid4())
            await node.own_write(CreateSession(id=session_id, node="s1", lock_delay_ms=1, node_checks=()))
            keys = [f"lock/{round_}/{i}" for i in range(1200)]
            await asyncio.gather(*(node.own_write(SetKey(key, b"", acquire=session_id)) for key in keys))
            await node.own_write(DestroySession(session_id))
            await asyncio.sleep(0.01)
        assert len(node.lock_delays) < 2500


async def test_a_repeated_acquire_gets_its_first_result_although_the_lock_is_delayed_by_now(tmp_path: Path) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)
        await eventually(lambda: status(core, "s1") == ("alive", "passing"))
        session_id = str(uuid.uuid4())
        await node.own_write(CreateSession(id=session_id, node="s1", node_checks=()))
        kind, args = encode_value(SetKey("lock", b"x", acquire=session_id))
        origin = ("client", 1, 1)
        assert await node.write(origin, kind, args) is True
        await node.own_write(DestroySession(session_id))
        assert await node.write(origin, kind, args) is True


async def test_the_service_of_the_servers_says_what_consuls_clients_look_for_and_an_older_row_is_mended(
    tmp_path: Path,
) -> None:
    async with Cluster(tmp_path, 1) as cluster:
        core, node, _ = server_of(cluster)

        def meta() -> dict[str, str]:
            row = core.node.store.tables.services.get(("s1", "consul"))
            return dict(row.meta) if row is not None else {}

        wanted = {
            "non_voter": "false",
            "raft_version": "3",
            "serf_protocol_current": "2",
            "serf_protocol_max": "5",
            "serf_protocol_min": "1",
            "version": "1.8.7",
        }
        await eventually(lambda: meta() == wanted)
        older = {"id": "consul", "name": "consul", "port": 1, "meta": {"raft_version": "3", "version": "0.1.0"}}
        await node.own_write(Register(node="s1", skip_node_update=True, service=older))
        await eventually(lambda: meta() == wanted)
        root = next(iter(core.node.store.tables.roots.rows.values()))
        assert root.name == "Consul CA Root Cert"
