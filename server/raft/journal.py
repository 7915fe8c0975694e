"""The journal: what this server has promised to remember, on disk, and the log that pysyncobj reads and writes.

Segments `journal-00000001`, `journal-00000002`, …, each written once from its beginning to its end and then deleted
whole. A frame is `u32 length, u32 crc32(body, seed = salt of the segment ^ offset)`, little-endian, and its body one
record. Space is zeroed before it is used, so that fdatasync has no metadata to write. Records are buffered;
`start_sync` writes and syncs all of them at once in the disk's lane, with at most one sync in flight. A caller that
must not speak before the disk has it compares `lsn` (when it was said) with `durable_lsn`. An error of the disk is
never retried (what an fsync that failed has lost is unknown): the owner must stop the process.

How a torn tail is told from damage: a segment comes into being whole, after all of the one before is on the disk, and
notes where that one ended. In the last one each write ends with a COMMIT record that says up to which offset everything
was known to be on the disk. A bad frame below what is vouched for is damage, and the journal refuses to open. A bad
frame that nobody vouches for was being written when the power went: it was never acknowledged, and is wiped.
"""

from __future__ import annotations

import errno
import re
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import overload

from pysyncobj.journal import Journal as CoreJournal

from rostra.server.raft.core import NO_OP
from rostra.server.raft.disk import JOURNAL, Disk, File
from rostra.server.raft.members import MEMBERSHIP, Members, decode_members
from rostra.wire.errors import Conflict, Internal

#: A log entry as the core wants it: (command, index, term). Always a tuple: the core compares with `!=`.
Entry = tuple[bytes, int, int]

#: (number of a segment, offset in it): how far the records of a server go. It only ever grows, whatever they say.
Place = tuple[int, int]
#: Of a server that has no journal yet.
BEGINNING_PLACE: Place = (0, 0)

FORMAT = 2
MAGIC = b"ROSTRA-J"
HEADER_BYTES = 512
RECORD_BYTES_MAX = 8 << 20

#: A segment that has grown past this is closed with the next sync.
SEGMENT_BYTES = 16 << 20
#: Space is zeroed in steps of this size, before less than half of it is left.
ALLOCATE_BYTES = 4 << 20

#: What an entry takes in memory beside its command: the tuple, two numbers, the bytes object and its place in the list.
ENTRY_OVERHEAD_BYTES = 200

# Record types. On disk for ever: never renumbered, never reused. BASE, RESET: what the log begins with from now on.
ENTRY, TRUNC_FROM, META, COMMIT, BASE, RESET = 1, 2, 3, 4, 5, 6

_HEADER = struct.Struct("<8sIHH")  # magic, format, length of the cluster id, length of the node id
_PLACE = struct.Struct("<QQ")  # from format 2 on: number of the segment, where the one before ended (0: there was none)
_FRAME = struct.Struct("<II")  # length of the body, crc32 of the body
_ENTRY = struct.Struct("<BQQ")  # type, index, term; the command follows
_META = struct.Struct("<BQ")  # type, term; the id voted for follows, empty if none
_INDEX = struct.Struct("<BQ")  # type, index
_COMMIT = struct.Struct("<BQQ")  # type, commit index, offset up to which all of this segment is on disk
_RESET = struct.Struct("<BQQ")  # type, index, term
_U32 = struct.Struct("<I")

_NAME = re.compile(r"journal-([0-9]{8,})")

#: What can begin a frame: a length below 16 MiB and a known record type. Only a filter, the checksum decides.
_FRAME_CANDIDATE = re.compile(rb"(?=.{3}\x00.{4}[\x01-\x06])", re.DOTALL)

#: The records with which each segment since format 2 begins, so that those before it can go.
_BEGINNING = (META, COMMIT, BASE)

_REPLACE = (
    "Nothing was changed. Restore the file, or replace this server: remove it from the cluster and start it again with "
    "an empty data directory"
)


class DamagedJournal(Internal):
    """Bytes that were on the disk for certain are gone. The server must not run on it (exit status 78)."""


class NewerFormat(Conflict):
    """Written by a later release. Nothing was touched."""


class WrongJournal(Conflict):
    """It belongs to another cluster or another node."""


