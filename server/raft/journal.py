"""The journal: what this server has promised to remember, on disk, and the log that pysyncobj reads and writes.

One append-only file, `journal-00000001`, written by nobody else. A frame is `u32 length, u32 crc32(body, seed =
offset of the frame)`, little-endian, and its body one record. Space is zeroed before it is used, so that fdatasync
has no metadata to write. Records are buffered; `start_sync` writes and syncs all of them at once, with at most one
sync in flight. Whoever must not speak before the disk has it compares `lsn` (when it was said) with `durable_lsn`. An
error of the disk is never retried (what an fsync that failed has lost is unknown): the owner must stop the process.

How a torn tail is told from damage: each write ends with a COMMIT record that says up to which offset everything was
known to be on the disk. A bad frame below an offset that a later record vouches for is damage, and the journal
refuses to open; a bad frame that nobody vouches for was being written when the power went, was never acknowledged,
and is wiped.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import re
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from pysyncobj.journal import Journal as CoreJournal

from rostra.wire.errors import Conflict, Internal

#: A log entry as the core wants it: (command, index, term). Always a tuple: the core compares with `!=`.
Entry = tuple[bytes, int, int]

FORMAT = 1
FILE_NAME = "journal-00000001"
MAGIC = b"ROSTRA-J"
HEADER_BYTES = 512
RECORD_BYTES_MAX = 8 << 20

#: Space is zeroed in steps of this size, before less than half of it is left.
ALLOCATE_BYTES = 4 << 20

# Record types. On disk for ever: never renumbered, never reused. 6 is kept for snapshots.
ENTRY, TRUNC_FROM, META, COMMIT, BASE = 1, 2, 3, 4, 5

_HEADER = struct.Struct("<8sIHH")  # magic, format, length of the cluster id, length of the node id
_FRAME = struct.Struct("<II")  # length of the body, crc32 of the body
_ENTRY = struct.Struct("<BQQ")  # type, index, term; the command follows
_META = struct.Struct("<BQ")  # type, term; the id voted for follows, empty if none
_INDEX = struct.Struct("<BQ")  # type, index
_COMMIT = struct.Struct("<BQQ")  # type, commit index, offset up to which all is on disk
_U32 = struct.Struct("<I")

#: What can begin a frame: a length below 16 MiB and a known record type. Only a filter, the checksum decides.
_FRAME_CANDIDATE = re.compile(rb"(?=.{3}\x00.{4}[\x01-\x06])", re.DOTALL)


class DamagedJournal(Internal):
    """What was on the disk for certain is not there any more. The server must not run on it (exit status 78)."""


class NewerFormat(Conflict):
    """Written by a later release. Nothing was touched."""


class JournalInUse(Conflict):
    """Another process has it open."""


class WrongJournal(Conflict):
    """It belongs to another cluster or another node."""


def has_journal(directory: Path) -> bool:
    """Whether this directory has ever held a journal: if so, the cluster must not be bootstrapped again."""
    return (directory / FILE_NAME).exists()


# -- the file -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Recovered:
    """What a journal's file says."""

    entries: list[Entry] = field(default_factory=list)
    term: int = 0
    vote: str | None = None
    commit_index: int = 1
    end: int = HEADER_BYTES
    wiped_bytes: int = 0


def header(cluster_id: str, node_id: str) -> bytes:
    """The first 512 bytes of a journal."""
    cluster, node = cluster_id.encode(), node_id.encode()
    if len(cluster) + len(node) > HEADER_BYTES - _HEADER.size - _U32.size:
        raise Internal(f"cluster id and node id are too long for a journal: {cluster_id!r}, {node_id!r}")
    head = _HEADER.pack(MAGIC, FORMAT, len(cluster), len(node)) + cluster + node
    head = head.ljust(HEADER_BYTES - _U32.size, b"\0")
    return head + _U32.pack(zlib.crc32(head))


def encode_frame(body: bytes, offset: int) -> bytes:
    """`body` as it stands in the file at `offset`, which seeds the checksum: a frame is valid in its place only."""
    return _FRAME.pack(len(body), zlib.crc32(body, offset & 0xFFFFFFFF)) + body


def _body_at(data: Any, at: int) -> bytes | None:
    """The body of the valid frame at `at`, or None."""
    size = len(data)
    if at + _FRAME.size > size:
        return None
    length, crc = _FRAME.unpack_from(data, at)
    if not 0 < length <= RECORD_BYTES_MAX or at + _FRAME.size + length > size:
        return None
    body: bytes = data[at + _FRAME.size : at + _FRAME.size + length]
    return body if zlib.crc32(body, at & 0xFFFFFFFF) == crc else None


