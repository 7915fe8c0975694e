"""A virtual disk: what was synced survives a power cut, what was only written survives in any part, or not at all.

Two levels. The *content* is what a running machine sees: all that was written. The *durable* state is what is there
after a power cut: synced data for certain, and of the writes, renames and removals since then an arbitrary subset, the
writes torn by page or byte. A killed process loses nothing that it has written, but that is still not durable: a later
power cut may take it. Work in a lane takes time, and a crash meanwhile cuts it between or inside its steps.
"""

from __future__ import annotations

import errno
import os
import random
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.world import Handle, Loop, World

PAGE = 4096
#: The lane of everything that the loop's default executor is given.
EXECUTOR = "executor"


class _Inode:
    __slots__ = ("content", "durable", "pending")

    def __init__(self) -> None:
        self.content = bytearray()
        self.durable = bytearray()
        #: since the last sync: (offset, data), or (size, None) for a truncation
        self.pending: list[tuple[int, bytes | None]] = []

    def settle(self) -> None:
        """All that is pending is on the disk."""
        for change in self.pending:
            _apply(self.durable, change)
        self.pending.clear()

    def rebuild(self) -> None:
        self.content = bytearray(self.durable)
        for change in self.pending:
            _apply(self.content, change)


def _apply(data: bytearray, change: tuple[int, bytes | None]) -> None:
    at, written = change
    if written is None:
        if at < len(data):
            del data[at:]
        else:
            data.extend(bytes(at - len(data)))
        return
    if at > len(data):
        data.extend(bytes(at - len(data)))
    data[at : at + len(written)] = written


class _Job:
    """Work of one lane, at it."""

    __slots__ = ("ends", "seconds", "steps")

    def __init__(self) -> None:
        #: what it does to the disk, in order: (function, arguments)
        self.steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.seconds = 0.0
        self.ends: Handle | None = None