def has_journal(directory: Path) -> bool:
    """Whether this directory has ever held a journal: if so, the cluster must not be bootstrapped again."""
    return directory.is_dir() and any(_NAME.fullmatch(path.name) for path in directory.iterdir())


# -- what is in the files -------------------------------------------------------------------------------------------


def segment_name(number: int) -> str:
    return f"journal-{number:08d}"


def segment_numbers(disk: Disk) -> list[int]:
    return sorted(int(match[1]) for name in disk.names() if (match := _NAME.fullmatch(name)))


def segment_salt(number: int) -> int:
    """What the checksums of segment `number` are seeded with, beside the offset: a frame is valid in its file only."""
    return zlib.crc32(struct.pack("<Q", number))


@dataclass(frozen=True, slots=True)
class Header:
    """The first 512 bytes of a segment."""

    cluster_id: str
    node_id: str
    number: int
    previous_end: int
    format: int = FORMAT

    @property
    def salt(self) -> int:
        return segment_salt(self.number) if self.format > 1 else 0

    def encode(self) -> bytes:
        cluster, node = self.cluster_id.encode(), self.node_id.encode()
        head = _HEADER.pack(MAGIC, self.format, len(cluster), len(node))
        if self.format > 1:
            head += _PLACE.pack(self.number, self.previous_end)
        head += cluster + node
        if len(head) > HEADER_BYTES - _U32.size:
            raise Internal(f"cluster id and node id are too long for a journal: {self.cluster_id!r}, {self.node_id!r}")
        head = head.ljust(HEADER_BYTES - _U32.size, b"\0")
        return head + _U32.pack(zlib.crc32(head))


def _decode_header(path: str, data: bytes, number: int) -> Header:
    """The header of the file that is called segment `number`. Raises DamagedJournal or NewerFormat."""
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        raise DamagedJournal(f"{path} is not a journal of this program: it is damaged at byte 0. {_REPLACE}")
    _, version, cluster_bytes, node_bytes = _HEADER.unpack_from(data, 0)
    if version > FORMAT:
        raise NewerFormat(
            f"{path} has journal format {version} and this release reads up to {FORMAT}. "
            "Nothing was changed. Start the release that wrote it, or a later one"
        )
    head = data[: HEADER_BYTES - _U32.size]
    if zlib.crc32(head) != _U32.unpack_from(data, HEADER_BYTES - _U32.size)[0]:
        raise DamagedJournal(f"{path}: the checksum of the header (byte 0) is wrong. {_REPLACE}")
    at, found, previous_end = _HEADER.size, 1, 0
    if version > 1:
        found, previous_end = _PLACE.unpack_from(head, at)
        at += _PLACE.size
    if found != number:
        raise DamagedJournal(f"{path} says at byte {_HEADER.size} that it is segment {found}. {_REPLACE}")
    cluster, node = head[at : at + cluster_bytes].decode(), head[at + cluster_bytes :][:node_bytes].decode()
    return Header(cluster, node, found, previous_end, version)


def encode_frame(body: bytes, offset: int, salt: int = 0) -> bytes:
    """`body` as it stands in the file at `offset`."""
    return _FRAME.pack(len(body), zlib.crc32(body, salt ^ (offset & 0xFFFFFFFF))) + body


def _body_at(data: bytes, at: int, salt: int) -> bytes | None:
    """The body of the valid frame at `at`, or None."""
    size = len(data)
    if at + _FRAME.size > size:
        return None
    length, crc = _FRAME.unpack_from(data, at)
    if not 0 < length <= RECORD_BYTES_MAX or at + _FRAME.size + length > size:
        return None
    body = data[at + _FRAME.size : at + _FRAME.size + length]
    return body if zlib.crc32(body, salt ^ (at & 0xFFFFFFFF)) == crc else None


def _frames(data: bytes, salt: int) -> Iterator[tuple[int, bytes]]:
    """(offset, body) of the valid frames up to the first bad one."""
    at = HEADER_BYTES
    while (body := _body_at(data, at, salt)) is not None:
        yield at, body
        at += _FRAME.size + len(body)


def _vouched_beyond(data: bytes, bad_at: int, junk_end: int, salt: int) -> int | None:
    """The offset of a later record which says that `bad_at` was on the disk; None if there is none."""
    at = bad_at + 1
    while at < junk_end:
        match = _FRAME_CANDIDATE.search(data, at, junk_end)
        if match is None:
            return None
        at = match.start()
        body = _body_at(data, at, salt)
        if body is None:
            at += 1
            continue
        if body[0] == COMMIT and len(body) == _COMMIT.size and _COMMIT.unpack(body)[2] > bad_at:
            return at
        at += _FRAME.size + len(body)
    return None