def _frames(data: Any, at: int) -> Iterator[tuple[int, bytes]]:
    """(offset, body) of the valid frames from `at` on, up to the first bad one."""
    while (body := _body_at(data, at)) is not None:
        yield at, body
        at += _FRAME.size + len(body)


def _check_header(path: Path, data: Any, cluster_id: str, node_id: str) -> None:
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        raise DamagedJournal(f"{path} is not a journal of this program: its first bytes are wrong")
    _, version, cluster_bytes, node_bytes = _HEADER.unpack_from(data, 0)
    if version > FORMAT:
        raise NewerFormat(
            f"{path} has journal format {version} and this release reads up to {FORMAT}. "
            "Nothing was changed. Start the release that wrote it, or a later one"
        )
    head = data[: HEADER_BYTES - _U32.size]
    if zlib.crc32(head) != _U32.unpack_from(data, HEADER_BYTES - _U32.size)[0]:
        raise DamagedJournal(f"{path}: the header's checksum is wrong")
    at = _HEADER.size
    cluster, node = head[at : at + cluster_bytes].decode(), head[at + cluster_bytes :][:node_bytes].decode()
    if cluster != cluster_id or node != node_id:
        raise WrongJournal(
            f"{path} belongs to node {node!r} of cluster {cluster!r}, and this is node {node_id!r} of {cluster_id!r}"
        )


def _replay(path: Path, data: Any) -> Recovered:
    """The state that the valid frames add up to. Raises DamagedJournal where they contradict one another."""
    found = Recovered()
    entries = found.entries
    for at, body in _frames(data, HEADER_BYTES):
        kind = body[0]
        if kind == ENTRY:
            _, index, term = _ENTRY.unpack_from(body)
            if entries and index != entries[-1][1] + 1:
                raise DamagedJournal(f"{path}: at {at} entry {index} follows entry {entries[-1][1]}")
            entries.append((body[_ENTRY.size :], index, term))
        elif kind == TRUNC_FROM:
            first = _INDEX.unpack_from(body)[1]
            if entries:
                del entries[max(0, first - entries[0][1]) :]
        elif kind == META:
            found.term = _META.unpack_from(body)[1]
            found.vote = body[_META.size :].decode() or None
        elif kind == COMMIT:
            found.commit_index = _COMMIT.unpack_from(body)[1]
        elif kind == BASE:
            first = _INDEX.unpack_from(body)[1]
            if first == 0:
                entries.clear()
            elif entries:
                del entries[: max(0, first - entries[0][1])]
        else:
            raise NewerFormat(f"{path}: record type {kind} at {at} is of a later release. Nothing was changed")
        found.end = at + _FRAME.size + len(body)
    if entries:
        found.commit_index = min(found.commit_index, entries[-1][1])
    return found


def _vouched_beyond(data: Any, bad_at: int, junk_end: int) -> int | None:
    """The offset of a later record which says that `bad_at` was on the disk; None if there is none."""
    at = bad_at + 1
    while at < junk_end:
        match = _FRAME_CANDIDATE.search(data, at, junk_end)
        if match is None:
            return None
        at = match.start()
        body = _body_at(data, at)
        if body is None:
            at += 1
            continue
        if body[0] == COMMIT and len(body) == _COMMIT.size and _COMMIT.unpack(body)[2] > bad_at:
            return at
        at += _FRAME.size + len(body)
    return None


