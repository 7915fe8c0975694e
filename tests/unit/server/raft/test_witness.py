"""Who comes back with less than it has shown is not heard, and is told so."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rostra.server.raft import Member
from rostra.server.raft.disk import DirectoryDisk
from rostra.server.raft.journal import DamagedJournal
from rostra.server.raft.log import RaftLog
from rostra.server.raft.witness import FILE_NAME, Witness
from tests.support.raft_peers import Machine, Peer
from tests.support.waiting import eventually

MEMBERS = [Member(node, "127.0.0.1", 0, f"key-{node}", node) for node in ("a", "b", "c")]


def lived(lineage: str, last_index: int = 10, starts: int = 0) -> dict[str, Any]:
    """Of a server whose processes have had these names; a letter each."""
    return {"starts": starts or len(lineage), "lineage": tuple(lineage), "last_index": last_index}


@pytest.fixture
async def machine() -> Any:
    machine = Machine()
    yield machine
    for raft in machine.logs:
        await raft.stop()


async def start(machine: Machine, directory: Path | None, **more: Any) -> RaftLog:
    return await machine.start(directory, members=MEMBERS, starts=1, lineage=("ours",), **more)


def test_a_server_knows_its_former_processes_however_often_it_was_started_since() -> None:
    witness = Witness(None)
    assert witness.problem("key", lived("abc")) == ""
    assert witness.problem("key", lived("abc")) == ""  # another connection
    assert "as number 3" in witness.problem("key", lived("ab"))
    assert "as number 3" in witness.problem("key", lived("abx"))
    assert "as number 3" in witness.problem("key", lived("abxyz"))
    assert witness.problem("key", lived("abcde")) == ""
    assert witness.problem("other", lived("x")) == ""


def test_who_was_away_for_long_believes_a_server_that_names_only_its_latest_processes() -> None:
    witness = Witness(None)
    witness.problem("key", lived("abc"))
    assert "as number 3" in witness.problem("key", lived("xyz", starts=5))
    assert witness.problem("key", lived("xyz", starts=6)) == ""


def test_a_log_never_ends_before_what_it_has_acknowledged() -> None:
    witness = Witness(None)
    witness.acknowledged("key", 20)
    witness.acknowledged("key", 15)
    assert "acknowledged entry 20" in witness.problem("key", lived("a", 19))
    assert witness.problem("key", lived("a", 20)) == ""


def test_who_was_removed_is_forgotten_and_may_be_let_in_again() -> None:
    witness = Witness(None)
    witness.problem("key", lived("abc"))
    witness.acknowledged("key", 20)
    witness.forget_all_but({"other"})
    assert witness.problem("key", lived("x", 1)) == ""


def test_what_was_seen_is_remembered_by_the_next_process(tmp_path: Path) -> None:
    disk = DirectoryDisk(tmp_path, inline=True)
    witness = Witness(disk)
    witness.problem("key", lived("a"))
    witness.problem("key", lived("ab"))
    disk.close()
    disk = DirectoryDisk(tmp_path, inline=True)
    assert Witness(disk).problem("key", lived("ax")) == (
        "its data count 2 starts, without the one that was seen here as number 2"
    )
    (tmp_path / FILE_NAME).write_text("{")
    assert Witness(disk).problem("key", lived("x")) == ""
    disk.close()


async def test_the_first_word_on_a_connection_is_about_this_servers_life(machine: Machine, tmp_path: Path) -> None:
    peer = Peer(await start(machine, tmp_path), "b")
    first = peer.heard[0]
    assert (first["type"], first["starts"], first["lineage"]) == ("lived", 1, ("ours",))


async def test_the_vote_of_who_has_lost_its_log_counts_for_nothing(machine: Machine, tmp_path: Path) -> None:
    raft = await start(machine, tmp_path)
    peer = Peer(raft, "b")
    peer.say(type="lived", **lived("ab"))
    peer.hang_up()
    peer = Peer(raft, "b")
    peer.say(type="lived", **lived("axyz"))
    said = await peer.hears("outlived")
    assert "as number 2" in said["reason"]
    asked = await peer.hears("pre_vote")
    peer.say(type="pre_vote_reply", term=asked["term"], current=asked["term"] - 1, granted=True)
    asks = await peer._hears(lambda message: message["type"] in ("pre_vote", "request_vote"))
    assert asks["type"] == "pre_vote"  # once more: nobody has granted the first
    other = Peer(raft, "c")
    other.say(type="lived", **lived("a"))
    await other.votes()
    await eventually(lambda: raft.is_leader)


async def test_a_follower_that_comes_back_with_less_than_it_acknowledged_is_told_so(
    machine: Machine, tmp_path: Path
) -> None:
    raft = await start(machine, tmp_path)
    peer = Peer(raft, "b")
    peer.say(type="lived", **lived("a", 1))
    await peer.votes()
    follows = asyncio.create_task(peer.follows())
    await raft.propose(b"write")
    follows.cancel()
    peer.hang_up()
    peer = Peer(raft, "b")
    peer.say(type="lived", **lived("ab", 1))
    assert "acknowledged entry" in (await peer.hears("outlived"))["reason"]


async def test_a_member_that_knows_better_ends_this_server_for_good(machine: Machine, tmp_path: Path) -> None:
    ends: list[str] = []
    raft = await start(machine, tmp_path, on_outlived=ends.append)
    peer = Peer(raft, "b")
    peer.say(type="outlived", reason="it has been seen in start 9 before")
    assert ends == ["b says: it has been seen in start 9 before"]
    assert not raft.is_leader


async def test_a_servers_own_notes_of_its_journal_are_believed(machine: Machine, tmp_path: Path) -> None:
    reached: list[tuple[int, int]] = []
    raft = await machine.start(tmp_path, on_reached=reached.append)
    await raft.propose(b"write")
    await raft.stop()
    raft = await machine.start(tmp_path, reached=reached[-1])
    await raft.stop()
    with pytest.raises(DamagedJournal, match="older copy"):
        await machine.start(tmp_path, reached=(reached[-1][0], reached[-1][1] + 1000))
    with pytest.raises(DamagedJournal, match="older copy"):
        await machine.start(tmp_path / "empty", reached=reached[-1])


async def test_how_far_the_journal_is_is_noted_while_the_server_runs(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rostra.server.raft.log.PLACE_EVERY_S", 0.01)
    reached: list[tuple[int, int]] = []
    raft = await machine.start(tmp_path, on_reached=reached.append)
    await raft.propose(b"write")
    await eventually(lambda: reached and reached[-1] == raft.place)
    assert sorted(set(reached)) == reached
