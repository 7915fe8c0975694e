"""Snapshots on disk: the whole state as of one log entry in one file, written once, verified before it is believed.

`snapshot-<index>-<term>` is a row of frames `u32 length, u32 crc32(body, seed = offset)`, little-endian. The first byte
of a body is its kind: HEADER (msgpack map), CHUNK (bytes that only the state machine understands), END (how many chunks
and bytes there were, and the crc32 of all before it). A file gets its name when it is complete and on the disk; until
then it is called `snapshot-taking.new`, or `incoming-…` while it is received. All work on files is done in the disk's
SNAPSHOT lane; the callers are on the loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from rostra.server.raft.disk import SNAPSHOT, Disk, Done, File
from rostra.server.raft.journal import NewerFormat
from rostra.server.raft.members import Members, decode_members, encode_members
from rostra.wire.errors import Internal

FORMAT = 1
CHUNK_BYTES_MAX = 2 << 20

#: Chunks are written in blocks of at least this size.
BLOCK_BYTES = 256 << 10
#: The disk is made to keep up: one sync of everything at the end would hold up the journal's.
SYNC_BYTES = 4 << 20

# Kinds of frames. On disk for ever: never renumbered, never reused.
HEADER, CHUNK, END = b"\x01", b"\x02", b"\x03"

TAKING = "snapshot-taking.new"

_FRAME = struct.Struct("<II")  # length of the body, crc32 of the body
_NAME = re.compile(r"snapshot-([0-9]{20})-([0-9]{10,})")
_PARTIAL = re.compile(r"incoming-([0-9]+)-([0-9]+)-[0-9a-f]+")


class DamagedSnapshot(ValueError):
    """The file is not what was once written. The message names it and the offset."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete file. `members` were in force at `index`, by the log entry `members_index`; `size` in bytes."""

    name: str
    index: int
    term: int
    members: Members
    members_index: int
    size: int
    digest: str

    @property
    def id(self) -> str:
        """The same for the same bytes: what was received of one can be completed from another server's copy."""
        return f"{self.index}-{self.term}-{self.size}-{self.digest}"


def snapshot_name(index: int, term: int) -> str:
    return f"snapshot-{index:020d}-{term:010d}"


# -- frames ---------------------------------------------------------------------------------------------------------


def _frame(kind: bytes, data: bytes, offset: int) -> bytes:
    crc = zlib.crc32(data, zlib.crc32(kind, offset & 0xFFFFFFFF))
    return b"".join((_FRAME.pack(len(data) + 1, crc), kind, data))


def _frames(file: File, path: str) -> Iterator[tuple[int, bytes, bytes]]:
    """(offset, head, body) of each frame, checked, to the end of the file. Raises DamagedSnapshot."""
    at, size = 0, file.size
    while at < size:
        head = file.read(at, _FRAME.size)
        length, crc = _FRAME.unpack(head) if len(head) == _FRAME.size else (0, 0)
        if not 0 < length <= CHUNK_BYTES_MAX + 1:
            raise DamagedSnapshot(f"{path} is damaged at byte {at}: no frame begins there")
        body = file.read(at + _FRAME.size, length)
        if len(body) != length or zlib.crc32(body, at & 0xFFFFFFFF) != crc:
            raise DamagedSnapshot(f"{path} is damaged at byte {at}: the checksum is wrong")
        yield at, head, body
        at += _FRAME.size + length


def _decode(path: str, at: int, body: bytes, expected: type) -> Any:
    try:
        value = msgpack.unpackb(memoryview(body)[1:])
    except ValueError as e:
        raise DamagedSnapshot(f"{path}: the frame at byte {at} cannot be read: {e}") from None
    if type(value) is not expected:
        raise DamagedSnapshot(f"{path}: the frame at byte {at} holds no {expected.__name__}")
    return value


