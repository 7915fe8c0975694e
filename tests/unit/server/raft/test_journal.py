"""The journal keeps what was synced, forgets what was torn, and refuses what was damaged."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import stat
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest

from rostra.server.raft.disk import DirectoryDisk, DirectoryInUse
from rostra.server.raft.journal import (
    ENTRY_OVERHEAD_BYTES,
    HEADER_BYTES,
    DamagedJournal,
    Entry,
    Journal,
    NewerFormat,
    WrongJournal,
    has_journal,
    inspect_journal,
    segment_salt,
)
from rostra.server.raft.members import Member, encode_members
from rostra.wire.errors import Internal
from tests.support.recorded_disk import RecordedDisk

GOLDEN = Path(__file__).parents[3] / "golden"
FIRST, SECOND, THIRD, FOURTH = "journal-00000001", "journal-00000002", "journal-00000003", "journal-00000004"

#: META without a vote, COMMIT, BASE, each with the head of its frame.
BEGINNING_BYTES = (8 + 9) + (8 + 17) + (8 + 9)


def open_journal(disk: Any, *, cluster_id: str = "c1", node_id: str = "n1", segment_bytes: int = 1 << 16) -> Journal:
    return Journal.open(
        disk, cluster_id=cluster_id, node_id=node_id, segment_bytes=segment_bytes, allocate_bytes=segment_bytes // 4
    )


def add(journal: Journal, *indexes: int, term: int = 1, size: int = 10) -> None:
    for index in indexes:
        journal.add(b"\0" + bytes([index % 256]) * size, index, term)
    journal.start_sync()


def change(disk: RecordedDisk, name: str, at: int, data: bytes) -> None:
    image = disk.image(name)
    disk.put(name, image[:at] + data + image[at + len(data) :])


def flip(disk: RecordedDisk, name: str, at: int) -> None:
    change(disk, name, at, bytes([disk.image(name)[at] ^ 4]))


def log_of(journal: Journal) -> list[tuple[int, int]]:
    """(index, term)"""
    return [(index, term) for _, index, term in journal[:]]


def indexes_of(journal: Journal) -> list[int]:
    return [index for _, index, _ in journal[:]]


def promises(journal: Journal) -> tuple[list[Entry], int, str | None]:
    return journal[:], journal.getCurrentTerm(), journal.getVotedForNodeId()


@pytest.fixture
def disk() -> RecordedDisk:
    return RecordedDisk()


# -- one segment ----------------------------------------------------------------------------------------------------


def test_a_reopened_journal_has_its_entries_term_vote_and_commit_index(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2, 3)
    journal.setCurrentTerm(7, "n2")
    journal.setRaftCommitIndex(2)
    journal.start_sync()
    journal.close()

    again = open_journal(disk)
    assert again[:] == [(b"\0" + bytes([i]) * 10, i, 1) for i in (1, 2, 3)]
    assert (again.getCurrentTerm(), again.getVotedForNodeId(), again.getRaftCommitIndex()) == (7, "n2", 2)
    assert again.wiped_bytes == 0
    assert again.log_bytes == journal.log_bytes


def test_a_journal_that_was_not_closed_has_all_that_was_synced(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2)
    assert indexes_of(open_journal(disk.power_cut())) == [1, 2]


def test_the_files_are_private_and_known_to_be_there(tmp_path: Path) -> None:
    assert not has_journal(tmp_path / "raft")
    disk = DirectoryDisk(tmp_path / "raft", inline=True)
    assert not has_journal(tmp_path / "raft")
    disk.start("journal-00000001.new").close()  # the power went while it was made
    assert not has_journal(tmp_path / "raft")
    open_journal(disk).close()
    assert has_journal(tmp_path / "raft")
    assert stat.S_IMODE((tmp_path / "raft" / FIRST).stat().st_mode) == 0o600
    (tmp_path / "raft" / FIRST).rename(tmp_path / "raft" / "journal-00000412")
    assert has_journal(tmp_path / "raft")
    disk.close()


def test_a_directory_is_open_once_only(tmp_path: Path) -> None:
    first = DirectoryDisk(tmp_path)
    with pytest.raises(DirectoryInUse):
        DirectoryDisk(tmp_path)
    first.close()
    DirectoryDisk(tmp_path).close()


def test_truncation_survives_a_restart(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2, 3, 4)
    journal.deleteEntriesFrom(2)
    add(journal, 3, term=2)
    journal.close()
    assert log_of(open_journal(disk)) == [(1, 1), (2, 1), (3, 2)]


def test_dropping_the_beginning_survives_a_restart_and_keeps_one_entry(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2, 3, 4)
    journal.deleteEntriesTo(2)
    journal.start_sync()
    journal.close()
    again = open_journal(disk)
    assert indexes_of(again) == [3, 4]
    again.set_base(1)
    assert indexes_of(again) == [3, 4]
    again.deleteEntriesTo(99)
    assert indexes_of(again) == [4]


def test_a_reset_leaves_a_placeholder_and_survives_a_restart(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2, 3)
    journal.setRaftCommitIndex(2)
    journal.reset_to(50, 6)
    assert (journal[:], journal.getRaftCommitIndex()) == ([(b"\x01", 50, 6)], 50)
    add(journal, 51, term=7)
    journal.close()
    again = open_journal(disk)
    assert log_of(again) == [(50, 6), (51, 7)]
    assert again.getRaftCommitIndex() == 50
    assert again.log_bytes == journal.log_bytes


def test_a_commit_index_never_covers_what_came_after_a_truncation_or_reset(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2, 3, 4, 5)
    journal.setRaftCommitIndex(5)
    journal.onOneSecondTimer()
    journal.deleteEntriesFrom(2)
    add(journal, 3, 4, 5, term=2)
    assert journal.getRaftCommitIndex() == 2
    assert open_journal(disk.power_cut()).getRaftCommitIndex() == 2
    without_note = disk.copy()
    change(without_note, FIRST, journal.bytes - 25, bytes(25))
    assert open_journal(without_note).getRaftCommitIndex() == 2
    journal.setRaftCommitIndex(5)
    journal.reset_to(2, 2)
    add(journal, 3, 4, 5, term=3)
    assert journal.getRaftCommitIndex() == 2
    assert open_journal(disk.power_cut()).getRaftCommitIndex() == 2


def test_an_emptied_log_can_begin_anywhere(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2, 3)
    journal.clear()
    assert journal.log_bytes == 0
    assert journal.term_at(1) is None
    add(journal, 9, 10)
    journal.close()
    assert indexes_of(open_journal(disk)) == [9, 10]


def test_a_torn_tail_is_wiped_and_what_was_synced_stays(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2)
    end = journal.bytes
    add(journal, 3, size=100)
    torn = disk.copy()
    change(torn, FIRST, end + 60, bytes(journal.bytes - end - 60))

    again = open_journal(torn)
    assert indexes_of(again) == [1, 2]
    assert again.wiped_bytes > 0
    assert torn.power_cut().image(FIRST)[end:].strip(b"\0") == b""
    add(again, 3, term=2)
    again.close()
    assert log_of(open_journal(torn)) == [(1, 1), (2, 1), (3, 2)]


def test_garbage_after_the_tail_is_wiped(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1, 2)
    change(disk, FIRST, journal.bytes, random.Random(4).randbytes(5000))
    assert indexes_of(open_journal(disk)) == [1, 2]
    assert disk.image(FIRST)[journal.bytes :].strip(b"\0") == b""


def test_a_batch_torn_in_its_first_sector_is_wiped_though_later_frames_are_whole(disk: RecordedDisk) -> None:
    """The disk may write the sectors of one unsynced write in any order."""
    journal = open_journal(disk)
    add(journal, 1)
    start = journal.bytes
    add(journal, 2, 3, 4, size=600)
    change(disk, FIRST, start, bytes(512))
    assert indexes_of(open_journal(disk)) == [1]


@pytest.mark.parametrize("where", ["length", "checksum", "body"])
def test_a_flipped_bit_in_the_middle_is_refused_and_nothing_is_touched(disk: RecordedDisk, where: str) -> None:
    journal = open_journal(disk)
    add(journal, 1)
    start = journal.bytes
    for index in (2, 3, 4):
        add(journal, index)
    journal.close()
    flip(disk, FIRST, start + {"length": 1, "checksum": 5, "body": 20}[where])
    before = disk.image(FIRST)
    disk.read_only = True
    with pytest.raises(DamagedJournal, match=f"/disk/{FIRST} is damaged at byte {start}: the record at"):
        open_journal(disk)
    assert disk.image(FIRST) == before


@pytest.mark.parametrize("at", [20, 300, HEADER_BYTES - 1, HEADER_BYTES + 3, HEADER_BYTES + BEGINNING_BYTES - 1])
def test_a_flipped_bit_in_the_beginning_is_refused_since_it_was_made_whole(disk: RecordedDisk, at: int) -> None:
    open_journal(disk)
    flip(disk, FIRST, at)
    with pytest.raises(DamagedJournal, match=rf"/disk/{FIRST}.*byte"):
        open_journal(disk)


def test_a_flipped_bit_in_the_last_entry_is_refused_once_the_journal_was_idle_or_closed(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1)
    start = journal.bytes
    add(journal, 2)
    journal.onOneSecondTimer()
    flip(disk, FIRST, start + 20)
    with pytest.raises(DamagedJournal):
        open_journal(disk)


def test_an_idle_journal_writes_nothing_once_all_is_on_record(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1)
    journal.onOneSecondTimer()
    disk.forget_steps()
    journal.onOneSecondTimer()
    journal.start_sync()
    journal.close()
    assert disk.steps == []


def test_a_zeroed_page_in_the_middle_is_refused(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    for index in range(1, 40):
        add(journal, index, size=400)
    journal.close()
    change(disk, FIRST, 8192, bytes(4096))
    with pytest.raises(DamagedJournal):
        open_journal(disk)


def test_a_newer_format_is_refused_with_a_clear_message_and_not_touched(disk: RecordedDisk) -> None:
    open_journal(disk).close()
    change(disk, FIRST, 8, struct.pack("<I", 3))
    disk.read_only = True
    with pytest.raises(NewerFormat, match=r"journal format 3 and this release reads up to 2.*Nothing was changed"):
        open_journal(disk)


def test_a_record_of_a_later_release_is_refused(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, 1)
    journal._record(b"\x09future")
    journal.start_sync()
    journal.close()
    with pytest.raises(NewerFormat, match="record type 9"):
        open_journal(disk)


def test_the_journal_of_another_node_or_cluster_is_refused(disk: RecordedDisk) -> None:
    open_journal(disk).close()
    with pytest.raises(WrongJournal, match="'n1' of cluster 'c1'"):
        open_journal(disk, node_id="n2")
    with pytest.raises(WrongJournal):
        open_journal(disk, cluster_id="c2")


def test_a_file_that_is_no_journal_is_refused(disk: RecordedDisk) -> None:
    for image in (b"x" * 4096, b"", b"ROSTRA-J"):
        disk.put(FIRST, image)
        with pytest.raises(DamagedJournal, match="not a journal"):
            open_journal(disk)


def test_a_checksum_is_good_in_its_place_only(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    start = journal.bytes
    add(journal, 1)
    frame = disk.image(FIRST)[start : journal.bytes]
    length, crc = struct.unpack_from("<II", frame)
    assert crc == zlib.crc32(frame[8 : 8 + length], segment_salt(1) ^ start)
    change(disk, FIRST, journal.bytes, frame)  # old bytes where a new record should be
    assert indexes_of(open_journal(disk)) == [1]


def test_a_record_that_is_too_large_is_refused_before_it_is_written(disk: RecordedDisk) -> None:
    with pytest.raises(Internal, match="at most"):
        open_journal(disk).add(bytes(9 << 20), 1, 1)


def test_an_entry_that_the_log_has_not_is_never_another_one(disk: RecordedDisk) -> None:
    journal = open_journal(disk)
    add(journal, *range(1, 10))
    journal.set_base(5)
    assert [journal.term_at(index) for index in (4, 5, 9, 10)] == [None, 1, 1, None]
    assert [entry[1] for entry in journal.entries_from(8, 1000)] == [8, 9]
    assert [entry[1] for entry in journal.entries_from(5, 12)] == [5, 6]
    assert journal.entries_from(10, 1000) == []
    for index in (4, 10):
        with pytest.raises(Internal, match="not in the log"):
            journal.entry(index)
    with pytest.raises(Internal, match="not in the log"):
        journal.entries_from(4, 1000)


def test_the_memory_of_the_entries_is_counted_as_they_come_and_go(disk: RecordedDisk) -> None:
    journal, chance = open_journal(disk), random.Random(5)
    journal.add(b"\x01", 1, 0)
    for step in range(400):
        match chance.randrange(8):
            case 0 if len(journal) > 2:
                journal.deleteEntriesFrom(chance.randrange(1, len(journal)))
            case 1:
                journal.set_base(journal.first_index + chance.randrange(3))
            case 2 if step % 5 == 0:
                journal.reset_to(journal.last_index + chance.randrange(1, 9), step)
            case _:
                journal.add(bytes(chance.randrange(300)), journal.last_index + 1, step)
        assert journal.log_bytes == sum(len(command) + ENTRY_OVERHEAD_BYTES for command, _, _ in journal[:])
        assert journal.log_bytes == sum(map(journal.cost, indexes_of(journal)))
    journal.start_sync()
    assert open_journal(disk).log_bytes == journal.log_bytes


# -- several segments -----------------------------------------------------------------------------------------------


def filled(disk: RecordedDisk, *, last: int = 25) -> Journal:
    """Entries 1 to `last` in segments of 1 KiB, one sync each."""
    journal = open_journal(disk, segment_bytes=1024)
    journal.setCurrentTerm(3, "n2")
    for index in range(1, last + 1):
        add(journal, index, term=3)
    return journal


def segments(disk: RecordedDisk) -> list[str]:
    return [name for name in disk.names() if name.startswith("journal-")]


def test_a_full_segment_is_closed_with_a_sync_and_the_log_goes_on_in_another(disk: RecordedDisk) -> None:
    journal = filled(disk)
    assert segments(disk) == [FIRST, SECOND, THIRD, FOURTH]
    journal.close()
    again = open_journal(disk, segment_bytes=1024)
    assert promises(again) == promises(journal)
    assert indexes_of(again) == list(range(1, 26))
    assert again.bytes == sum(segment.end for segment in inspect_journal(disk).segments)
    for index in range(26, 50):
        add(again, index)
    assert indexes_of(open_journal(disk.power_cut(), segment_bytes=1024)) == list(range(1, 50))


def test_segments_go_when_nothing_in_them_is_needed_and_term_and_vote_stay(disk: RecordedDisk) -> None:
    journal = filled(disk)
    first_of_third = inspect_journal(disk).segments[2].first
    journal.set_base(first_of_third - 1)
    journal.start_sync()
    assert segments(disk) == [SECOND, THIRD, FOURTH]
    journal.set_base(first_of_third)
    journal.start_sync()
    assert segments(disk) == [THIRD, FOURTH]
    journal.set_base(25)
    journal.start_sync()
    assert segments(disk) == [FOURTH]
    assert journal.bytes == inspect_journal(disk).segments[0].end
    again = open_journal(disk.power_cut())
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (3, "n2")
    assert indexes_of(again) == [25]


def test_a_segment_stays_until_the_record_that_makes_it_superfluous_is_on_the_disk(disk: RecordedDisk) -> None:
    journal = filled(disk)
    disk.is_held = True
    journal.add(b"\0before", 26, 3)
    journal.start_sync()
    journal.set_base(26)
    disk.run(1)
    assert len(segments(disk)) == 4
    assert journal.durable_index == 26
    assert not disk.held
    journal.start_sync()
    disk.run(1)
    assert len(segments(disk)) == 4
    disk.run(1)  # the removal
    assert segments(disk) == [FOURTH]


@pytest.mark.parametrize("index", [12, 900])
def test_a_reset_removes_all_older_segments_once_it_is_on_the_disk(disk: RecordedDisk, index: int) -> None:
    journal = filled(disk)
    journal.reset_to(index, 4)
    assert journal.durable_index == index - 1
    assert len(segments(disk)) == 4
    journal.start_sync()
    assert segments(disk) == [FOURTH]
    again = open_journal(disk.power_cut(), segment_bytes=1024)
    assert again[:] == [(b"\x01", index, 4)]
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (3, "n2")


def test_a_segment_whose_entries_were_all_replaced_in_later_ones_goes_with_the_base_below_it(
    disk: RecordedDisk,
) -> None:
    journal = filled(disk)
    journal.deleteEntriesFrom(3)
    for index in range(4, 8):
        add(journal, index, term=4)
    journal.set_base(3)
    journal.start_sync()
    assert FIRST in segments(disk)
    journal.set_base(4)
    journal.start_sync()
    assert segments(disk)[0] > THIRD
    assert log_of(open_journal(disk, segment_bytes=1024)) == [(index, 4) for index in range(4, 8)]


def test_what_is_added_while_a_segment_is_closed_goes_into_the_next(disk: RecordedDisk) -> None:
    journal = open_journal(disk, segment_bytes=1024)
    disk.is_held = True
    add(journal, 1, size=300)
    journal.add(b"\0" * 300, 2, 1)
    disk.run()
    journal.start_sync()  # this closes the first segment
    journal.add(b"\0c", 3, 1)
    journal.setCurrentTerm(5, "n3")
    assert (journal.durable_index, journal.is_durable) == (1, False)
    journal.start_sync()
    assert len(disk.held) == 1
    disk.run()
    assert (journal.durable_index, journal.is_durable) == (2, False)
    assert segments(disk) == [FIRST, SECOND]
    assert indexes_of(open_journal(disk.power_cut())) == [1, 2]
    journal.start_sync()
    disk.run()
    assert (journal.durable_index, journal.is_durable) == (3, True)
    again = open_journal(disk.power_cut())
    assert indexes_of(again) == [1, 2, 3]
    assert (again.getCurrentTerm(), again.getVotedForNodeId()) == (5, "n3")


def test_nothing_is_written_on_the_loop_and_space_is_zeroed_before_it_is_used(disk: RecordedDisk) -> None:
    journal = open_journal(disk, segment_bytes=4096)
    disk.is_held = True
    disk.forget_steps()
    for index in range(1, 60):
        add(journal, index, size=90)
        assert disk.steps == []
        disk.run()
        # H7: written, since a hole in the file would be filled when there is no room any more.
        assert not [step for step in disk.steps if step[0] == "truncate"]
        inode = disk.names_now[segments(disk)[-1]]
        assert len(inode.content) > journal._synced
        assert inode.pending == []
        disk.steps.clear()
    assert len(segments(disk)) == 3


def test_a_bad_frame_in_an_earlier_segment_is_refused_whoever_vouches_for_it(disk: RecordedDisk) -> None:
    filled(disk).close()
    inspected = inspect_journal(disk)
    end = inspected.segments[1].end
    for at in (HEADER_BYTES + 3, HEADER_BYTES + BEGINNING_BYTES + 30, end - 3):
        damaged = disk.copy()
        flip(damaged, SECOND, at)
        damaged.read_only = True
        with pytest.raises(DamagedJournal, match=rf"/disk/{SECOND} is damaged at byte \d+: {THIRD} proves") as caught:
            open_journal(damaged)
        found = int(str(caught.value).split("at byte ")[1].split(":")[0])
        assert at - 60 < found <= at
        inspection = inspect_journal(damaged)
        assert inspection.damage == str(caught.value)
        assert inspected.entries[: len(inspection.entries)] == inspection.entries
        assert inspection.last_index >= inspected.segments[1].first - 1


@pytest.mark.parametrize("cut", ["last records", "whole body", "file"])
def test_the_end_of_an_earlier_segment_cannot_vanish(disk: RecordedDisk, cut: str) -> None:
    filled(disk).close()
    image, end = disk.image(SECOND), inspect_journal(disk).segments[1].end
    match cut:
        case "last records":
            disk.put(SECOND, image[: end - 90] + bytes(len(image) - end + 90))
        case "whole body":
            disk.put(SECOND, image[: HEADER_BYTES + BEGINNING_BYTES + 2] + bytes(512))
        case _:
            disk.put(SECOND, image[: end - 10])
    with pytest.raises(DamagedJournal, match=f"/disk/{SECOND} is damaged at byte .* up to byte {end}"):
        open_journal(disk)


@pytest.mark.parametrize("missing", [FIRST, SECOND, THIRD])
def test_a_missing_segment_is_named(disk: RecordedDisk, missing: str) -> None:
    filled(disk).close()
    del disk.names_now[missing]
    disk.read_only = True
    with pytest.raises(DamagedJournal, match=f"/disk/{missing} is missing: the log has to begin with entry 1"):
        open_journal(disk)
    assert f"{missing} is missing" in inspect_journal(disk).damage


def test_a_missing_segment_is_named_though_the_next_one_has_no_entries_yet(disk: RecordedDisk) -> None:
    journal = open_journal(disk, segment_bytes=1024)
    add(journal, 1, size=1000)
    assert segments(disk) == [FIRST, SECOND]
    del disk.names_now[FIRST]
    with pytest.raises(DamagedJournal, match=f"{FIRST} is missing"):
        open_journal(disk)


@pytest.mark.parametrize("left", [[], [FIRST], [SECOND], [FIRST, SECOND]])
def test_a_removal_that_the_power_cut_short_is_completed(disk: RecordedDisk, left: list[str]) -> None:
    journal = filled(disk)
    before = disk.copy()
    journal.set_base(inspect_journal(disk).segments[2].first)
    journal.start_sync()
    for name in left:
        disk.put(name, before.image(name))
    again = open_journal(disk, segment_bytes=1024)
    assert promises(again) == promises(journal)
    add(again, 26)
    assert segments(disk) == [THIRD, FOURTH]


def test_a_segment_under_another_name_is_refused(disk: RecordedDisk) -> None:
    filled(disk, last=12).close()
    disk.put(SECOND, disk.image(FIRST))
    with pytest.raises(DamagedJournal, match=f"/disk/{SECOND} says at byte 16 that it is segment 1"):
        open_journal(disk)


def test_a_segment_that_was_being_made_is_made_again(disk: RecordedDisk) -> None:
    journal = filled(disk, last=5)
    disk.put("journal-00000002.new", b"half")
    again = open_journal(disk, segment_bytes=1024)
    assert promises(again) == promises(journal)
    assert disk.names() == [FIRST]


def test_what_a_killed_process_had_written_is_on_the_disk_before_it_counts(disk: RecordedDisk) -> None:
    """Only then may the next process promise it again."""
    journal = open_journal(disk)
    add(journal, 1)
    disk.fails = lambda step: OSError(errno.EIO, "Input/output error") if step[0] == "sync" else None
    add(journal, 2)  # the system shows it from its memory, though the disk has not got it
    assert indexes_of(open_journal(disk.power_cut())) == [1]
    disk.fails = lambda _step: None
    again = open_journal(disk)
    assert indexes_of(again) == [1, 2]
    assert again.durable_index == 2
    assert indexes_of(open_journal(disk.power_cut())) == [1, 2]


def test_the_name_of_a_segment_is_on_the_disk_before_what_is_in_it_counts(disk: RecordedDisk) -> None:
    journal = open_journal(disk, segment_bytes=1024)
    disk.fails = lambda step: OSError(errno.EIO, "Input/output error") if step[0] == "directory" else None
    add(journal, 1, size=1000)
    assert segments(disk) == [FIRST, SECOND]
    assert segments(disk.power_cut()) == [FIRST]
    disk.fails = lambda _step: None
    open_journal(disk)
    assert segments(disk.power_cut()) == [FIRST, SECOND]


# -- the power goes, anywhere ---------------------------------------------------------------------------------------


def story(disk: RecordedDisk, seed: int) -> tuple[list[Any], list[tuple[int, int]]]:
    """What was promised after each record, and (steps on the disk, promises known to be durable by then)."""
    chance = random.Random(seed)
    journal = open_journal(disk, segment_bytes=700)
    journal.add(b"\x01", 1, 0)
    journal.start_sync()
    disk.forget_steps()
    states = [promises(journal)]
    states = [(list(states[0][0]), *states[0][1:])]
    lsns = {journal.lsn: 0}
    known = [(0, 0)]

    def durable(_seconds: float) -> None:
        known.append((len(disk.steps), max(at for lsn, at in lsns.items() if lsn <= journal.durable_lsn)))

    def note() -> None:
        entries, term, vote = promises(journal)
        states.append((list(entries), term, vote))
        lsns[journal.lsn] = len(states) - 1

    journal.on_durable = durable
    disk.is_held = seed % 2 == 0  # then records come while a sync is in flight
    for turn in range(18):
        for _ in range(chance.randrange(1, 4)):
            match chance.randrange(9):
                case 0 if len(journal) > 1:
                    journal.deleteEntriesFrom(chance.randrange(1, len(journal)))
                case 1 if len(journal) > 2:
                    journal.set_base(journal.first_index + chance.randrange(1, len(journal)))
                case 2 if turn > 6:
                    journal.reset_to(journal.last_index + chance.randrange(1, 30), turn)
                case 3:
                    journal.setCurrentTerm(turn + 1, chance.choice(["n2", None]))
                case _:
                    journal.add(chance.randbytes(chance.randrange(1, 200)), journal.last_index + 1, turn)
            note()
        journal.start_sync()
        disk.run(chance.randrange(3))
    return states, known


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_wherever_the_power_goes_all_that_was_synced_is_there_and_nothing_that_never_was(seed: int) -> None:
    disk = RecordedDisk()
    states, known = story(disk, seed)
    assert sum(step[0] == "rename" for step in disk.steps) >= 3
    assert sum(step[0] == "remove" for step in disk.steps) >= 2
    chance = random.Random(seed)
    tried = 0
    for count, stopped in disk.prefixes(stride=23):
        floor = max(state for steps, state in known if steps <= count)
        for after in (stopped, stopped.power_cut(), stopped.power_cut(chance)):
            journal = open_journal(after, segment_bytes=700)
            found = promises(journal)
            assert found in states[floor:], f"after {count} steps"
            assert promises(open_journal(after.power_cut(), segment_bytes=700)) == found
            journal.add(b"\0goes on", journal.last_index + 1, 99)
            journal.start_sync()
            assert promises(open_journal(after.power_cut(), segment_bytes=700)) == promises(journal)
            tried += 1
    assert tried > 500


# -- the disk fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "step", "advice"),
    [
        (errno.ENOSPC, "write", "Make room on this disk"),
        (errno.EIO, "sync", "Check this disk"),
        (errno.ENOSPC, "name", "Make room on this disk"),  # the next segment cannot be made
        (errno.EIO, "directory", "Check this disk"),
        (errno.EROFS, "remove", "Check this disk"),
    ],
)
def test_a_failed_disk_is_reported_once_and_never_tried_again(
    disk: RecordedDisk, number: int, step: str, advice: str
) -> None:
    journal = filled(disk)
    failures: list[str] = []
    journal.on_failed = failures.append
    tried: list[str] = []

    def fails(asked: Any) -> OSError | None:
        tried.append(asked[0])
        return OSError(number, os.strerror(number)) if asked[0] == step else None

    disk.fails = fails
    durable = journal.durable_lsn
    journal.set_base(25)
    add(journal, 26, size=2000)
    assert len(failures) == 1
    assert failures[0].startswith("journal: /disk/journal-0000000")
    assert os.strerror(number) in failures[0]
    assert advice in failures[0]
    assert (journal.durable_lsn > durable) == (step == "remove")
    tried.clear()
    add(journal, 27)
    journal.onOneSecondTimer()
    journal.close()
    assert tried == []
    assert len(failures) == 1


class SlowDisk(DirectoryDisk):
    """A real directory on which a sync lasts until it is let go."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.go = threading.Semaphore(0)
        self.is_slow = False

    def open(self, name: str, *, read_only: bool = False) -> Any:
        file = super().open(name, read_only=read_only)
        sync = file.sync

        def slow() -> None:
            if self.is_slow:
                assert self.go.acquire(timeout=10)
            sync()

        file.sync = slow  # type: ignore[method-assign]
        return file


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def slow(tmp_path: Path) -> Any:
    open_journal(maker := DirectoryDisk(tmp_path, inline=True)).close()
    maker.close()
    disk = SlowDisk(tmp_path)
    yield disk
    disk.go.release(10)
    disk.close()