@dataclass(slots=True)
class Segment:
    """`first`: the first entry in it that counts, or the first one after it. `end`: bytes in use."""

    number: int
    first: int
    end: int


class Replay:
    """What the segments add up to; as far as they can be read, where they are damaged."""

    def __init__(self) -> None:
        self.header: Header | None = None  # of the last segment read
        self.entries: list[Entry] = []
        self.term = 0
        self.vote: str | None = None
        self.commit_index = 1
        self.segments: list[Segment] = []
        self.torn_bytes = 0
        self.unvouched = b""  # the end of the last segment, of which nobody says that it was synced
        self.leftovers: list[int] = []  # segments before a gap, which nothing needs
        self._needed: int | None = None  # the log begins with this entry

    @property
    def place(self) -> Place:
        return (self.segments[-1].number, self.segments[-1].end) if self.segments else BEGINNING_PLACE

    def read(self, disk: Disk, *, cluster_id: str | None = None, node_id: str | None = None) -> None:
        """Raises DamagedJournal, NewerFormat, WrongJournal; what was read up to there stays."""
        numbers = segment_numbers(disk)
        first = len(numbers) - 1
        while first > 0 and numbers[first - 1] == numbers[first] - 1:
            first -= 1
        self.leftovers = numbers[:first]
        for number in numbers[first:]:
            path = f"{disk.path}/{segment_name(number)}"
            file = disk.open(segment_name(number), read_only=True)
            try:
                data = file.read(0, file.size)
            finally:
                file.close()
            header = _decode_header(path, data, number)
            if cluster_id is not None and (header.cluster_id, header.node_id) != (cluster_id, node_id):
                raise WrongJournal(
                    f"{path} belongs to node {header.node_id!r} of cluster {header.cluster_id!r}, and this is node "
                    f"{node_id!r} of {cluster_id!r}"
                )
            if self.segments and self.segments[-1].end != header.previous_end:
                raise DamagedJournal(
                    f"{disk.path}/{segment_name(number - 1)} is damaged at byte {self.segments[-1].end}: "
                    f"{segment_name(number)} proves that it once was whole up to byte {header.previous_end}. {_REPLACE}"
                )
            self.header = header
            self._segment(path, data, header, is_last=number == numbers[-1])
        if self._needed is not None and (not self.entries or self.entries[0][1] > self._needed):
            missing = f"{disk.path}/{segment_name(self.segments[0].number - 1)}"
            raise DamagedJournal(
                f"{missing} is missing: the log has to begin with entry {self._needed}, and the first one in "
                f"{segment_name(self.segments[0].number)} (byte {HEADER_BYTES}) is "
                f"{self.entries[0][1] if self.entries else 'not there'}. {_REPLACE}"
            )
        if self.entries:
            self.commit_index = min(self.commit_index, self.entries[-1][1])

    def _segment(self, path: str, data: bytes, header: Header, *, is_last: bool) -> None:
        next_index = self.entries[-1][1] + 1 if self.entries else 0
        segment = Segment(header.number, next_index, HEADER_BYTES)
        self.segments.append(segment)
        frame_count, vouched = 0, HEADER_BYTES
        for at, body in _frames(data, header.salt):
            kind = body[0]
            if frame_count < len(_BEGINNING) and header.format > 1:
                if kind != _BEGINNING[frame_count]:
                    raise DamagedJournal(f"{path} does not begin as a segment does, at byte {at}. {_REPLACE}")
                vouched = at + _FRAME.size + len(body)
            elif kind == COMMIT:
                vouched = max(vouched, _COMMIT.unpack_from(body)[2])
            self._record(path, at, body)
            segment.end = at + _FRAME.size + len(body)
            frame_count += 1
        if not is_last:
            return  # the next one says where it must end
        junk = data[segment.end :].rstrip(b"\0")
        witness = _vouched_beyond(data, segment.end, segment.end + len(junk), header.salt) if junk else None
        if witness is not None or (header.format > 1 and frame_count < len(_BEGINNING)):
            proof = f"the record at {witness} proves" if witness is not None else "files are made such"
            raise DamagedJournal(f"{path} is damaged at byte {segment.end}: {proof} that it once was whole. {_REPLACE}")
        self.torn_bytes = len(junk)
        self.unvouched = data[vouched : segment.end]

    def _record(self, path: str, at: int, body: bytes) -> None:
        entries, kind = self.entries, body[0]
        if kind == ENTRY:
            _, index, term = _ENTRY.unpack_from(body)
            if not entries:
                self._rebase(index)
            elif index != entries[-1][1] + 1:
                raise DamagedJournal(f"{path}: at byte {at} entry {index} follows entry {entries[-1][1]}. {_REPLACE}")
            entries.append((body[_ENTRY.size :], index, term))
        elif kind == TRUNC_FROM:
            first = _INDEX.unpack_from(body)[1]
            if entries:
                del entries[max(0, first - entries[0][1]) :]
            if self._needed is not None and first <= self._needed:
                self._needed = None
            for segment in self.segments:
                segment.first = min(segment.first, first)
            self.commit_index = min(self.commit_index, max(1, first - 1))
        elif kind == META:
            self.term = _META.unpack_from(body)[1]
            self.vote = body[_META.size :].decode() or None
        elif kind == COMMIT:
            self.commit_index = _COMMIT.unpack_from(body)[1]
        elif kind == BASE:
            first = _INDEX.unpack_from(body)[1]
            if first == 0:
                entries.clear()
                self._needed, self.commit_index = None, 1
            else:
                if entries:
                    del entries[: max(0, first - entries[0][1])]
                self._needed = first
        elif kind == RESET:
            _, index, term = _RESET.unpack_from(body)
            self.entries[:] = [(NO_OP, index, term)]
            self._rebase(index)
            self._needed = self.commit_index = index
        else:
            raise NewerFormat(
                f"{path}: record type {kind} at byte {at} is of a later release. Nothing was changed. "
                "Start the release that wrote it, or a later one"
            )

    def _rebase(self, index: int) -> None:
        """The log begins anew with `index`, which is in the present segment."""
        for segment in self.segments:
            segment.first = index