def verify(file: File, path: str, cluster_id: str | None = None) -> Snapshot:
    """What the file is, read to its end. Raises DamagedSnapshot, NewerFormat."""
    head: dict[str, Any] | None = None
    count = size = crc = 0
    end: list[int] | None = None
    at = 0
    for at, frame_head, body in _frames(file, path):
        kind = body[:1]
        if end is not None or (kind == HEADER) != (head is None) or kind not in (HEADER, CHUNK, END):
            raise DamagedSnapshot(f"{path}: the frame at byte {at} is out of place")
        if kind == HEADER:
            head = _decode(path, at, body, dict)
            if head.get("format") != FORMAT:
                raise NewerFormat(
                    f"{path} has snapshot format {head.get('format')} and this release reads up to {FORMAT}. "
                    "Nothing was changed. Start the release that wrote it, or a later one"
                )
            if cluster_id is not None and head.get("cluster_id") != cluster_id:
                raise DamagedSnapshot(f"{path} is not of cluster {cluster_id!r}, but of {head.get('cluster_id')!r}")
        elif kind == CHUNK:
            count, size = count + 1, size + len(body) - 1
        else:
            end = _decode(path, at, body, list)
            if end != [count, size, crc]:
                raise DamagedSnapshot(f"{path}: the end at byte {at} does not fit what is before it")
            continue
        crc = zlib.crc32(body, zlib.crc32(frame_head, crc))
    if head is None or end is None:
        raise DamagedSnapshot(f"{path} ends at byte {file.size}, before it is complete")
    try:
        return Snapshot(
            name=snapshot_name(head["index"], head["term"]),
            index=head["index"],
            term=head["term"],
            members=decode_members(head["members"]),
            members_index=head["members_index"],
            size=file.size,
            digest=f"{crc:08x}",
        )
    except (KeyError, TypeError, Internal) as e:
        raise DamagedSnapshot(f"{path}: the head at byte 0 is not one: {e}") from None


# -- reading --------------------------------------------------------------------------------------------------------


def newest(disk: Disk, cluster_id: str | None) -> tuple[Snapshot | None, list[str]]:
    """The newest snapshot that is whole, and what is wrong with those newer than it. Blocks; changes nothing.

    Raises NewerFormat. A snapshot of another cluster than `cluster_id` counts as damaged.
    """
    problems: list[str] = []
    for _, name in sorted(_complete(disk), reverse=True):
        path = f"{disk.path}/{name}"
        try:
            file = disk.open(name, read_only=True)
            try:
                snapshot = verify(file, path, cluster_id)
            finally:
                file.close()
            if snapshot.name == name:
                return snapshot, problems
            problems.append(f"{path} is {snapshot.name} under another name")
        except DamagedSnapshot as e:
            problems.append(str(e))
        except OSError as e:
            problems.append(f"{path} cannot be read: {e}")
    return None, problems


def _complete(disk: Disk) -> Iterator[tuple[tuple[int, int], str]]:
    """((index, term), name)"""
    for name in disk.names():
        match = _NAME.fullmatch(name)
        if match:
            yield (int(match[1]), int(match[2])), name


def chunks(disk: Disk, snapshot: Snapshot) -> Iterator[bytes]:
    """The chunks in the order in which they were added, checked once more. Blocks. Raises DamagedSnapshot, OSError."""
    file = SnapshotFile(disk, snapshot)
    try:
        for _, _, body in _frames(file.file, f"{disk.path}/{snapshot.name}"):
            if body[:1] == CHUNK:
                yield body[1:]
    finally:
        file.close()


class SnapshotFile:
    """A snapshot's bytes, to be sent. Stays readable when the file is replaced or removed. Methods block."""

    def __init__(self, disk: Disk, snapshot: Snapshot) -> None:
        """Raises OSError where the file is gone, or is another one by now."""
        self.file = disk.open(snapshot.name, read_only=True)
        if self.file.size != snapshot.size:
            self.file.close()
            raise FileNotFoundError(f"{disk.path}/{snapshot.name} has been replaced")

    def read(self, offset: int, count: int) -> bytes:
        return self.file.read(offset, count)

    def close(self) -> None:
        self.file.close()


