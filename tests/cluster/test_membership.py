"""The servers of a cluster change: let in, promoted, removed, replaced, moved; by operators and by autopilot."""

from __future__ import annotations

import asyncio
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rostra.server import roster, run, standing
from rostra.server.founding import JOIN, MEMBER, WAITING
from rostra.server.introduction import introduce
from rostra.server.membership import FILE_NAME, Membership, ServerInfo
from rostra.server.raft import Limits, Member, RaftLog
from rostra.server.raft.members import LEARNER, Members
from rostra.server.requests import Peer
from rostra.server.run import FOUND_MAX, Core, UnusableData
from rostra.server.standing import Standing
from rostra.server.state.cluster import CLUSTER_CA_KEY, BindNode
from rostra.server.state.kv import SetKey
from rostra.server.state.operator import SetAutopilot
from rostra.wire.errors import BadRequest, Conflict, Denied, NotFound, RostraError
from tests.support.cores import Cluster
from tests.support.waiting import eventually

pytestmark = pytest.mark.cluster

#: Autopilot that need not be waited for.
PROMPT = {"server_stabilization_time_ms": 300, "last_contact_threshold_ms": 2000}


def leader(cluster: Cluster) -> Core:
    """Who leads; in the moment of an election anyone, for those who ask again."""
    found = cluster.leader()
    return found if found is not None else next(iter(cluster.cores.values()))


async def prompt(cluster: Cluster, **changed: Any) -> None:
    await eventually(lambda: leader(cluster).node.own_write(SetAutopilot(**(PROMPT | changed))))


async def votes(cluster: Cluster, *names: str) -> None:
    await eventually(lambda: {n for n, s in cluster.suffrages().items() if s == "voter"} == set(names), 20)


async def write(cluster: Cluster, key: str) -> None:
    """A write that an election may put off."""
    await eventually(lambda: leader(cluster).node.own_write(SetKey(key, b"x")))


async def no_longer_leads(core: Core) -> None:
    await eventually(lambda: not core.node.is_leader)


async def looked_at(cluster: Cluster) -> None:
    """Autopilot has looked at the servers several times: what it was going to do, it has done."""
    autopilot = leader(cluster)._autopilot
    before = autopilot.rounds
    await eventually(lambda: autopilot.rounds > before + 3)


def members(core: Core) -> dict[str, Any]:
    assert core.node.raft is not None
    return {m.name: m for m in core.node.raft.members}


# -- being let in ----------------------------------------------------------------------------------------------------


