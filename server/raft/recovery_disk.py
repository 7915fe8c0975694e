"""The data directories of a recovery: reading them without a trace, and writing the new members into one of them.

`look` reads what a server would find at its start, without locking or changing anything, so that copies from other
hosts and read-only ones will do. `write` is the only writer. It holds the locks that a running server would hold, and
keeps a copy of what it changes. It uses the real journal, so that the result is what a server itself would have
written. `recovery.py` decides what to write.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rostra.runtime.data_directory import DataDirectory
from rostra.runtime.files import sync_directory
from rostra.runtime.identity import read_node_id
from rostra.server.lived import accept, noted_places
from rostra.server.membership import FILE_NAME, Membership, load
from rostra.server.raft.disk import DirectoryDisk
from rostra.server.raft.journal import Journal, inspect_journal
from rostra.server.raft.members import Member, Members, encode_members
from rostra.server.raft.recovery import Change, Found, SnapshotFound, effective
from rostra.server.raft.snapshots import newest
from rostra.wire.errors import BadRequest, Conflict, Internal, RostraError

#: Where a list of servers may have been put, as with Consul. A server does not start while one is there.
PEERS_FILES = ("server/raft/peers.json", "raft/peers.json")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the parts of a data directory are. `data` is what the operator named, or what is above it."""

    data: Path
    raft: Path

    @property
    def locks(self) -> tuple[Path, ...]:
        """What the agent, the core and its journal lock."""
        return self.data / "agent.lock", self.data / "server" / "lock", self.raft / "lock"


def find(directory: Path) -> Place:
    """A data directory, its server/ or its server/raft/. Raises BadRequest."""
    directory = Path(os.path.abspath(directory))
    if not directory.is_dir():
        raise BadRequest(f"{directory}: {'not a directory' if directory.exists() else 'no such directory'}")
    if (directory / "server" / "raft").is_dir() or (directory / "node-id").exists():
        return Place(directory, directory / "server" / "raft")
    if (directory / "raft").is_dir():
        return Place(directory.parent, directory / "raft")
    if any(directory.glob("journal-*")) or any(directory.glob("snapshot-*")):
        inside = directory.name == "raft" and directory.parent.name == "server"
        return Place(directory.parents[1] if inside else directory, directory)
    raise BadRequest(f"{directory} is no data directory of a server: there is no server/raft in it")


def look(directory: Path) -> Found:
    """What is in a data directory, damage and all. Raises BadRequest where there is none, or it may not be read."""
    place = find(directory)
    try:
        return _look(place)
    except PermissionError as e:
        raise BadRequest(f"{e.filename or place.data}: {e.strerror}") from None


def _look(place: Place) -> Found:
    node_id = read_node_id(place.data)
    if not place.raft.is_dir():
        return Found(str(place.data), node_id, "")
    disk = DirectoryDisk(place.raft, lock=False)
    log = inspect_journal(disk)
    problems: list[str] = [log.damage] if log.damage else []
    notes: list[str] = []
    snapshot = None
    try:
        whole, notes = newest(disk, log.cluster_id or None)
        if whole is not None:
            snapshot = SnapshotFound(whole.index, whole.term, whole.size, whole.members, whole.members_index)
    except RostraError as e:
        problems.append(e.message)
    if not log.segments and not log.damage and snapshot is not None:
        problems.append(f"{place.raft}: the log is gone, and without it this server must never vote again")
    if (noted := max(noted_places(place.data), default=log.place)) > log.place:
        notes.append(
            f"{place.raft} is an older copy of the log, or has lost its end: it had reached byte {noted[1]} of segment"
            f" {noted[0]} once. What this server has acknowledged since is not in it, and without a recovery it does"
            " not start on it"
        )
    founded = None
    if log.segments or snapshot is not None:
        founded, wrong = _identity(place, log.cluster_id, log.node_id)
        problems += wrong
    logged = (log.members_index, log.members) if log.members is not None else None
    fields = effective(log.entries, log.commit_index, snapshot, logged, _founding(founded))
    fields["problems"] += tuple(problems)
    return Found(
        path=str(place.data),
        node_id=log.node_id or node_id,
        cluster_id=log.cluster_id or (founded.cluster_id if founded else ""),
        term=log.term,
        torn_bytes=log.torn_bytes,
        notes=tuple(notes),
        in_use=_in_use(place),
        **fields,
    )


def _identity(place: Place, cluster_id: str, node_id: str) -> tuple[Membership | None, list[str]]:
    """The cluster as it was founded, and why a server would not start with this identity."""
    wrong = []
    path = place.data / "server" / FILE_NAME
    founded = None
    try:
        founded = load(path).committed
        if founded is None:
            wrong.append(f"{path} is missing: restore it, or copy that of another server of the cluster")
        elif cluster_id and founded.cluster_id != cluster_id:
            wrong.append(f"{path} is of cluster {founded.cluster_id}, and the log of {cluster_id}")
    except RostraError as e:
        wrong.append(e.message)
    if node_id and (on_disk := read_node_id(place.data)) != node_id:
        wrong.append(f"{place.data / 'node-id'} has {on_disk or 'nothing'}, and the log is of node {node_id}")
    if not (place.data / "tls" / "node.key").exists():
        wrong.append(f"{place.data / 'tls' / 'node.key'} is missing: without its key nobody knows this server")
    return founded, wrong