def remove_older(disk: Disk, keep: Snapshot) -> None:
    """All snapshots older than `keep`, and what was received of others that it makes superfluous. Blocks."""
    for (index, term), name in list(_complete(disk)):
        if (index, term) < (keep.index, keep.term):
            disk.remove(name)
    for name in disk.names():
        match = _PARTIAL.fullmatch(name)
        if match and int(match[1]) <= keep.index:
            disk.remove(name)


# -- writing --------------------------------------------------------------------------------------------------------


class SnapshotWriter:
    """A snapshot that is being taken. Methods are called on the loop; errors of the disk come out of `finish`."""

    def __init__(
        self,
        disk: Disk,
        *,
        cluster_id: str,
        node_id: str,
        index: int,
        term: int,
        members: Members,
        members_index: int,
    ) -> None:
        self._disk = disk
        self._index, self._term, self._members, self._members_index = index, term, members, members_index
        head = {
            "format": FORMAT,
            "cluster_id": cluster_id,
            "index": index,
            "term": term,
            "members": encode_members(members),
            "members_index": members_index,
            "made_by": node_id,
        }
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        #: Added and not yet written: whoever adds should wait while it is large.
        self.backlog_bytes = 0
        # The lines below belong to the lane.
        self._file: File | None = None
        self._offset = self._unsynced = self._crc = 0
        self._count = self._size = 0
        self._error: Exception | None = None
        self._head = msgpack.packb(head, use_bin_type=True)

    def add(self, chunk: bytes) -> None:
        """The next chunk, at most CHUNK_BYTES_MAX. Raises OSError once the disk has failed."""
        if self._error is not None:
            raise self._error
        if len(chunk) > CHUNK_BYTES_MAX:
            raise Internal(f"a chunk of {len(chunk)} bytes for a snapshot; at most {CHUNK_BYTES_MAX} are allowed")
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        self.backlog_bytes += len(chunk)
        if self._waiting_bytes >= BLOCK_BYTES:
            block, size = self._take()
            self._disk.submit(SNAPSHOT, lambda: self._guarded(lambda: self._write(block)), lambda *_: self._wrote(size))

    def finish(self, done: Callable[[Snapshot | None, Exception | None], None]) -> None:
        """`done(snapshot, None)` when it is on the disk under its name; else `done(None, error)`, and nothing is."""
        block, size = self._take()

        def finished(snapshot: Snapshot | None, error: Exception | None) -> None:
            self._wrote(size)
            done(snapshot, error)

        self._disk.submit(SNAPSHOT, lambda: self._guarded(lambda: self._complete(block)), finished)

    def abandon(self) -> None:
        """Nothing is to be left of it. Harmless after `finish`."""
        self._waiting.clear()
        if self._error is None:
            self._error = Internal("this snapshot was given up")
        self._disk.submit(SNAPSHOT, self._drop, lambda *_: None)

    def _take(self) -> tuple[list[bytes], int]:
        block, size = self._waiting, self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0
        return block, size

    def _wrote(self, size: int) -> None:
        self.backlog_bytes -= size

    # -- in the lane

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """After an error nothing is tried any more, and nothing is left on the disk."""
        if self._error is not None:
            raise self._error
        try:
            return work()
        except Exception as e:
            self._error = e
            self._drop()
            raise

    def _write(self, block: Sequence[bytes]) -> None:
        data = bytearray()
        if self._file is None:
            self._file = self._disk.start(TAKING)
            data += _frame(HEADER, self._head, 0)
        for chunk in block:
            data += _frame(CHUNK, chunk, self._offset + len(data))
            self._count, self._size = self._count + 1, self._size + len(chunk)
        self._put(bytes(data))
        self._crc = zlib.crc32(data, self._crc)
        if self._unsynced >= SYNC_BYTES:
            self._file.sync()
            self._unsynced = 0

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(self._offset, data)
        self._offset += len(data)
        self._unsynced += len(data)

    def _complete(self, block: Sequence[bytes]) -> Snapshot:
        self._write(block)
        file = self._file
        assert file is not None
        self._put(_frame(END, msgpack.packb([self._count, self._size, self._crc]), self._offset))
        file.sync()
        name = snapshot_name(self._index, self._term)
        self._disk.rename(TAKING, name)
        self._file = None
        file.close()
        return Snapshot(
            name, self._index, self._term, self._members, self._members_index, self._offset, f"{self._crc:08x}"
        )

    def _drop(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):
            self._disk.remove(TAKING)


