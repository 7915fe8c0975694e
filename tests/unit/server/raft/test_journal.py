"""The journal keeps what was synced, forgets what was torn, and refuses what was damaged."""

from __future__ import annotations

import asyncio
import os
import random
import stat
import struct
import threading
import zlib
from pathlib import Path

import pytest

from rostra.server.raft.journal import (
    FILE_NAME,
    HEADER_BYTES,
    DamagedJournal,
    Journal,
    JournalInUse,
    NewerFormat,
    Recovered,
    WrongJournal,
    has_journal,
)

GOLDEN = Path(__file__).parents[3] / "golden" / "journal-1.bin"


def open_journal(directory: Path, *, cluster_id: str = "c1", node_id: str = "n1") -> Journal:
    return Journal.open(directory, cluster_id=cluster_id, node_id=node_id, inline=True)


def add(journal: Journal, *indexes: int, term: int = 1, size: int = 10) -> None:
    for index in indexes:
        journal.add(b"\0" + bytes([index % 256]) * size, index, term)
    journal.start_sync()


def image(directory: Path) -> bytes:
    return (directory / FILE_NAME).read_bytes()


def change(directory: Path, at: int, data: bytes) -> None:
    with (directory / FILE_NAME).open("r+b") as file:
        file.seek(at)
        file.write(data)


def write_golden_story(directory: Path) -> Journal:
    journal = open_journal(directory, cluster_id="5e1f", node_id="node-a")
    journal.add(b"\x01", 1, 0)
    journal.setCurrentTerm(1, "node-a")
    journal.start_sync()
    journal.add(b"\x00" + bytes(range(40)), 2, 1)
    journal.setRaftCommitIndex(1)
    journal.start_sync()
    journal.add(b"\x00late", 3, 1)
    journal.deleteEntriesFrom(2)
    journal.setCurrentTerm(3, None)
    journal.add(b"\x00other", 3, 3)
    journal.setRaftCommitIndex(3)
    journal.start_sync()
    journal.deleteEntriesTo(1)
    journal.start_sync()
    return journal


def test_a_reopened_journal_has_its_entries_term_vote_and_commit_index(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1, 2, 3)
    journal.setCurrentTerm(7, "n2")
    journal.setRaftCommitIndex(2)
    journal.start_sync()
    journal.close()

    again = open_journal(tmp_path)
    assert again[:] == [(b"\0" + bytes([i]) * 10, i, 1) for i in (1, 2, 3)]
    assert (again.getCurrentTerm(), again.getVotedForNodeId(), again.getRaftCommitIndex()) == (7, "n2", 2)
    assert again.wiped_bytes == 0


def test_a_journal_that_was_not_closed_has_all_that_was_synced(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1, 2)
    os.close(journal._file._fd)  # the process is gone, the kernel has what was written
    assert [entry[1] for entry in open_journal(tmp_path)[:]] == [1, 2]


def test_the_file_is_private_and_known_to_be_there(tmp_path: Path) -> None:
    assert not has_journal(tmp_path / "raft")
    open_journal(tmp_path / "raft").close()
    assert has_journal(tmp_path / "raft")
    assert stat.S_IMODE((tmp_path / "raft" / FILE_NAME).stat().st_mode) == 0o600


def test_truncation_survives_a_restart(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1, 2, 3, 4)
    journal.deleteEntriesFrom(2)
    add(journal, 3, term=2)
    journal.close()
    assert [(index, term) for _, index, term in open_journal(tmp_path)[:]] == [(1, 1), (2, 1), (3, 2)]


def test_dropping_the_beginning_survives_a_restart_and_keeps_one_entry(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1, 2, 3, 4)
    journal.deleteEntriesTo(2)
    journal.start_sync()
    journal.close()
    again = open_journal(tmp_path)
    assert [entry[1] for entry in again[:]] == [3, 4]
    again.deleteEntriesTo(99)
    assert [entry[1] for entry in again[:]] == [4]


def test_a_torn_tail_is_wiped_and_what_was_synced_stays(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1, 2)
    end = journal.bytes
    add(journal, 3, size=100)
    journal._file.close()
    torn = image(tmp_path)[end : end + 60]
    change(tmp_path, end, torn + bytes(len(image(tmp_path)) - end - 60))

    again = open_journal(tmp_path)
    assert [entry[1] for entry in again[:]] == [1, 2]
    assert again.wiped_bytes > 0
    add(again, 3, term=2)
    again.close()
    assert [(index, term) for _, index, term in open_journal(tmp_path)[:]] == [(1, 1), (2, 1), (3, 2)]