# -- for people and for recovery -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Inspection:
    """What the journal of a server that is not running holds, as far as it can be read.

    `damage` and `torn_bytes` are of the files: with damage a server would not start; a torn tail it would wipe.
    Indexes are 0 where there is no entry. `members`: the last list in the log, None if there is none in it.
    """

    cluster_id: str = ""
    node_id: str = ""
    term: int = 0
    vote: str | None = None
    commit_index: int = 0
    entries: list[Entry] = field(default_factory=list)
    members: Members | None = None
    members_index: int = 0
    segments: list[Segment] = field(default_factory=list)
    torn_bytes: int = 0
    damage: str = ""

    @property
    def first_index(self) -> int:
        return self.entries[0][1] if self.entries else 0

    @property
    def last_index(self) -> int:
        return self.entries[-1][1] if self.entries else 0

    @property
    def last_term(self) -> int:
        return self.entries[-1][2] if self.entries else 0

    @property
    def place(self) -> Place:
        return (self.segments[-1].number, self.segments[-1].end) if self.segments else BEGINNING_PLACE

    def term_at(self, index: int) -> int | None:
        """The term of entry `index`, None if it is not in the log."""
        return self.entries[index - self.first_index][2] if self.first_index <= index <= self.last_index else None


def inspect_journal(disk: Disk) -> Inspection:
    """Reads all there is and writes nothing. What is wrong is in `damage`; raises nothing for it."""
    found, damage = Replay(), ""
    try:
        found.read(disk)
    except (DamagedJournal, NewerFormat, OSError) as e:
        damage = str(e)
    inspection = Inspection(
        term=found.term,
        vote=found.vote,
        commit_index=min(found.commit_index, found.entries[-1][1]) if found.entries else 0,
        entries=found.entries,
        segments=found.segments,
        torn_bytes=found.torn_bytes,
        damage=damage,
    )
    if found.header is not None:
        inspection.cluster_id, inspection.node_id = found.header.cluster_id, found.header.node_id
    for command, index, _ in reversed(found.entries):
        if command[:1] == MEMBERSHIP:
            try:
                inspection.members, inspection.members_index = decode_members(command), index
            except Internal as e:
                inspection.damage = inspection.damage or f"entry {index}: {e}"
            break
    return inspection