class Incoming:
    """A snapshot that is being received: `offset` bytes of `size` are there. Survives a restart; one at a time.

    Methods are called on the loop, the next one when the one before is done.
    """

    def __init__(self, disk: Disk, cluster_id: str, snapshot_id: str, index: int, term: int, size: int) -> None:
        self._disk, self._cluster_id = disk, cluster_id
        self.id, self.index, self.term, self.size = snapshot_id, index, term, size
        mark = hashlib.blake2b(snapshot_id.encode(), digest_size=8).hexdigest()  # the id is a peer's word
        self._name = f"incoming-{index}-{term}-{mark}"
        self.offset = 0
        with contextlib.suppress(FileNotFoundError):
            file = disk.open(self._name, read_only=True)
            self.offset = file.size if file.size <= size else 0
            file.close()
        self._file: File | None = None  # the lane's, as the next
        self._unsynced = 0

    def write(self, offset: int, data: bytes, done: Done) -> None:
        """`data` is what follows at `offset`, which is this object's; `done(None, error)` when it is written."""

        def work() -> None:
            if offset != self.offset or offset + len(data) > self.size:
                raise ValueError(f"{len(data)} bytes at {offset} do not follow {self.offset} of {self.size}")
            file = self._open()
            file.write(offset, data)
            self._unsynced += len(data)
            if self._unsynced >= SYNC_BYTES:
                file.sync()
                self._unsynced = 0

        def written(_: Any, error: Exception | None) -> None:
            if error is None:
                self.offset = offset + len(data)
            done(None, error)

        self._disk.submit(SNAPSHOT, work, written)

    def finish(self, done: Callable[[Snapshot | None, Exception | None], None]) -> None:
        """`done(snapshot, None)` when it is verified, durable and has its name; else `done(None, error)`: a ValueError
        for what is no snapshot, not the announced one, or of another cluster. Then nothing is left of it."""

        def work() -> Snapshot:
            try:
                file = self._open()
                snapshot = verify(file, f"{self._disk.path}/{self._name}", self._cluster_id)
                if (snapshot.id, snapshot.index, snapshot.term) != (self.id, self.index, self.term):
                    raise ValueError(f"received snapshot {snapshot.id}, announced was {self.id}")
                file.sync()
                self._disk.rename(self._name, snapshot.name)
                self._file = None
                file.close()
                return snapshot
            except BaseException:
                self._drop()
                raise

        self._disk.submit(SNAPSHOT, work, done)

    def abandon(self) -> None:
        """Nothing is to be left of it."""
        self._disk.submit(SNAPSHOT, self._drop, lambda *_: None)

    def _open(self) -> File:
        """The partial file. Raises OSError where it is not what it was when this object was made."""
        if self._file is None:
            for name in self._disk.names():
                if name != self._name and _PARTIAL.fullmatch(name):
                    self._disk.remove(name)
            self._file = self._disk.open(self._name) if self.offset else self._disk.start(self._name)
            if self._file.size != self.offset:
                raise FileNotFoundError(f"{self._disk.path}/{self._name} has changed")
        return self._file

    def _drop(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                file.close()
        with contextlib.suppress(OSError):
            self._disk.remove(self._name)