def test_garbage_after_the_tail_is_wiped(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1, 2)
    journal._file.close()
    change(tmp_path, journal.bytes, random.Random(4).randbytes(5000))
    assert [entry[1] for entry in open_journal(tmp_path)[:]] == [1, 2]
    assert image(tmp_path)[journal.bytes :].strip(b"\0") == b""


def test_a_batch_torn_in_its_first_sector_is_wiped_though_later_frames_are_whole(tmp_path: Path) -> None:
    """The disk may write the sectors of one unsynced write in any order."""
    journal = open_journal(tmp_path)
    add(journal, 1)
    start = journal.bytes
    add(journal, 2, 3, 4, size=600)
    journal._file.close()
    change(tmp_path, start, bytes(512))
    assert [entry[1] for entry in open_journal(tmp_path)[:]] == [1]


@pytest.mark.parametrize("where", ["length", "checksum", "body"])
def test_a_flipped_bit_in_the_middle_is_refused_and_nothing_is_touched(tmp_path: Path, where: str) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1)
    start = journal.bytes
    for index in (2, 3, 4):
        add(journal, index)
    journal.close()
    at = start + {"length": 1, "checksum": 5, "body": 20}[where]
    change(tmp_path, at, bytes([image(tmp_path)[at] ^ 4]))
    before = image(tmp_path)
    with pytest.raises(DamagedJournal, match="damaged at byte"):
        open_journal(tmp_path)
    assert image(tmp_path) == before


def test_a_flipped_bit_in_the_last_entry_is_refused_once_the_journal_was_idle_or_closed(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1)
    start = journal.bytes
    add(journal, 2)
    journal.onOneSecondTimer()
    journal._file.close()
    change(tmp_path, start + 20, b"\xff")
    with pytest.raises(DamagedJournal):
        open_journal(tmp_path)