async def test_what_is_added_during_a_sync_is_durable_with_the_next_one(slow: SlowDisk) -> None:
    journal = open_journal(slow)
    slow.is_slow = True
    journal.add(b"\0a", 1, 1)
    journal.start_sync()
    journal.add(b"\0b", 2, 1)
    journal.start_sync()
    assert (journal.durable_lsn, journal.lsn, journal.durable_index) == (0, 2, 0)

    slow.go.release()
    await until(lambda: journal.durable_lsn == 1)
    assert journal.durable_index == 1
    journal.start_sync()
    slow.go.release()
    await until(lambda: journal.is_durable)
    assert journal.durable_index == 2
    slow.is_slow = False
    await asyncio.to_thread(journal.close)


async def test_an_entry_that_replaced_a_durable_one_is_not_durable_yet(slow: SlowDisk) -> None:
    journal = open_journal(slow)
    for index in (1, 2, 3):
        journal.add(b"\0", index, 1)
    journal.start_sync()
    await until(lambda: journal.is_durable)
    slow.is_slow = True
    journal.deleteEntriesFrom(1)
    assert journal.durable_index == 1
    journal.add(b"\0", 2, 2)
    assert journal.durable_index == 1
    journal.start_sync()
    slow.is_slow = False
    slow.go.release()
    await until(lambda: journal.is_durable)
    assert journal.durable_index == 2
    await asyncio.to_thread(journal.close)


