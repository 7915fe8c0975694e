"""Three servers on real sockets agree, survive the loss of one, and keep what they acknowledged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import uvloop

from rostra.server.raft import Member, RaftLog, Timing
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import NoLeader, RostraError, Timeout

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


class Server:
    """One server: its log, its state, and the ways in which it can be ill-treated."""

    def __init__(self, cluster: Cluster, node: str, directory: Path) -> None:
        self.cluster, self.node, self.directory = cluster, node, directory
        self.applied: list[bytes] = []
        self.raft: RaftLog | None = None
        self.stops: list[str] = []

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(lambda: self.wire(on_made=self._greet), "127.0.0.1", 0)
        host, port = self.listener.sockets[0].getsockname()
        self.member = Member(self.node, host, port, "", self.node)

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
        self.applied += entries
        return [bytes(entry) for entry in entries]

    async def start(self) -> None:
        self.applied = []
        raft = RaftLog(
            directory=self.directory,
            node_id=self.node,
            cluster_id="c1",
            members=[server.member for server in self.cluster.servers.values()],
            apply=self.apply,
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
        self.servers = {node: Server(self, node, directory / node) for node in "abcde"[:size]}

    async def start(self) -> None:
        for server in self.servers.values():
            await server.listen()
        for server in self.servers.values():
            await server.start()

    async def stop(self) -> None:
        for server in self.servers.values():
            await server.stop()
            server.listener.close()
        assert not [server.stops for server in self.servers.values() if server.stops]

    def running(self) -> list[Server]:
        return [server for server in self.servers.values() if server.raft is not None]

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
        async with asyncio.timeout(10):
            while True:
                for server in self.running():
                    if server.raft is not None and server.raft.is_leader and server.node != not_node:
                        try:
                            await server.raft.propose(entry)
                            return
                        except (NoLeader, Timeout):
                            pass
                await asyncio.sleep(0.002)

    async def agree(self) -> list[bytes]:
        """All running servers have applied the same; what that is."""
        running = self.running()
        await eventually(lambda: len({s.raft.applied_index for s in running}) == 1)  # type: ignore[union-attr]
        for server in running[1:]:
            assert server.applied == running[0].applied
        return running[0].applied


async def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    await cluster.start()
    yield cluster
    await cluster.stop()


async def test_one_is_elected_and_all_apply_the_same(cluster: Cluster) -> None:
    leader = await cluster.leader()
    assert leader.raft is not None
    entries = [b"%d" % number for number in range(3000)]
    assert await asyncio.gather(*map(leader.raft.propose, entries)) == entries
    assert await cluster.agree() == entries
    assert [s.raft.is_leader for s in cluster.running()].count(True) == 1  # type: ignore[union-attr]
    assert {s.raft.leader_id for s in cluster.running()} == {leader.node}  # type: ignore[union-attr]
    for follower in cluster.running():
        if follower is not leader:
            assert follower.raft is not None
            assert follower.raft.last_heard_age_s() < 0.3
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


async def test_when_the_leader_stops_another_goes_on_within_a_second(cluster: Cluster) -> None:
    leader = await cluster.leader()
    await cluster.write(b"before")
    await leader.stop()
    started = time.monotonic()
    await cluster.write(b"after")
    assert time.monotonic() - started < 1.0
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
    started = time.monotonic()
    doomed = asyncio.gather(old.raft.propose(b"doomed"), old.raft.read_index(), return_exceptions=True)
    await cluster.write(b"after", not_node=old.node)
    assert time.monotonic() - started < 1.5
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
    assert leader.raft is not None
    await asyncio.gather(*(leader.raft.propose(b"%06d" % number * 100) for number in range(5000)))
    await away.start()
    assert len(await cluster.agree()) == 5000


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


async def test_heartbeats_and_turns_are_on_time_under_load(cluster: Cluster) -> None:
    leader = await cluster.leader()
    assert leader.raft is not None
    term, until = leader.raft.term, time.monotonic() + 1.0

    async def caller() -> None:
        while time.monotonic() < until:
            await leader.raft.propose(bytes(200))  # type: ignore[union-attr]

    await asyncio.gather(*(caller() for _ in range(64)))
    assert leader.raft.term == term
    turns = leader.raft.metrics()["turn"]
    late = sum(count for bound, count in turns["buckets"].items() if float(bound) > 0.005)
    assert late / turns["count"] < 0.01
