"""Files that are whole and on the disk, or as they were: how everything below a data directory is written."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` by a file of `mode` that is on the disk, whole, when this returns; or leave it as it was."""
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(name, path)
    except BaseException:
        remove(name)
        raise
    sync_directory(path.parent)


def write_if_changed(path: Path, data: bytes, *, mode: int = 0o600) -> bool:
    """`write_durably` unless `path` holds `data` already. True when it was written."""
    try:
        if path.read_bytes() == data:
            return False
    except FileNotFoundError:
        pass
    write_durably(path, data, mode=mode)
    return True


def sync_directory(path: Path) -> None:
    """Make names in `path` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_once(path: Path, data: bytes) -> None:
    """Make `path` with `data` and mode 0600 in one step; whoever comes second leaves the first one's."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.link(name, path)
    except FileExistsError:
        pass
    finally:
        remove(name)
    sync_directory(path.parent)


def remove(name: str) -> None:
    try:
        os.unlink(name)
    except OSError:
        pass


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """One process at a time: the agent and the core of a host open the same identity at first start."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