async def test_closing_waits_for_the_sync_in_flight_and_writes_the_rest(slow: SlowDisk, tmp_path: Path) -> None:
    journal = open_journal(slow)
    slow.is_slow = True
    add(journal, 1)
    journal.add(b"\0late", 2, 1)
    closing = asyncio.create_task(asyncio.to_thread(journal.close))
    await asyncio.sleep(0.02)
    assert not closing.done()
    slow.is_slow = False
    slow.go.release()
    await closing
    await asyncio.to_thread(slow.close)
    assert indexes_of(open_journal(DirectoryDisk(tmp_path, lock=False, inline=True))) == [1, 2]


def test_closing_does_what_no_lane_has_begun_and_the_lane_then_does_nothing(disk: RecordedDisk) -> None:
    journal = filled(disk)
    disk.is_held = True
    add(journal, 26, size=1000)
    journal.add(b"\0in the next segment", 27, 3)
    journal.close()
    steps = len(disk.steps)
    disk.run()
    assert len(disk.steps) == steps
    assert indexes_of(open_journal(disk.power_cut(), segment_bytes=1024)) == list(range(1, 28))


def test_without_a_disk_all_is_durable_at_once() -> None:
    journal = Journal.memory()
    journal.add(b"\x01", 1, 0)
    journal.add(b"\0", 2, 1)
    journal.set_base(2)
    assert (journal.is_durable, journal.durable_index, journal.first_index) == (True, 2, 2)
    journal.reset_to(9, 1)
    assert (journal.is_durable, journal.durable_index) == (True, 9)
    journal.start_sync()
    journal.close()