async def test_a_fourth_server_waits_and_gets_nothing_until_an_operator_lets_it_in(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        await write(cluster, "k")
        fourth = await cluster.add("s4")
        await eventually(lambda: [w["name"] for w in cluster.waiting()] == ["s4"])
        (waiting,) = cluster.waiting()
        assert (waiting["suffrage"], waiting["problem"]) == ("learner", "")
        assert waiting["key_hash"] == fourth._identity.key_hash
        assert fourth.node.raft is None
        assert not fourth.node.store.tables.secrets.rows
        assert not (tmp_path / "s4" / "server" / "raft").exists()
        assert set(cluster.suffrages()) == {"s1", "s2", "s3"}

        added = await cluster.act("raft.add-peer", {"name": "s4"})
        assert (added["name"], added["id"], added["suffrage"]) == ("s4", fourth._identity.node_id, "learner")
        await votes(cluster, "s1", "s2", "s3", "s4")
        await eventually(lambda: "k" in fourth.node.store.tables.kv.rows)
        await eventually(lambda: cluster.waiting() == [])
        await eventually(
            lambda: (
                (row := fourth.node.store.tables.members.rows["s4"])
                and (row.role, row.voter, row.status, row.rpc_port) == ("server", True, "alive", fourth.rpc_port)
            )
        )
        await eventually(lambda: fourth._identity.is_enrolled)
        await eventually(lambda: ("s4", "consul") in leader(cluster).node.store.tables.services.rows)


async def test_of_four_servers_that_start_together_three_found_the_cluster_and_one_waits(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    try:
        four = ("s1", "s2", "s3", "s4")
        for name in four:
            await cluster.start(name)
        for core in cluster.cores.values():
            core.learn([f"127.0.0.1:{c.rpc_port}" for c in cluster.cores.values()])
        await eventually(cluster.leader)
        await eventually(cluster.waiting)
        founders = cluster.suffrages()
        assert (len(founders), set(founders.values())) == (3, {"voter"})
        assert [w["name"] for w in cluster.waiting()] == [n for n in four if n not in founders]
        assert len({c.node.cluster_id for c in cluster.cores.values()} - {""}) == 1
        await prompt(cluster)
        (fourth,) = (n for n in four if n not in founders)
        await cluster.act("raft.add-peer", {"name": fourth})
        await votes(cluster, *four)
    finally:
        await cluster.__aexit__()


async def test_a_server_is_let_in_through_a_follower_and_by_its_id(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        fourth = await cluster.add("s4")
        await eventually(cluster.waiting)
        follower = cluster.followers()[0]
        assert follower.settings.node_name != "s4"
        rows = await cluster.act("raft.waiting", {}, at=follower.settings.node_name)
        assert [r["name"] for r in rows] == ["s4"]
        await cluster.act("raft.add-peer", {"id": fourth._identity.node_id}, at=follower.settings.node_name)
        await eventually(lambda: cluster.suffrages().get("s4") == "learner")
        await eventually(lambda: fourth.node.raft is not None)
        described = await cluster.act("raft.configuration", {})
        assert {(m["name"], m["suffrage"], m["leader"]) for m in described["members"]} == {
            (n, "learner" if n == "s4" else "voter", n == leader(cluster).settings.node_name)
            for n in ("s1", "s2", "s3", "s4")
        }
        assert described["settled"]


async def test_with_auto_admit_a_server_needs_no_operator(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        await prompt(cluster, auto_admit_servers=True)
        await cluster.add("s2")
        await votes(cluster, "s1", "s2")


async def test_a_replica_gets_everything_and_never_votes(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        await prompt(cluster)
        replica = await cluster.grow("r1", non_voting_server=True)
        await eventually(lambda: cluster.suffrages() == {"s1": "voter", "r1": "replica"})
        await write(cluster, "k")
        await eventually(lambda: "k" in replica.node.store.tables.kv.rows)
        await looked_at(cluster)
        assert cluster.suffrages() == {"s1": "voter", "r1": "replica"}
        with pytest.raises(Conflict, match="does not vote"):
            await cluster.act("raft.transfer-leader", {"name": "r1"})
        await cluster.stop("s1")
        assert replica.node.raft is not None
        raft, term = replica.node.raft, replica.node.raft.term
        await eventually(lambda: raft.last_heard_age_s() > 3 * replica.settings.election_max_s)
        assert not replica.node.is_leader
        assert raft.term == term


async def test_who_is_not_waiting_or_is_there_already_is_not_let_in(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        with pytest.raises(NotFound, match="no server 's9' waits"):
            await cluster.act("raft.add-peer", {"name": "s9"})
        with pytest.raises(Conflict, match="already"):
            await cluster.act("raft.add-peer", {"name": "s1"})
        with pytest.raises(BadRequest, match="say which"):
            await cluster.act("raft.add-peer", {})


async def test_only_from_a_servers_host_can_a_server_be_let_in(tmp_path: Path) -> None:
    """Who may only enrol as a client must not be able to make a server, and with it all secrets, its own."""
    async with Cluster(tmp_path, size=1) as cluster:
        await cluster.add("s2")
        await eventually(cluster.waiting)
        client = cluster.session(leader(cluster), name="c1")
        with pytest.raises(Denied, match="host of a server"):
            await client.act("raft.add-peer", {"name": "s2"})
        with pytest.raises(Denied, match="host of a server"):
            await client.write(SetAutopilot(auto_admit_servers=True))
        assert await client.write(SetAutopilot(min_quorum=1)) is True
        with pytest.raises(Denied, match="only servers"):
            await client.act("raft.moved", {"host": "127.0.0.1", "port": 1})
        assert cluster.suffrages() == {"s1": "voter"}


async def test_a_server_that_asks_under_another_name_or_key_than_its_own_is_refused(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        other = await cluster.add("s2")
        await eventually(cluster.waiting)
        address = f"127.0.0.1:{leader(cluster).rpc_port}"
        said = other._bootstrap.asking()
        for lie in (
            {"name": "s9"},
            {"node_id": "x"},
            {"key_hash": "0" * 64},
            {"datacenter": "dc9"},
            {"suffrage": "voter"},
            {"address": "no such/host"},
            {"rpc_port": 0},
            {"version": "x" * 65},
        ):
            with pytest.raises(BadRequest):
                await other._call_bootstrap(address, JOIN, {**said, **lie})
        assert [w["name"] for w in cluster.waiting()] == ["s2"]


async def test_the_list_of_who_waits_is_bounded_and_forgets_the_silent(tmp_path: Path) -> None:
    async with Cluster(tmp_path, size=1) as cluster:
        books = leader(cluster)._roster
        said = {
            "address": "127.0.0.1",
            "rpc_port": 1,
            "datacenter": "dc1",
            "suffrage": "learner",
            "version": "x",
        }
        now = 1000.0
        books._now = lambda: now
        for i in range(roster.WAITING_MAX + 5):
            key = f"{i:064x}"
            peer = Peer(key_hash=key, address="", name=f"n{i}", node_id=f"id-{i}")
            reply = books.answer_join({**said, "name": f"n{i}", "node_id": f"id-{i}", "key_hash": key}, peer)
            assert "membership" not in reply
            assert ("wait already" in reply["reason"]) == (i >= roster.WAITING_MAX)
        assert len(books.waiting()) == roster.WAITING_MAX
        now += roster.WAITING_S + 1
        assert books.waiting() == []


async def test_a_member_is_told_whom_to_hear_although_the_list_that_says_so_is_not_committed(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        core, away = leader(cluster), cluster.followers()[0]
        raft, introduced = core.node.raft, list[Members]()
        assert raft is not None
        assert away._raft is not None
        newcomer = Member("id-s4", "127.0.0.1", 1, "4" * 64, "s4", LEARNER)
        change = raft.change_members((*raft.members, newcomer))
        about = away._bootstrap.asking()
        me = Peer(key_hash=about["key_hash"], address="", name=about["name"], node_id=about["node_id"])
        reply = core._roster.answer_join(about, me)  # in the turn of the change: nobody has it yet
        assert not raft.members_settled
        assert reply["state"] != MEMBER

        async def ask(_address: str, _kind: str, _args: dict[str, Any]) -> tuple[dict[str, Any], str]:
            return reply, core._identity.key_hash

        standing = Standing(
            away.node,
            away._raft,
            away._peers,
            host="127.0.0.1",
            port=1,
            candidates=list,
            asking=dict,
            ask=ask,
            moved=away._roster.moved,
            introduce=introduced.append,
            hear=away._roster.hear,
        )
        await standing._ask_one(f"127.0.0.1:{core.rpc_port}")
        assert sorted(m.name for m in introduced[0]) == ["s1", "s2", "s3", "s4"]
        await change


async def test_who_was_emptied_while_it_waited_waits_once_and_under_its_new_key(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        roster = leader(cluster)._roster
        for key in ("a" * 64, "b" * 64):
            said = ServerInfo(f"id-{key[0]}", "s4", "127.0.0.4", 8300, key)
            roster._note(said, {"suffrage": LEARNER, "version": "1"})
        roster._note(ServerInfo("id-c", "s4", "127.0.0.5", 8300, "c" * 64), {"suffrage": LEARNER, "version": "1"})
        assert [w["id"] for w in cluster.waiting()] == ["id-b", "id-c"]
        assert all(w["heard_s"] >= 0 for w in cluster.waiting())


async def test_a_join_address_of_another_cluster_is_named_with_its_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Cluster(tmp_path / "a", 1) as one, Cluster(tmp_path / "b", 1) as other:
        other.secret = one.secret
        await other.stop("s1")
        shutil.rmtree(tmp_path / "b" / "s1")
        stranger = await other.start("s1")
        await eventually(other.leader)
        address = f"127.0.0.1:{leader(one).rpc_port}"
        await other.stop("s1")
        await other.start("s1", candidates=(address,))
        told = ""

        def is_told() -> bool:
            nonlocal told
            told += capsys.readouterr().err
            return "that address belongs to another cluster" in told

        await eventually(is_told)
        line = next(x for x in told.splitlines() if "that address belongs to another cluster" in x)
        assert address in line
        assert leader(one).node.cluster_id in line
        assert stranger.node.cluster_id in line


async def test_a_server_that_can_neither_found_nor_join_a_cluster_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(tmp_path, 1)
    told = ""

    def is_told() -> bool:
        nonlocal told
        told += capsys.readouterr().err
        return "no cluster yet: give -bootstrap-expect=N or -retry-join" in told

    try:
        await cluster.start("s1", bootstrap_expect=0)
        await eventually(is_told)
    finally:
        await cluster.__aexit__()


async def test_an_old_list_that_another_server_shows_takes_no_hint_away(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        core, other = cluster.followers()
        raft = core.node.raft
        assert raft is not None
        listed = next(m for m in raft.members if m.id == other._identity.node_id)
        core._peers.hint(listed.id, "127.0.0.9", 1)
        core._introduce(raft.members)
        assert core._peers.where(listed) == ("127.0.0.9", 1)
        core._introduce(())


async def test_a_server_says_that_it_looks_for_others_while_it_misses_one_and_keeps_what_was_found_last(
    tmp_path: Path,
) -> None:
    async with Cluster(tmp_path) as cluster:
        core, other = cluster.followers()
        await eventually(lambda: core.learn([]) is False)
        await cluster.stop(other.settings.node_name)
        found = [f"127.0.0.1:{n}" for n in range(1, 3 * FOUND_MAX)]
        await eventually(lambda: core.learn(found) is True)
        assert core._candidates() == found[:FOUND_MAX]
        assert core.learn(["127.0.0.1:9"]) is True
        assert core._candidates()[0] == "127.0.0.1:9"


async def test_h21_who_was_away_while_all_others_changed_hears_the_only_one_that_is_left(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        away, gone = (core.settings.node_name for core in cluster.followers())
        first = leader(cluster).settings.node_name
        await cluster.stop(away)
        await cluster.grow("s4")
        await votes(cluster, "s1", "s2", "s3", "s4")
        await cluster.act("raft.remove-peer", {"id": cluster.cores[gone]._identity.node_id}, at=first)
        await votes(cluster, first, away, "s4")
        await cluster.stop(gone)
        await cluster.stop(first)
        await cluster.start(away)  # its list has nobody that is there but itself
        await eventually(cluster.leader)
        assert leader(cluster).settings.node_name == "s4"
        await write(cluster, "k")
        await eventually(lambda: "k" in cluster.cores[away].node.store.tables.kv.rows)


async def test_h21_who_comes_back_to_a_cluster_of_none_that_it_knows_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those that miss it look for it, too, and introduce themselves: here it has to ask by itself.
    monkeypatch.setattr(standing, "LOOK_FOR_S", 3600.0)
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster, cleanup_dead_servers=False)  # who is away stays in the list, however long this takes
        away, *known = (core.settings.node_name for core in cluster.followers())
        known.append(leader(cluster).settings.node_name)
        await cluster.stop(away)
        for name in ("s4", "s5"):
            await cluster.grow(name)
        await votes(cluster, "s1", "s2", "s3", "s4", "s5")
        for name in known:
            await eventually(cluster.leader)
            at = next(n for n in ("s4", "s5", *known) if n in cluster.cores and n != name)
            await cluster.act("raft.remove-peer", {"id": cluster.cores[name]._identity.node_id}, at=at)
            await cluster.stop(name)
        await votes(cluster, away, "s4", "s5")
        core = await cluster.start(away)
        core.learn([f"127.0.0.1:{cluster.cores['s4'].rpc_port}"])  # `retry_join`
        await write(cluster, "k")
        await eventually(lambda: "k" in core.node.store.tables.kv.rows)
        assert "s4" in members(core)


async def test_h21_nobody_is_introduced_to_who_has_a_leader_or_has_only_just_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path) as cluster:
        core, other = cluster.followers()
        raft = core.node.raft
        assert raft is not None
        ca_key_pem = await eventually(lambda: core.node.store.secret(CLUSTER_CA_KEY))
        former = ServerInfo("id-s9", "s9", "127.0.0.1", 1, "9" * 64, "dc1")
        listed = sorted((*core._roster._membership(raft).members, former))
        shown = introduce(Membership(core.node.cluster_id, "dc1", tuple(listed)), former.key_hash, ca_key_pem)
        about = {**other._bootstrap.asking(), "node_id": "id-s9", "name": "s9", "key_hash": former.key_hash}
        peer = Peer(key_hash=former.key_hash, address="", name="s9", node_id="id-s9")

        def is_heard() -> bool:
            reply = core._roster.answer_join({**about, **shown}, peer)
            return reply["state"] != WAITING and "s9" in [m.name for m in raft.heard]

        monkeypatch.setattr(roster, "ALONE_S", 0.0)
        await eventually(lambda: raft.leader_id)
        assert not is_heard()
        monkeypatch.setattr(roster, "ALONE_S", 3600.0)
        for name in set(cluster.cores) - {core.settings.node_name}:
            await cluster.stop(name)
        await eventually(lambda: raft.leader_id is None)
        assert not is_heard()
        monkeypatch.setattr(roster, "ALONE_S", 0.0)
        assert is_heard()


async def test_a_new_server_is_caught_up_by_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Limits(segment_bytes=64 << 10, snapshot_log_bytes=64 << 10, log_bytes_max=128 << 10)
    monkeypatch.setattr(run, "RaftLog", partial(RaftLog, limits=small))
    async with Cluster(tmp_path, size=1) as cluster:
        await prompt(cluster)
        for i in range(40):
            await leader(cluster).node.own_write(SetKey(f"k{i}", bytes(16 << 10)))
        first = leader(cluster).node.raft
        assert first is not None
        await eventually(lambda: first.metrics()["first_index"] > 1)
        second = await cluster.grow("s2")
        await votes(cluster, "s1", "s2")
        await eventually(lambda: second.node.store.index == leader(cluster).node.store.index)
        assert second.node.raft is not None
        assert second.node.raft.metrics()["snapshots_installed"] == 1
        await eventually(lambda: second.node.store.hash() == leader(cluster).node.store.hash())
        await cluster.stop("s2")
        again = await cluster.start("s2")
        await votes(cluster, "s1", "s2")
        await write(cluster, "after")
        await eventually(lambda: "after" in again.node.store.tables.kv.rows)


# -- being removed ---------------------------------------------------------------------------------------------------


async def test_a_removed_follower_is_told_so_and_can_be_let_in_again(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        gone = cluster.followers()[0].settings.node_name
        core = cluster.cores[gone]
        removed = await cluster.act("raft.remove-peer", {"name": gone})
        assert removed["name"] == gone
        await votes(cluster, *({"s1", "s2", "s3"} - {gone}))
        rows = leader(cluster).node.store.tables.members.rows
        await eventually(lambda: (rows[gone].voter, rows[gone].status) == (False, "left"))
        await eventually(lambda: gone not in leader(cluster).node.store.tables.nodes.rows)
        with pytest.raises(Denied, match=f"removed from this cluster.*add-peer {gone}"):
            await core._peers.dial_raft(members(core)[leader(cluster).settings.node_name])
        await write(cluster, "meanwhile")
        await eventually(lambda: [w["name"] for w in cluster.waiting()] == [gone])
        await looked_at(cluster)
        assert gone not in cluster.suffrages()  # by itself it does not come back
        assert not core.node.is_leader
        await cluster.act("raft.add-peer", {"name": gone})
        await votes(cluster, "s1", "s2", "s3")
        await eventually(lambda: "meanwhile" in core.node.store.tables.kv.rows)


async def test_a_server_that_is_removed_while_the_rows_follow_the_list_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        lead = leader(cluster)
        *_, gone = [name for name in members(lead) if name != lead.settings.node_name]
        reached, go_on, after = asyncio.Event(), asyncio.Event(), list[Any]()
        own_write = lead.node.own_write

        async def late(command: Any, **options: Any) -> Any:
            if isinstance(command, BindNode) and command.name != gone and not reached.is_set():
                reached.set()
                await go_on.wait()
            elif go_on.is_set() and getattr(command, "name", "") == gone:
                after.append(command)
            return await own_write(command, **options)

        monkeypatch.setattr(lead.node, "own_write", late)
        for member in members(lead).values():
            lead._roster.note_version(member.id, "9.9.9")  # each row is to be written again
        await eventually(reached.is_set)
        await cluster.act("raft.remove-peer", {"name": gone})
        go_on.set()
        await looked_at(cluster)
        row = leader(cluster).node.store.tables.members.rows[gone]
        assert (row.voter, row.status, after) == (False, "left", [])


async def test_the_leader_hands_over_before_it_is_removed(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        old = leader(cluster)
        name = old.settings.node_name
        await cluster.act("raft.remove-peer", {"id": old._identity.node_id}, at=name)
        await votes(cluster, *({"s1", "s2", "s3"} - {name}))
        await no_longer_leads(old)
        await write(cluster, "k")


async def test_a_server_that_cannot_be_spared_is_not_removed(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        first, second = (c.settings.node_name for c in cluster.followers())
        await cluster.stop(first)
        await eventually(lambda: leader(cluster)._roster.configuration()["members"])
        with pytest.raises(Conflict, match=f"bring back {first}"):
            await eventually(lambda: cluster.act("raft.remove-peer", {"name": second}))
        assert leader(cluster).node.store.tables.members.rows[second].status == "alive"
        await cluster.act("raft.remove-peer", {"name": first})
        await votes(cluster, leader(cluster).settings.node_name, second)
    async with Cluster(tmp_path / "one", size=1) as cluster:
        with pytest.raises(Conflict, match="last voting server"):
            await cluster.act("raft.remove-peer", {"name": "s1"})
        with pytest.raises(NotFound, match="its servers are s1"):
            await cluster.act("raft.remove-peer", {"name": "s7"})


async def test_a_server_whose_disk_was_wiped_is_replaced_under_its_name(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster, cleanup_dead_servers=False)
        name = cluster.followers()[0].settings.node_name
        former = cluster.cores[name]._identity.node_id
        await cluster.stop(name)
        shutil.rmtree(tmp_path / name)
        await cluster.add(name)
        await eventually(cluster.waiting)
        (waiting,) = cluster.waiting()
        assert f"remove-peer -id={former}" in waiting["problem"]
        with pytest.raises(Conflict, match=f"remove-peer -id={former}"):
            await cluster.act("raft.add-peer", {"name": name})
        await cluster.act("raft.remove-peer", {"id": former})
        await cluster.act("raft.add-peer", {"name": name})
        await votes(cluster, "s1", "s2", "s3")
        assert members(leader(cluster))[name].id != former
        await write(cluster, "k")
        await eventually(lambda: "k" in cluster.cores[name].node.store.tables.kv.rows)
        rows = leader(cluster).node.store.tables.members.rows
        new_id = cluster.cores[name]._identity.node_id
        await eventually(lambda: (rows[name].node_id, rows[name].voter) == (new_id, True))


# -- the log of a server -----------------------------------------------------------------------------------------------


async def test_a_server_that_lost_its_log_refuses_to_start_and_says_what_to_do(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        name = cluster.followers()[0].settings.node_name
        node_id = cluster.cores[name]._identity.node_id
        await cluster.stop(name)
        shutil.rmtree(tmp_path / name / "server" / "raft")
        for _ in range(2):
            with pytest.raises(UnusableData, match=f"server/raft: its log is gone.*remove-peer -id={node_id}"):
                await cluster.start(name)
        assert (tmp_path / name / "server" / FILE_NAME).exists()


async def test_changed_members_survive_the_restart_of_all(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        await cluster.grow("s4")
        await cluster.grow("r1", non_voting_server=True)
        await votes(cluster, "s1", "s2", "s3", "s4")
        gone = next(c.settings.node_name for c in cluster.followers() if c.settings.node_name in ("s1", "s2", "s3"))
        await cluster.act("raft.remove-peer", {"name": gone})
        left = {"s1", "s2", "s3", "s4"} - {gone}
        await votes(cluster, *left)
        for name in list(cluster.cores):
            await cluster.stop(name)
        for name in [*left, "r1"]:
            await cluster.start(name, non_voting_server=name == "r1")
        await eventually(cluster.leader)
        await votes(cluster, *left)
        await eventually(lambda: cluster.suffrages()["r1"] == "replica")
        await write(cluster, "k")
        await eventually(lambda: all("k" in c.node.store.tables.kv.rows for c in cluster.cores.values()))


# -- addresses ---------------------------------------------------------------------------------------------------------


async def test_a_server_that_comes_back_with_another_address_is_followed_there(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        name = cluster.followers()[0].settings.node_name
        await cluster.stop(name)
        moved = await cluster.start(name, rpc_port=0)
        port = moved.rpc_port
        await eventually(lambda: all(members(c)[name].port == port for c in cluster.cores.values()), 20)
        await write(cluster, "k")
        await eventually(lambda: "k" in moved.node.store.tables.kv.rows)
        await eventually(lambda: leader(cluster).node.store.tables.members.rows[name].rpc_port == port)
        await eventually(lambda: [s["port"] for s in leader(cluster)._servers() if s["name"] == name] == [port])


async def test_servers_that_all_have_new_addresses_find_each_other_where_they_are_told_to_join(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        for name in cluster.names:
            await cluster.stop(name)
        for name in cluster.names:
            await cluster.start(name, rpc_port=0)
        ports = {name: core.rpc_port for name, core in cluster.cores.items()}
        for core in cluster.cores.values():
            core.learn([f"127.0.0.1:{port}" for port in ports.values()])
        await eventually(cluster.leader, 20)

        def is_known() -> bool:
            core = cluster.leader()
            return core is not None and {n: m.port for n, m in members(core).items()} == ports

        await eventually(is_known, 20)


async def test_a_server_that_was_away_hears_a_leader_that_came_meanwhile(tmp_path: Path) -> None:
    """Its own list does not have that leader yet, and only the leader could send it the list that does."""
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster, cleanup_dead_servers=False)
        away = cluster.followers()[0].settings.node_name
        await cluster.stop(away)
        await cluster.grow("s4")
        await votes(cluster, "s1", "s2", "s3", "s4")
        await cluster.act("raft.transfer-leader", {"name": "s4"})
        await eventually(lambda: (c := cluster.leader()) is not None and c.settings.node_name == "s4")
        await write(cluster, "k")
        back = await cluster.start(away)
        await eventually(lambda: "k" in back.node.store.tables.kv.rows, 15)
        await eventually(lambda: "s4" in members(back))


# -- autopilot ---------------------------------------------------------------------------------------------------------


async def test_health_tells_of_each_server_and_how_many_may_fail(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        await eventually(lambda: all(s["healthy"] for s in leader(cluster)._autopilot.health()["servers"]))
        health = await cluster.act("autopilot.health", {}, at=cluster.followers()[0].settings.node_name)
        assert (health["healthy"], health["failure_tolerance"]) == (True, 1)
        assert [s["leader"] for s in health["servers"]].count(True) == 1
        assert {s["serf_status"] for s in health["servers"]} == {"alive"}
        await cluster.stop(cluster.followers()[0].settings.node_name)

        async def is_ill() -> bool:
            health = await cluster.act("autopilot.health", {})
            return (health["healthy"], health["failure_tolerance"]) == (False, 0)

        await eventually(is_ill)


async def test_a_dead_server_keeps_its_place_until_another_makes_up_for_it_and_comes_back_by_itself(
    tmp_path: Path,
) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster)
        dead = cluster.followers()[0].settings.node_name
        await cluster.stop(dead)
        rows = leader(cluster).node.store.tables.members.rows
        leader(cluster)._leader._leading_since = 0.0  # its grace for agents is over
        await eventually(lambda: rows[dead].status == "failed", 20)
        await looked_at(cluster)
        assert dead in cluster.suffrages()  # of two servers both would be needed, of three two
        await cluster.grow("s4")
        left = {"s1", "s2", "s3", "s4"} - {dead}
        await votes(cluster, *left)
        await eventually(lambda: rows[dead].voter is False)
        back = await cluster.start(dead)
        await votes(cluster, "s1", "s2", "s3", "s4")
        await eventually(lambda: rows[dead].status == "alive")
        await write(cluster, "k")
        await eventually(lambda: "k" in back.node.store.tables.kv.rows)


async def test_where_all_are_let_in_a_wiped_server_is_replaced_without_an_operator(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster, auto_admit_servers=True)
        name = cluster.followers()[0].settings.node_name
        former = cluster.cores[name]._identity.node_id
        await cluster.stop(name)
        shutil.rmtree(tmp_path / name)
        new = await cluster.add(name)
        leader(cluster)._leader._leading_since = 0.0  # its grace for agents is over
        await eventually(
            lambda: name in members(leader(cluster)) and members(leader(cluster))[name].id == new._identity.node_id, 20
        )
        assert new._identity.node_id != former
        await votes(cluster, "s1", "s2", "s3")
        await eventually(lambda: leader(cluster).node.store.tables.nodes.rows[name].id == new._identity.node_id)


async def test_force_leave_takes_a_dead_server_out(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await prompt(cluster, cleanup_dead_servers=False)
        name = cluster.followers()[0].settings.node_name
        with pytest.raises(Conflict, match="is alive"):
            await cluster.act("member.force-leave", {"name": name, "prune": False})
        await cluster.stop(name)

        async def left() -> bool:
            try:
                await cluster.act("member.force-leave", {"name": name, "prune": True})
            except Conflict:  # it is not missed yet
                return False
            return True

        await eventually(left, 20)
        await votes(cluster, *({"s1", "s2", "s3"} - {name}))
        await eventually(lambda: name not in leader(cluster).node.store.tables.members.rows)


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_a_leader_that_is_stopped_hands_leadership_over_first(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        await eventually(lambda: all(c.node.leader_id for c in cluster.cores.values()))
        old = leader(cluster)
        await cluster.stop(old.settings.node_name)
        await eventually(lambda: any(c.node.is_leader for c in cluster.cores.values()))


async def test_while_one_change_is_on_its_way_another_is_refused_and_named(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        books = leader(cluster)._roster
        books._change = "adding s9"
        with pytest.raises(Conflict, match="adding s9"):
            await cluster.act(
                "raft.remove-peer",
                {"name": cluster.followers()[0].settings.node_name},
                at=leader(cluster).settings.node_name,
            )
        books._change = ""
        with pytest.raises(RostraError, match="say which server"):
            await cluster.act("raft.remove-peer", {})
