"""One directory on a disk, as the journal and the snapshots need it: the only door from `server/raft/` to files.

`Disk` is what is promised; `DirectoryDisk` is the real one, the simulator has another. Work that may take long (write
and sync, read a chunk) is handed to a *lane*, a thread of its own, and its outcome comes back on the loop. An error of
a sync is never retried: what was lost is unknown, so the owner has to stop the process (fsyncgate).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from rostra.wire.errors import Conflict

#: Lanes: work of one lane runs in order, one at a time. Snapshots must not hold up the journal's syncs.
JOURNAL, SNAPSHOT = "journal", "snapshot"

#: Called on the loop with (result, None) or (None, the error).
Done = Callable[[Any, Exception | None], None]


class DirectoryInUse(Conflict):
    """Another process has it open."""


class File(Protocol):
    """An open file. Methods block; offsets and sizes in bytes; OSError is passed on."""

    @property
    def size(self) -> int: ...
    def read(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes; fewer at the end of the file only."""

    def write(self, offset: int, data: bytes) -> None: ...
    def sync(self) -> None:
        """Returns when all that was written is on the disk (fdatasync)."""

    def truncate(self, size: int) -> None: ...
    def close(self) -> None: ...


class Disk(Protocol):
    """One directory. Names are plain file names."""

    #: For messages to people.
    path: str

    def names(self) -> list[str]: ...
    def open(self, name: str, *, read_only: bool = False) -> File:
        """An existing file. Raises FileNotFoundError."""

    def create(self, name: str, data: bytes) -> File:
        """A new file, there whole and durable or not at all: other name, write, sync, rename, sync of the directory."""

    def start(self, name: str) -> File:
        """An empty file at once, replacing one of that name; durable only after `sync` and `rename`."""

    def rename(self, old: str, new: str) -> None:
        """Replaces `new`; durable when it returns."""

    def remove(self, name: str) -> None:
        """Whether it survives a power cut is unknown until something else syncs the directory. Absent is fine."""

    def sync_directory(self) -> None: ...
    def submit(self, lane: str, work: Callable[[], Any], done: Done) -> None:
        """Run `work` in its lane; `done` is called on the loop (before `submit` returns, where the disk is inline)."""

    def close(self) -> None:
        """Waits for the work in progress and gives the directory back. Blocks."""


class _File:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        parts = []
        while count > 0 and (data := os.pread(self._fd, count, offset)):
            parts.append(data)
            offset, count = offset + len(data), count - len(data)
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class DirectoryDisk:
    """A real directory, made with mode 0700 if there is none; files are 0600. `lock`: nobody else may open it."""

    def __init__(self, directory: Path, *, lock: bool = True, inline: bool = False) -> None:
        self._directory = directory
        self.path = str(directory)
        self._inline = inline
        self._lanes: dict[str, _Lane] = {}
        self._lock = -1
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if lock:
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._lock)
                raise DirectoryInUse(f"{directory} is in use by another process") from None

    def names(self) -> list[str]:
        return sorted(os.listdir(self._directory))

    def open(self, name: str, *, read_only: bool = False) -> _File:
        return _File(os.open(self._directory / name, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC))

    def create(self, name: str, data: bytes) -> _File:
        file = self.start(name + ".new")
        try:
            file.write(0, data)
            file.sync()
            self.rename(name + ".new", name)
        except BaseException:
            file.close()
            raise
        return file

    def start(self, name: str) -> _File:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(self._directory / name, flags, 0o600)
        os.fchmod(fd, 0o600)
        return _File(fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(self._directory / old, self._directory / new)
        self.sync_directory()

    def remove(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)

    def sync_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def submit(self, lane: str, work: Callable[[], Any], done: Done) -> None:
        if self._inline:
            done(*_outcome(work))
            return
        thread = self._lanes.get(lane)
        if thread is None:
            thread = self._lanes[lane] = _Lane(lane)
        thread.queue.put((work, done))

    def close(self) -> None:
        for thread in self._lanes.values():
            thread.queue.put(None)
        for thread in self._lanes.values():
            thread.join()
        self._lanes.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class _Lane(threading.Thread):
    """An executor's pool and futures would cost as much as a short write: this is on the way of each batch."""

    def __init__(self, name: str) -> None:
        super().__init__(name=f"raft-{name}", daemon=True)
        self.queue: SimpleQueue[tuple[Callable[[], Any], Done] | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self.start()

    def run(self) -> None:
        while (job := self.queue.get()) is not None:
            work, done = job
            outcome = _outcome(work)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(done, *outcome)


def _outcome(work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except Exception as e:  # whatever it was: the owner decides
        return None, e
