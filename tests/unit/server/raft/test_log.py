"""RaftLog alone, and among peers whose every word the test decides."""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rostra.server.raft import RaftLog, Timing
from rostra.server.raft import core as core_module
from rostra.server.raft import log as log_module
from rostra.wire.errors import Internal, NoLeader, RostraError, Timeout, TooLarge
from tests.support.raft_peers import TIMING, Machine, Peer
from tests.support.raft_state import Applying
from tests.support.waiting import eventually


@pytest.fixture
async def machine() -> Any:
    machine = Machine()
    yield machine
    for raft in machine.logs:
        await raft.stop()


# -- alone ----------------------------------------------------------------------------------------------------------


async def test_a_server_alone_leads_at_once_and_applies_what_is_proposed(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path)
    assert raft.is_leader
    assert raft.leader_id == "a"
    assert machine.roles == [(True, "a", 1)]
    assert await asyncio.gather(*(raft.propose(b"%d" % number) for number in range(2000))) == list(range(1, 2001))
    assert machine.applied == [b"%d" % number for number in range(2000)]
    assert raft.lease_valid()
    index = await raft.read_index()
    assert raft.applied_index >= index
    assert raft.metrics()["proposals"] == 2000


async def test_a_restart_applies_everything_again_in_the_same_order(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path)
    await asyncio.gather(*(raft.propose(b"%d" % number) for number in range(3000)))
    await raft.stop()
    again = Machine()
    raft = await again.start(tmp_path)
    await raft.read_index()
    assert again.applied == machine.applied
    assert raft.term == 2
    await raft.stop()


async def test_without_a_directory_it_works_and_forgets(machine: Machine) -> None:
    raft = await machine.start(None)
    assert await raft.propose(b"x") == 1
    assert (await Machine().start(None)).applied_index <= 2


async def test_a_result_is_given_only_when_the_disk_has_the_entry(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path)
    writer: Any = raft._journal._writer
    write = writer.write
    written: list[bytes] = []

    def slow(offset: int, data: bytes) -> None:
        time.sleep(0.05)
        write(offset, data)
        written.append(data)

    writer.write = slow
    await raft.propose(b"precious")
    assert any(b"precious" in data for data in written)


async def test_a_slow_apply_is_cut_into_turns(machine: Machine) -> None:
    def apply(entries: Sequence[bytes]) -> list[Any]:
        time.sleep(0.0001 * len(entries))
        return machine.apply(entries)

    raft = await machine.start(None, state=Applying(apply))
    results = asyncio.gather(*(raft.propose(b"%d" % number) for number in range(500)))
    turns = 0
    while not results.done():
        await asyncio.sleep(0)
        turns += 1
    assert await results == list(range(1, 501))
    assert turns > 10


async def test_an_exception_in_apply_stops_the_process(machine: Machine) -> None:
    def apply(entries: Sequence[bytes]) -> list[Any]:
        raise MemoryError("no room")

    raft = await machine.start(None, state=Applying(apply))
    future = raft.propose(b"x")
    await asyncio.sleep(0.05)
    assert machine.stops == ["MemoryError: no room"]
    assert not future.done()
    with pytest.raises(NoLeader):
        await raft.propose(b"y")


async def test_a_failed_disk_stops_the_process_and_nothing_is_acknowledged(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raft = await machine.start(tmp_path)

    def no_space(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_space)
    future = raft.propose(b"x")
    async with asyncio.timeout(30):
        while not machine.stops:
            await asyncio.sleep(0.001)
    assert len(machine.stops) == 1
    assert "journal-00000001 cannot be written: OSError: [Errno 28] No space left on device" in machine.stops[0]
    assert not future.done()
    assert machine.applied == []


async def test_an_entry_that_is_too_large_is_refused(machine: Machine) -> None:
    raft = await machine.start(None)
    with pytest.raises(TooLarge):
        await raft.propose(bytes(3 << 20))
    assert await raft.propose(bytes(1 << 20)) == 1


async def test_another_version_of_the_library_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "LIBRARY_SHA256", "0" * 64)
    with pytest.raises(Internal, match=r"pysyncobj==0\.3\.17"):
        await machine.start(None)


# -- among peers ----------------------------------------------------------------------------------------------------


