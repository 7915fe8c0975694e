"""A directory in memory that records what is done to it, so that a test can cut the power after any part of that.

`content` is what the running machine sees. After a power cut only what was synced is there for certain; of the rest,
any part may be. A process that is killed loses nothing that it has written, but that is still not durable.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

PAGE = 64  # torn writes end at any byte or leave out pages of this size


@dataclass(eq=False)
class Inode:
    content: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: truncated to that size

    def change(self, at: int, data: bytes | None) -> None:
        _put(self.content, at, data)
        self.pending.append((at, data))

    def settle(self) -> None:
        for at, data in self.pending:
            _put(self.durable, at, data)
        self.pending.clear()


def _put(image: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del image[at:]
        image.extend(bytes(at - len(image)))
        return
    if at > len(image):
        image.extend(bytes(at - len(image)))
    image[at : at + len(data)] = data


#: What is done: ("write", inode, offset, data), ("truncate", inode, size), ("sync", inode), ("name", name, inode),
#: ("rename", old, new), ("remove", name), ("directory",).
Step = tuple[Any, ...]


class RecordedDisk:
    """`rostra.server.raft.disk.Disk`. Work in lanes is done at once, or with `is_held` when `run` is called."""

    def __init__(self, path: str = "/disk") -> None:
        self.path = path
        self.names_now: dict[str, Inode] = {}
        self.names_durable: dict[str, Inode] = {}
        self._moves: list[dict[str, Inode | None]] = []
        self.steps: list[Step] = []
        self.is_held = False
        self.held: list[tuple[str, Callable[[], Any], Callable[..., None]]] = []
        #: Raised by the next write, sync or creation that it is asked about.
        self.fails: Callable[[Step], OSError | None] = lambda _step: None
        self.read_only = False
        self._before: list[tuple[str, Inode, bytes]] = []

    # -- the protocol

    def names(self) -> list[str]:
        return sorted(self.names_now)

    def open(self, name: str, *, read_only: bool = False) -> RecordedFile:
        if name not in self.names_now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return RecordedFile(self, self.names_now[name], read_only)

    def start(self, name: str) -> RecordedFile:
        inode = Inode()
        self.do(("name", name, inode))
        return RecordedFile(self, inode, False)

    def create(self, name: str, data: bytes) -> RecordedFile:
        file = self.start(name + ".new")
        file.write(0, data)
        file.sync()
        self.rename(name + ".new", name)
        return file

    def rename(self, old: str, new: str) -> None:
        self.do(("rename", old, new))
        self.sync_directory()

    def remove(self, name: str) -> None:
        if name in self.names_now:
            self.do(("remove", name))

    def sync_directory(self) -> None:
        self.do(("directory",))

    def submit(self, lane: str, work: Callable[[], Any], done: Callable[..., None]) -> None:
        self.held.append((lane, work, done))
        if not self.is_held:
            self.run()

    def close(self) -> None:
        pass

    # -- for tests

    def run(self, count: int = 1 << 30) -> None:
        """Do held work, as the lanes would."""
        while self.held and count > 0:
            _, work, done = self.held.pop(0)
            count -= 1
            try:
                outcome = (work(), None)
            except Exception as e:
                done(None, e)
            else:
                done(*outcome)

    def do(self, step: Step) -> None:
        assert not self.read_only, f"{step[0]} on a disk that is only to be read"
        error = self.fails(step)
        if error is not None:
            if step[0] == "sync":  # the system forgets what was to be written, and shows it nevertheless
                step[1].pending.clear()
            raise error
        self.steps.append(step)
        match step:
            case ("write", inode, offset, data):
                inode.change(offset, data)
            case ("truncate", inode, size):
                inode.change(size, None)
            case ("sync", inode):
                inode.settle()
            case ("name", name, inode):
                self._move({name: inode})
            case ("rename", old, new):
                self._move({old: None, new: self.names_now[old]})
            case ("remove", name):
                self._move({name: None})
            case ("directory",):
                self.names_durable = dict(self.names_now)
                self._moves.clear()

    def _move(self, names: dict[str, Inode | None]) -> None:
        self._moves.append(names)
        _rename(self.names_now, names)

    def image(self, name: str) -> bytes:
        return bytes(self.names_now[name].content)

    def put(self, name: str, data: bytes) -> None:
        """A file that was always there."""
        self.names_now[name] = self.names_durable[name] = Inode(bytearray(data), bytearray(data))

    def copy(self) -> RecordedDisk:
        """What is there now, synced; for a test to damage."""
        disk = RecordedDisk(self.path)
        for name in self.names():
            disk.put(name, self.image(name))
        return disk

    def power_cut(self, chance: random.Random | None = None) -> RecordedDisk:
        """The disk afterwards. Without `chance`, nothing is left that was not synced."""
        disk = RecordedDisk(self.path)
        names = dict(self.names_durable)
        for move in self._moves:
            if chance is not None and chance.random() < 0.5:
                _rename(names, move)
        for name, inode in names.items():
            image = bytearray(inode.durable)
            for at, data in inode.pending if chance is not None else ():
                assert chance is not None
                if chance.random() < 0.4:
                    continue
                if data is None or chance.random() < 0.3:
                    _put(image, at, data)
                elif chance.random() < 0.5:
                    _put(image, at, data[: chance.randrange(len(data) + 1)])
                else:
                    for start in range(0, len(data), PAGE):
                        if chance.random() < 0.5:
                            _put(image, at + start, data[start : start + PAGE])
            disk.put(name, bytes(image))
        return disk

    def prefixes(self, first: int = 0, *, stride: int = 1) -> Iterator[tuple[int, RecordedDisk]]:
        """(number of whole steps done, the disk) for a stop between any two steps and inside each write."""
        for count in range(first, len(self.steps) + 1):
            cuts: list[int | None] = [None]
            if count < len(self.steps) and self.steps[count][0] == "write":
                size = len(self.steps[count][3].rstrip(b"\0"))
                cuts += sorted({1, size, *range(1, size, stride)})
            for cut in cuts:
                yield count, self._replayed(count, cut)

    def _replayed(self, count: int, cut: int | None) -> RecordedDisk:
        disk = RecordedDisk(self.path)
        inodes: dict[int, Inode] = {}
        for name, inode, image in self._before:
            inodes[id(inode)] = Inode(bytearray(image), bytearray(image))
            disk.names_now[name] = disk.names_durable[name] = inodes[id(inode)]
        steps = list(self.steps[:count])
        if cut is not None:
            _, inode, offset, data = self.steps[count]
            steps.append(("write", inode, offset, data[:cut]))
        for step in steps:
            mapped = [inodes.setdefault(id(part), Inode()) if isinstance(part, Inode) else part for part in step]
            disk.do(tuple(mapped))
        disk.steps.clear()
        return disk

    def forget_steps(self) -> None:
        """Record from here on; what is there now is taken for durable."""
        self.steps.clear()
        for inode in self.names_now.values():
            inode.settle()
        self.names_durable = dict(self.names_now)
        self._moves.clear()
        self._before = [(name, inode, bytes(inode.content)) for name, inode in self.names_now.items()]


def _rename(names: dict[str, Inode], move: dict[str, Inode | None]) -> None:
    for name, inode in move.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


class RecordedFile:
    """`rostra.server.raft.disk.File`."""

    def __init__(self, disk: RecordedDisk, inode: Inode, read_only: bool) -> None:
        self._disk, self._inode, self._read_only = disk, inode, read_only
        self.is_closed = False

    @property
    def size(self) -> int:
        return len(self._inode.content)

    def read(self, offset: int, count: int) -> bytes:
        return bytes(self._inode.content[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        self._must_write()
        self._disk.do(("write", self._inode, offset, bytes(data)))

    def sync(self) -> None:
        self._must_write()
        self._disk.do(("sync", self._inode))

    def truncate(self, size: int) -> None:
        self._must_write()
        self._disk.do(("truncate", self._inode, size))

    def close(self) -> None:
        self.is_closed = True

    def _must_write(self) -> None:
        if self._read_only or self.is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
