"""The simulator in small, and that it sees what it is there to see. `make sim` runs it at length."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rostra.server.raft.transport import Links
from rostra.server.state.clients import Clients
from rostra.wire.connection import FrameConnection
from tests.sim.cluster import Cluster, Profile
from tests.sim.disk import OpenDisk, VirtualDisk
from tests.sim.run import Outcome, run_seed
from tests.sim.world import Clock, Loop, World

SEEDS = range(20)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [run_seed(seed) for seed in SEEDS]


def test_clusters_keep_their_promises_whatever_happens_to_them(outcomes: list[Outcome]) -> None:
    failed = [outcome.report() for outcome in outcomes if outcome.invariant]
    assert not failed, "\n\n".join(failed)


def test_seeds_have_enough_in_them_to_count(outcomes: list[Outcome]) -> None:
    assert sum(outcome.counts_as_seed for outcome in outcomes) >= 0.9 * len(outcomes)
    for has in ("has_snapshots", "has_members", "has_reads"):
        assert sum(getattr(outcome, has) for outcome in outcomes) >= 0.3 * len(outcomes), has


@pytest.mark.parametrize("seed", [3, 8])
def test_a_seed_is_the_same_run_each_time_with_and_without_a_trace(outcomes: list[Outcome], seed: int) -> None:
    assert run_seed(seed).digest == run_seed(seed, trace=10).digest == outcomes[seed].digest
    assert outcomes[seed].digest != outcomes[seed + 1].digest


def _first_failure(seeds: range, profile: Any = Profile.of) -> Outcome:
    for seed in seeds:
        outcome = run_seed(seed, profile=profile, explain=False)
        if outcome.invariant:
            return outcome
    pytest.fail(f"none of {len(seeds)} seeds has failed")


def test_a_write_that_is_applied_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clients, "remember", lambda *_: None)
    assert _first_failure(range(5)).invariant in ("applied exactly once", "results follow the order")


def test_a_promise_before_the_disk_has_it_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def post(self: Links, peer_id: str, message: dict[str, Any]) -> None:
        link = self.links.get(peer_id)
        if link is not None and link.is_up:
            self._send_now(link, message)

    monkeypatch.setattr(Links, "post", post)
    assert _first_failure(range(50)).invariant in ("terms never fall", "one vote a term", "equal applied sequences")


def test_a_failure_names_its_seed_and_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clients, "remember", lambda *_: None)
    outcome = run_seed(_first_failure(range(5)).seed)
    assert f"--seed {outcome.seed}" in outcome.report()
    assert any("VIOLATION" in line for line in outcome.trace)


# -- its parts --------------------------------------------------------------------------------------------------------


class _Machine:
    """A disk, and a process that has it open."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.disk = VirtualDisk(self.world, "d")
        self.reopen()

    def reopen(self) -> None:
        self.loop = Loop(self.world, "p", Clock(0.0, 1.0), unhandled=lambda context: None)  # type: ignore[abstract]
        self.open = OpenDisk(self.disk, self.loop)

    def do(self, *steps: Any) -> list[Any]:
        """In a lane, to the end."""
        outcomes: list[Any] = []
        for step in steps:
            self.open.submit("lane", step, lambda result, error: outcomes.append(error or result))
        self.world.run(lambda: False, self.world.now + 10)
        return outcomes

    def content(self, name: str) -> bytes:
        file = self.open.open(name)
        return file.read(0, file.size)


def test_what_is_due_after_a_deadline_happens_when_time_goes_on() -> None:
    world, happened = World(0), list[float]()
    world.at(2.0, lambda: happened.append(world.now))
    world.run(lambda: False, 1.0)
    assert (world.now, happened) == (1.0, [])
    world.run(lambda: False, 3.0)
    assert happened == [2.0]


@pytest.mark.parametrize("seed", range(30))
def test_the_disk_keeps_what_was_synced_and_may_lose_the_rest(seed: int) -> None:
    machine = _Machine(seed)
    data, more = random.Random(seed).randbytes(10_000), b"x" * 9_000

    def write() -> None:
        file = machine.open.create("f", b"head")
        file.write(4, data)
        file.sync()
        file.write(4 + len(data), more)

    machine.do(write)
    assert machine.content("f") == b"head" + data + more
    machine.disk.power_cut()
    machine.reopen()
    found = machine.content("f")
    assert found[: 4 + len(data)] == b"head" + data
    assert set(found[4 + len(data) :]) <= {0, ord("x")}


@pytest.mark.parametrize("seed", range(20))
def test_a_file_is_created_whole_or_not_at_all_when_the_power_goes(seed: int) -> None:
    machine = _Machine(seed)
    machine.disk.when_syncing = machine.disk.power_cut
    machine.do(lambda: machine.open.create("f", b"whole"))
    assert machine.open.names() in ([], ["f.new"], ["f"])
    if "f" in machine.open.names():
        assert machine.content("f") == b"whole"


def test_a_killed_process_leaves_what_it_wrote_to_the_system_until_the_power_goes() -> None:
    lost = 0
    for seed in range(20):
        machine = _Machine(seed)
        machine.do(lambda machine=machine: machine.open.create("f", b"").write(0, b"written"))
        machine.disk.process_died()
        machine.reopen()
        assert machine.content("f") == b"written"
        machine.disk.power_cut()
        lost += machine.content("f") != b"written"
    assert 0 < lost < 20


@pytest.mark.parametrize("seed", range(20))
def test_a_connection_that_is_cut_gives_a_prefix_of_what_was_sent_to_each_side_and_then_its_end(seed: int) -> None:
    cluster = Cluster(World(seed), Profile(voters=2))
    network, world = cluster.network, cluster.world
    sent = [b"%03d" % number for number in range(100)]
    received: list[bytes] = []
    lost: list[str] = []

    class Process:
        def __init__(self, host: str) -> None:
            self.host, self.key_hash = host, host
            self.loop = Loop(world, host, Clock(0.0, 1.0), unhandled=lambda context: None)  # type: ignore[abstract]

        def incoming(self, transport: Any) -> None:
            transport.protocol = FrameConnection(received.append, lost.append)
            transport.protocol.connection_made(transport)

    near, far = Process("near"), Process("far")
    network.processes["far"] = far

    async def talk() -> None:
        transport, connection = await network.connect(near, lambda: FrameConnection(None, lost.append), "far")
        for payload in sent:
            connection.send(payload)
            connection.flush()
        transport.cut()

    near.loop.run_now(near.loop.create_task, talk())
    world.run(lambda: False, 5.0)
    world.leave()
    assert received == sent[: len(received)]
    assert len(lost) == 2