class VirtualDisk:
    """One machine's directory, whichever process has it open."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self.name = world, name
        self.chance = random.Random(world.chance.getrandbits(48))
        self._names: dict[str, _Inode] = {}
        self._durable_names: dict[str, _Inode] = {}
        #: since the last sync of the directory: (name, what it names then or None); a rename is two at once
        self._moved: list[tuple[tuple[str, _Inode | None], ...]] = []
        self._jobs: dict[str, _Job] = {}
        self._queues: dict[str, deque[tuple[Callable[[], Any], Callable[..., None]]]] = {}
        self._working: _Job | None = None
        self.sync_s = (0.00008, 0.0006)  # from, to
        self.next_sync_s = 0.0  # a stall: the next sync takes this long
        self.fails: int | None = None  # errno of the next write or sync
        self.failed: Callable[[], None] = lambda: None
        self.is_full = False
        #: Called once, while the next sync is under way.
        self.when_syncing: Callable[[], None] | None = None
        self.syncs = self.torn = self.files = 0

    # -- the machine

    def process_died(self) -> None:
        """Lanes end between two steps; what was written stays in memory."""
        self._cut_jobs()
        self._rebuild()

    def power_cut(self) -> None:
        """What was not synced survives in part."""
        self._cut_jobs()
        chance = self.chance
        mood = chance.random()
        inodes = {id(i): i for i in [*self._names.values(), *self._durable_names.values()]}
        for moved in self._moved:
            if mood < 0.3 or (mood < 0.7 and chance.random() < 0.5):
                for _, inode in moved:
                    if inode is not None:
                        inodes[id(inode)] = inode
                self._move(self._durable_names, moved)
            elif mood > 0.85:
                break  # a journalling filesystem keeps the order
        self._moved.clear()
        for inode in inodes.values():
            if not inode.pending:
                continue
            self.torn += 1
            kept = chance.random()
            for change in inode.pending:
                if kept < 0.25:
                    continue
                if kept > 0.8 or chance.random() < 0.5:
                    _apply(inode.durable, change)
                elif change[1] is not None:
                    for piece in self._torn(change[0], change[1]):
                        _apply(inode.durable, piece)
                elif chance.random() < 0.5:
                    _apply(inode.durable, change)
                if 0.25 <= kept < 0.4 and chance.random() < 0.3:
                    break  # nothing after it
            inode.pending.clear()
        self._rebuild()

    def _torn(self, offset: int, data: bytes) -> list[tuple[int, bytes]]:
        chance = self.chance
        if chance.random() < 0.5:
            return [(offset, data[: chance.randrange(len(data) + 1)])]
        pieces = []
        at = offset
        while at < offset + len(data):
            end = min((at // PAGE + 1) * PAGE, offset + len(data))
            if chance.random() < 0.5:
                pieces.append((at, data[at - offset : end - offset]))
            at = end
        return pieces

    def _cut_jobs(self) -> None:
        for job in self._jobs.values():
            if job.ends is not None:
                job.ends.cancel()
            done = self.chance.randrange(len(job.steps) + 1)
            for step, arguments in job.steps[:done]:
                step(*arguments)
            if done < len(job.steps):
                step, arguments = job.steps[done]
                if step is _write:  # in the middle of it
                    inode, (offset, data) = arguments
                    _write(inode, (offset, data[: self.chance.randrange(len(data) + 1)]))
        self._jobs.clear()
        self._queues.clear()
        self._working = None

    def _rebuild(self) -> None:
        names = dict(self._durable_names)
        for moved in self._moved:
            self._move(names, moved)
        self._names = names
        for inode in names.values():
            inode.rebuild()

    def _lose(self, inode: _Inode) -> None:
        """A sync has failed: the system has forgotten which pages were to be written, and some were not."""
        for change in inode.pending:
            if self.chance.random() < 0.5:
                _apply(inode.durable, change)
        inode.pending.clear()

    def copy(self) -> dict[str, bytes]:
        """All files, as a backup has them."""
        return {name: bytes(inode.content) for name, inode in self._names.items()}

    def put(self, files: dict[str, bytes]) -> None:
        """These files instead of what is there; no process is at it."""
        self.wipe()
        for name, data in files.items():
            inode = self._names[name] = self._durable_names[name] = _Inode()
            inode.content, inode.durable = bytearray(data), bytearray(data)

    def wipe(self) -> None:
        """Somebody has put another disk in."""
        self._cut_jobs()
        self._names.clear()
        self._durable_names.clear()
        self._moved.clear()

    # -- steps: now on the loop, or for later in a lane

    def _step(self, function: Callable[..., None], *arguments: Any) -> None:
        if self._working is not None:
            self._working.steps.append((function, arguments))
        else:
            function(*arguments)

    @staticmethod
    def _move(names: dict[str, _Inode], moved: tuple[tuple[str, _Inode | None], ...]) -> None:
        for name, inode in moved:
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode

    def _note_move(self, *moved: tuple[str, _Inode | None]) -> None:
        self._move(self._names, moved)
        self._step(self._moved.append, moved)

    def _settle_names(self) -> None:
        for moved in self._moved:
            self._move(self._durable_names, moved)
        self._moved.clear()

    def _check(self, grows: bool) -> None:
        if self.fails is not None:
            number, self.fails = self.fails, None
            self.failed()
            raise OSError(number, os.strerror(number))
        if grows and self.is_full:
            self.failed()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sync_takes(self) -> None:
        self.syncs += 1
        seconds, self.next_sync_s = self.next_sync_s, 0.0
        low, high = self.sync_s
        if self._working is not None:
            self._working.seconds += seconds or low + (high - low) * self.chance.random() ** 3
        else:
            self._world.violated("sync on the loop", f"{self.name} syncs a file without a lane")

    # -- lanes

    def submit(self, loop: Loop, lane: str, work: Callable[[], Any], done: Callable[..., None]) -> None:
        if loop.is_dead:
            return
        queue = self._queues.setdefault(lane, deque())
        queue.append((work, done))
        if lane not in self._jobs:
            self._begin(loop, lane)

    def _begin(self, loop: Loop, lane: str) -> None:
        work, done = self._queues[lane].popleft()
        job = self._jobs[lane] = _Job()
        # The thread wakes up a moment later; what it sees and does is of that moment.
        job.ends = self._world.at(self._world.now + 0.00002, self._work, loop, lane, job, work, done)

    def _work(self, loop: Loop, lane: str, job: _Job, work: Callable[[], Any], done: Callable[..., None]) -> None:
        if lane == EXECUTOR and len(self._jobs) > 1:
            # What opens or closes a file waits for those who are at it, by a lock of theirs.
            job.ends = self._world.after(0.0001, self._work, loop, lane, job, work, done)
            return
        self._working = job
        self._world.leave()  # a thread has no loop
        outcome: tuple[Any, Exception | None]
        try:
            outcome = (work(), None)
        except Exception as e:
            outcome = (None, e)
        finally:
            self._working = None
        if self.when_syncing is not None and job.seconds > 0.0:
            self._world.after(job.seconds * self.chance.random(), self.when_syncing)
            self.when_syncing = None
        when = self._world.now + job.seconds + 0.00003
        job.ends = self._world.at(when, self._end, loop, lane, job, done, outcome)

    def _end(
        self, loop: Loop, lane: str, job: _Job, done: Callable[..., None], outcome: tuple[Any, Exception | None]
    ) -> None:
        for step, arguments in job.steps:
            step(*arguments)
        del self._jobs[lane]
        if self._queues[lane]:
            self._begin(loop, lane)
        loop.run_now(done, *outcome)


def _write(inode: _Inode, change: tuple[int, bytes | None]) -> None:
    inode.pending.append(change)


def _settle(inode: _Inode) -> None:
    inode.settle()


class OpenDisk:
    """The disk as one process has it open: `rostra.server.raft.disk.Disk`."""

    def __init__(self, disk: VirtualDisk, loop: Loop) -> None:
        self._disk, self._loop = disk, loop
        self.path = f"/{disk.name}"

    def names(self) -> list[str]:
        return sorted(self._disk._names)

    def open(self, name: str, *, read_only: bool = False) -> OpenFile:
        inode = self._disk._names.get(name)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return OpenFile(self, inode, read_only)

    def start(self, name: str) -> OpenFile:
        self._disk._check(grows=True)
        inode = _Inode()
        self._disk._note_move((name, inode))
        return OpenFile(self, inode, read_only=False)

    def create(self, name: str, data: bytes) -> OpenFile:
        self._disk.files += 1
        file = self.start(name + ".new")
        file.write(0, data)
        file.sync()
        self.rename(name + ".new", name)
        return file

    def rename(self, old: str, new: str) -> None:
        inode = self._disk._names.get(old)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), old)
        self._disk._note_move((old, None), (new, inode))
        self.sync_directory()

    def remove(self, name: str) -> None:
        if name in self._disk._names:
            self._disk._note_move((name, None))

    def sync_directory(self) -> None:
        self._disk._sync_takes()
        self._disk._step(self._disk._settle_names)

    def submit(self, lane: str, work: Callable[[], Any], done: Callable[..., None]) -> None:
        self._disk.submit(self._loop, lane, work, done)

    def close(self) -> None:
        pass


class OpenFile:
    """`rostra.server.raft.disk.File`."""

    def __init__(self, disk: OpenDisk, inode: _Inode, read_only: bool) -> None:
        self._open_disk, self._disk, self._inode, self._read_only = disk, disk._disk, inode, read_only

    @property
    def size(self) -> int:
        return len(self._inode.content)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._inode.content[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        if self._open_disk._loop.is_dead:
            return
        self._must_write()
        inode, change = self._inode, (offset, bytes(data))
        self._disk._check(grows=offset + len(data) > len(inode.content))
        _apply(inode.content, change)
        self._disk._step(_write, inode, change)

    def sync(self) -> None:
        if self._open_disk._loop.is_dead:
            return
        disk = self._disk
        try:
            disk._check(grows=False)
        except OSError:
            disk._step(disk._lose, self._inode)
            raise
        disk._sync_takes()
        disk._step(_settle, self._inode)

    def truncate(self, size: int) -> None:
        if self._open_disk._loop.is_dead:
            return
        self._must_write()
        change = (size, None)
        _apply(self._inode.content, change)
        self._disk._step(_write, self._inode, change)

    def close(self) -> None:
        pass

    def _must_write(self) -> None:
        if self._read_only:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
