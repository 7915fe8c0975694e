"""What a server's notes of its former life show, and what they let pass."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from rostra.runtime.data_directory import UnusableData
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import generate_secret
from rostra.server import lived
from rostra.server.lived import Life, accept, look, noted_places, paths
from rostra.server.membership import Membership, ServerInfo, Stored
from rostra.server.raft.messages import LINEAGE_MAX

CLUSTER = "6b1e1c5e-0000-4000-8000-000000000000"


class Directory:
    """A data directory in which a server has been started as often as `starts` says."""

    def __init__(self, path: Path, starts: int = 1) -> None:
        self.path = path
        (path / "server").mkdir(parents=True)
        self.identity = NodeIdentity.open(path, "s1", [generate_secret()])
        me = ServerInfo(self.identity.node_id, "s1", "127.0.0.1", 8300, self.identity.key_hash)
        self.stored = Stored(committed=Membership(CLUSTER, "dc1", (me,)), started=True)
        for _ in range(starts):
            self.start()

    def look(self, stored: Stored | None = None, *, has_log: bool = True) -> Life:
        return look(self.path, stored or self.stored, has_log=has_log)

    def start(self) -> Life:
        life = self.look()
        life.begin(CLUSTER, self.identity.node_id, "s1", self.identity.key_hash)
        return life

    @property
    def notes(self) -> tuple[Path, Path]:
        return paths(self.path)


def refusal(directory: Directory, stored: Stored | None = None, **options: Any) -> str:
    with pytest.raises(UnusableData) as refused:
        directory.look(stored, **options)
    message = refused.value.message
    assert "\n" not in message
    assert str(directory.path) in message
    assert "rostra operator raft remove-peer" in message
    return message


def test_a_directory_without_notes_is_of_an_older_version_or_new(tmp_path: Path) -> None:
    life = Directory(tmp_path, starts=0).look()
    assert (life.starts, life.place, len(life.lineage)) == (1, (0, 0), 1)


def test_the_latest_processes_are_named_and_no_more(tmp_path: Path) -> None:
    directory = Directory(tmp_path, starts=0)
    names = [directory.start().lineage[-1] for _ in range(LINEAGE_MAX + 3)]
    found = directory.look()
    assert (found.starts, found.lineage[:-1]) == (LINEAGE_MAX + 4, tuple(names[1 - LINEAGE_MAX :]))


def test_starts_are_counted_and_the_furthest_place_is_kept(tmp_path: Path) -> None:
    directory = Directory(tmp_path, starts=2)
    life = directory.start()
    life.reached((2, 700))
    life.reached((1, 900))  # a thread that was late
    found = directory.look()
    assert (found.starts, found.place) == (4, (2, 700))
    assert found.lineage[:3] == life.lineage
    assert noted_places(tmp_path) == [(2, 700)] * 2


def test_an_earlier_note_that_is_still_on_its_way_does_not_replace_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(tmp_path)
    life = directory.start()
    write, has_begun, go_on = lived.write_durably, threading.Event(), threading.Event()

    def slow(path: Path, data: bytes) -> None:
        if not has_begun.is_set():
            has_begun.set()
            assert go_on.wait(60)
        write(path, data)

    monkeypatch.setattr(lived, "write_durably", slow)
    earlier = threading.Thread(target=life.reached, args=((1, 100),))
    earlier.start()
    assert has_begun.wait(60)
    last = threading.Thread(target=life.reached, args=((1, 200),))
    last.start()
    last.join(0.2)  # it has every chance to be first
    go_on.set()
    earlier.join()
    last.join()
    assert noted_places(tmp_path) == [(1, 200)] * 2


def test_a_crash_between_the_two_notes_is_no_loss(tmp_path: Path) -> None:
    directory = Directory(tmp_path, starts=1)
    directory.notes[1].unlink()
    assert directory.look().starts == 2
    directory = Directory(tmp_path / "again", starts=1)
    kept = directory.notes[1].read_bytes()
    directory.start()
    directory.notes[1].write_bytes(kept)
    assert directory.look().starts == 3


def test_a_lost_note_beside_the_log_is_no_loss_and_one_beside_the_key_is(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    directory.notes[1].write_text("")
    assert directory.look().starts == 2
    directory.start()
    directory.notes[0].unlink()
    assert f"{directory.notes[0]} is missing" in refusal(directory)
    directory.notes[0].write_text("{")
    assert f"{directory.notes[0]} is damaged" in refusal(directory)
    directory.notes[1].unlink()
    refusal(directory)


def test_an_older_note_beside_the_key_shows_nothing_any_more(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    kept = directory.notes[0].read_bytes()
    directory.start()
    directory.notes[0].write_bytes(kept)
    assert f"{directory.notes[0]} is older than {directory.notes[1]}" in refusal(directory)


def test_each_part_that_the_notes_name_must_be_there(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    assert "server: bootstrap.json and the log in it are gone" in refusal(directory, Stored(), has_log=False)
    assert "server/bootstrap.json: gone" in refusal(directory, Stored())
    assert "server/raft: its log is gone" in refusal(directory, has_log=False)
    assert directory.stored.committed is not None
    other = Membership("another", "dc1", directory.stored.committed.members)
    assert "server/bootstrap.json: of cluster another" in refusal(directory, Stored(committed=other))
    node_id = tmp_path / "node-id"
    kept = node_id.read_text()
    for content in ("", "0b1e1c5e-0000-4000-8000-000000000000\n"):
        node_id.write_text(content)
        assert f"instead of {kept.strip()}" in refusal(directory)
    node_id.write_text(kept)
    directory.look()


@pytest.mark.parametrize("starts", [0, 1])
def test_the_key_is_the_one_that_the_others_know(tmp_path: Path, starts: int) -> None:
    directory = Directory(tmp_path / "s1", starts)
    other = Directory(tmp_path / "other")
    key = directory.path / "tls" / "node.key"
    key.write_bytes((other.path / "tls" / "node.key").read_bytes())
    assert "not s1's key" in refusal(directory)
    key.write_bytes(b"")
    assert "damaged" in refusal(directory)
    key.unlink()
    assert "the key is gone" in refusal(directory)
    assert not key.exists()


def test_without_notes_the_node_id_is_still_that_of_a_member(tmp_path: Path) -> None:
    directory = Directory(tmp_path, starts=0)
    (tmp_path / "node-id").unlink()
    assert "node-id: nothing" in refusal(directory)


def test_the_parts_of_two_servers_do_not_make_one(tmp_path: Path) -> None:
    directory, other = Directory(tmp_path / "s1"), Directory(tmp_path / "other")
    directory.notes[1].write_bytes(other.notes[1].read_bytes())
    assert "copied from another server" in refusal(directory)


def test_after_a_recovery_the_log_as_it_is_counts(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    directory.start().reached((3, 1000))
    accept(tmp_path, (3, 2000))
    assert noted_places(tmp_path) == [(3, 1000)] * 2  # what was kept before the recovery can still be put back
    accept(tmp_path, (1, 600))
    assert noted_places(tmp_path) == [(1, 600)] * 2
    assert directory.look().starts == 3


def test_a_note_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    note = json.loads(directory.notes[0].read_text())
    directory.notes[0].write_text(json.dumps(note | {"format": 2}))
    with pytest.raises(UnusableData, match="newer Rostra"):
        directory.look()
