"""Snapshots at work: taken while writes go on, sent piece by piece, installed whole or not at all, and started from."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import pytest

from rostra.server.raft import DamagedJournal, Limits, Member, RaftLog, snapshotting
from rostra.server.raft.core import BATCH, NO_OP
from rostra.server.raft.disk import JOURNAL, DirectoryDisk
from rostra.server.raft.guard import FULL_ASKS_EVERY
from rostra.server.raft.messages import Message
from rostra.server.raft.snapshots import Snapshot, SnapshotWriter
from tests.support.raft_peers import Machine, Peer
from tests.support.raft_state import AppliedEntries, Applying, Loading
from tests.support.waiting import eventually

MEMBERS = tuple(Member(node, "127.0.0.1", 0, node, node) for node in "abc")
SMALL = Limits(segment_bytes=16 << 10, snapshot_log_bytes=1 << 30, log_bytes_max=24 << 10, chunk_bytes=500)


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    machine = Machine()
    yield machine
    for raft in machine.logs:
        await raft.stop()


async def verdict(raft: RaftLog) -> None:
    """What was received is being looked at, and then not any more."""
    async with asyncio.timeout(30):
        for is_looking in (True, False):
            while raft._snapshots._installing is not is_looking:
                await asyncio.sleep(0)


def written(directory: Path, index: int, term: int, applied: list[bytes]) -> Snapshot:
    """A snapshot of `applied` in `directory`, in chunks of a hundred."""
    disk = DirectoryDisk(directory, lock=False, inline=True)
    writer = SnapshotWriter(
        disk, cluster_id="c1", node_id="b", index=index, term=term, members=MEMBERS, members_index=0
    )
    for at in range(0, len(applied), 100):
        writer.add(msgpack.packb(applied[at : at + 100]))
    found: list[Snapshot | None] = []
    writer.finish(lambda snapshot, error: found.append(snapshot))
    assert found[0] is not None
    return found[0]


class Leader:
    """b leads term 3, and sends a snapshot that ends with entry (index, snap_term)."""

    def __init__(self, raft: RaftLog, directory: Path, applied: list[bytes], index: int = 900, term: int = 2) -> None:
        self.peer = Peer(raft, "b")
        self.snapshot = written(directory, index, term, applied)
        self.data = (directory / self.snapshot.name).read_bytes()
        self.append(1, 0)

    def append(self, prev: int, prev_term: int, *entries: tuple[bytes, int, int], commit: int = 1) -> None:
        said = {"prevLogIdx": prev, "prevLogTerm": prev_term, "entries": list(entries)}
        self.peer.say(type="append_entries", term=3, commit_index=commit, r=1, **said)

    def piece(self, offset: int, data: bytes) -> None:
        about = {"id": self.snapshot.id, "index": self.snapshot.index, "snap_term": self.snapshot.term}
        self.peer.say(type="snapshot", term=3, r=1, size=len(self.data), offset=offset, data=data, **about)

    async def says(self, offset: int, data: bytes) -> Message:
        """A piece; the answer to it."""
        self.piece(offset, data)
        return await self.peer.hears("snapshot_answer")

    async def sends_all(self, piece_bytes: int = 700) -> Message:
        """The last answer."""
        answer = await self.says(0, b"")
        while not answer["done"]:
            answer = await self.says(answer["offset"], self.data[answer["offset"] :][:piece_bytes])
        return answer


# -- at the start ---------------------------------------------------------------------------------------------------


async def test_h3_a_restart_goes_on_with_the_entries_behind_the_snapshot(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path)
    await asyncio.gather(*(raft.propose(b"%d" % number) for number in range(50)))
    snapshot = await raft.take_snapshot()
    assert snapshot is not None
    await asyncio.gather(*(raft.propose(b"%d" % number) for number in range(50, 80)))
    last = raft._journal.last_index
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path)
    assert raft._journal.last_index > last > snapshot.index
    assert again.applied == machine.applied
    await raft.stop()


async def test_h3_what_a_crash_left_between_snapshot_and_log_is_put_right(machine: Machine, tmp_path: Path) -> None:
    """The snapshot was received and is on the disk; the log is still what it was before: another leader's."""
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    entries = [(b"\0\x91\xc4\x01x", index, 1) for index in range(2, 6)]
    peer.say(type="append_entries", term=1, commit_index=2, prevLogIdx=1, prevLogTerm=0, r=1, entries=entries)
    await peer.hears("next_node_idx", next_node_idx=6)
    await raft.stop()
    written(tmp_path, 4, 2, [b"%d" % number for number in range(250)])
    again = Machine()
    raft = await again.start(tmp_path, ["b", "c"])
    assert again.applied == [b"%d" % number for number in range(250)]
    assert [(index, term) for _, index, term in raft._journal[:]] == [(4, 2)]
    assert (raft.applied_index, raft.commit_index) == (4, 4)
    assert raft.term == 2, "whoever has an entry of a term is in that term"
    await raft.stop()


