"""Snapshots on disk: there whole or not at all, believed only when every byte is what was written."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from rostra.server.raft.disk import DirectoryDisk
from rostra.server.raft.journal import NewerFormat
from rostra.server.raft.members import LEARNER, Member
from rostra.server.raft.snapshots import (
    BLOCK_BYTES,
    CHUNK,
    CHUNK_BYTES_MAX,
    END,
    HEADER,
    TAKING,
    DamagedSnapshot,
    Incoming,
    Snapshot,
    SnapshotFile,
    SnapshotWriter,
    _frame,
    chunks,
    newest,
    remove_older,
    snapshot_name,
)
from rostra.wire.errors import Internal
from tests.support.recorded_disk import RecordedDisk

GOLDEN = Path(__file__).parents[3] / "golden" / "snapshot-1.bin"
MEMBERS = (Member("n1", "10.0.0.1", 8300, "k1", "one"), Member("n2", "10.0.0.2", 8300, "k2", "two", LEARNER))
CHUNKS = [b"first", b"", bytes(range(256)) * 3, b"last"]


class Outcome:
    """What `done` was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, Exception | None]] = []

    def __call__(self, result: Any, error: Exception | None) -> None:
        self.told.append((result, error))

    @property
    def snapshot(self) -> Snapshot:
        assert len(self.told) == 1
        result, error = self.told[0]
        assert error is None
        assert isinstance(result, Snapshot)
        return result

    @property
    def error(self) -> Exception:
        assert len(self.told) == 1
        result, error = self.told[0]
        assert result is None
        assert error is not None
        return error


def writer(disk: Any, index: int = 40, term: int = 3) -> SnapshotWriter:
    return SnapshotWriter(disk, cluster_id="c1", node_id="n1", index=index, term=term, members=MEMBERS, members_index=7)


def write(disk: Any, index: int = 40, term: int = 3, parts: list[bytes] = CHUNKS) -> Snapshot:
    taking, outcome = writer(disk, index, term), Outcome()
    for part in parts:
        taking.add(part)
    taking.finish(outcome)
    return outcome.snapshot


def receive(disk: Any, snapshot: Snapshot, image: bytes, *, step: int = 300, stop: int | None = None) -> Incoming:
    """All pieces up to `stop`, from where an earlier attempt ended."""
    incoming = Incoming(disk, "c1", snapshot.id, snapshot.index, snapshot.term, snapshot.size)
    end = len(image) if stop is None else stop
    while incoming.offset < end:
        outcome = Outcome()
        incoming.write(incoming.offset, image[incoming.offset : min(end, incoming.offset + step)], outcome)
        assert outcome.told == [(None, None)]
    return incoming


def finish(incoming: Incoming) -> Outcome:
    outcome = Outcome()
    incoming.finish(outcome)
    return outcome


@pytest.fixture
def disk() -> RecordedDisk:
    return RecordedDisk()


# -- writing and reading --------------------------------------------------------------------------------------------


def test_what_was_added_is_read_back_in_order(disk: RecordedDisk) -> None:
    snapshot = write(disk)
    assert disk.names() == ["snapshot-00000000000000000040-0000000003"] == [snapshot.name]
    assert (snapshot.index, snapshot.term, snapshot.members, snapshot.members_index) == (40, 3, MEMBERS, 7)
    assert snapshot.size == len(disk.image(snapshot.name))
    assert newest(disk, "c1") == (snapshot, [])
    assert newest(disk.power_cut(), None) == (snapshot, [])
    assert list(chunks(disk, snapshot)) == CHUNKS


def test_the_newest_one_counts(disk: RecordedDisk) -> None:
    assert newest(disk, "c1") == (None, [])
    for index, term in [(9, 9), (100, 2), (100, 10), (11, 3)]:
        write(disk, index, term)
    found, problems = newest(disk, "c1")
    assert found is not None
    assert ((found.index, found.term), problems) == ((100, 10), [])


def test_large_states_go_to_the_disk_in_blocks_while_they_are_added(disk: RecordedDisk) -> None:
    disk.is_held = True
    taking, outcome, chance = writer(disk), Outcome(), random.Random(3)
    parts = [chance.randbytes(100_000) for _ in range(60)]
    for part in parts:
        taking.add(part)
    assert disk.steps == []
    assert taking.backlog_bytes == 6_000_000
    assert 15 <= len(disk.held) <= 6_000_000 // BLOCK_BYTES
    disk.run(10)
    assert taking.backlog_bytes == 6_000_000 - 10 * 300_000
    taking.finish(outcome)
    disk.run()
    assert taking.backlog_bytes == 0
    assert sum(step[0] == "sync" for step in disk.steps) >= 2
    assert list(chunks(disk, outcome.snapshot)) == parts