# -- the writing side of the disk: runs in the lane, one call at a time ---------------------------------------------


class _Writer:
    """The segment that is being written."""

    def __init__(self, disk: Disk, file: File, number: int, segment_bytes: int, allocate_bytes: int) -> None:
        self._disk, self._file, self.name = disk, file, segment_name(number)
        self._segment_bytes, self._allocate_bytes = segment_bytes, min(segment_bytes, allocate_bytes)
        self._allocated = file.size

    @staticmethod
    def create(disk: Disk, header: Header, beginning: bytes, segment_bytes: int, allocate_bytes: int) -> _Writer:
        """A new segment, there whole or not at all."""
        data = (header.encode() + beginning).ljust(min(segment_bytes, allocate_bytes), b"\0")
        file = disk.create(segment_name(header.number), data)
        return _Writer(disk, file, header.number, segment_bytes, allocate_bytes)

    def write(self, offset: int, data: bytes) -> None:
        """Returns when `data` is on the disk. Raises OSError: then nothing is known, and nothing may be tried again."""
        file, step = self._file, self._allocate_bytes
        file.write(offset, data)
        end = offset + len(data)
        if end > self._allocated - step // 2 and self._allocated < self._segment_bytes:
            start = max(end, self._allocated)
            file.write(start, bytes(step))
            self._allocated = start + step
        file.sync()

    def next(self, header: Header, beginning: bytes) -> None:
        """Go on in a new segment; all of this one is on the disk."""
        self.name = segment_name(header.number)
        new = self.create(self._disk, header, beginning, self._segment_bytes, self._allocate_bytes)
        self._file.close()
        self._file, self._allocated = new._file, new._allocated

    def close(self) -> None:
        self._file.close()