def test_a_zeroed_page_in_the_middle_is_refused(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    for index in range(1, 40):
        add(journal, index, size=400)
    journal.close()
    change(tmp_path, 8192, bytes(4096))
    with pytest.raises(DamagedJournal):
        open_journal(tmp_path)


def test_a_newer_format_is_refused_with_a_clear_message_and_not_touched(tmp_path: Path) -> None:
    open_journal(tmp_path).close()
    change(tmp_path, 8, struct.pack("<I", 2))
    before = image(tmp_path)
    with pytest.raises(NewerFormat, match=r"journal format 2 and this release reads up to 1.*Nothing was changed"):
        open_journal(tmp_path)
    assert image(tmp_path) == before


def test_a_record_of_a_later_release_is_refused(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1)
    journal._record(b"\x09future")
    journal.start_sync()
    journal.close()
    with pytest.raises(NewerFormat, match="record type 9"):
        open_journal(tmp_path)


def test_the_journal_of_another_node_or_cluster_is_refused(tmp_path: Path) -> None:
    open_journal(tmp_path).close()
    with pytest.raises(WrongJournal, match="'n1' of cluster 'c1'"):
        open_journal(tmp_path, node_id="n2")
    with pytest.raises(WrongJournal):
        open_journal(tmp_path, cluster_id="c2")


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"x" * 4096)
    with pytest.raises(DamagedJournal, match="not a journal"):
        open_journal(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(b"")
    with pytest.raises(DamagedJournal):
        open_journal(tmp_path)


def test_a_journal_is_open_once_only(tmp_path: Path) -> None:
    first = open_journal(tmp_path)
    with pytest.raises(JournalInUse):
        open_journal(tmp_path)
    first.close()
    open_journal(tmp_path).close()


def test_the_bytes_on_disk_are_those_of_the_first_release(tmp_path: Path) -> None:
    journal = write_golden_story(tmp_path)
    journal._file.close()
    written = image(tmp_path)[: journal.bytes]
    if os.environ.get("ROSTRA_RECORD_GOLDEN"):
        GOLDEN.write_bytes(written)
    assert written == GOLDEN.read_bytes()


def test_the_journal_of_the_first_release_can_be_read(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(GOLDEN.read_bytes())
    journal = open_journal(tmp_path, cluster_id="5e1f", node_id="node-a")
    assert journal[:] == [(b"\x00" + bytes(range(40)), 2, 1), (b"\x00other", 3, 3)]
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId(), journal.getRaftCommitIndex()) == (3, None, 3)


def test_any_prefix_of_an_unsynced_write_gives_the_synced_state_or_more(tmp_path: Path) -> None:
    chance = random.Random(11)
    for round_number in range(30):
        directory = tmp_path / str(round_number)
        journal = open_journal(directory)
        journal.add(b"\x01", 1, 0)
        journal.start_sync()
        states = [list(journal[:])]  # after each record
        for _ in range(chance.randrange(1, 6)):
            synced, end = len(states) - 1, journal.bytes
            for _ in range(chance.randrange(1, 4)):
                if len(journal) > 1 and chance.random() < 0.3:
                    journal.deleteEntriesFrom(chance.randrange(1, len(journal)))
                    states.append(list(journal[:]))
                journal.add(chance.randbytes(chance.randrange(1, 900)), journal.last_index + 1, round_number)
                states.append(list(journal[:]))
            journal.start_sync()
        journal._file.close()
        cut = chance.randrange(end, journal.bytes + 1)
        (directory / FILE_NAME).write_bytes(image(directory)[:cut].ljust(HEADER_BYTES * 80, b"\0"))
        again = open_journal(directory)
        assert again[:] in states[synced:]
        again.close()


class SlowFile:
    """A disk on which a write lasts until it is let go."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []
        self.go = threading.Semaphore(0)
        self.error: OSError | None = None

    def write(self, offset: int, data: bytes) -> None:
        assert self.go.acquire(timeout=10)
        self.writes.append((offset, data))
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        pass


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)


async def test_what_is_added_during_a_sync_is_durable_with_the_next_one() -> None:
    disk = SlowFile()
    journal = Journal(disk, Recovered())
    journal.add(b"\0a", 1, 1)
    journal.start_sync()
    journal.add(b"\0b", 2, 1)
    journal.start_sync()
    assert (journal.durable_lsn, journal.lsn, journal.durable_index) == (0, 2, 0)

    disk.go.release()
    await until(lambda: journal.durable_lsn == 1)
    assert journal.durable_index == 1
    assert len(disk.writes) == 1
    journal.start_sync()
    disk.go.release()
    await until(lambda: journal.is_durable)
    assert journal.durable_index == 2
    assert disk.writes[1][0] == disk.writes[0][0] + len(disk.writes[0][1])
    disk.go.release()
    journal.close()


async def test_an_entry_that_replaced_a_durable_one_is_not_durable_yet() -> None:
    disk = SlowFile()
    journal = Journal(disk, Recovered())
    for index in (1, 2, 3):
        journal.add(b"\0", index, 1)
    journal.start_sync()
    disk.go.release()
    await until(lambda: journal.is_durable)
    journal.deleteEntriesFrom(1)
    assert journal.durable_index == 1
    journal.add(b"\0", 2, 2)
    assert journal.durable_index == 1
    disk.go.release()
    journal.close()


async def test_a_failed_disk_is_reported_once_and_never_tried_again() -> None:
    disk = SlowFile()
    disk.error = OSError(5, "Input/output error")
    journal = Journal(disk, Recovered())
    failures: list[str] = []
    journal.on_failed = failures.append
    journal.add(b"\0", 1, 1)
    journal.start_sync()
    disk.go.release()
    await until(lambda: failures)
    journal.add(b"\0", 2, 1)
    journal.start_sync()
    journal.close()
    assert failures == ["journal: OSError: [Errno 5] Input/output error"]
    assert len(disk.writes) == 1
    assert journal.durable_lsn == 0


def test_a_checksum_is_good_in_its_place_only(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    add(journal, 1)
    journal._file.close()
    frame = image(tmp_path)[HEADER_BYTES : journal.bytes]
    assert struct.unpack_from("<II", frame)[1] == zlib.crc32(frame[8 : 8 + struct.unpack_from("<I", frame)[0]], 512)
    change(tmp_path, journal.bytes, frame)  # old bytes where a new record should be
    assert [entry[1] for entry in open_journal(tmp_path)[:]] == [1]