# -- formats --------------------------------------------------------------------------------------------------------


def write_golden_story(disk: RecordedDisk) -> Journal:
    """Ends in the second segment, the only one left, with each kind of record in it."""
    journal = Journal.open(disk, cluster_id="5e1f", node_id="node-a", segment_bytes=700, allocate_bytes=1024)
    journal.add(b"\x01", 1, 0)
    journal.setCurrentTerm(1, "node-a")
    journal.start_sync()
    journal.add(b"\x00" + bytes(range(40)), 2, 1)
    journal.setRaftCommitIndex(1)
    journal.start_sync()
    assert segments(disk) == [FIRST, SECOND]
    journal._segment_bytes = 1 << 20
    journal.add(b"\x00late", 3, 1)
    journal.deleteEntriesFrom(2)
    journal.setCurrentTerm(3, None)
    journal.add(b"\x00other", 3, 3)
    journal.setRaftCommitIndex(3)
    journal.start_sync()
    journal.reset_to(20, 3)
    journal.add(b"\x00after", 21, 3)
    journal.add(b"\x00the snapshot", 22, 3)
    journal.setRaftCommitIndex(22)
    journal.start_sync()
    journal.set_base(21)
    journal.start_sync()
    return journal


def test_the_bytes_on_disk_are_those_that_were_agreed_on(disk: RecordedDisk) -> None:
    write_golden_story(disk)
    assert segments(disk) == [SECOND]
    written = disk.image(SECOND)[: inspect_journal(disk).segments[0].end]
    if os.environ.get("ROSTRA_RECORD_GOLDEN"):
        (GOLDEN / "journal-2.bin").write_bytes(written)
    assert written == (GOLDEN / "journal-2.bin").read_bytes()