def test_a_chunk_that_is_too_large_is_refused(disk: RecordedDisk) -> None:
    with pytest.raises(Internal, match="at most"):
        writer(disk).add(bytes(CHUNK_BYTES_MAX + 1))
    assert list(chunks(disk, write(disk, parts=[bytes(CHUNK_BYTES_MAX)]))) == [bytes(CHUNK_BYTES_MAX)]


@pytest.mark.parametrize("added", [0, 1, 3])
def test_nothing_is_left_of_a_snapshot_that_was_given_up(disk: RecordedDisk, added: int) -> None:
    disk.is_held = True
    taking = writer(disk)
    for _ in range(added):
        taking.add(bytes(BLOCK_BYTES))
    disk.run(1)
    taking.abandon()
    disk.run()
    assert disk.names() == []
    write_again = writer(disk)
    taking.abandon()
    outcome = Outcome()
    write_again.finish(outcome)
    disk.run()
    assert newest(disk, "c1")[0] == outcome.snapshot


@pytest.mark.parametrize("step", ["name", "write", "sync", "rename"])
def test_nothing_is_left_of_a_snapshot_that_the_disk_refused(disk: RecordedDisk, step: str) -> None:
    before = write(disk, index=30)
    tried = []

    def fails(asked: Any) -> OSError | None:
        tried.append(asked[0])
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if asked[0] == step else None

    disk.fails = fails
    taking, outcome = writer(disk), Outcome()
    for _ in range(3):
        with contextlib.suppress(OSError):  # which says that there is no use in going on
            taking.add(bytes(BLOCK_BYTES))
    taking.finish(outcome)
    assert isinstance(outcome.error, OSError)
    assert tried.count(step) == 1
    assert disk.names() == [before.name]
    disk.fails = lambda _step: None
    assert write(disk).index == 40


def test_wherever_the_power_goes_the_old_one_or_the_new_one_is_there_and_whole(disk: RecordedDisk) -> None:
    old = write(disk, index=30)
    disk.forget_steps()
    new = write(disk, parts=[random.Random(1).randbytes(900), b"x"])
    remove_older(disk, new)
    chance = random.Random(2)
    found = []
    for count, stopped in disk.prefixes(stride=40):
        for after in (stopped, stopped.power_cut(), stopped.power_cut(chance)):
            snapshot, problems = newest(after, "c1")
            assert snapshot in (old, new)
            assert problems == []
            assert list(chunks(after, snapshot))
            found.append(snapshot)
            if count == len(disk.steps):
                assert snapshot == new
            assert write(after, index=50).index == 50
    assert {old, new} == set(found)


# -- damage ---------------------------------------------------------------------------------------------------------


