"""Three servers on real sockets agree, survive the loss of one, and keep what they acknowledged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from rostra.server.raft import Limits, Member, RaftLog, Timing
from rostra.server.raft.members import LEARNER, VOTER, Members
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import Conflict, NoLeader, RostraError, Timeout
from tests.support.raft_state import AppliedEntries
from tests.support.waiting import PATIENCE, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy")]

TIMING = Timing()


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


class Network:
    """Which directed pairs lose everything without a word."""

    def __init__(self) -> None:
        self.lost: set[tuple[str, str]] = set()

    def isolate(self, node: str, others: Sequence[str]) -> None:
        self.lost |= {pair for other in others for pair in ((node, other), (other, node))}

    def heal(self) -> None:
        self.lost.clear()


class Wire(FrameConnection):
    """A connection on a network that may lose what is sent."""

    network: Network
    here = there = ""

    def send(self, payload: bytes) -> None:
        if (self.here, self.there) not in self.network.lost:
            super().send(payload)


class Server(AppliedEntries):
    """One server: its log, its state, and the ways in which it can be ill-treated."""

    def __init__(self, cluster: Cluster, node: str, directory: Path) -> None:
        super().__init__()
        self.cluster, self.node, self.directory = cluster, node, directory
        self.raft: RaftLog | None = None
        self.stops: list[str] = []

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(lambda: self.wire(on_made=self._greet), "127.0.0.1", 0)
        host, port = self.listener.sockets[0].getsockname()
        self.member = Member(self.node, host, port, f"key of {self.node}", self.node)

    def wire(self, **more: Any) -> Wire:
        wire = Wire(**more)
        wire.network, wire.here = self.cluster.network, self.node
        return wire

    def _greet(self, wire: FrameConnection) -> None:
        def hello(payload: bytes) -> None:
            wire.there = payload.decode()  # type: ignore[attr-defined]
            if self.raft is None:
                wire.abort("not running")
            else:
                self.raft.accept(payload.decode(), wire)

        wire.on_frame = hello

    async def dial(self, member: Member) -> FrameConnection:
        if (self.node, member.id) in self.cluster.network.lost:
            raise OSError("no answer")
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(self.wire, member.host, member.port)
        wire.there = member.id
        wire.send(self.node.encode())
        return wire

    def apply(self, entries: Sequence[bytes]) -> list[Any]:
        super().apply(entries)
        return [bytes(entry) for entry in entries]

    async def start(self) -> None:
        self.applied = []
        raft = RaftLog(
            directory=self.directory,
            node_id=self.node,
            cluster_id="c1",
            members=self.cluster.members,
            state=self,
            limits=self.cluster.limits,
            dial=self.dial,
            timing=TIMING,
            on_role_change=lambda *role: None,
            fail_stop=self.stops.append,  # type: ignore[arg-type]
        )
        await raft.start()
        self.raft = raft

    async def stop(self) -> None:
        raft, self.raft = self.raft, None
        if raft is not None:
            await raft.stop()


class Cluster:
    def __init__(self, directory: Path, size: int = 3) -> None:
        self.network = Network()
        self.limits = Limits()
        self.directory = directory
        self.servers = {node: Server(self, node, directory / node) for node in "abcde"[:size]}
        self.members: Members = ()

    async def start(self) -> None:
        for server in self.servers.values():
            await server.listen()
        self.members = tuple(server.member for server in self.servers.values())
        for server in self.servers.values():
            await server.start()

    async def stop(self) -> None:
        for server in self.servers.values():
            await server.stop()
            server.listener.close()
        assert not [server.stops for server in self.servers.values() if server.stops]

    def running(self) -> list[Server]:
        return [server for server in self.servers.values() if server.raft is not None]

    async def add(self, node: str, suffrage: str = LEARNER) -> Server:
        """An empty server is made a member and started, as bootstrap does it."""
        server = self.servers[node] = Server(self, node, self.directory / node)
        await server.listen()
        leader = (await self.leader()).raft
        assert leader is not None
        server.member = replace(server.member, suffrage=suffrage)
        await leader.change_members((*leader.members, server.member))
        self.members = leader.members
        await server.start()
        return server

    async def vote_for(self, node: str, suffrage: str = VOTER) -> None:
        """`node` is given another suffrage."""
        leader = (await self.leader()).raft
        assert leader is not None
        await leader.change_members(tuple(replace(m, suffrage=suffrage) if m.id == node else m for m in leader.members))

    async def remove(self, node: str) -> None:
        leader = (await self.leader()).raft
        assert leader is not None
        await leader.change_members(tuple(m for m in leader.members if m.id != node))

    async def leader(self, *, not_node: str = "") -> Server:
        """The server that leads and can prove it."""
        found: list[Server] = []

        def is_there() -> bool:
            found[:] = [s for s in self.running() if s.raft.lease_valid() and s.node != not_node]  # type: ignore[union-attr]
            return bool(found)

        await eventually(is_there)
        return found[0]

    async def write(self, entry: bytes, *, not_node: str = "") -> None:
        """Until it is acknowledged, as a client does: by whoever leads."""
        async with asyncio.timeout(10 * PATIENCE):
            while True:
                for server in self.running():
                    if server.raft is not None and server.raft.is_leader and server.node != not_node:
                        try:
                            await server.raft.propose(entry)
                            return
                        except (NoLeader, Timeout):
                            pass
                await asyncio.sleep(0.002)

    async def agree_on_members(self) -> None:
        leader = raft_of(await self.leader())
        logs = [raft_of(self.servers[member.id]) for member in leader.members]
        await eventually(lambda: len({raft.members for raft in logs}) == 1)

    async def agree(self) -> list[bytes]:
        """All running servers have applied the same; what that is."""
        running = self.running()
        await eventually(lambda: len({s.raft.applied_index for s in running}) == 1)  # type: ignore[union-attr]
        for server in running[1:]:
            assert server.applied == running[0].applied
        return running[0].applied


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    await cluster.start()
    yield cluster
    await cluster.stop()


async def test_one_is_elected_and_all_apply_the_same(cluster: Cluster) -> None:
    entries = [b"%d" % number for number in range(3000)]

    async def all_are_taken() -> Any:
        leader = await cluster.leader()
        assert leader.raft is not None
        return await asyncio.gather(*map(leader.raft.propose, entries)) == entries

    await eventually(all_are_taken)  # a busy machine may elect another meanwhile
    assert (await cluster.agree())[-len(entries) :] == entries

    def one_leads() -> bool:
        rafts = [server.raft for server in cluster.running() if server.raft is not None]
        leaders = [raft for raft in rafts if raft.is_leader]
        followers = [raft for raft in rafts if not raft.is_leader]
        return (
            (len(leaders), len(followers)) == (1, 2)
            and len({raft.leader_id for raft in rafts}) == 1
            and all(raft.last_heard_age_s() < 0.3 for raft in followers)
        )

    await eventually(one_leads)
    for follower in cluster.running():
        if follower.raft is not None and not follower.raft.is_leader:
            with pytest.raises(NoLeader):
                await follower.raft.propose(b"x")


async def test_a_follower_serves_a_consistent_read_with_the_leaders_index(cluster: Cluster) -> None:
    leader = await cluster.leader()
    assert leader.raft is not None
    await leader.raft.propose(b"seen")
    index = await leader.raft.read_index()
    for server in cluster.running():
        assert server.raft is not None
        await server.raft.wait_applied(index, 1.0)
        assert server.applied == [b"seen"]


async def test_when_the_leader_stops_another_goes_on(cluster: Cluster) -> None:
    leader = await cluster.leader()
    await cluster.write(b"before")
    await leader.stop()
    await cluster.write(b"after")
    assert await cluster.agree() == [b"before", b"after"]
    await leader.start()
    await cluster.write(b"with all")
    assert await cluster.agree() == [b"before", b"after", b"with all"]


async def test_what_was_acknowledged_survives_a_restart_of_all(cluster: Cluster) -> None:
    entries = [b"%d" % number for number in range(200)]
    for entry in entries:
        await cluster.write(entry)
    terms = [server.raft.term for server in cluster.running()]  # type: ignore[union-attr]
    for server in cluster.running():
        await server.stop()
    for server in cluster.servers.values():
        await server.start()
    await cluster.write(b"after")
    assert await cluster.agree() == [*entries, b"after"]
    assert all(server.raft.term > max(terms) for server in cluster.running())  # type: ignore[union-attr]


async def test_a_leader_cut_off_in_silence_is_replaced_and_steps_down(cluster: Cluster) -> None:
    old = await cluster.leader()
    assert old.raft is not None
    await cluster.write(b"before")
    cluster.network.isolate(old.node, "abc")
    doomed = asyncio.gather(old.raft.propose(b"doomed"), old.raft.read_index(), return_exceptions=True)
    await cluster.write(b"after", not_node=old.node)
    assert not old.raft.lease_valid()
    assert [type(outcome) for outcome in await doomed] == [Timeout, NoLeader]
    assert not old.raft.is_leader

    new = await cluster.leader()
    assert new.raft is not None
    term = new.raft.term
    cluster.network.heal()
    await eventually(lambda: old.raft.leader_id == new.node)  # type: ignore[union-attr]
    await cluster.write(b"healed")
    assert await cluster.agree() == [b"before", b"after", b"healed"]
    assert new.raft.term == term, "the one that came back must not disturb"


async def test_a_follower_that_was_cut_off_does_not_disturb_when_it_returns(cluster: Cluster) -> None:
    leader = await cluster.leader()
    assert leader.raft is not None
    term = leader.raft.term
    away = next(server for server in cluster.running() if server is not leader)
    cluster.network.isolate(away.node, "abc")
    for number in range(200):
        await cluster.write(b"%d" % number)
    await eventually(lambda: away.raft.leader_id is None)  # type: ignore[union-attr]
    cluster.network.heal()
    assert len(await cluster.agree()) == 200
    assert (leader.raft.is_leader, leader.raft.term) == (True, term)


async def test_a_deposed_leader_with_a_tail_of_its_own_catches_up_with_200_kb(cluster: Cluster) -> None:
    """The core alone never does: its resets chase one another."""
    old = await cluster.leader()
    assert old.raft is not None
    cluster.network.isolate(old.node, "abc")
    doomed = asyncio.gather(*(old.raft.propose(bytes(1000)) for _ in range(5)), return_exceptions=True)
    await asyncio.sleep(0)
    await eventually(lambda: not old.raft.is_leader)  # type: ignore[union-attr]
    assert all(isinstance(outcome, RostraError) for outcome in await doomed)
    for number in range(100):
        await cluster.write(b"%04d" % number * 1000, not_node=old.node)
    cluster.network.heal()
    applied = await cluster.agree()
    assert [entry[:4] for entry in applied] == [b"%04d" % number for number in range(100)]


async def test_a_server_without_its_disk_for_a_while_is_brought_up_to_date(cluster: Cluster) -> None:
    leader = await cluster.leader()
    away = next(server for server in cluster.running() if server is not leader)
    await away.stop()
    entries = [b"%06d" % number * 100 for number in range(5000)]
    left = iter(entries)

    async def writer() -> None:  # 5,000 that wait for a leader at once would leave it no time to be one
        for entry in left:
            await cluster.write(entry)

    await asyncio.gather(*(writer() for _ in range(200)))
    await away.start()
    assert set(await cluster.agree()) == set(entries)


async def test_five_servers_go_on_without_two(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, size=5)
    await cluster.start()
    for _ in range(2):
        await cluster.write(b"x")
        await (await cluster.leader()).stop()
    await cluster.write(b"y")
    assert (await cluster.agree())[-1] == b"y"
    await (await cluster.leader()).stop()
    await eventually(lambda: not any(s.raft.is_leader for s in cluster.running()))  # type: ignore[union-attr]
    await cluster.stop()


async def test_all_that_was_acknowledged_during_restarts_is_there_once_and_in_order(cluster: Cluster) -> None:
    acknowledged: list[bytes] = []
    is_over = False

    async def client(name: int) -> None:
        number = 0
        while not is_over:
            number += 1
            entry = b"%d.%d" % (name, number)
            for server in cluster.running():
                if server.raft is not None and server.raft.is_leader:
                    try:
                        await server.raft.propose(entry)
                        acknowledged.append(entry)
                    except (NoLeader, Timeout):
                        pass
                    break
            await asyncio.sleep(0.001)

    clients = [asyncio.create_task(client(name)) for name in range(8)]
    for node in "abcab":
        await cluster.leader()
        await cluster.servers[node].stop()
        await asyncio.sleep(0.1)
        await cluster.servers[node].start()
    await cluster.leader()
    is_over = True
    await asyncio.gather(*clients)
    await cluster.write(b"end")
    applied = await cluster.agree()
    assert len(applied) == len(set(applied))
    assert set(acknowledged) <= set(applied)
    for name in range(8):
        mine = [int(entry.split(b".")[1]) for entry in applied if entry.startswith(b"%d." % name)]
        assert mine == sorted(mine)


async def test_under_load_heartbeats_are_in_time_to_keep_the_leader(cluster: Cluster) -> None:
    leader = await cluster.leader()
    assert leader.raft is not None
    term, until = leader.raft.term, time.monotonic() + 1.0

    async def caller() -> None:
        while time.monotonic() < until:
            await leader.raft.propose(bytes(200))  # type: ignore[union-attr]

    await asyncio.gather(*(caller() for _ in range(64)))
    assert (leader.raft.is_leader, leader.raft.term) == (True, term)


# -- members --------------------------------------------------------------------------------------------------------


def raft_of(server: Server) -> RaftLog:
    assert server.raft is not None
    return server.raft


async def test_a_learner_gets_everything_counts_for_nothing_and_is_promoted(cluster: Cluster) -> None:
    for number in range(20):
        await cluster.write(b"%d" % number)
    added = await cluster.add("d")
    await eventually(lambda: len(added.applied) == 20)
    assert raft_of(added).suffrage == LEARNER
    # With two of three voters gone nothing is decided, though two servers live.
    leader = await cluster.leader()
    gone = [s.node for s in cluster.running() if s is not leader and s is not added]
    for node in gone:
        cluster.network.isolate(node, [n for n in "abcd" if n != node])
    await eventually(lambda: not raft_of(leader).is_leader)
    cluster.network.heal()
    await cluster.vote_for("d")
    await eventually(lambda: raft_of(added).suffrage == VOTER)
    # Four voters: three are a majority, with the new one among them.
    leader = await cluster.leader()
    other = next(s for s in cluster.running() if s is not leader and s is not added)
    await other.stop()
    await cluster.write(b"more")
    await other.start()
    assert len(await cluster.agree()) == 21


async def test_a_removed_server_is_left_alone_and_disturbs_nobody(cluster: Cluster) -> None:
    leader = await cluster.leader()
    term = raft_of(leader).term
    victim = next(s for s in cluster.running() if s is not leader)
    await cluster.remove(victim.node)
    await cluster.write(b"without it")
    assert not raft_of(leader)._links.links.get(victim.node)
    await asyncio.sleep(2 * TIMING.election_max_s)  # time enough for it to campaign
    assert (raft_of(leader).is_leader, raft_of(leader).term) == (True, term)
    assert b"without it" not in victim.applied
    await victim.stop()
    del cluster.servers[victim.node]
    await cluster.agree()


async def test_members_change_one_at_a_time_and_never_the_leader_itself(cluster: Cluster) -> None:
    leader = raft_of(await cluster.leader())
    two_less = tuple(m for m in leader.members if m.id == leader._node_id)
    with pytest.raises(Conflict, match="one at a time"):
        await leader.change_members(two_less)
    with pytest.raises(Conflict, match="transfer leadership first"):
        await leader.change_members(tuple(m for m in leader.members if m.id != leader._node_id))
    one_less = tuple(m for m in leader.members if m.id != leader.peers()[0].id)
    first = leader.change_members(one_less)
    with pytest.raises(Conflict, match="on its way"):
        await leader.change_members(tuple(m for m in leader.members if m.id != leader.peers()[0].id))
    await first
    assert leader.members == one_less


async def test_members_survive_the_restart_of_all(cluster: Cluster) -> None:
    added = await cluster.add("d")
    await cluster.vote_for("d")
    await cluster.remove(next(s.node for s in cluster.running() if s.node != "d" and not raft_of(s).is_leader))
    await cluster.write(b"x")
    await cluster.agree_on_members()
    members = raft_of(added).members
    kept = [s for s in cluster.servers.values() if s.node in {m.id for m in members}]
    for server in cluster.servers.values():
        await server.stop()
    for server in kept:
        await server.start()
    await cluster.leader()
    for server in kept:
        assert raft_of(server).members == members


async def test_leadership_is_handed_over_without_an_election_timeout(cluster: Cluster) -> None:
    leader = await cluster.leader()
    heir = next(s for s in cluster.running() if s is not leader)
    writes = [asyncio.create_task(cluster.write(b"%d" % n)) for n in range(50)]
    assert await raft_of(leader).transfer(heir.node) == heir.node
    await eventually(lambda: raft_of(heir).lease_valid())
    assert not raft_of(leader).lease_valid()
    await asyncio.gather(*writes)
    assert {b"%d" % n for n in range(50)} <= set(await cluster.agree())


async def test_leadership_is_not_offered_to_who_cannot_take_it(cluster: Cluster) -> None:
    leader = raft_of(await cluster.leader())
    with pytest.raises(Conflict, match="no such voting server"):
        await leader.transfer("z")
    await cluster.add("d")
    with pytest.raises(Conflict, match="no such voting server"):
        await raft_of(await cluster.leader()).transfer("d")


# -- snapshots ------------------------------------------------------------------------------------------------------


async def test_the_log_stays_small_and_a_restart_begins_at_the_snapshot(cluster: Cluster) -> None:
    cluster.limits = Limits(segment_bytes=32 << 10, snapshot_log_bytes=64 << 10, log_bytes_max=256 << 10)
    for server in cluster.running():
        await server.stop()
        await server.start()
    for number in range(1500):
        await cluster.write(b"%d " % number + b"x" * 300)
    everything = await cluster.agree()
    for server in cluster.running():
        await eventually(partial(has_taken_snapshots, server))
        assert raft_of(server).metrics()["log_bytes_peak"] < 400 << 10
    journals = [path for path in (cluster.directory / "a").iterdir() if path.name.startswith("journal-")]
    assert sum(path.stat().st_size for path in journals) < 600 << 10
    for server in list(cluster.running()):
        await server.stop()
    for server in cluster.servers.values():
        await server.start()
    await cluster.write(b"after")
    assert await cluster.agree() == [*everything, b"after"]


async def test_an_empty_server_catches_up_from_a_snapshot_while_writes_go_on(cluster: Cluster) -> None:
    cluster.limits = Limits(
        segment_bytes=32 << 10, snapshot_log_bytes=64 << 10, log_bytes_max=256 << 10, chunk_bytes=4096
    )
    for server in cluster.running():
        await server.stop()
        await server.start()
    for number in range(1200):
        await cluster.write(b"%d " % number + b"x" * 300)
    for server in cluster.running():
        await eventually(partial(has_dropped_entries, server))
    going_on = asyncio.create_task(write_for_ever(cluster))
    added = await cluster.add("d")
    await eventually(lambda: raft_of(added).metrics()["snapshots_installed"] >= 1)
    await eventually(lambda: len(added.applied) > 1200)
    going_on.cancel()
    await asyncio.gather(going_on, return_exceptions=True)
    assert len(await cluster.agree()) > 1200
    await added.stop()
    await added.start()
    await cluster.write(b"after")
    assert (await cluster.agree())[-1] == b"after"


def has_taken_snapshots(server: Server) -> bool:
    return int(raft_of(server).metrics()["snapshots_taken"]) > 1


def has_dropped_entries(server: Server) -> bool:
    return raft_of(server)._journal.first_index > 1


async def write_for_ever(cluster: Cluster) -> None:
    number = 0
    while True:
        await cluster.write(b"more %d" % number)
        number += 1