async def test_a_server_without_a_leader_refuses_writes_and_reads(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    assert (raft.is_leader, raft.leader_id, raft.lease_valid()) == (False, None, False)
    with pytest.raises(NoLeader):
        await raft.propose(b"x")
    with pytest.raises(NoLeader):
        await raft.read_index()
    with pytest.raises(Timeout):
        await raft.wait_applied(5, 0.01)


async def test_a_new_leader_reads_nothing_before_its_first_entry_is_committed(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    append = await peer.hears("append_entries")
    assert raft.is_leader
    read = asyncio.ensure_future(raft.read_index())
    peer.say(type="next_node_idx", term=1, r=append["r"], next_node_idx=1, reset=False, success=False)
    later = await peer.hears("append_entries")
    peer.say(type="next_node_idx", term=1, r=later["r"], next_node_idx=1, reset=False, success=False)
    await asyncio.sleep(0.01)
    assert not read.done()
    assert not raft.lease_valid()
    following = asyncio.ensure_future(peer.follows())
    peer.answers({**append, "entries": [(b"\1", 2, 1)]})
    assert await read == 2
    assert raft.lease_valid()
    following.cancel()


async def test_a_read_is_answered_by_a_round_that_began_after_it(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    peer.answers(await peer.hears("append_entries"))
    await asyncio.sleep(0.02)
    peer.heard.clear()
    old = await peer.hears("append_entries")
    read = asyncio.ensure_future(raft.read_index())
    new = await peer.hears("append_entries")
    peer.answers(old)
    await asyncio.sleep(0.01)
    assert not read.done()
    peer.answers(new)
    assert await read == 2


async def test_a_vote_is_asked_and_given_only_when_the_disk_knows(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await asyncio.sleep(0.12)
    release = asyncio.Event()
    hang(raft, release)
    peer.say(type="request_vote", transfer=False, term=7, last_log_index=1, last_log_term=0)
    await asyncio.sleep(0.05)
    assert all(message["type"] in ("pre_vote", "ping") for message in peer.heard)
    release.set()
    assert (await peer.hears("response_vote"))["term"] == 7


async def test_a_follower_answers_heartbeats_while_its_disk_is_slow(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    release = asyncio.Event()
    hang(raft, release)
    append = {"type": "append_entries", "term": 3, "commit_index": 1, "prevLogIdx": 1, "prevLogTerm": 0}
    peer.say(**append, r=1, entries=[(b"\0\x91\xc4\x01x", 2, 3)])
    peer.say(**{**append, "prevLogIdx": 2, "prevLogTerm": 3}, r=2, entries=[])
    heard = await peer.hears("next_node_idx")
    assert (heard["r"], heard["success"], heard["next_node_idx"]) == (2, False, 1)
    release.set()
    heard = await peer.hears("next_node_idx", r=1)
    assert (heard["success"], heard["next_node_idx"]) == (True, 3)


async def test_a_follower_writes_before_it_applies_and_still_applies_when_appends_never_end(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    writer: Any = raft._journal._writer
    write, applied_when_written = writer.write, []

    def watched(offset: int, data: bytes) -> None:
        applied_when_written.append(len(machine.applied))
        write(offset, data)

    writer.write = watched
    for index in range(2, 22):  # each tells that the one before is committed
        about = {"prevLogIdx": index - 1, "prevLogTerm": 3 if index > 2 else 0, "commit_index": index - 1}
        peer.say(type="append_entries", term=3, r=index, entries=[(b"\0\x91\xc4\x01x", index, 3)], **about)
        await peer.hears("next_node_idx", r=index, success=True)
    assert applied_when_written[1] == 0
    assert applied_when_written[-1] >= 10


async def test_a_follower_whose_disk_is_slow_applies_without_it(machine: Machine, tmp_path: Path) -> None:
    rarely = Timing(heartbeat_s=300.0, election_min_s=1000.0, election_max_s=2000.0)  # nothing else gives it a turn
    raft = await machine.start(tmp_path, ["b", "c"], timing=rarely)
    peer, release = Peer(raft, "b"), asyncio.Event()
    about = {"type": "append_entries", "term": 3}
    peer.say(**about, r=1, prevLogIdx=1, prevLogTerm=0, entries=[(b"\0\x91\xc4\x01x", 2, 3)], commit_index=1)
    await peer.hears("next_node_idx", success=True)
    await eventually(lambda: not raft._disk_first and not raft._pump_scheduled)  # the next turn writes
    hang(raft, release)
    try:
        peer.say(**about, r=2, prevLogIdx=2, prevLogTerm=3, entries=[(b"\0\x91\xc4\x01y", 3, 3)], commit_index=2)
        await eventually(lambda: machine.applied == [b"x"])
        assert not raft._journal.is_durable
    finally:
        release.set()


async def test_who_asks_what_is_committed_is_not_kept_waiting_for_the_next_notice(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "COMMIT_NOTICE_S", 30.0)
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    peer.answers(await peer.hears("append_entries"))
    write = raft.propose(b"x")
    peer.answers(await peer.hears_entries())
    assert await write == 1
    committed = raft.commit_index
    peer.heard.clear()
    raft.tell_commit()  # in the same turn: no heartbeat can come in between
    assert [message["commit_index"] for message in peer.heard] == [committed]


async def test_writes_on_their_way_are_unknown_when_another_leader_appears(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    peer.answers(await peer.hears("append_entries"))
    await asyncio.sleep(0.02)
    on_its_way = raft.propose(b"first")
    await asyncio.sleep(0.01)
    not_yet, read = raft.propose(b"second"), asyncio.ensure_future(raft.read_index())
    await asyncio.sleep(0)
    other = Peer(raft, "c")
    other.say(type="append_entries", term=5, commit_index=1, prevLogIdx=1, prevLogTerm=0, r=1, entries=[])
    outcomes = await asyncio.gather(on_its_way, not_yet, read, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Timeout, NoLeader, NoLeader]
    assert (raft.is_leader, raft.leader_id, raft.term, raft.lease_valid()) == (False, "c", 5, False)
    assert machine.roles[-1] == (False, "c", 5)


async def test_a_leader_that_hears_nobody_steps_down(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    peer.answers(await peer.hears("append_entries"))
    write = raft.propose(b"lost?")
    async with asyncio.timeout(30):
        with pytest.raises(Timeout):
            await write
    assert not raft.is_leader
    assert raft.term == 1


async def test_a_leader_whose_disk_hangs_lets_another_one_lead(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "HUNG_DISK_S", 0.3)
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    following = asyncio.ensure_future(peer.follows())
    assert await raft.propose(b"before") == 1
    release = asyncio.Event()
    hang(raft, release)
    try:
        async with asyncio.timeout(30):
            with pytest.raises(Timeout, match="may or may not"):
                await raft.propose(b"held by the disk")
        assert (raft.is_leader, raft.term) == (False, 1)
        following.cancel()
        peer.heard.clear()
        await asyncio.sleep(3 * TIMING.election_max_s)
        assert not [message for message in peer.heard if message["type"] in ("pre_vote", "request_vote")]
    finally:
        release.set()
    await peer.votes()  # with its disk back it stands again, as nobody else has
    await peer.hears_entries()
    assert (raft.is_leader, raft.term) == (True, 2)


async def test_a_follower_whose_disk_hangs_says_so_once_and_names_no_leader_that_is_gone(
    machine: Machine, tmp_path: Path, told: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "HUNG_DISK_S", 0.05)
    raft = await machine.start(tmp_path, ["b", "c"])
    peer, release = Peer(raft, "b"), asyncio.Event()
    hang(raft, release)
    said = {"prevLogIdx": 1, "prevLogTerm": 0, "entries": [(b"\0\x91\xc4\x01x", 2, 3)], "commit_index": 1}
    try:
        peer.say(type="append_entries", term=3, r=1, **said)
        assert raft.leader_id == "b"
        await eventually(lambda: raft._elections.disk_hangs)
        peer.heard.clear()
        await eventually(lambda: raft.leader_id is None)
        assert not [message for message in peer.heard if message["type"] in ("pre_vote", "request_vote")]
    finally:
        release.set()
    await peer.hears("pre_vote")
    lines = [line.split("raft: ")[1] for line in told.getvalue().splitlines() if "the disk" in line]
    assert [line.partition(":")[0] for line in lines] == ["the disk of the log hangs", "the disk of the log is back"]


async def test_a_pause_of_the_process_is_no_pause_of_its_disk(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    moved = raft._disk_moved_s
    raft._stood_still, raft._pumped_s = False, raft._pumped_s - 5.0
    assert raft._was_paused()
    assert 5.0 <= raft._disk_moved_s - moved < 6.0, "what it stood still before the pause still counts"


def hang(raft: RaftLog, release: asyncio.Event) -> None:
    """Its disk ends no write until `release`."""
    writer: Any = raft._journal._writer
    loop, write = asyncio.get_running_loop(), writer.write

    def hanging(offset: int, data: bytes) -> None:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(timeout=30)
        write(offset, data)

    writer.write = hanging


async def test_a_disk_that_is_at_its_first_write_does_not_hang(
    machine: Machine, tmp_path: Path, told: io.StringIO
) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    release = asyncio.Event()
    hang(raft, release)
    peer = Peer(raft, "b")
    peer.say(type="append_entries", term=3, commit_index=1, prevLogIdx=1, prevLogTerm=0, r=1, entries=[])
    try:
        for _ in range(5):
            await asyncio.sleep(0.01)
            raft._watch_disk()
            assert not raft._elections.disk_hangs
    finally:
        release.set()
    assert "hangs" not in told.getvalue()


async def test_a_server_each_of_whose_turns_is_long_works_all_the_same(machine: Machine, tmp_path: Path) -> None:
    class Dragging:
        """Whoever asks this loop for the time finds that long has passed: longer than what counts as standing still."""

        def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
            self.loop, self.dragged_s = loop, 0.0

        def time(self) -> float:
            self.dragged_s += 2 * TIMING.election_min_s
            return self.loop.time() + self.dragged_s

        def __getattr__(self, name: str) -> Any:
            return getattr(self.loop, name)

    raft = await machine.start(tmp_path)
    raft._loop = Dragging(raft._loop)  # type: ignore[assignment]
    async with asyncio.timeout(30):
        assert await raft.propose(b"x") == 1


async def test_the_log_exists_before_a_word_is_said(tmp_path: Path) -> None:
    machine = Machine()
    found: list[tuple[list[str], bool]] = []

    def opened() -> None:
        found.append((sorted(path.name for path in tmp_path.iterdir()), bool(machine.roles)))

    raft = await machine.start(tmp_path, on_opened=opened)
    await raft.stop()
    assert [(any(name.startswith("journal") for name in names), spoke) for names, spoke in found] == [(True, False)]


async def test_the_lease_ends_while_the_leader_still_believes(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    peer.answers(await peer.hears("append_entries"))
    async with asyncio.timeout(30):
        while not raft.lease_valid():
            await asyncio.sleep(0.001)
        while raft.lease_valid():
            await asyncio.sleep(0.001)
    assert raft.is_leader


async def test_a_new_connection_replaces_the_old_one(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    old, new = Peer(raft, "b"), Peer(raft, "b")
    assert (old.open, new.open) == (False, True)
    await new.votes()
    assert raft.is_leader
    assert not [message for message in old.heard if message["type"] == "append_entries"]


async def test_strangers_and_the_wrong_side_are_refused(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    assert not Peer(raft, "x").open


async def test_a_bad_message_closes_the_link_and_nothing_else(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    assert peer.on_frame is not None
    peer.on_frame(b"\x80\x04\x95garbage")
    assert not peer.open
    assert machine.stops == []
    await Peer(raft, "b").votes()


async def test_a_silent_link_is_dropped(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    raft._links._silent_after_s = 0.2
    peer = Peer(raft, "b")
    await peer.hears("ping")
    async with asyncio.timeout(30):
        while peer.open:
            await asyncio.sleep(0.01)


async def test_stopping_answers_everyone_who_waits(machine: Machine, tmp_path: Path) -> None:
    raft = await machine.start(tmp_path, ["b", "c"])
    peer = Peer(raft, "b")
    await peer.votes()
    peer.answers(await peer.hears("append_entries"))
    await asyncio.sleep(0.02)
    futures = [raft.propose(b"x"), asyncio.ensure_future(raft.read_index())]
    futures.append(asyncio.ensure_future(raft.wait_applied(99, 30)))
    await asyncio.sleep(0.01)
    await raft.stop()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert all(isinstance(outcome, RostraError) for outcome in outcomes)
