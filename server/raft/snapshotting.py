"""Snapshots at work: taken here, sent to followers that lack more than the log has, received and installed.

Three flows that share the disk's SNAPSHOT lane and one rule: nothing holds the loop. Taking: each table is copied while
apply is held (rows never change), then packed and written in slices. Sending: one piece is on its way per follower, the
next leaves when it was acknowledged; a follower says where it wants to go on. Installing: the file is complete and
verified on the disk first, then it is loaded in slices, and one short step swaps log, indexes, members and state.
H3 H9 H22: the core's own snapshots do none of this safely. Called by RaftLog on its loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from rostra.runtime import log as logging
from rostra.server.raft.core import Core
from rostra.server.raft.disk import SNAPSHOT, Disk, Done
from rostra.server.raft.guard import BrokenInvariant
from rostra.server.raft.journal import DamagedJournal, Journal
from rostra.server.raft.membership import Membership
from rostra.server.raft.messages import Message
from rostra.server.raft.replication import Replication
from rostra.server.raft.snapshots import (
    Incoming,
    Snapshot,
    SnapshotFile,
    SnapshotWriter,
    chunks,
    newest,
    remove_older,
)
from rostra.wire.errors import Conflict

log = logging.get("raft")

#: What may wait for the disk while a snapshot is written.
BACKLOG_BYTES_MAX = 8 << 20
#: So many entries leave the log's memory in one step of the loop.
TRIM_ENTRIES = 8192
#: Chunks of a snapshot that are read ahead while one is being loaded.
LOAD_CHUNKS = 4
#: A snapshot that could not be written (a full disk) is tried again after this long.
RETRY_S = 5.0
#: A log that is full for longer than this is worth a line: under load it fills up and is shortened all the time.
FULL_NOTICE_S = 1.0
#: A follower that says nothing about its snapshot is asked after this long.
ASK_AGAIN_S = 5.0


class StateLoader(Protocol):
    def feed(self, chunk: bytes) -> None:
        """The next chunk. Raises ValueError for what is not one."""

    def finish(self) -> Callable[[], None]:
        """A short step that puts the loaded state in the place of the present one. Raises ValueError."""


class StateMachine(Protocol):
    """What the log drives."""

    def apply(self, entries: Sequence[bytes]) -> list[Any]:
        """Called with proposals in log order, on every server and again on restart; one result for each."""

    def capture(self) -> Iterator[bytes | None]:
        """The state as of the first step, in chunks. None: still copying; apply nothing until a chunk comes."""

    def loader(self) -> StateLoader: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of log and snapshots in bytes. A snapshot is due after `snapshot_log_bytes` of applied entries; the
    log in memory holds at most `log_bytes_max`, at which writes wait for the snapshot that makes room."""

    segment_bytes: int = 16 << 20
    snapshot_log_bytes: int = 24 << 20
    log_bytes_max: int = 64 << 20
    chunk_bytes: int = 256 << 10


@dataclass(slots=True)
class _Sending:
    """A snapshot on its way to one follower."""

    snapshot: Snapshot
    file: SnapshotFile
    spoke_s: float
    is_reading: bool = False
    offset: int = 0