class _Job:
    """Work for the lane that is done once, by whoever comes first: the lane, or `close`, which waits for nobody."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._is_done = False
        self._error: Exception | None = None
        self._seconds = 0.0

    def run(self) -> float:
        """Seconds that it took. Raises what it raised."""
        with self._lock:
            if not self._is_done:
                started = time.perf_counter()
                try:
                    self._work()
                except Exception as e:  # whatever it was: what is on the disk is unknown now
                    self._error = e
                self._is_done = True
                self._seconds = time.perf_counter() - started
        if self._error is not None:
            raise self._error
        return self._seconds


# -- the log --------------------------------------------------------------------------------------------------------


class Journal(CoreJournal):  # type: ignore[misc]
    """The log in memory and its files. Without a disk (`-dev`) everything counts as durable at once."""

    def __init__(self, disk: Disk | None, writer: _Writer | None, found: Replay, segment_bytes: int) -> None:
        self._disk, self._writer, self._header = disk, writer, found.header
        self._entries = found.entries
        self._term, self._vote, self._commit = found.term, found.vote, found.commit_index
        self._segments = found.segments or [Segment(1, 0, HEADER_BYTES)]
        self._segment_bytes = segment_bytes
        self.wiped_bytes = found.torn_bytes
        #: Memory that the entries take.
        self.log_bytes = sum(len(entry[0]) + ENTRY_OVERHEAD_BYTES for entry in found.entries)

        self.lsn = 0  # number of the last record that must be durable before it may be spoken of
        self.durable_lsn = 0
        self._undurable: deque[tuple[int, int]] = deque()  # (lsn, index) of the entries not yet on disk
        self._forget_lsn = 0  # of the last record after which an older segment may not be needed any more

        self._buffer: list[bytes] = []  # parts of frames
        self._salt = found.header.salt if found.header is not None else 0
        self._tail = self._segments[-1].end  # offset of the next frame
        self._synced = self._tail  # everything below is on disk
        #: Everything up to there is on disk.
        self.place: Place = (self._segments[-1].number, self._tail)
        self.bytes = sum(segment.end for segment in self._segments)  # on disk, in all segments
        self._noted: tuple[int, int] | None = None  # (commit index, end) if the last COMMIT record vouches for all
        self._jobs: list[_Job] = []  # in the lane: a sync, a removal
        self._is_syncing = self._is_removing = False
        self._failed = False
        #: Called on the loop when `durable_lsn` has grown, with the seconds that the write and the sync took.
        self.on_durable: Callable[[float], None] = lambda _seconds: None
        #: Called on the loop, once, when the disk has failed. It should not return.
        self.on_failed: Callable[[str], None] = lambda _reason: None

    @classmethod
    def open(
        cls,
        disk: Disk,
        *,
        cluster_id: str,
        node_id: str,
        segment_bytes: int = SEGMENT_BYTES,
        allocate_bytes: int = ALLOCATE_BYTES,
        reached: Place = BEGINNING_PLACE,
    ) -> Journal:
        """The journal on `disk`, made if there is none. Blocks. `reached`: a place that was on this server's disk once.

        Raises DamagedJournal and the Conflicts above, with nothing changed, and OSError.
        """
        found = Replay()
        found.read(disk, cluster_id=cluster_id, node_id=node_id)
        if found.place < reached:
            raise DamagedJournal(
                f"{disk.path}: the journal ends at byte {found.place[1]} of {segment_name(found.place[0])}, and this"
                f" server's had reached byte {reached[1]} of {segment_name(reached[0])}: it is an older copy, or its"
                f" end is lost, and what this server has promised since is not in it. {_REPLACE}"
            )
        for name in disk.names():
            if name.endswith(".new") and _NAME.fullmatch(name.removesuffix(".new")):
                disk.remove(name)
        for number in found.leftovers:
            disk.remove(segment_name(number))
        if found.header is None:
            found.header = Header(cluster_id, node_id, 1, 0)
            beginning = _beginning(found.header, found.term, found.vote, found.commit_index, 0)
            writer = _Writer.create(disk, found.header, beginning, segment_bytes, allocate_bytes)
            found.segments.append(Segment(1, 0, HEADER_BYTES + len(beginning)))
            return cls(disk, writer, found, segment_bytes)
        last = found.segments[-1]
        file = disk.open(segment_name(last.number))
        try:
            if found.torn_bytes:
                file.write(last.end, bytes(found.torn_bytes))
            if found.unvouched:
                # A process that was killed has not synced it; and after a sync that failed, the kernel has it in its
                # cache as if it were clean, and only another write brings it to the disk.
                file.write(last.end - len(found.unvouched), found.unvouched)
            file.sync()
            disk.sync_directory()  # the file's name, likewise
        except BaseException:
            file.close()
            raise
        return cls(disk, _Writer(disk, file, last.number, segment_bytes, allocate_bytes), found, segment_bytes)

    @classmethod
    def memory(cls) -> Journal:
        """A journal that forgets, for `-dev`."""
        return cls(None, None, Replay(), SEGMENT_BYTES)

    # -- reading

    @property
    def first_index(self) -> int:
        return self._entries[0][1]

    @property
    def last_index(self) -> int:
        return self._entries[-1][1]

    def term_at(self, index: int) -> int | None:
        """The term of entry `index`, None if it is not in the log."""
        if not self._entries:
            return None
        at = index - self._entries[0][1]
        return self._entries[at][2] if 0 <= at < len(self._entries) else None

    def entry(self, index: int) -> Entry:
        """Raises Internal where the log does not have it."""
        at = index - self._entries[0][1]
        if not 0 <= at < len(self._entries):
            raise Internal(f"entry {index} is not in the log, which has {self.first_index} to {self.last_index}")
        return self._entries[at]

    def cost(self, index: int) -> int:
        """What entry `index` adds to `log_bytes`."""
        return len(self.entry(index)[0]) + ENTRY_OVERHEAD_BYTES

    def entries_from(self, index: int, bytes_max: int) -> list[Entry]:
        """The entries from `index` on, at least one, until `bytes_max` is reached; [] after the last."""
        at, size, taken = index - self._entries[0][1], 0, []
        if at < 0:
            raise Internal(f"entry {index} is not in the log, which begins with {self.first_index}")
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
        if not self._entries:
            self._begin_log(idx)
        self._entries.append((command, idx, term))
        self.log_bytes += len(command) + ENTRY_OVERHEAD_BYTES
        self._record(_ENTRY.pack(ENTRY, idx, term), command)
        if self.durable_lsn < self.lsn:
            self._undurable.append((self.lsn, idx))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        if entryFrom >= len(self._entries):
            return
        index = self._entries[entryFrom][1]
        self._drop(entryFrom, len(self._entries))
        while self._undurable and self._undurable[-1][1] >= index:
            self._undurable.pop()
        self._commit = min(self._commit, max(1, index - 1))
        for segment in self._segments:
            segment.first = min(segment.first, index)
        self._record(_INDEX.pack(TRUNC_FROM, index))
        self._forget_lsn = self.lsn

    def deleteEntriesTo(self, entryTo: int) -> None:
        if entryTo > 0 and self._entries:
            self.set_base(self._entries[min(entryTo, len(self._entries) - 1)][1])

    def set_base(self, index: int) -> None:
        """Entries below `index` are not needed any more; that one, or the last, stays: the log is never empty.

        Segments that hold nothing else are deleted once this is on the disk.
        """
        at = min(index - self._entries[0][1], len(self._entries) - 1)
        if at <= 0:
            return
        self._drop(0, at)
        self._record(_INDEX.pack(BASE, self._entries[0][1]))
        self._forget_lsn = self.lsn

    def reset_to(self, index: int, term: int) -> None:
        """A snapshot has taken the place of the log: forget all, and go on after entry `index` of `term`."""
        self._entries = [(NO_OP, index, term)]
        self.log_bytes = len(NO_OP) + ENTRY_OVERHEAD_BYTES
        self._undurable.clear()
        self._commit = index
        self._begin_log(index)
        self._record(_RESET.pack(RESET, index, term))
        self._forget_lsn = self.lsn
        if self.durable_lsn < self.lsn:
            self._undurable.append((self.lsn, index))

    def clear(self) -> None:
        self._entries.clear()
        self._undurable.clear()
        self.log_bytes, self._commit = 0, 1
        self._begin_log(0)
        self._record(_INDEX.pack(BASE, 0))
        self._forget_lsn = self.lsn

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
        return min(self._commit, self._entries[-1][1])  # H24

    def onOneSecondTimer(self) -> None:
        """Put the commit index, and up to where the disk is trusted, on record when nothing else is being written."""
        if not self._buffer and self._noted != (self._commit, self._synced):
            self._sync()

    def _begin_log(self, index: int) -> None:
        """The log begins anew with entry `index`."""
        for segment in self._segments:
            segment.first = index

    def _drop(self, start: int, end: int) -> None:
        dropped = self._entries[start:end]
        del self._entries[start:end]
        self.log_bytes -= sum(len(entry[0]) for entry in dropped) + ENTRY_OVERHEAD_BYTES * len(dropped)

    def _record(self, head: bytes, command: bytes = b"") -> None:
        self.lsn += 1
        if self._disk is None:
            self.durable_lsn = self.lsn
            return
        length = len(head) + len(command)
        if length > RECORD_BYTES_MAX:
            raise Internal(f"a log record of {length} bytes; at most {RECORD_BYTES_MAX} are allowed")
        # The frame of head + command, without a copy of the command.
        crc = zlib.crc32(command, zlib.crc32(head, self._salt ^ (self._tail & 0xFFFFFFFF)))
        self._buffer.append(_FRAME.pack(length, crc) + head)
        if command:
            self._buffer.append(command)
        self._tail += _FRAME.size + length

    # -- getting it to the disk

    def start_sync(self) -> bool:
        """Write and sync what is buffered, unless a sync is in flight: then it joins the next one. Whether it began."""
        if not self._buffer or self._is_syncing or self._failed or self._writer is None:
            return False
        self._sync()
        return True

    def _sync(self) -> None:
        if self._is_syncing or self._failed or self._writer is None:
            return
        writer, parts, offset = self._writer, self._buffer, self._synced
        # Now, and not when the records were buffered: all that was written before is on the disk.
        note = encode_frame(_COMMIT.pack(COMMIT, self._commit, offset), self._tail, self._salt)
        self._tail += len(note)
        self._noted = None if parts else (self._commit, self._tail)
        self._buffer = []
        parts.append(note)
        end = self._tail
        following = self._next_segment() if end >= self._segment_bytes else None

        def work() -> None:
            writer.write(offset, b"".join(parts))
            if following is not None:
                writer.next(*following)

        self._is_syncing = True
        self._submit(work, partial(self._synced_up_to, self.lsn, end if following is None else self._tail))

    def _next_segment(self) -> tuple[Header, bytes]:
        """From now on records are for a new segment. Its header, and the records that make those before superfluous."""
        assert self._header is not None
        end = self._tail
        header = self._header = Header(self._header.cluster_id, self._header.node_id, self._header.number + 1, end)
        self._segments[-1].end = end
        base, next_index = (self._entries[0][1], self._entries[-1][1] + 1) if self._entries else (0, 0)
        beginning = _beginning(header, self._term, self._vote, self._commit, base)
        self._tail = HEADER_BYTES + len(beginning)
        self._segments.append(Segment(header.number, next_index, self._tail))
        self._salt = header.salt
        self._noted = (self._commit, self._tail)
        return header, beginning

    def _submit(self, work: Callable[[], None], done: Callable[[float], None]) -> None:
        assert self._disk is not None
        job = _Job(work)
        self._jobs.append(job)

        def finished(seconds: float | None, error: Exception | None) -> None:
            self._jobs.remove(job)
            if self._writer is None:
                return  # closed: nobody waits any more
            if error is None and seconds is not None:
                done(seconds)
            elif not self._failed:
                self._failed = True
                self.on_failed(self._reason(error))

        self._disk.submit(JOURNAL, job.run, finished)

    def _synced_up_to(self, lsn: int, end: int, seconds: float) -> None:
        self._is_syncing = False
        self.durable_lsn, self._synced = max(self.durable_lsn, lsn), end
        self.place = (self._segments[-1].number, end)
        self._count_bytes()
        while self._undurable and self._undurable[0][0] <= lsn:
            self._undurable.popleft()
        self._remove_segments()
        self.on_durable(seconds)

    def _count_bytes(self) -> None:
        self.bytes = sum(segment.end for segment in self._segments[:-1]) + self._synced

    def _remove_segments(self) -> None:
        """Those whose entries are all dropped or replaced, by records that are on the disk."""
        segments = self._segments
        if len(segments) < 2 or self._is_removing or self.durable_lsn < self._forget_lsn:
            return
        base, count = self._entries[0][1] if self._entries else 0, 0
        while count < len(segments) - 1 and segments[count + 1].first <= base:
            count += 1
        if count == 0:
            return
        names = [segment_name(segment.number) for segment in segments[:count]]
        del segments[:count]
        self._count_bytes()
        disk = self._disk
        assert disk is not None

        def work() -> None:
            for name in names:
                disk.remove(name)
            disk.sync_directory()

        self._is_removing = True
        self._submit(work, self._removed)

    def _removed(self, _seconds: float) -> None:
        self._is_removing = False
        self._remove_segments()

    def _reason(self, error: Exception | None) -> str:
        assert self._disk is not None
        assert self._writer is not None
        path = f"{self._disk.path}/{self._writer.name}"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "Make room on this disk and start the server again"
        else:
            advice = "Check this disk (the system's log says more), then start the server again or replace it"
        return (
            f"journal: {path} cannot be written: {type(error).__name__}: {error}. The server stops, since what the "
            f"disk has is unknown now; nothing that was acknowledged is lost. {advice}"
        )

    def close(self) -> None:
        """Blocks until all is on the disk (unless the disk has failed) and gives the file back. Not on the loop."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            for job in list(self._jobs):  # what the lane has not done yet, or not reported
                job.run()
            if not self._failed and (self._buffer or self._noted is None or self._noted[0] != self._commit):
                offset = self._tail - sum(map(len, self._buffer))
                note = encode_frame(_COMMIT.pack(COMMIT, self._commit, offset), self._tail, self._salt)
                data = b"".join([*self._buffer, note])
                writer.write(offset, data)
                self.place = (self._segments[-1].number, offset + len(data))
        except Exception:  # nobody was told that this is on the disk
            self._failed = True
        self._buffer.clear()
        writer.close()

    def _destroy(self) -> None:
        """The core's name for it; the owner calls `close`."""


def _beginning(header: Header, term: int, vote: str | None, commit_index: int, base: int) -> bytes:
    """The first records of a segment."""
    data = b""
    for body in (
        _META.pack(META, term) + (vote or "").encode(),
        _COMMIT.pack(COMMIT, commit_index, HEADER_BYTES),
        _INDEX.pack(BASE, base),
    ):
        data += encode_frame(body, HEADER_BYTES + len(data), header.salt)
    return data