def test_a_journal_of_format_2_can_be_read(disk: RecordedDisk) -> None:
    disk.put(SECOND, (GOLDEN / "journal-2.bin").read_bytes())
    journal = open_journal(disk, cluster_id="5e1f", node_id="node-a")
    assert journal[:] == [(b"\x00after", 21, 3), (b"\x00the snapshot", 22, 3)]
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId(), journal.getRaftCommitIndex()) == (3, None, 22)


def test_a_journal_of_format_1_can_be_read_and_goes_on(disk: RecordedDisk) -> None:
    disk.put(FIRST, (GOLDEN / "journal-1.bin").read_bytes())
    journal = open_journal(disk, cluster_id="5e1f", node_id="node-a", segment_bytes=1024)
    assert journal[:] == [(b"\x00" + bytes(range(40)), 2, 1), (b"\x00other", 3, 3)]
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId(), journal.getRaftCommitIndex()) == (3, None, 3)
    for index in range(4, 12):
        add(journal, index, term=4)
    assert segments(disk) == [FIRST, SECOND]
    again = open_journal(disk.power_cut(), cluster_id="5e1f", node_id="node-a", segment_bytes=1024)
    assert promises(again) == promises(journal)
    journal.set_base(11)
    journal.start_sync()
    assert segments(disk) == [SECOND]
    again = open_journal(disk.power_cut(), cluster_id="5e1f", node_id="node-a", segment_bytes=1024)
    assert promises(again) == promises(journal)