def damaged(image: bytes) -> dict[str, bytes]:
    flipped = {
        f"a flipped bit at {at}": image[:at] + bytes([image[at] ^ 1]) + image[at + 1 :]
        for at in [*range(0, len(image), 13), len(image) - 1]
    }
    return flipped | {
        "empty": b"",
        "without its end": image[:-20],
        "cut": image[: len(image) // 2],
        "longer": image + b"\0" * 40,
        "twice": image + image,
        "zeroed": bytes(len(image)),
    }


def test_a_damaged_one_is_reported_kept_and_the_one_before_counts(disk: RecordedDisk) -> None:
    old, new = write(disk, index=30), write(disk)
    image = disk.image(new.name)
    disk.read_only = True
    for what, changed in damaged(image).items():
        disk.put(new.name, changed)
        found, problems = newest(disk, "c1")
        assert found == old, what
        assert len(problems) == 1
        assert problems[0].startswith(f"/disk/{new.name}"), what
        assert " byte " in problems[0]
        assert new.name in disk.names()


def test_frames_that_are_whole_but_not_the_ones_that_belong_there_are_noticed(disk: RecordedDisk) -> None:
    """Of another file, at the same offsets: only the end knows."""
    one = write(disk, parts=[b"aaaa", b"bbbb"])
    image = disk.image(one.name)
    other = write(disk, parts=[b"aaaa", b"cccc"])
    mixed = disk.image(other.name)
    assert len(image) == len(mixed)
    assert one.id != other.id
    at = image.index(b"bbbb")
    disk.put(one.name, image[: at - 9] + mixed[at - 9 : at + 4] + image[at + 4 :])
    assert "the end at byte" in newest(disk, "c1")[1][0]


def test_frames_out_of_place_are_noticed(disk: RecordedDisk) -> None:
    snapshot = write(disk)
    image = disk.image(snapshot.name)
    for what in (
        _frame(CHUNK, b"first", 0),
        image + _frame(CHUNK, b"after the end", len(image)),
        image + _frame(HEADER, b"\x80", len(image)),
        _frame(b"\x09", b"strange", 0),
        _frame(END, b"\x90", 0),
    ):
        disk.put(snapshot.name, what)
        assert "is out of place" in newest(disk, "c1")[1][0]


def test_a_snapshot_under_another_name_or_of_another_cluster_does_not_count(disk: RecordedDisk) -> None:
    snapshot = write(disk)
    found, problems = newest(disk, "c2")
    assert found is None
    assert "is not of cluster 'c2', but of 'c1'" in problems[0]
    disk.put(snapshot_name(99, 3), disk.image(snapshot.name))
    found, problems = newest(disk, "c1")
    assert found == snapshot
    assert "under another name" in problems[0]


def test_a_snapshot_of_a_later_release_is_refused(disk: RecordedDisk) -> None:
    disk.put(snapshot_name(9, 1), _frame(HEADER, b"\x81\xa6format\x02", 0))
    disk.read_only = True
    with pytest.raises(NewerFormat, match=r"snapshot format 2 and this release reads up to 1.*Nothing was changed"):
        newest(disk, "c1")


def test_a_snapshot_that_cannot_be_read_is_reported(disk: RecordedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = write(disk, index=30), write(disk)
    open_file = disk.open

    def unreadable(name: str, *, read_only: bool = False) -> Any:
        if name == new.name:
            raise OSError(errno.EIO, "Input/output error")
        return open_file(name, read_only=read_only)

    monkeypatch.setattr(disk, "open", unreadable)
    found, problems = newest(disk, "c1")
    assert found == old
    assert problems == [f"/disk/{new.name} cannot be read: [Errno 5] Input/output error"]


def test_chunks_are_checked_when_they_are_read_again(disk: RecordedDisk) -> None:
    snapshot = write(disk)
    image = bytearray(disk.image(snapshot.name))
    image[-40] ^= 1
    disk.put(snapshot.name, bytes(image))
    with pytest.raises(DamagedSnapshot, match=snapshot.name):
        list(chunks(disk, snapshot))


# -- sending and receiving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 100, 10_000])
def test_a_snapshot_that_was_sent_in_pieces_is_the_same_at_the_other_end(disk: RecordedDisk, step: int) -> None:
    snapshot = write(disk)
    source, other = SnapshotFile(disk, snapshot), RecordedDisk("/other")
    image = b"".join(source.read(at, step) for at in range(0, snapshot.size, step))
    source.close()
    incoming = receive(other, snapshot, image, step=step)
    assert newest(other, "c1") == (None, [])
    assert finish(incoming).snapshot == snapshot
    assert other.names() == [snapshot.name]
    assert newest(other.power_cut(), "c1") == (snapshot, [])


def test_receiving_goes_on_where_it_was_after_a_restart(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    image = disk.image(snapshot.name)
    receive(other, snapshot, image, stop=500)
    again = Incoming(other, "c1", snapshot.id, snapshot.index, snapshot.term, snapshot.size)
    assert (again.offset, again.size, again.id) == (500, snapshot.size, snapshot.id)
    assert finish(receive(other, snapshot, image)).snapshot == snapshot


def test_receiving_was_complete_before_a_restart(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    receive(other, snapshot, disk.image(snapshot.name))
    again = Incoming(other, "c1", snapshot.id, snapshot.index, snapshot.term, snapshot.size)
    assert again.offset == again.size
    assert finish(again).snapshot == snapshot


def test_another_snapshot_begins_from_nothing_and_takes_the_place_of_the_unfinished_one(disk: RecordedDisk) -> None:
    first, other = write(disk), RecordedDisk()
    receive(other, first, disk.image(first.name), stop=500)
    second = write(disk, index=60)
    incoming = receive(other, second, disk.image(second.name), stop=300)
    assert incoming.offset == 300
    assert len(other.names()) == 1
    assert finish(receive(other, second, disk.image(second.name))).snapshot == second


def test_what_is_not_the_announced_snapshot_is_dropped(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    image = disk.image(snapshot.name)
    different = write(disk, parts=[*CHUNKS[:-1], b"tsal"])
    wrong = {**damaged(image), "another": disk.image(different.name)}
    for what, changed in wrong.items():
        if len(changed) != snapshot.size:
            continue
        outcome = finish(receive(other, snapshot, changed))
        assert isinstance(outcome.error, ValueError), what
        assert other.names() == []
    assert finish(receive(other, snapshot, image)).snapshot == snapshot


def test_pieces_that_do_not_follow_or_are_too_many_are_refused(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    incoming = receive(other, snapshot, disk.image(snapshot.name), stop=100)
    for offset, data in [(50, b"x"), (101, b"x"), (100, bytes(snapshot.size))]:
        outcome = Outcome()
        incoming.write(offset, data, outcome)
        assert isinstance(outcome.error, ValueError)
        assert incoming.offset == 100
    incoming.abandon()
    assert other.names() == []


def test_a_piece_that_the_disk_refused_does_not_count(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    incoming = receive(other, snapshot, disk.image(snapshot.name), stop=100)
    other.fails = lambda step: OSError(errno.ENOSPC, "No space") if step[0] == "write" else None
    outcome = Outcome()
    incoming.write(100, b"x", outcome)
    assert isinstance(outcome.error, OSError)
    assert incoming.offset == 100


def test_a_received_snapshot_of_another_cluster_is_none(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    incoming = Incoming(other, "c2", snapshot.id, snapshot.index, snapshot.term, snapshot.size)
    incoming.write(0, disk.image(snapshot.name), Outcome())
    error = finish(incoming).error
    assert isinstance(error, ValueError)
    assert "not of cluster 'c2'" in str(error)
    assert other.names() == []


def test_a_partial_file_that_went_away_meanwhile_is_noticed(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    image = disk.image(snapshot.name)
    receive(other, snapshot, image, stop=100)
    incoming = Incoming(other, "c1", snapshot.id, snapshot.index, snapshot.term, snapshot.size)
    name = other.names()[0]
    for change in (lambda: other.put(name, image[:90]), lambda: other.remove(name)):
        change()
        outcome = Outcome()
        incoming.write(100, image[100:], outcome)
        assert isinstance(outcome.error, OSError)
        incoming._file = None


def test_wherever_the_power_goes_a_snapshot_can_be_received_after_it(disk: RecordedDisk) -> None:
    snapshot, other = write(disk), RecordedDisk()
    image = disk.image(snapshot.name)
    assert finish(receive(other, snapshot, image)).snapshot == snapshot
    chance = random.Random(8)
    for count, stopped in other.prefixes(stride=60):
        for after in (stopped, stopped.power_cut(), stopped.power_cut(chance)):
            found, problems = newest(after, "c1")
            assert found in (None, snapshot)
            assert problems == []
            assert found == snapshot or count < len(other.steps)
            outcome = finish(receive(after, snapshot, image))
            if outcome.told[0][1] is not None:  # what was there was torn, and is gone now
                outcome = finish(receive(after, snapshot, image))
            assert outcome.snapshot == snapshot


def test_a_file_that_is_being_sent_stays_readable_when_it_is_replaced_and_removed(tmp_path: Path) -> None:
    disk = DirectoryDisk(tmp_path, inline=True)
    snapshot = write(disk)
    image = (tmp_path / snapshot.name).read_bytes()
    sent, removed = SnapshotFile(disk, snapshot), SnapshotFile(disk, snapshot)
    replaced = write(disk, parts=[b"another state"])
    assert replaced.name == snapshot.name
    assert sent.read(0, 1 << 20) == image
    with pytest.raises(FileNotFoundError, match="replaced"):
        SnapshotFile(disk, snapshot)
    remove_older(disk, write(disk, index=41))
    assert removed.read(5, 100) == image[5:105]
    with pytest.raises(FileNotFoundError):
        SnapshotFile(disk, replaced)
    sent.close()
    removed.close()
    disk.close()


def test_older_snapshots_and_what_was_received_of_them_go_and_nothing_else(disk: RecordedDisk) -> None:
    source = RecordedDisk()
    for index in (20, 30, 50):
        write(disk, index=index)
    keep = write(disk, index=40)
    older, newer = write(source, index=35), write(source, index=70)
    receive(disk, older, source.image(older.name), stop=50)
    disk.put("journal-00000001", b"x")
    remove_older(disk, keep)
    assert disk.names() == ["journal-00000001", keep.name, snapshot_name(50, 3)]
    receive(disk, newer, source.image(newer.name), stop=50)
    disk.put(TAKING, b"x")
    remove_older(disk, keep)
    assert len(disk.names()) == 5


# -- format ---------------------------------------------------------------------------------------------------------


def test_the_bytes_on_disk_are_those_that_were_agreed_on(disk: RecordedDisk) -> None:
    written = disk.image(write(disk).name)
    if os.environ.get("ROSTRA_RECORD_GOLDEN"):
        GOLDEN.write_bytes(written)
    assert written == GOLDEN.read_bytes()


def test_a_snapshot_of_format_1_can_be_read(disk: RecordedDisk) -> None:
    disk.put(snapshot_name(40, 3), GOLDEN.read_bytes())
    snapshot, problems = newest(disk, "c1")
    assert problems == []
    assert snapshot is not None
    assert (snapshot.index, snapshot.term, snapshot.members, snapshot.members_index) == (40, 3, MEMBERS, 7)
    assert list(chunks(disk, snapshot)) == CHUNKS
