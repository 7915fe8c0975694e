"""Data directories with real journals and snapshots: read without a trace, written as a server would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rostra.runtime.data_directory import DataDirectory
from rostra.server.raft.disk import DirectoryDisk
from rostra.server.raft.journal import Journal, inspect_journal
from rostra.server.raft.members import encode_members
from rostra.server.raft.recovery import Change, Found, choose, members_by_name, plan_recovery
from rostra.server.raft.recovery_disk import look, write
from rostra.server.raft.snapshots import newest
from rostra.wire.errors import BadRequest, Conflict, Internal
from tests.support.data_directories import CLUSTER, NAMES, make, member, node_id, write_log, write_snapshot


def everything_in(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def change_for(keep: Found, *others: Found, names: tuple[str, ...] = ("s1",), lose: tuple[str, ...] = ()) -> Change:
    (plan,) = plan_recovery([keep, *others])
    return choose(plan, keep, members_by_name(plan, keep, names), lose)


# -- looking ---------------------------------------------------------------------------------------------------------


def test_a_directory_tells_what_a_server_would_find(tmp_path):
    found = look(make(tmp_path / "s1", "s1", "01122", commit=4))
    assert (found.name, found.node_id, found.cluster_id) == ("s1", node_id("s1"), CLUSTER)
    assert (found.term, found.first_index, found.last_index, found.last_term, found.committed) == (2, 1, 5, 2, 4)
    assert found.members == tuple(map(member, NAMES))
    assert (found.founding, found.problems, found.in_use, found.snapshot) == (True, (), "", None)


def test_looking_changes_nothing(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    raft = directory / "server" / "raft"
    (raft / "lock").unlink()  # as in a copy
    before = everything_in(directory)
    look(directory)
    assert everything_in(directory) == before


@pytest.mark.parametrize("below", ["", "server", "server/raft"])
def test_the_directory_may_be_named_by_its_inside(tmp_path, below):
    directory = make(tmp_path / "s1", "s1", "011")
    found = look(directory / below)
    assert (found.path, found.last_index, found.problems) == (str(directory), 3, ())


def test_the_log_alone_can_be_compared_and_not_kept(tmp_path):
    raft = make(tmp_path / "s1", "s1", "011") / "server" / "raft"
    copy = tmp_path / "copy"
    raft.rename(copy)
    found = look(copy)
    assert found.last_index == 3
    assert any("bootstrap.json is missing" in problem for problem in found.problems)
    assert any("node.key is missing" in problem for problem in found.problems)


def test_what_is_no_data_directory_is_told(tmp_path):
    with pytest.raises(BadRequest, match="no such directory"):
        look(tmp_path / "gone")
    with pytest.raises(BadRequest, match="is no data directory of a server: there is no server/raft in it"):
        look(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="not a directory"):
        look(tmp_path / "file")


def test_a_directory_without_a_log_is_empty(tmp_path):
    found = look(make(tmp_path / "s1", "s1"))
    assert (found.is_empty, found.node_id) == (True, node_id("s1"))


def test_damage_is_told_with_file_and_offset_and_what_was_before_it_is_read(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011111", commit=5)
    path = directory / "server" / "raft" / "journal-00000001"
    data = bytearray(path.read_bytes())
    at = data.index(b"k4")
    data[at] ^= 1
    path.write_bytes(data)
    found = look(directory)
    assert f"{path} is damaged at byte " in found.problems[0]
    assert (found.is_sound, found.last_index) == (False, 3)


def test_a_torn_end_is_told_and_does_not_matter(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    path = directory / "server" / "raft" / "journal-00000001"
    data = bytearray(path.read_bytes())
    end = len(bytes(data).rstrip(b"\0"))
    data[end + 1 : end + 11] = b"torn write"
    path.write_bytes(data)
    found = look(directory)
    assert found.torn_bytes > 0
    assert found.is_sound


def test_a_snapshot_ahead_of_the_log_counts(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    write_snapshot(directory, "s1", 40, 3, (member("s1"), member("s2")))
    found = look(directory)
    assert (found.last_index, found.last_term, found.committed) == (40, 3, 40)
    assert (found.members_index, len(found.members)) == (2, 2)


def test_a_damaged_snapshot_is_told_and_matters_only_where_the_log_needs_it(tmp_path):
    directory = make(tmp_path / "s1", "s1", "0111")
    write_snapshot(directory, "s1", 3, 1, tuple(map(member, NAMES)))
    path = next((directory / "server" / "raft").glob("snapshot-*"))
    path.write_bytes(path.read_bytes()[:-3])
    found = look(directory)
    assert path.name in found.notes[0]
    assert (found.is_sound, found.snapshot) == (True, None)


def test_the_members_are_those_of_the_last_list_in_the_log(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    disk = DirectoryDisk(directory / "server" / "raft", inline=True)
    journal = Journal.open(disk, cluster_id=CLUSTER, node_id=node_id("s1"))
    journal.add(encode_members((member("s1"), member("s2"))), 4, 1)
    journal.close()
    disk.close()
    found = look(directory)
    assert ([m.name for m in found.members], found.members_index, found.founding) == (["s1", "s2"], 4, False)


def test_a_lost_log_is_no_empty_directory(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    write_snapshot(directory, "s1", 3, 1, tuple(map(member, NAMES)))
    (directory / "server" / "raft" / "journal-00000001").unlink()
    found = look(directory)
    assert "the log is gone" in found.problems[0]


def test_an_identity_that_does_not_fit_is_told(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    (directory / "node-id").write_text(node_id("s2") + "\n")
    (directory / "tls" / "node.key").unlink()
    problems = " ".join(look(directory).problems)
    assert f"node-id has {node_id('s2')}, and the log is of node {node_id('s1')}" in problems
    assert "node.key is missing" in problems


@pytest.mark.parametrize("lock", ["agent.lock", "server/lock", "server/raft/lock"])
def test_a_running_process_is_seen(tmp_path, lock):
    directory = make(tmp_path / "s1", "s1", "011")
    path = directory / lock
    with DataDirectory.lock(path.parent, path.name):
        assert look(directory).in_use == f"in use by process {os.getpid()}"
    assert look(directory).in_use == ""


# -- writing ---------------------------------------------------------------------------------------------------------


def test_the_written_journal_is_one_that_a_server_reads(tmp_path):
    found = look(make(tmp_path / "s1", "s1", "01122", commit=3))
    change = change_for(found)
    write(change)
    disk = DirectoryDisk(tmp_path / "s1" / "server" / "raft", inline=True)
    journal = Journal.open(disk, cluster_id=CLUSTER, node_id=node_id("s1"))
    assert (journal.getCurrentTerm(), journal.getVotedForNodeId()) == (3, None)
    assert journal.entry(6) == (encode_members((member("s1"),)), 6, 3)
    assert (journal.last_index, journal.getRaftCommitIndex()) == (6, 6)
    assert [journal.entry(i) for i in range(1, 6)] == list(found.entries)
    journal.close()
    disk.close()


def test_after_it_no_recovery_is_needed(tmp_path):
    s1, s2 = look(make(tmp_path / "s1", "s1", "0112", commit=3)), look(make(tmp_path / "s2", "s2", "02"))
    (plan,) = plan_recovery([s1])
    assert plan.startable == ()
    write(change_for(s1))
    (plan,) = plan_recovery([look(tmp_path / "s1"), s2])
    assert [f.name for f in plan.startable] == ["s1"]


def test_what_was_there_is_kept_as_it_was(tmp_path):
    directory = make(tmp_path / "s1", "s1", "01122", segment_bytes=2048, allocate_bytes=1024)
    write_snapshot(directory, "s1", 3, 1, tuple(map(member, NAMES)))
    before = everything_in(directory / "server")
    before = {k: v for k, v in before.items() if not k.endswith(("lock", "format"))}
    backup = write(change_for(look(directory)))
    assert backup.parent == directory / "server"
    assert everything_in(backup) == before
    assert any(name.startswith("raft/journal-00000002") for name in before)
    assert before != {k: v for k, v in everything_in(directory / "server").items() if k in before}


def test_a_snapshot_ahead_of_the_log_is_gone_on_from(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    write_snapshot(directory, "s1", 40, 3, tuple(map(member, NAMES)))
    write(change_for(look(directory)))
    log = inspect_journal(DirectoryDisk(directory / "server" / "raft", lock=False))
    assert [entry[1:] for entry in log.entries] == [(40, 3), (41, 4)]
    assert (log.commit_index, log.members) == (41, (member("s1"),))
    snapshot, problems = newest(DirectoryDisk(directory / "server" / "raft", lock=False), CLUSTER)
    assert snapshot is not None
    assert (snapshot.index, problems) == (40, [])


def test_a_torn_end_is_written_over(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    path = directory / "server" / "raft" / "journal-00000001"
    data = bytearray(path.read_bytes())
    end = len(bytes(data).rstrip(b"\0"))
    data[end + 1 : end + 301] = b"x" * 300
    path.write_bytes(data)
    write(change_for(look(directory)))
    found = look(directory)
    assert (found.last_index, found.torn_bytes, found.problems) == (4, 0, ())


@pytest.mark.parametrize("lock", ["agent.lock", "server/lock", "server/raft/lock"])
def test_nothing_is_written_while_a_process_has_the_directory(tmp_path, lock):
    directory = make(tmp_path / "s1", "s1", "011")
    change = change_for(look(directory))
    path = directory / lock
    with DataDirectory.lock(path.parent, path.name), pytest.raises(Conflict, match="in use by"):
        write(change)
    assert look(directory).last_index == 3
    assert not list((directory / "server").glob("before-*"))


def test_nothing_is_written_to_a_log_that_is_not_the_one_that_was_looked_at(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    change = change_for(look(directory))
    write_log(directory / "server" / "raft", "s1", "1", 1)
    with pytest.raises(Conflict, match="has changed since it was looked at"):
        write(change)
    assert look(directory).last_index == 4


def test_another_user_must_not_write(tmp_path, monkeypatch):
    directory = make(tmp_path / "s1", "s1", "011")
    change = change_for(look(directory))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(Conflict, match="run this as that user"):
        write(change)


def test_a_list_of_servers_in_the_directory_is_taken_away_with_a_copy(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    (directory / "server" / "raft" / "peers.json").write_text("[]")
    backup = write(change_for(look(directory)))
    assert not (directory / "server" / "raft" / "peers.json").exists()
    assert (backup / "raft" / "peers.json").read_text() == "[]"


def test_a_second_recovery_keeps_the_copy_of_the_first(tmp_path):
    directory = make(tmp_path / "s1", "s1", "011")
    first = write(change_for(look(directory)))
    make_others = look(directory)
    (plan,) = plan_recovery([make_others])
    assert plan.startable
    change = Change(make_others, 5, 3, (member("s1"),), (), (), ())
    second = write(change)
    assert first != second
    assert first.exists()


def test_a_disk_that_fails_is_told_with_the_place_of_the_copy(tmp_path, monkeypatch):
    directory = make(tmp_path / "s1", "s1", "011")
    change = change_for(look(directory))

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(Internal, match=r"put back what is in .*before-recovery") as raised:
        write(change)
    assert "No space left on device" in raised.value.message