# -- inspection -----------------------------------------------------------------------------------------------------


def test_an_inspection_says_what_is_there_and_writes_nothing(disk: RecordedDisk) -> None:
    members = (Member("n1", "10.0.0.1", 8300, "k1", "one"), Member("n2", "10.0.0.2", 8300, "k2", "two"))
    journal = filled(disk)
    journal._segment_bytes = 1 << 20
    journal.add(encode_members(members[:1]), 26, 3)
    journal.add(encode_members(members), 27, 3)
    journal.set_base(9)
    journal.setRaftCommitIndex(26)
    journal.start_sync()
    torn = inspect_journal(disk).segments[-1].end + 50
    add(journal, 28, size=300)
    disk.put(FOURTH, disk.image(FOURTH)[:torn] + bytes(1000))
    disk.read_only = True

    found = inspect_journal(disk)
    assert (found.cluster_id, found.node_id, found.term, found.vote) == ("c1", "n1", 3, "n2")
    assert (found.first_index, found.last_index, found.last_term, found.commit_index) == (9, 27, 3, 26)
    assert (found.members, found.members_index) == (members, 27)
    assert (found.damage, found.torn_bytes > 0) == ("", True)
    assert [found.term_at(index) for index in (8, 9, 27, 28)] == [None, 3, 3, None]
    assert [segment.number for segment in found.segments] == [2, 3, 4]


def test_an_inspection_of_nothing_finds_nothing(disk: RecordedDisk) -> None:
    found = inspect_journal(disk)
    assert (found.segments, found.cluster_id, found.last_index, found.damage) == ([], "", 0, "")


def test_an_inspection_reports_a_later_format_a_strange_file_and_an_unreadable_list_as_damage(
    disk: RecordedDisk,
) -> None:
    journal = open_journal(disk)
    add(journal, 1)
    journal.add(b"\x02strange", 2, 1)
    journal.start_sync()
    assert "entry 2: a list of members in the log cannot be read" in inspect_journal(disk).damage
    strange = disk.copy()
    change(strange, FIRST, 0, b"x")
    assert "not a journal" in inspect_journal(strange).damage
    change(disk, FIRST, 8, struct.pack("<I", 3))
    assert "journal format 3" in inspect_journal(disk).damage