class Snapshots:
    """`send(peer_id, message)` queues; `schedule()` asks for another turn of the log; `is_idle()` says that no entry
    is applied in part; `installed(index)` is told after a swap."""

    def __init__(
        self,
        disk: Disk | None,
        *,
        journal: Journal,
        membership: Membership,
        state: StateMachine,
        cluster_id: str,
        node_id: str,
        limits: Limits,
        send: Callable[[str, Message], None],
        schedule: Callable[[], None],
        is_idle: Callable[[], bool],
        installed: Callable[[int], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._disk, self._journal, self._membership, self._state = disk, journal, membership, state
        self._cluster_id, self._node_id, self._limits = cluster_id, node_id, limits
        self._send, self._schedule, self._is_idle = send, schedule, is_idle
        self._installed, self._failed = installed, failed
        self._core: Core
        self._replication: Replication
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.newest: Snapshot | None = None
        #: While true nothing may be applied: the tables are being copied, or replaced.
        self.holds_apply = False
        self._taking: asyncio.Future[Snapshot | None] | None = None
        self._is_taking = False
        self._applied_bytes = self._taken_bytes = 0  # of log entries since the newest snapshot; up to the one in work
        self._retry_s = 0.0
        self._had_room_s, self._told_full = self._loop.time(), False
        self._full = logging.RateLimited(log, 60.0, now=self._loop.time)
        self._sending: dict[str, _Sending] = {}
        self._incoming: Incoming | None = None
        self._is_writing = False
        self._installing = False
        self.taken = self.sent = self.received = 0

    # -- at the start

    async def restore(self) -> None:
        """Load the newest snapshot and bring the journal in line with it. Raises DamagedJournal."""
        if self._disk is None:
            return
        disk, journal = self._disk, self._journal
        found, problems = await self._in_lane(lambda: newest(disk, self._cluster_id))
        for problem in problems:
            log.err("a snapshot cannot be used", problem=problem)
        first = journal.first_index if len(journal) else 1
        if found is None or found.index < first:
            if first > 1:
                raise DamagedJournal(
                    f"{disk.path}: the log begins at entry {first} and the snapshot before it is missing or damaged"
                    f"{': ' + '; '.join(problems) if problems else ''}. Nothing was changed. Restore the directory, or"
                    " replace this server: remove it from the cluster and start it again with an empty data directory"
                )
            return
        try:
            loader = self._state.loader()
            await self._load(found, loader)
            loader.finish()()
        except ValueError as e:
            raise DamagedJournal(
                f"{disk.path}/{found.name} cannot be read by this release: {e}. Nothing was changed. Start the release"
                " that wrote it, or replace this server: remove it from the cluster and start it again with an empty"
                " data directory"
            ) from None
        if not len(journal) or journal.term_at(found.index) != found.term:
            # H3: only now is the log's tail of no use: it is shorter than the snapshot or another leader's.
            journal.reset_to(found.index, found.term)
        if journal.getCurrentTerm() < found.term:  # the power went after the file was in place, before the term was
            journal.setCurrentTerm(found.term, None)
        self._adopt(found)

    def attach(self, core: Core, replication: Replication) -> None:
        self._core, self._replication = core, replication
        if self.newest is not None:
            core.set_applied_index(self.newest.index)
            if core.commit_index() < self.newest.index:
                core.set_commit_index(self.newest.index)
            self._start(self._trim())  # the process may have ended between a snapshot and that

    def _adopt(self, snapshot: Snapshot) -> None:
        self.newest = snapshot
        self._applied_bytes = 0
        tail = [self._journal.entry(i) for i in range(snapshot.index + 1, self._journal.last_index + 1)]
        self._membership.replaced(snapshot.members_index, snapshot.members, tail)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.stop_sending()
        if self._taking is not None and not self._taking.done():
            self._taking.cancel()

    # -- taking

    def note_applied(self, log_bytes: int) -> None:
        self._applied_bytes += log_bytes

    @property
    def has_room(self) -> bool:
        """Whether the log may grow. The entry at its beginning cannot be dropped, however large it is."""
        journal = self._journal
        kept = journal.log_bytes - journal.cost(journal.first_index)
        return kept < self._limits.log_bytes_max or self._keeps_all

    @property
    def _keeps_all(self) -> bool:
        """Several servers without disks (a test, a benchmark): the log is all that a follower can catch up from."""
        return self._disk is None and bool(self._replication.followers)

    def take_if_due(self) -> None:
        limits = self._limits
        if self._taking is not None or self._applied_bytes == 0 or self._keeps_all:
            return
        is_due = self._applied_bytes >= limits.snapshot_log_bytes or self._journal.log_bytes >= limits.log_bytes_max
        if is_due and self._loop.time() >= self._retry_s:
            self.take()

    def take(self) -> asyncio.Future[Snapshot | None]:
        """A snapshot of what is applied now; None where it could not be written. Shared while one is being taken."""
        if self._taking is None:
            self._taking = self._loop.create_future()
            self._start(self._take(self._taking))
        return self._taking

    async def _take(self, outcome: asyncio.Future[Snapshot | None]) -> None:
        snapshot: Snapshot | None = None
        try:
            while not self._is_idle() or self._installing:
                await asyncio.sleep(0.001)
            self._is_taking = True
            snapshot = await (self._take_file() if self._disk is not None else self._take_nothing())
        except OSError as e:
            log.err(
                "no snapshot could be written: when the log has grown to its bound, this server takes no more writes",
                error=str(e),
                log_bytes=self._journal.log_bytes,
                bound=self._limits.log_bytes_max,
            )
            self._retry_s = self._loop.time() + RETRY_S
            self._applied_bytes += self._taken_bytes  # else a log that is full would wait for news that cannot come
        finally:
            self.holds_apply = self._is_taking = False
            self._taking = None
            if not outcome.done():
                outcome.set_result(snapshot)
            self._schedule()
        await self._trim()

    async def _take_nothing(self) -> None:
        """Without a disk there is nothing to come back to, and alone there is nobody who could lack an entry."""
        self._applied_bytes = 0

    async def _take_file(self) -> Snapshot:
        assert self._disk is not None
        core, journal = self._core, self._journal
        index = core.applied_index()
        term = journal.term_at(index)
        members_index, members = self._membership.at(index)
        if term is None:
            raise BrokenInvariant(f"applied entry {index} is not in the log")
        self._taken_bytes, self._applied_bytes = self._applied_bytes, 0
        self.holds_apply = True
        capture = self._state.capture()
        first: bytes | None = None
        for chunk in capture:
            if chunk is not None:
                first = chunk
                break
            await asyncio.sleep(0)
        self.holds_apply = False
        self._schedule()
        writer = SnapshotWriter(
            self._disk,
            cluster_id=self._cluster_id,
            node_id=self._node_id,
            index=index,
            term=term,
            members=members,
            members_index=members_index,
        )
        finished: asyncio.Future[Snapshot] = self._loop.create_future()
        try:
            for chunk in itertools.chain((first,), capture):
                if chunk is not None:
                    writer.add(chunk)
                await asyncio.sleep(0)
                while writer.backlog_bytes > BACKLOG_BYTES_MAX:
                    await asyncio.sleep(0.002)
        except BaseException:
            writer.abandon()
            raise
        writer.finish(lambda result, error: _settle(finished, result, error))
        snapshot = await finished
        if self.newest is None or self.newest.index <= snapshot.index:
            self.newest = snapshot
            self._membership.forget_before(snapshot.index)
        disk, keep = self._disk, self.newest
        await self._in_lane(lambda: remove_older(disk, keep))
        self.taken += 1
        log.debug("snapshot taken", index=index, bytes=snapshot.size)
        return snapshot

    async def _trim(self) -> None:
        """Drop what the log in memory need not hold: all but a trailing part for followers that lag a little."""
        journal, core = self._journal, self._core
        kept = self._limits.log_bytes_max // 3
        while journal.log_bytes > kept:
            floor = core.applied_index() if self._disk is None else self.newest.index if self.newest else 0
            if journal.log_bytes < self._limits.log_bytes_max:
                for sending in self._sending.values():  # they go on from there
                    floor = min(floor, sending.snapshot.index)
            first = journal.first_index
            base, size = first, journal.log_bytes
            while base < min(floor, first + TRIM_ENTRIES) and size > kept:
                size -= journal.cost(base)
                base += 1
            if base == first:
                return
            journal.set_base(base)
            await asyncio.sleep(0)

    # -- sending

    def send_to(self, peer_id: str) -> None:
        """Leader: `peer_id` lacks entries that the log does not have any more."""
        if self._disk is None or self.newest is None:
            raise BrokenInvariant(f"the log begins at {self._journal.first_index} and there is no snapshot to send")
        follower = self._replication.followers[peer_id]
        snapshot = self.newest
        follower.streaming = snapshot.id
        self._drop_sending(peer_id)
        self._start(self._begin_sending(peer_id, snapshot))

    async def _begin_sending(self, peer_id: str, snapshot: Snapshot) -> None:
        disk = self._disk
        assert disk is not None
        try:
            file = await self._in_lane(lambda: SnapshotFile(disk, snapshot))
        except OSError as e:  # a newer one has taken its place
            log.debug("snapshot is gone before it was sent", error=str(e))
            self._stop_waiting(peer_id, snapshot.id)
            return
        follower = self._replication.followers.get(peer_id)
        is_wanted = follower is not None and follower.streaming == snapshot.id and self._core.is_leader()
        if not is_wanted or peer_id in self._sending:
            self._close(file)
            return
        self._sending[peer_id] = _Sending(snapshot, file, self._loop.time())
        log.info("sending a snapshot", to=peer_id, index=snapshot.index, bytes=snapshot.size)
        self._say(peer_id, self._sending[peer_id], 0, b"")

    def _stop_waiting(self, peer_id: str, snapshot_id: str) -> None:
        follower = self._replication.followers.get(peer_id)
        if follower is not None and follower.streaming == snapshot_id:
            follower.streaming = ""

    def _say(self, peer_id: str, sending: _Sending, offset: int, data: bytes) -> None:
        snapshot = sending.snapshot
        sending.spoke_s = self._loop.time()
        self._send(
            peer_id,
            {
                "type": "snapshot",
                "term": self._core.term(),
                "r": self._replication.round,
                "id": snapshot.id,
                "index": snapshot.index,
                "snap_term": snapshot.term,
                "size": snapshot.size,
                "offset": offset,
                "data": data,
            },
        )
        self._schedule()

    def on_answer(self, peer_id: str, message: Message) -> None:
        """Leader: what a follower says about the snapshot that it is sent."""
        sending = self._sending.get(peer_id)
        if sending is None or sending.snapshot.id != message["id"]:
            return
        if message["done"]:
            self._drop_sending(peer_id)
            self.sent += 1
            self._replication.has_snapshot(peer_id, message["index"])
            self._schedule()
            return
        offset, size = message["offset"], sending.snapshot.size
        if sending.is_reading or offset >= size:
            return
        if offset == 0 and sending.offset + self._limits.chunk_bytes >= size > self._limits.chunk_bytes:
            log.err("a follower found a snapshot damaged, taking another", to=peer_id, snapshot=sending.snapshot.name)
            self._drop_sending(peer_id)
            self._stop_waiting(peer_id, sending.snapshot.id)
            self.take()
            return
        sending.is_reading, sending.offset = True, offset
        count = min(self._limits.chunk_bytes, size - offset)

        def read(data: bytes | None, error: Exception | None) -> None:
            sending.is_reading = False
            if self._sending.get(peer_id) is not sending:
                self._close(sending.file)
            elif error is not None or not data:
                log.warn("a snapshot cannot be read, trying another", to=peer_id, error=str(error))
                self._drop_sending(peer_id)
                self._stop_waiting(peer_id, sending.snapshot.id)
            elif self._core.is_leader():
                self._say(peer_id, sending, offset, data)

        assert self._disk is not None
        self._disk.submit(SNAPSHOT, lambda: sending.file.read(offset, count), self._or_fail(read))

    def stop_sending(self, peer_id: str = "") -> None:
        """The link to `peer_id` is lost; without one: leadership is over."""
        for each in [peer_id] if peer_id else list(self._sending):
            self._drop_sending(each)

    def _drop_sending(self, peer_id: str) -> None:
        sending = self._sending.pop(peer_id, None)
        if sending is not None and not sending.is_reading:
            self._close(sending.file)

    def _close(self, file: SnapshotFile) -> None:
        """In the lane: the last one to close a file that was removed frees its blocks, which takes its time."""
        assert self._disk is not None
        self._disk.submit(SNAPSHOT, file.close, lambda _result, _error: None)

    def check(self) -> None:
        """On a timer: is the log full; and a follower that has said nothing for long is asked again."""
        now = self._loop.time()
        self._watch_room(now)
        for peer_id, sending in self._sending.items():
            if now - sending.spoke_s > ASK_AGAIN_S and not sending.is_reading:
                self._say(peer_id, sending, 0, b"")

    def _watch_room(self, now: float) -> None:
        if self.has_room:
            if self._told_full:
                log.warn("the log has room again", seconds=round(now - self._had_room_s, 1))
            self._had_room_s, self._told_full = now, False
        elif now - self._had_room_s > FULL_NOTICE_S and not self._told_full:
            self._told_full = self._full.err(
                "the log is full: it takes nothing more before a snapshot of what is applied has made room",
                applied=self._core.applied_index(),
                last=self._journal.last_index,
                log_bytes=self._journal.log_bytes,
                bound=self._limits.log_bytes_max,
            )

    def progress(self, peer_id: str) -> float | None:
        """Between 0 and 1 while `peer_id` is sent a snapshot."""
        sending = self._sending.get(peer_id)
        return None if sending is None else sending.offset / max(1, sending.snapshot.size)

    # -- receiving

    def on_piece(self, peer_id: str, message: Message) -> None:
        """Follower: a piece of the leader's snapshot, or its question how far we are."""
        assert self._disk is not None
        if message["index"] <= self._core.commit_index():  # we have all of that, by the log or from before
            self._answer(message, message["size"], done=True)
            return
        if self._installing or self._is_writing:
            return
        incoming = self._incoming
        if incoming is None or incoming.id != message["id"]:
            if incoming is not None:
                incoming.abandon()
            try:
                incoming = self._incoming = Incoming(
                    self._disk,
                    self._cluster_id,
                    message["id"],
                    message["index"],
                    message["snap_term"],
                    message["size"],
                )
            except OSError as e:
                self._incoming = None
                log.err("a snapshot from the leader cannot be kept, this server stays behind", error=str(e))
                return
        if incoming.offset >= incoming.size:
            self._finish(incoming, message)
        elif message["data"] and message["offset"] == incoming.offset:
            self._is_writing = True

            def written(_: Any, error: Exception | None) -> None:
                self._is_writing = False
                if self._incoming is not incoming:
                    return
                if error is not None:
                    self._give_up(incoming, f"cannot be written: {error}")
                elif incoming.offset >= incoming.size:
                    self._finish(incoming, message)
                else:
                    self._answer(message, incoming.offset)

            incoming.write(message["offset"], message["data"], self._or_fail(written))
        else:
            self._answer(message, incoming.offset)

    def _finish(self, incoming: Incoming, message: Message) -> None:
        self._installing = True

        def verified(snapshot: Snapshot | None, error: Exception | None) -> None:
            self._incoming = None
            if snapshot is None:
                self._installing = False  # the leader asks in a while, and hears that it has to begin again
                log.warn("a received snapshot is not what was sent, it is needed again", error=str(error))
            else:
                self._start(self._install(snapshot, message))

        incoming.finish(self._or_fail(verified))

    def _give_up(self, incoming: Incoming, why: str) -> None:
        log.err("a snapshot from the leader could not be kept, this server stays behind", reason=why)
        incoming.abandon()
        self._incoming = None

    async def _install(self, snapshot: Snapshot, message: Message) -> None:
        """From the file, which is whole and durable, to the state. A crash in between finds it at the next start."""
        try:
            while self._is_taking:
                await asyncio.sleep(0.001)
            core, journal = self._core, self._journal
            if snapshot.index > core.commit_index():
                try:
                    loader = self._state.loader()
                    await self._load(snapshot, loader)
                    swap = loader.finish()
                except ValueError as e:
                    # Of a later release, most likely. The server's own log and state are as good as before.
                    log.err("a snapshot of the leader cannot be read by this release", error=str(e))
                    assert self._disk is not None
                    await self._in_lane(partial(self._disk.remove, snapshot.name))
                    return
                while not self._is_idle():
                    await asyncio.sleep(0)
                if snapshot.index > core.commit_index():
                    if journal.term_at(snapshot.index) != snapshot.term:
                        journal.reset_to(snapshot.index, snapshot.term)
                    swap()
                    core.set_commit_index(snapshot.index)
                    core.set_applied_index(snapshot.index)
                    self._adopt(snapshot)
                    self.received += 1
                    log.info("installed a snapshot of the leader", index=snapshot.index, bytes=snapshot.size)
                    self._installed(snapshot.index)
            if self.newest is None or self.newest.index < snapshot.index:
                self.newest = snapshot
            disk, keep = self._disk, self.newest
            assert disk is not None
            await self._in_lane(lambda: remove_older(disk, keep))
            await self._trim()
        finally:
            self._installing = False
        self._answer(message, snapshot.size, done=True)

    async def _load(self, snapshot: Snapshot, loader: StateLoader) -> None:
        disk = self._disk
        assert disk is not None
        pieces = chunks(disk, snapshot)
        while block := await self._in_lane(lambda: list(itertools.islice(pieces, LOAD_CHUNKS))):
            for chunk in block:
                loader.feed(chunk)
                await asyncio.sleep(0)

    def _answer(self, message: Message, offset: int, *, done: bool = False) -> None:
        """To whoever leads now: it knows the snapshot by its id, or has no use for the answer."""
        leader_id = self._core.leader_id()
        if leader_id is None or self._core.is_leader():
            return
        self._send(
            leader_id,
            {
                "type": "snapshot_answer",
                "term": self._core.term(),
                "r": message["r"] if message["term"] == self._core.term() else 0,
                "id": message["id"],
                "index": message["index"],
                "offset": offset,
                "done": done,
            },
        )
        self._schedule()

    # -- work beside the loop

    async def _in_lane(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, done in the SNAPSHOT lane. Raises what it raises."""
        assert self._disk is not None
        future: asyncio.Future[Any] = self._loop.create_future()
        self._disk.submit(SNAPSHOT, work, lambda result, error: _settle(future, result, error))
        return await future

    def _or_fail(self, done: Done) -> Done:
        """H8: what goes wrong in a callback of the disk ends the process, as anywhere else in here."""

        def run(result: Any, error: Exception | None) -> None:
            try:
                done(result, error)
            except Exception as e:
                self._failed(e)

        return run

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(error if isinstance(error, Exception) else Conflict(repr(error)))


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