async def test_h9_a_log_whose_snapshot_is_damaged_is_not_started_from_an_empty_state(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path, limits=SMALL)
    for number in range(40):
        await raft.propose(b"%02d" % number * 500)
    snapshot = await raft.take_snapshot()
    assert snapshot is not None
    await eventually(lambda: raft._journal.first_index > 1)
    await raft.stop()
    path = tmp_path / snapshot.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    again = Machine()
    with pytest.raises(DamagedJournal, match="snapshot before it is missing or damaged"):
        await again.start(tmp_path, limits=SMALL)
    assert again.applied == []
    assert path.exists()


async def test_h9_a_snapshot_from_before_the_log_does_not_stand_in_for_a_lost_one(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path, limits=SMALL)
    for number in range(40):
        await raft.propose(b"%02d" % number * 500)
    snapshot = await raft.take_snapshot()
    assert snapshot is not None
    await eventually(lambda: raft._journal.first_index > 5)
    await raft.stop()
    (tmp_path / snapshot.name).unlink()
    written(tmp_path, 3, 1, [b"00" * 500])
    with pytest.raises(DamagedJournal, match="snapshot before it is missing or damaged"):
        await Machine().start(tmp_path, limits=SMALL)


# -- taking ---------------------------------------------------------------------------------------------------------


class SlowCapture(AppliedEntries):
    """Takes many steps to copy its table, and would notice if it changed meanwhile."""

    def capture(self) -> Iterator[bytes | None]:
        for _ in range(200):
            yield None
        yield from super().capture()


async def test_nothing_is_applied_while_the_tables_are_copied(machine: Machine, tmp_path: Path) -> None:
    state = SlowCapture()
    raft = await machine.start(tmp_path, state=state, sync_inline=True)
    await raft.propose(b"before")
    taking = raft.take_snapshot()
    async with asyncio.timeout(30):
        while not raft._snapshots.holds_apply:
            await asyncio.sleep(0)
    writes = [raft.propose(b"%d" % number) for number in range(5)]
    snapshot = await taking
    assert await asyncio.gather(*writes) == [2, 3, 4, 5, 6]
    assert snapshot is not None
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path)
    assert again.applied == state.applied
    await raft.stop()


async def test_a_snapshot_is_never_taken_in_the_middle_of_an_entry(machine: Machine, tmp_path: Path) -> None:
    def apply(entries: Sequence[bytes]) -> list[Any]:
        time.sleep(0.002)  # longer than a turn of applying
        return machine.apply(entries)

    state = Applying(apply)
    state.applied = machine.applied
    raft = await machine.start(tmp_path, state=state)
    writes = asyncio.gather(*(raft.propose(b"%d" % number) for number in range(200)))
    async with asyncio.timeout(30):
        while raft._partly is None:
            await asyncio.sleep(0)
    snapshot = await raft.take_snapshot()
    await writes
    assert snapshot is not None
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path)
    assert again.applied == [b"%d" % number for number in range(200)]
    await raft.stop()


async def test_at_its_bound_the_log_takes_nothing_more_until_a_snapshot_has_made_room(
    machine: Machine, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotting, "FULL_NOTICE_S", 0.05)
    raft = await machine.start(tmp_path, limits=SMALL)
    make_room = full_for_snapshots(raft)
    waiting = await fill(raft)
    assert raft._journal.log_bytes < SMALL.log_bytes_max + 2000
    assert raft._journal.first_index == 1
    await eventually(lambda: "the log is full" in told.getvalue())
    make_room()
    await until_taken(raft)
    assert await waiting == len(machine.applied)
    await eventually(lambda: "the log has room again" in told.getvalue())
    assert told.getvalue().count("the log is full") == 1