def _founding(founded: Membership | None) -> Members:
    return tuple(
        Member(m.node_id, m.address, m.rpc_port, m.key_hash, m.name, m.suffrage)
        for m in (founded.members if founded else ())
    )


def _in_use(place: Place) -> str:
    for path in place.locks:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # there is none, or none that we could ask
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            return f"in use by process {pid or 'unknown'}"
        except OSError:  # a file system without locks: a copy
            continue
        finally:
            os.close(fd)
    return ""


def peers_files(data: Path) -> Iterator[Path]:
    """Lists of servers that lie in a data directory."""
    return (path for name in PEERS_FILES if (path := data / name).exists())


# -- writing ---------------------------------------------------------------------------------------------------------


def write(change: Change) -> Path:
    """Make it so. Returns the directory in which everything is as it was before.

    Raises Conflict (a process has the directory, or it changed since it was looked at), BadRequest, Internal: nothing
    was changed then, unless the message says so.
    """
    keep = change.keep
    place = find(Path(keep.path))
    owner = place.raft.stat().st_uid
    if owner != os.geteuid():
        raise Conflict(
            f"{place.raft} belongs to user {owner}: run this as that user, or the server cannot open what is written"
        )
    with ExitStack() as held:
        # As at a start, so that neither agent nor core can start meanwhile.
        held.enter_context(DataDirectory.lock(place.data, "agent.lock"))
        held.enter_context(DataDirectory.lock(place.data / "server"))
        disk = DirectoryDisk(place.raft, inline=True)
        held.callback(disk.close)
        _check_unchanged(keep, inspect_journal(disk).entries, place)
        try:
            backup = _backup(place)
        except OSError as e:
            raise Internal(f"{place.data}: no copy could be made: {e}. Nothing was changed") from None
        try:
            accept(place.data, _append(disk, change))
            for path in peers_files(place.data):
                path.unlink()
                sync_directory(path.parent)
        except (RostraError, OSError) as e:
            what = e.message if isinstance(e, RostraError) else str(e)
            raise Internal(
                f"{what}. {place.raft} may be changed in part: put back what is in {backup} before anything else"
            ) from None
        _check_written(change, disk, backup)
    return backup


def _check_unchanged(keep: Found, entries: list[tuple[bytes, int, int]], place: Place) -> None:
    now = (entries[-1][1:] if entries else None, len(entries))
    then = effective(entries, keep.commit_index, keep.snapshot, None, ())["entries"]
    if tuple(then) != tuple(keep.entries):
        raise Conflict(f"{place.raft} has changed since it was looked at: it ends with {now} now. Start over")


def _append(disk: DirectoryDisk, change: Change) -> tuple[int, int]:
    """All in one write: a crash leaves the directory as it was, or a list that the kept server completes itself. Where
    the journal ends then."""
    keep, failures = change.keep, list[str]()
    journal = Journal.open(disk, cluster_id=keep.cluster_id, node_id=keep.node_id)
    try:
        journal.on_failed = failures.append
        snapshot = keep.snapshot
        if snapshot is not None and (not len(journal) or journal.term_at(snapshot.index) != snapshot.term):
            journal.reset_to(snapshot.index, snapshot.term)  # as a server does at its start
        if journal.last_index + 1 != change.index:
            raise Internal(f"{disk.path}: the log ends with entry {journal.last_index}, not with {change.index - 1}")
        journal.setCurrentTerm(change.term, None)
        journal.add(encode_members(change.members), change.index, change.term)
        journal.setRaftCommitIndex(change.index)
        journal.start_sync()
        if failures or not journal.is_durable:
            raise Internal(failures[0] if failures else f"{disk.path}: not written")
    finally:
        journal.close()
    return journal.place


def _check_written(change: Change, disk: DirectoryDisk, backup: Path) -> None:
    log = inspect_journal(disk)
    read = (log.damage, log.term, log.last_index, log.last_term, log.commit_index, log.members)
    if read != ("", change.term, change.index, change.term, change.index, change.members):
        raise Internal(f"{disk.path} does not read back as it was written. Put back what is in {backup}")


def _backup(place: Place) -> Path:
    """A copy of what is changed here, or removed when the server runs again; of snapshots another link."""
    server = place.data / "server"
    backup = server / time.strftime("before-recovery-%Y%m%dT%H%M%SZ", time.gmtime())
    for number in range(2, 1000):
        if not backup.exists():
            break
        backup = backup.with_name(f"{backup.name.partition('.')[0]}.{number}")
    try:
        (backup / "raft").mkdir(parents=True, mode=0o700)
        log = [*sorted(place.raft.glob("journal-*")), *sorted(place.raft.glob("snapshot-*"))]
        for path in [*log, server / FILE_NAME, *peers_files(place.data)]:
            to = backup / path.name if path.parent == server else backup / "raft" / path.name
            if path.name.startswith("snapshot-"):
                try:
                    os.link(path, to)  # never written again, only removed
                    continue
                except OSError:
                    pass
            shutil.copy2(path, to)
            with open(to, "rb") as copied:
                os.fsync(copied.fileno())
        for each in (backup / "raft", backup, server):
            sync_directory(each)
    except BaseException:
        shutil.rmtree(backup, ignore_errors=True)
        raise
    return backup