class JournalFile:
    """The file and how bytes get into it for good. `write` is called by one thread at a time."""

    def __init__(self, fd: int, allocated: int) -> None:
        self._fd = fd
        self._allocated = allocated

    @classmethod
    def open(cls, directory: Path, cluster_id: str, node_id: str) -> tuple[JournalFile, Recovered]:
        """The journal of `directory`, made if there is none. Raises DamagedJournal and the Conflicts above."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = directory / FILE_NAME
        if not path.exists():
            cls._create(path, cluster_id, node_id)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise JournalInUse(f"{path} is in use by another process") from None
            size = os.fstat(fd).st_size
            found = cls._recover(path, fd, size, cluster_id, node_id)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size), found

    @staticmethod
    def _create(path: Path, cluster_id: str, node_id: str) -> None:
        """Under another name first: the journal is there whole or not at all."""
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
            _write_all(fd, header(cluster_id, node_id).ljust(ALLOCATE_BYTES, b"\0"), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(new, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @staticmethod
    def _recover(path: Path, fd: int, size: int, cluster_id: str, node_id: str) -> Recovered:
        if size < HEADER_BYTES:
            raise DamagedJournal(f"{path} has {size} bytes, which is less than a header")
        with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as data:
            _check_header(path, data, cluster_id, node_id)
            found = _replay(path, data)
            junk = data[found.end :].rstrip(b"\0")
            witness = _vouched_beyond(data, found.end, found.end + len(junk)) if junk else None
        if witness is not None:
            raise DamagedJournal(
                f"{path} is damaged at byte {found.end}: the record at {witness} proves that it once was whole. "
                "Nothing was changed. Restore the disk; the other servers go on, but this version cannot replace one"
            )
        if junk:
            found.wiped_bytes = len(junk)
            _write_all(fd, bytes(len(junk)), found.end)
            os.fsync(fd)
        return found

    def write(self, offset: int, data: bytes) -> None:
        """Returns when `data` is on the disk. Raises OSError: then nothing is known, and nothing may be tried again."""
        _write_all(self._fd, data, offset)
        end = offset + len(data)
        if end > self._allocated - ALLOCATE_BYTES // 2:
            start = max(end, self._allocated)
            _write_all(self._fd, bytes(ALLOCATE_BYTES), start)
            self._allocated = start + ALLOCATE_BYTES
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


# -- the log --------------------------------------------------------------------------------------------------------


class Journal(CoreJournal):  # type: ignore[misc]
    """The log in memory and its file. Without a file (`-dev`) everything counts as durable at once."""

    def __init__(self, file: Any | None, found: Recovered, *, inline: bool = False) -> None:
        self._file: Any = file
        self._entries = found.entries
        self._term, self._vote, self._commit = found.term, found.vote, found.commit_index
        self.wiped_bytes = found.wiped_bytes
        self.bytes = found.end

        self.lsn = 0  # number of the last record that must be durable before it may be spoken of
        self.durable_lsn = 0
        self._undurable: deque[tuple[int, int]] = deque()  # (lsn, index) of the entries not yet on disk

        self._buffer: list[bytes] = []
        self._tail = found.end  # offset of the next frame
        self._synced = found.end  # everything below is on disk
        self._noted: tuple[int, int] | None = None  # (commit index, end) if the last COMMIT record vouches for all
        self._syncing = False
        self._failed = False
        self._inline = inline
        self._writer = ThreadPoolExecutor(1, "raft-journal") if file is not None and not inline else None
        self._job: Future[float | str] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        #: Called on the loop when `durable_lsn` has grown, with the seconds that the write and the sync took.
        self.on_durable: Callable[[float], None] = lambda _seconds: None
        #: Called on the loop, once, when the disk has failed. It should not return.
        self.on_failed: Callable[[str], None] = lambda _reason: None

    @classmethod
    def open(cls, directory: Path, *, cluster_id: str, node_id: str, inline: bool = False) -> Journal:
        file, found = JournalFile.open(directory, cluster_id, node_id)
        return cls(file, found, inline=inline)

    @classmethod
    def memory(cls) -> Journal:
        """A journal that forgets, for `-dev`."""
        return cls(None, Recovered())

    # -- reading

    @property
    def first_index(self) -> int:
        return self._entries[0][1]

    @property
    def last_index(self) -> int:
        return self._entries[-1][1]

    def term_at(self, index: int) -> int | None:
        """The term of entry `index`, None if it is not in the log."""
        at = index - self._entries[0][1]
        return self._entries[at][2] if 0 <= at < len(self._entries) else None

    def entry(self, index: int) -> Entry:
        return self._entries[index - self._entries[0][1]]

    def entries_from(self, index: int, bytes_max: int) -> list[Entry]:
        """The entries from `index` on, at least one, until `bytes_max` is reached."""
        at, size, taken = index - self._entries[0][1], 0, []
        while at < len(self._entries) and size < bytes_max:
            entry = self._entries[at]
            taken.append(entry)
            size += len(entry[0])
            at += 1
        return taken

    @property
    def durable_index(self) -> int:
        """The last entry that is on this server's disk."""
        return self._undurable[0][1] - 1 if self._undurable else self._entries[-1][1]

    @property
    def is_durable(self) -> bool:
        return self.durable_lsn >= self.lsn

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, item: int) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._entries[item]

    # -- writing (the core's interface; the offsets in it are positions in the list, not indexes)

    def add(self, command: bytes, idx: int, term: int) -> None:
        self._entries.append((command, idx, term))
        self._record(_ENTRY.pack(ENTRY, idx, term) + command)
        if self.durable_lsn < self.lsn:
            self._undurable.append((self.lsn, idx))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        if entryFrom >= len(self._entries):
            return
        index = self._entries[entryFrom][1]
        del self._entries[entryFrom:]
        while self._undurable and self._undurable[-1][1] >= index:
            self._undurable.pop()
        self._record(_INDEX.pack(TRUNC_FROM, index))

    def deleteEntriesTo(self, entryTo: int) -> None:
        entryTo = min(entryTo, len(self._entries) - 1)  # the core cannot live with an empty log
        if entryTo <= 0:
            return
        del self._entries[:entryTo]
        self._record(_INDEX.pack(BASE, self._entries[0][1]))

    def clear(self) -> None:
        self._entries.clear()
        self._undurable.clear()
        self._record(_INDEX.pack(BASE, 0))

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        if (term, votedForNodeId) != (self._term, self._vote):
            self._term, self._vote = term, votedForNodeId
            self._record(_META.pack(META, term) + (votedForNodeId or "").encode())

    def getCurrentTerm(self) -> int:
        return self._term

    def getVotedForNodeId(self) -> str | None:
        return self._vote

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Written with the next records, behind the entries that it covers; nobody waits for it."""
        self._commit = raftCommitIndex

    def getRaftCommitIndex(self) -> int:
        return min(self._commit, self._entries[-1][1])

    def onOneSecondTimer(self) -> None:
        """Put the commit index, and up to where the disk is trusted, on record when nothing else is being written."""
        if not self._buffer and self._noted != (self._commit, self._synced):
            self._sync(b"")

    def _record(self, body: bytes) -> None:
        self.lsn += 1
        if self._file is None:
            self.durable_lsn = self.lsn
            return
        if len(body) > RECORD_BYTES_MAX:
            raise Internal(f"a log record of {len(body)} bytes; at most {RECORD_BYTES_MAX} are allowed")
        framed = encode_frame(body, self._tail)
        self._tail += len(framed)
        self._buffer.append(framed)

    # -- getting it to the disk

    def start_sync(self) -> None:
        """Write and sync what is buffered, unless a sync is in flight: then it joins the next one."""
        if self._buffer:
            self._sync(b"".join(self._buffer))

    def _sync(self, data: bytes) -> None:
        if self._syncing or self._failed or self._file is None:
            return
        # Now, and not when the records were buffered: all that was written before is on the disk.
        offset = self._synced
        note = encode_frame(_COMMIT.pack(COMMIT, self._commit, offset), self._tail)
        self._buffer.clear()
        self._tail += len(note)
        self._noted = (self._commit, self._tail) if not data else None
        self._syncing = True
        data += note
        lsn, end = self.lsn, self._tail
        if self._writer is None:
            self._finished(_timed(self._file.write, offset, data), lsn, end)
            return
        loop = self._loop = self._loop or asyncio.get_running_loop()

        def done(future: Future[float | str]) -> None:
            try:
                loop.call_soon_threadsafe(self._finished, future.result(), lsn, end)
            except RuntimeError:  # the loop is closed: nobody waits any more
                pass

        self._job = self._writer.submit(_timed, self._file.write, offset, data)
        self._job.add_done_callback(done)

    def _finished(self, outcome: float | str, lsn: int, end: int) -> None:
        self._syncing = False
        if isinstance(outcome, str):
            self._failed = True
            self.on_failed(f"journal: {outcome}")
            return
        self.durable_lsn, self._synced, self.bytes = max(self.durable_lsn, lsn), end, end
        while self._undurable and self._undurable[0][0] <= lsn:
            self._undurable.popleft()
        self.on_durable(outcome)

    def close(self) -> None:
        """Blocks until all is on the disk (unless the disk has failed) and gives the file back. Not on the loop."""
        if self._file is None:
            return
        if self._writer is not None:
            self._writer.shutdown(wait=True)
            self._writer = None
        # What the thread did last may not have been reported to the loop yet.
        if self._job is not None and isinstance(self._job.result(), str):
            self._failed = True
        if not self._failed:
            waiting = b"".join(self._buffer)
            offset = self._tail - len(waiting)
            note = encode_frame(_COMMIT.pack(COMMIT, self._commit, offset), self._tail)
            outcome = _timed(self._file.write, offset, waiting + note)
            self._failed = isinstance(outcome, str)
            self._buffer.clear()
        self._file.close()
        self._file = None

    def _destroy(self) -> None:
        """The core's name for it; the owner calls `close`."""


def _timed(write: Callable[[int, bytes], None], offset: int, data: bytes) -> float | str:
    """Seconds that it took, or what went wrong. Runs in the writer's thread."""
    started = time.perf_counter()
    try:
        write(offset, data)
    except Exception as e:  # whatever it was: what is on the disk is unknown now
        return f"{type(e).__name__}: {e}"
    return time.perf_counter() - started