async def test_a_followers_log_is_bounded_too_and_goes_on_when_there_is_room(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"], limits=SMALL)
    make_room = full_for_snapshots(raft)
    leader, last = Peer(raft, "b"), 1

    async def offer() -> Message:
        entry = (BATCH + msgpack.packb([b"x" * 500]), last + 1, 3)
        append = {"prevLogIdx": last, "prevLogTerm": 3 if last > 1 else 0, "entries": [entry], "commit_index": last}
        leader.say(type="append_entries", term=3, r=1, **append)
        return await leader.hears("next_node_idx", success=True)

    while (await offer())["next_node_idx"] == last + 2:
        last += 1
        assert last < 200
    assert raft._journal.log_bytes < SMALL.log_bytes_max + 2000
    assert (await offer())["next_node_idx"] == last + 1  # what it has, and no more
    asks = 0
    for round_ in range(2, 2 + 2 * FULL_ASKS_EVERY):  # heartbeats that say that there is more
        said = {"prevLogIdx": last + 1, "prevLogTerm": 3, "entries": [], "commit_index": last}
        leader.say(type="append_entries", term=3, r=round_, **said)
        asks += (await leader.hears("next_node_idx", r=round_))["reset"]
    assert asks == 2  # else all of it would be sent for nothing, again and again
    noop = {"prevLogIdx": last, "prevLogTerm": 3, "entries": [(NO_OP, last + 1, 3)], "commit_index": last}
    leader.say(type="append_entries", term=3, r=100, **noop)
    assert (await leader.hears("next_node_idx", r=100))["next_node_idx"] == last + 2  # or nobody could lead
    last += 1
    make_room()
    await until_taken(raft)
    await eventually(lambda: raft._journal.log_bytes < SMALL.log_bytes_max)
    assert (await offer())["next_node_idx"] == last + 2


async def test_a_process_that_ended_between_a_snapshot_and_the_shortening_of_the_log_shortens_it_when_it_starts(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raft = await machine.start(tmp_path, ["b", "c"], limits=SMALL)
    leader = Peer(raft, "b")
    for last in range(1, 24):
        entry = (BATCH + msgpack.packb([b"x" * 700]), last + 1, 3)
        append = {"prevLogIdx": last, "prevLogTerm": 3 if last > 1 else 0, "entries": [entry], "commit_index": last}
        leader.say(type="append_entries", term=3, r=1, **append)
        await leader.hears("next_node_idx", success=True)

    async def cut_off() -> None:
        return None

    monkeypatch.setattr(raft._snapshots, "_trim", cut_off)
    assert await raft.take_snapshot() is not None
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path, ["b", "c"], limits=SMALL)
    await eventually(lambda: raft._journal.log_bytes < SMALL.log_bytes_max // 2)  # or it would take no entry any more
    await raft.stop()


async def until_taken(raft: RaftLog) -> None:
    """A snapshot; one that was begun when there was no room may still fail."""
    async with asyncio.timeout(30):
        while await raft.take_snapshot() is None:
            await asyncio.sleep(0)


def full_for_snapshots(raft: RaftLog) -> Callable[[], None]:
    """Its disk has no room for a new snapshot; what is returned makes some."""
    disk: Any = raft._disk
    start = disk.start

    def full(name: str) -> Any:
        if name.startswith("snapshot"):
            raise OSError(28, "No space left on device")
        return start(name)

    def make_room() -> None:
        disk.start = start

    disk.start = full
    return make_room


async def fill(raft: RaftLog) -> asyncio.Future[Any]:
    """Write until a write has to wait; that one."""
    for _ in range(200):
        write = raft.propose(b"x" * 500)
        for _ in range(100):
            if write.done():
                break
            await asyncio.sleep(0.001)
        else:
            return write
    raise AssertionError("nothing ever waits")


async def test_what_no_snapshot_holds_stays_in_the_log(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, limits=SMALL)
    for number in range(5):
        await raft.propose(b"%02d" % number)
    snapshot = await raft.take_snapshot()
    assert snapshot is not None
    for number in range(5, 40):
        await raft.propose(b"%02d" % number * 200)
    full_for_snapshots(raft)
    assert await raft.take_snapshot() is None
    await asyncio.sleep(0.02)
    assert raft._journal.log_bytes > SMALL.log_bytes_max // 3
    assert raft._journal.first_index <= snapshot.index
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path, limits=SMALL)
    assert again.applied == machine.applied
    await raft.stop()


async def test_a_snapshot_that_cannot_be_written_is_given_up_and_the_log_goes_on(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path)
    await raft.propose(b"x")
    make_room = full_for_snapshots(raft)
    assert await raft.take_snapshot() is None
    assert await raft.propose(b"y") == 2
    make_room()
    await until_taken(raft)
    assert machine.stops == []


async def test_h22_a_snapshot_leaves_a_part_of_the_log_for_followers_that_lag_a_little(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path, limits=SMALL)
    for number in range(100):
        await raft.propose(b"%02d" % number * 100)
    before = raft._journal.log_bytes
    assert before > SMALL.log_bytes_max // 2
    snapshot = await raft.take_snapshot()
    assert snapshot is not None
    await eventually(lambda: raft._journal.first_index > 1)
    await eventually(lambda: raft._journal.log_bytes <= SMALL.log_bytes_max // 3)
    assert raft._journal.first_index < snapshot.index - 10


# -- receiving ------------------------------------------------------------------------------------------------------


async def test_a_snapshot_is_installed_whole_and_found_again_after_a_restart(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    everything = [b"%d" % number for number in range(600)]
    leader = Leader(raft, tmp_path / "b", everything)
    answer = await leader.sends_all()
    assert (answer["index"], answer["done"]) == (900, True)
    assert machine.applied == everything
    assert (raft.applied_index, raft.commit_index, raft.members) == (900, 900, MEMBERS)
    leader.append(900, 2, (b"\0\x91\xc4\x04more", 901, 3), commit=901)
    await eventually(lambda: machine.applied[-1] == b"more")
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path / "a", ["b", "c"])
    assert again.applied == [*everything, b"more"][: len(again.applied)]
    assert raft.applied_index >= 900
    await raft.stop()


async def test_a_snapshot_is_acknowledged_only_when_the_disk_knows_of_it(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    answer = await leader.says(0, b"")
    go, submit = threading.Event(), raft._disk.submit  # type: ignore[union-attr]

    def slow(lane: str, work: Callable[[], Any], done: Any) -> None:
        submit(lane, (lambda: (go.wait(20), work())[1]) if lane == JOURNAL else work, done)

    raft._disk.submit = slow  # type: ignore[method-assign, union-attr]
    leader.piece(answer["offset"], leader.data)
    await eventually(lambda: raft.applied_index == 900)
    await asyncio.sleep(0.01)
    assert not [said for said in leader.peer.heard if said["type"] == "snapshot_answer"]
    go.set()
    assert (await leader.peer.hears("snapshot_answer"))["done"]


async def test_h3_entries_that_fit_the_snapshot_stay_behind_it(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"s"], index=4, term=3)
    leader.append(1, 0, *((b"\0\x91\xc4\x01x", index, 3) for index in range(2, 8)))
    assert (await leader.sends_all())["done"]
    assert raft._journal.last_index == 7
    assert (raft.applied_index, machine.applied) == (4, [b"s"])
    leader.append(7, 3, commit=7)
    await eventually(lambda: machine.applied == [b"s", b"x", b"x", b"x"])


async def test_a_log_that_fits_the_snapshot_is_shortened_like_any_other(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"], limits=SMALL)
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(100)], index=30, term=3)
    for index in range(2, 41):
        entry = (BATCH + msgpack.packb([b"x" * 500]), index, 3)
        leader.append(index - 1, 3 if index > 2 else 0, entry)
    await leader.sends_all()
    assert raft.applied_index == 30 < raft._journal.last_index  # what was in the log already stays
    assert raft._journal.log_bytes < SMALL.log_bytes_max // 2  # or it would take few entries more
    assert raft._journal.first_index > 1


async def test_h2_entries_that_contradict_the_snapshot_are_replaced_by_it(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    c = Peer(raft, "c")
    own = [(b"\0\x91\xc4\x01x", index, 1) for index in range(2, 8)]
    c.say(type="append_entries", term=1, commit_index=1, prevLogIdx=1, prevLogTerm=0, r=1, entries=own)
    leader = Leader(raft, tmp_path / "b", [b"s"], index=4, term=2)
    assert (await leader.sends_all())["done"]
    assert [(index, term) for _, index, term in raft._journal[:]] == [(4, 2)]


async def test_h9_a_snapshot_that_the_state_refuses_is_not_acknowledged_and_changes_nothing(
    machine: Machine, tmp_path: Path
) -> None:
    class Refusing(Loading):
        def feed(self, chunk: bytes) -> None:
            raise ValueError("a chunk of a later release")

    machine.loader = lambda: Refusing(machine)  # type: ignore[method-assign]
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    leader.append(1, 0, (b"\0\x91\xc4\x01x", 2, 3), commit=2)
    leader.piece(0, leader.data)
    await verdict(raft)
    await asyncio.sleep(0.01)
    assert not [said for said in leader.peer.heard if said["type"] == "snapshot_answer" and said["done"]]
    assert (machine.applied, raft.commit_index, machine.stops) == ([b"x"], 2, [])
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path / "a", ["b", "c"])
    assert raft._journal.last_index == 2
    await raft.stop()


async def test_a_snapshot_that_was_damaged_on_its_way_is_asked_for_again(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    bad = leader.data.replace(b"\xa3300", b"\xa3999").replace(b"\xc4\x03300", b"\xc4\x03999")
    assert bad != leader.data
    leader.piece(0, bad)
    await verdict(raft)
    answer = await leader.says(0, b"")
    assert (answer["offset"], answer["done"]) == (0, False)
    assert (machine.applied, raft.applied_index, machine.stops) == ([], 1, [])
    assert (await leader.sends_all())["done"]
    assert machine.applied == [b"%d" % number for number in range(600)]


async def test_h22_a_piece_that_does_not_follow_is_not_taken(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    assert (await leader.says(0, leader.data[:100]))["offset"] == 100
    assert (await leader.says(300, leader.data[300:400]))["offset"] == 100
    assert (await leader.says(0, leader.data[:100]))["offset"] == 100
    assert (await leader.sends_all())["done"]
    assert len(machine.applied) == 600
    assert raft.applied_index == 900


async def test_h22_what_was_received_before_a_restart_is_not_sent_again(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    assert (await leader.says(0, leader.data[:1000]))["offset"] == 1000
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    assert (await leader.says(0, b""))["offset"] == 1000
    assert (await leader.sends_all())["done"]
    assert len(again.applied) == 600
    await raft.stop()


async def test_a_piece_that_comes_twice_is_taken_once(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    leader.piece(0, leader.data[:700])
    leader.piece(0, leader.data[:700])
    assert (await leader.peer.hears("snapshot_answer"))["offset"] == 700
    assert (await leader.says(0, b""))["offset"] == 700
    assert (await leader.sends_all())["done"]
    assert len(machine.applied) == 600


async def test_what_was_complete_before_a_restart_is_installed_when_the_leader_asks(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    raft._snapshots._finish = lambda incoming, message: None  # type: ignore[method-assign]  # the power goes here
    leader.piece(0, leader.data)
    await eventually(lambda: raft._snapshots._incoming and raft._snapshots._incoming.offset == len(leader.data))
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    assert (await leader.says(0, b""))["done"]
    assert len(again.applied) == 600
    await raft.stop()


async def test_another_snapshot_takes_the_place_of_one_that_is_unfinished(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(600)])
    assert (await leader.says(0, leader.data[:1000]))["offset"] == 1000
    later = Leader(raft, tmp_path / "b", [b"%d" % number for number in range(700)], index=950)
    assert (await later.says(0, b""))["offset"] == 0
    assert (await later.sends_all())["done"]
    assert (raft.applied_index, len(machine.applied)) == (950, 700)


async def test_a_snapshot_that_the_log_has_overtaken_meanwhile_takes_nothing_back(
    machine: Machine, tmp_path: Path
) -> None:
    class Slow(Loading):
        def feed(self, chunk: bytes) -> None:
            super().feed(chunk)
            if not machine.applied:  # in the middle of loading, the log brings all of that and more
                entries = [(b"\0\x91\xc4\x01x", index, 3) for index in range(2, 8)]
                leader.append(1, 0, *entries, commit=7)

    machine.loader = lambda: Slow(machine)  # type: ignore[method-assign]
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"s%d" % number for number in range(300)], index=4, term=3)
    assert (await leader.sends_all(1 << 20))["done"]
    await eventually(lambda: raft.applied_index == 7)
    assert machine.applied == [b"x"] * 6


async def test_what_another_leaders_clock_said_is_not_told_to_the_next_one(machine: Machine, tmp_path: Path) -> None:
    """It would take the number for its own, and have a lease that nobody gave."""

    class Slow(Loading):
        def feed(self, chunk: bytes) -> None:
            super().feed(chunk)
            said = {"term": 4, "commit_index": 1, "prevLogIdx": 1, "prevLogTerm": 0, "entries": []}
            c.say(type="append_entries", r=77, **said)

    machine.loader = lambda: Slow(machine)  # type: ignore[method-assign]
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    c = Peer(raft, "c")
    leader = Leader(raft, tmp_path / "b", [b"x"])
    leader.piece(0, leader.data)
    answer = await c.hears("snapshot_answer")
    assert (answer["term"], answer["r"], answer["done"]) == (4, 0, True)


async def test_a_snapshot_of_what_this_server_has_already_changes_nothing(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path / "a", ["b", "c"])
    leader = Leader(raft, tmp_path / "b", [b"old"], index=3, term=3)
    leader.append(1, 0, *((b"\0\x91\xc4\x01x", index, 3) for index in range(2, 6)), commit=5)
    await eventually(lambda: raft.applied_index == 5)
    answer = await leader.says(0, leader.data)
    assert (answer["done"], answer["index"]) == (True, 3)
    assert machine.applied == [b"x"] * 4


# -- sending --------------------------------------------------------------------------------------------------------


async def sending(machine: Machine, directory: Path) -> tuple[RaftLog, Peer, Snapshot]:
    """A leader whose log begins behind what b lacks, and b, which has said that it has nothing."""
    raft = await machine.start(directory, limits=SMALL)
    for number in range(40):
        await raft.propose(b"%02d" % number * 500)
    snapshot = await raft.take_snapshot()
    assert snapshot is not None
    await eventually(lambda: raft._journal.first_index > 1)
    await raft.change_members((*raft.members, Member("b", "127.0.0.1", 0, "b", "b", "learner")))
    peer = Peer(raft, "b")
    append = await peer.hears("append_entries")
    peer.say(type="next_node_idx", term=raft.term, r=append["r"], next_node_idx=1, reset=True, success=False)
    return raft, peer, snapshot


def wants(peer: Peer, piece: Message, offset: int, *, done: bool = False) -> None:
    about = {name: piece[name] for name in ("term", "r", "id", "index")}
    peer.say(type="snapshot_answer", offset=offset, done=done, **about)


async def test_h22_a_snapshot_is_sent_piece_by_piece_as_the_follower_asks_for_it(
    machine: Machine, tmp_path: Path
) -> None:
    raft, peer, snapshot = await sending(machine, tmp_path)
    question = await peer.hears("snapshot")
    assert (question["index"], question["size"], question["data"]) == (snapshot.index, snapshot.size, b"")
    data = b""
    while len(data) < snapshot.size:
        wants(peer, question, len(data))
        piece = await peer.hears("snapshot")
        assert piece["offset"] == len(data)
        assert 0 < len(piece["data"]) <= SMALL.chunk_bytes
        await asyncio.sleep(0.001)
        assert not [said for said in peer.heard if said["type"] == "snapshot"], "one is on its way, not more"
        data += piece["data"]
    assert data == (tmp_path / snapshot.name).read_bytes()
    peer.heard.clear()
    wants(peer, question, snapshot.size, done=True)
    append = await peer.hears_entries()
    assert append["prevLogIdx"] == snapshot.index
    assert raft.peers()[0].match_index == snapshot.index


async def test_a_follower_that_says_nothing_about_its_snapshot_is_asked_again(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshotting, "ASK_AGAIN_S", 0.05)
    _, peer, _ = await sending(machine, tmp_path)
    question = await peer.hears("snapshot")
    wants(peer, question, 0)
    assert (await peer.hears("snapshot"))["data"]
    again = await peer.hears("snapshot")
    assert (again["id"], again["offset"], again["data"]) == (question["id"], 0, b"")


async def test_what_is_said_about_another_snapshot_counts_for_nothing(machine: Machine, tmp_path: Path) -> None:
    raft, peer, _ = await sending(machine, tmp_path)
    question = await peer.hears("snapshot")
    wants(peer, {**question, "id": "another"}, question["size"], done=True)
    wants(peer, question, 0)
    assert (await peer.hears("snapshot"))["offset"] == 0
    assert raft.peers()[0].match_index == 0


async def test_h22_after_a_lost_link_the_follower_says_where_to_go_on(machine: Machine, tmp_path: Path) -> None:
    raft, peer, _ = await sending(machine, tmp_path)
    wants(peer, await peer.hears("snapshot"), 0)
    await peer.hears("snapshot", offset=0)
    peer.hang_up()
    peer = Peer(raft, "b")
    append = await peer.hears("append_entries")
    peer.say(type="next_node_idx", term=raft.term, r=append["r"], next_node_idx=1, reset=True, success=False)
    question = await peer.hears("snapshot")
    assert (question["offset"], question["data"]) == (0, b"")
    wants(peer, question, 1234)
    assert (await peer.hears("snapshot"))["offset"] == 1234
