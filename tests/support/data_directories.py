"""Data directories of servers as recovery reads them, with real journals and snapshots, made without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack

from rostra.server.membership import Membership, ServerInfo, Stored, dump
from rostra.server.raft.disk import DirectoryDisk
from rostra.server.raft.journal import Journal
from rostra.server.raft.members import Member
from rostra.server.raft.snapshots import SnapshotWriter
from rostra.server.state.entry import encode_entry
from rostra.server.state.kv import SetKey

CLUSTER = "6b1e1c5e-0000-4000-8000-000000000000"
#: The founders, unless said otherwise.
NAMES = ("s1", "s2", "s3")


def node_id(name: str) -> str:
    return f"0000000{name[1:]}-0000-4000-8000-000000000000"


def member(name: str) -> Member:
    return Member(node_id(name), "127.0.0.1", 9000 + int(name[1:]), f"key-{name}", name)


def write_log(
    directory: Path,
    name: str,
    terms: str,
    commit: int,
    *,
    key: str = "k{}",
    cluster_id: str = CLUSTER,
    **options: Any,
) -> None:
    """What a server leaves whose log goes on with entries of these terms: entry i writes key k<i>; in term 0 nothing.

    `options` are the journal's.
    """
    disk = DirectoryDisk(directory, inline=True)
    journal = Journal.open(disk, cluster_id=cluster_id, node_id=node_id(name), **options)
    for index, term in enumerate(map(int, terms), len(journal) + 1):
        command = encode_entry(SetKey(key.format(index), b"hush" * 100), cluster_id=CLUSTER, at_ms=1)
        journal.setCurrentTerm(term, node_id(name))
        journal.add(b"\x00" + msgpack.packb([command]) if term else b"\x01", index, term)
        journal.setRaftCommitIndex(min(index, commit))
        journal.start_sync()
    journal.close()
    disk.close()


def make(
    directory: Path, name: str, terms: str = "", commit: int = 1, *, of: tuple[str, ...] = NAMES, **options: Any
) -> Path:
    """The data directory of server `name`, one of the founders `of`; `options` as for `write_log`."""
    (directory / "server").mkdir(parents=True)
    (directory / "tls").mkdir()
    (directory / "tls" / "node.key").write_text("a key")
    (directory / "node-id").write_text(node_id(name) + "\n")
    infos = tuple(ServerInfo(node_id(n), n, "127.0.0.1", 9000 + int(n[1:]), f"key-{n}") for n in of)
    stored = Stored(committed=Membership(options.get("cluster_id", CLUSTER), "dc1", infos), started=True)
    (directory / "server" / "bootstrap.json").write_bytes(dump(stored))
    if terms:
        write_log(directory / "server" / "raft", name, terms, commit, **options)
    return directory


def write_snapshot(directory: Path, name: str, index: int, term: int, members: tuple[Member, ...]) -> None:
    disk = DirectoryDisk(directory / "server" / "raft", inline=True)
    writer = SnapshotWriter(
        disk, cluster_id=CLUSTER, node_id=node_id(name), index=index, term=term, members=members, members_index=2
    )
    writer.add(b"state")
    outcome: list[Any] = []
    writer.finish(lambda snapshot, error: outcome.append((snapshot, error)))
    disk.close()
    assert outcome[0][1] is None
