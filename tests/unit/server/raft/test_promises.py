"""What RaftLog promises while peers are late, silent or wrong; each test is for one rule that would not be missed
otherwise until a disk, a network or a clock misbehaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rostra.server.raft import RaftLog, Timing
from rostra.server.raft.elections import LEASE, boottime_ns
from rostra.server.raft.members import LEARNER, Member, encode_members
from rostra.wire.errors import NoLeader, Timeout
from tests.support.raft_peers import Machine, Peer


class Clock:
    """The clock of leases, put forward by hand."""

    def __init__(self) -> None:
        self._ahead_ns = 0

    def __call__(self) -> int:
        return boottime_ns() + self._ahead_ns

    def put_forward(self, seconds: float) -> None:
        self._ahead_ns += int(seconds * 1e9)


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    machine = Machine()
    yield machine
    for raft in machine.logs:
        await raft.stop()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


#: Nobody steps down or campaigns meanwhile, however busy the machine is.
PATIENT = Timing(heartbeat_s=0.02, election_min_s=3.0, election_max_s=6.0)

#: For what has to wait for an election timeout.
BRISK = Timing(heartbeat_s=0.02, election_min_s=0.3, election_max_s=0.35)


async def leading(
    machine: Machine, directory: Path | None, *, timing: Timing = PATIENT, clock: Clock | None = None, **more: Any
) -> tuple[RaftLog, Peer]:
    """A leader of a, b and c whose no-op is committed, and b, which answers only when the test says so."""
    clock = clock or Clock()
    raft = await machine.start(directory, ["b", "c"], timing=timing, clock=clock, **more)
    peer = Peer(raft, "b")
    clock.put_forward(timing.election_min_s)  # it has been loyal for long enough
    raft._core.campaign_in(-1.0)
    raft._schedule()
    await peer.votes()
    peer.answers(await peer.hears("append_entries"))
    await until(lambda: raft.commit_index == 2)
    return raft, peer


def appended(term: int, prev: int, prev_term: int, *commands: bytes, commit: int = 1, r: int = 1) -> dict[str, Any]:
    """What the leader of `term` says; its entries are of its own term."""
    return {
        "type": "append_entries",
        "term": term,
        "commit_index": commit,
        "prevLogIdx": prev,
        "prevLogTerm": prev_term,
        "r": r,
        "entries": [(command, prev + 1 + at, term) for at, command in enumerate(commands)],
    }


# -- the end of the process -----------------------------------------------------------------------------------------


async def test_h8_a_contradiction_in_the_log_stops_the_process(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    b, c = Peer(raft, "b"), Peer(raft, "c")
    b.say(**appended(3, 1, 0))
    c.say(**appended(3, 1, 0))
    assert [reason.split(":")[0] for reason in machine.stops] == ["BrokenInvariant"]
    with pytest.raises(NoLeader):
        await raft.propose(b"x")


async def test_h8_whatever_a_turn_of_the_log_raises_stops_the_process(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")

    def broken(command: bytes, idx: int, term: int) -> None:
        raise MemoryError("no room for an entry")

    raft._journal.add = broken  # type: ignore[method-assign]
    peer.say(**appended(3, 1, 0, b"\0\x90"))
    assert machine.stops == ["MemoryError: no room for an entry"]
    await asyncio.sleep(0.05)
    assert not [said for said in peer.heard if said["type"] == "next_node_idx" and said["success"]]


@pytest.mark.parametrize("where", ["a link comes up", "a link is lost", "the disk is done", "the timer", "a commit"])
async def test_h8_so_does_what_is_raised_anywhere_else(machine: Machine, tmp_path: Path, where: str) -> None:
    raft, peer = await leading(machine, tmp_path)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    if where == "a link comes up":
        raft._replication.link_up = broken  # type: ignore[method-assign, assignment]
        Peer(raft, "c")
    elif where == "a link is lost":
        raft._replication.link_down = broken  # type: ignore[method-assign, assignment]
        peer.hang_up()
    elif where == "the disk is done":
        raft._links.release = broken  # type: ignore[method-assign]
        raft._on_durable(0.0)
    elif where == "the timer":
        raft._links.check = broken  # type: ignore[method-assign]
    else:
        raft.propose(b"x")  # nobody waits for it: who tells of a commit may be stopped before this one
        peer.answers(await peer.hears_entries())
        raft._replication.is_news = lambda: True  # type: ignore[method-assign]  # whatever a heartbeat has told meanwhile
        raft._core.send_heartbeat = broken  # type: ignore[method-assign]
    await until(lambda: machine.stops)
    assert machine.stops == ["ZeroDivisionError: "]


async def test_h15_a_caller_that_gave_up_harms_nobody(machine: Machine, tmp_path: Path) -> None:
    raft, peer = await leading(machine, tmp_path)
    given_up = raft.propose(b"nobody waits for this")
    append = await peer.hears_entries()
    given_up.cancel()
    peer.answers(append)
    following = asyncio.ensure_future(peer.follows())
    async with asyncio.timeout(30):
        assert await raft.propose(b"x") == 2
    assert machine.applied == [b"nobody waits for this", b"x"]
    assert machine.stops == []
    following.cancel()


async def test_h16_an_entry_of_a_kind_that_nobody_knows_stops_the_process(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    Peer(raft, "b").say(**appended(3, 1, 0, b"\3\x80\x02K\x01.", commit=2))
    await until(lambda: machine.stops)
    assert "of kind 3" in machine.stops[0]
    assert machine.applied == []


async def test_h24_a_commit_index_beyond_the_log_is_not_believed(machine: Machine, tmp_path: Path) -> None:
    raft, _ = await leading(machine, tmp_path)
    raft._journal.setRaftCommitIndex(99)
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path, ["b", "c"])
    assert (raft.commit_index, raft._journal.last_index, raft.applied_index) == (2, 2, 2)
    await raft.stop()


# -- writes ---------------------------------------------------------------------------------------------------------


async def test_h23_a_write_leaves_at_once_and_not_with_the_next_heartbeat(machine: Machine, tmp_path: Path) -> None:
    raft, peer = await leading(machine, tmp_path, timing=Timing(10.0, 31.0, 32.0))
    await peer.hears("append_entries", commit_index=2)  # of the commit they hear soon, with what is new by then
    write = raft.propose(b"x")
    async with asyncio.timeout(30):
        peer.answers(await peer.hears_entries())
        assert await write == 1
        assert (await peer.hears("append_entries", prevLogIdx=3))["commit_index"] == 3


async def test_h17_a_write_that_never_left_is_not_done_and_one_that_left_is_unknown(
    machine: Machine, tmp_path: Path
) -> None:
    raft, peer = await leading(machine, tmp_path)
    left = raft.propose(b"left")
    await peer.hears_entries()
    waits = raft.propose(b"waits")
    peer.say(type="stale", term=9)
    async with asyncio.timeout(30):
        with pytest.raises(Timeout, match="may or may not have been done"):
            await left
        with pytest.raises(NoLeader):
            await waits


# -- reads and the lease --------------------------------------------------------------------------------------------


async def test_a_read_never_joins_a_round_that_is_on_its_way(machine: Machine, tmp_path: Path) -> None:
    raft, peer = await leading(machine, tmp_path)
    peer.heard.clear()
    first = asyncio.ensure_future(raft.read_index())
    await until(lambda: raft._rounds)
    before = await peer.hears("append_entries", r=raft._rounds[-1][0])
    second = asyncio.ensure_future(raft.read_index())
    await until(lambda: len(raft._rounds) == 2)
    after = await peer.hears("append_entries", r=raft._rounds[-1][0])
    peer.answers(before)
    assert await first == 2
    await asyncio.sleep(0.005)
    assert not second.done()
    peer.answers(after)
    assert await second == 2


async def test_reads_that_arrive_together_share_a_round(machine: Machine, tmp_path: Path) -> None:
    raft, peer = await leading(machine, tmp_path)
    following = asyncio.ensure_future(peer.follows())
    rounds = raft.metrics()["read_rounds"]
    await asyncio.gather(*(raft.read_index() for _ in range(100)))
    assert raft.metrics()["read_rounds"] == rounds + 1
    following.cancel()


async def test_the_lease_counts_from_when_a_round_was_sent_and_not_from_its_answer(
    machine: Machine, tmp_path: Path
) -> None:
    clock = Clock()
    raft, peer = await leading(machine, tmp_path, clock=clock)
    old = await peer.hears("append_entries")
    clock.put_forward(PATIENT.election_min_s * LEASE)
    peer.answers(old)
    await asyncio.sleep(0.002)
    assert raft.is_leader
    assert not raft.lease_valid()
    new = await peer.hears("append_entries")
    while new["r"] < old["r"] + PATIENT.election_min_s * LEASE * 1e9:
        new = await peer.hears("append_entries")
    peer.answers(new)
    await until(raft.lease_valid)


async def test_from_the_offer_of_leadership_on_the_lease_is_void_until_the_heir_lets_it_pass(
    machine: Machine, tmp_path: Path
) -> None:
    raft, heir = await leading(machine, tmp_path, timing=BRISK)
    following = asyncio.ensure_future(Peer(raft, "c").follows())
    heir.answers(await heir.hears("append_entries"))
    await until(raft.lease_valid)
    before = await heir.hears("append_entries")
    term, offer = raft.term, asyncio.ensure_future(raft.transfer("b"))
    await heir.hears("timeout_now")
    for answered in (None, before):  # nothing, or what was said before the offer
        if answered is not None:
            heir.answers(answered)
        for _ in range(10):
            await asyncio.sleep(0.002)
            assert not raft.lease_valid(), "the offer may still be taken"
    assert await raft.read_index() == 2
    with pytest.raises(Timeout, match="did not take it"):
        await offer
    assert (raft.is_leader, raft.term, raft.lease_valid()) == (True, term, False)
    heir.heard.clear()
    heir.answers(await heir.hears("append_entries"))
    await until(raft.lease_valid)
    following.cancel()


async def test_an_offer_that_was_made_before_the_last_one_voids_the_lease_too(machine: Machine, tmp_path: Path) -> None:
    raft, b = await leading(machine, tmp_path, timing=BRISK)
    c = Peer(raft, "c")
    following = asyncio.ensure_future(c.follows())
    b.answers(await b.hears("append_entries"))
    for heir in ("b", "c"):
        await until(lambda: raft.peers() and all(peer.match_index == 2 for peer in raft.peers()))
        with pytest.raises(Timeout, match="did not take it"):
            await raft.transfer(heir)
    following.cancel()
    c.heard.clear()
    c.answers(await c.hears("append_entries"))
    await asyncio.sleep(0.01)
    assert raft.is_leader
    assert not raft.lease_valid(), "b may still take its own"
    b.heard.clear()
    b.answers(await b.hears("append_entries"))
    await until(raft.lease_valid)


async def test_leadership_is_offered_only_to_who_has_everything_and_nothing_new_is_begun(
    machine: Machine, tmp_path: Path
) -> None:
    raft, peer = await leading(machine, tmp_path)
    write = raft.propose(b"x")
    append = await peer.hears_entries()
    offer = asyncio.ensure_future(raft.transfer("b"))
    await asyncio.sleep(0.02)
    later = raft.propose(b"y")
    assert not [said for said in peer.heard if said["type"] == "timeout_now"]
    peer.answers(append)
    assert await write == 1
    assert (await peer.hears("timeout_now"))["term"] == raft.term
    assert raft._journal.last_index == 3
    peer.say(type="request_vote", term=raft.term + 1, last_log_index=3, last_log_term=raft.term, transfer=True)
    assert await offer == "b"
    assert (await peer.hears("response_vote"))["term"] == raft.term
    with pytest.raises(NoLeader):
        await later


async def test_who_is_offered_leadership_stands_at_once_and_its_voters_are_told_why(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path, ["b", "c"], timing=Timing(0.05, 1.0, 2.0))
    b, c = Peer(raft, "b"), Peer(raft, "c")
    b.say(**appended(3, 1, 0))
    c.say(type="timeout_now", term=3)  # not the leader
    await asyncio.sleep(0.05)
    assert raft.term == 3
    b.say(type="timeout_now", term=3)
    assert (await c.hears("request_vote"))["transfer"] is True
    assert raft.term == 4


# -- time -----------------------------------------------------------------------------------------------------------


async def test_a_leader_that_stood_still_reads_before_it_judges_who_is_silent(machine: Machine, tmp_path: Path) -> None:
    raft, peer = await leading(machine, tmp_path, timing=BRISK)
    append = await peer.hears("append_entries")
    time.sleep(0.4)  # longer than a leader goes on that hears nobody
    await asyncio.sleep(0)  # the timers come first, then what has arrived
    await asyncio.sleep(0)
    peer.answers(append)
    following = asyncio.ensure_future(peer.follows())
    async with asyncio.timeout(30):
        assert await raft.propose(b"x") == 1
    assert (raft.is_leader, raft.term) == (True, 1)
    following.cancel()


# -- members --------------------------------------------------------------------------------------------------------


async def test_a_new_leader_changes_no_members_before_its_first_entry_is_committed(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    append = await peer.hears("append_entries")
    more = (*raft.members, Member("d", "127.0.0.1", 0, "d", "d", LEARNER))
    members = tuple(Member(m.id, m.host, m.port, m.id, m.name) for m in raft.members)
    with pytest.raises(NoLeader, match="only just been elected"):
        await raft.change_members((*members, more[-1]))
    peer.answers(append)
    await until(lambda: raft.commit_index == 2)
    change = raft.change_members((*members, more[-1]))
    assert raft.members[-1].id == "d"
    following = asyncio.ensure_future(peer.follows())
    await change
    following.cancel()


async def test_h21_who_may_still_be_a_member_is_heard_until_the_list_without_it_is_committed(
    machine: Machine, tmp_path: Path
) -> None:
    """The entry may be replaced by a leader that only the old list knows."""
    raft = await machine.start(tmp_path, ["b", "c"])
    b, c = Peer(raft, "b"), Peer(raft, "c")
    without_c = tuple(member for member in raft.members if member.id != "c")
    b.say(**appended(3, 1, 0, encode_members(without_c)))
    assert raft.members == without_c
    assert c.open
    assert Peer(raft, "c").open
    c = Peer(raft, "c")
    b.say(**appended(3, 2, 3, commit=2))
    await until(lambda: not c.open)
    assert not Peer(raft, "c").open
