"""The data directory of a process: nobody else uses it, this program can read its format, and its files are ours.

<data_dir>/format            which version of the directory this is
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rostra.runtime import log as _log
from rostra.runtime.files import write_durably
from rostra.wire.errors import BadRequest, Conflict

if TYPE_CHECKING:
    pass


log = _log.get("identity")

#: The version of the data directory that this program writes.
FORMAT = 1
#: Of each directory at a start; a node may have registered thousands of services.
ENTRIES_LOOKED_AT = 200


class UnusableData(Conflict):
    """No start is possible from this data directory: a person has to look at it (exit status 78)."""


class NewerFormat(UnusableData):
    """The directory was written by a newer version. Nothing in it was touched."""


class DataDirectory:
    """A data directory that this process holds the lock of. Released by `release`, `with`, or the process's end."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def lock(cls, path: str | os.PathLike[str], holder: str = "lock") -> DataDirectory:
        """Take `path` for this process; make it when absent.

        `holder`: the lock's file name. The core and the agent of one host share a directory and lock different files.
        Raises Conflict when another process holds it, BadRequest when it cannot be used.
        """
        directory = Path(path)
        _check_format(directory)  # before anything is touched
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise BadRequest(f"data directory {directory}: is not a directory") from None
        except OSError as e:
            raise BadRequest(f"data directory {directory}: cannot be made: {e.strerror}") from None
        try:
            fd = os.open(directory / holder, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except NotADirectoryError:
            raise BadRequest(f"data directory {directory}: is not a directory") from None
        except OSError as e:
            raise BadRequest(f"data directory {directory}: not writable by user {os.geteuid()}: {e.strerror}") from None
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                raise Conflict(f"data directory {directory} is in use by process {pid}") from None
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            _check_format(directory)  # again: another may have upgraded it before we had the lock
            try:
                if not (directory / "format").exists():
                    write_durably(directory / "format", json.dumps({"format": FORMAT}).encode() + b"\n")
            except OSError as e:
                raise BadRequest(f"data directory {directory}: {e.strerror}") from None
            _check_access(directory)
        except BaseException:
            os.close(fd)
            raise
        return cls(directory, fd)

    def release(self) -> None:
        """Let others have it. The lock's file stays: removing it would let two processes hold two of them."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _check_format(directory: Path) -> None:
    try:
        found = json.loads((directory / "format").read_bytes())["format"]
        newer = int(found) > FORMAT
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as e:
        raise BadRequest(f"data directory {directory}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UnusableData(
            f'{directory / "format"}: damaged; restore it, or write {{"format": {FORMAT}}} into it if this version'
            " wrote the directory"
        ) from None
    if newer:
        raise NewerFormat(
            f"data directory {directory} has format {found} of a newer Rostra; this one knows up to {FORMAT}."
            " Nothing was changed"
        )


def _check_access(directory: Path) -> None:
    """Tells of files of somebody else and of a file system that is read-only now, before they are in the way."""
    for path in (directory, *_entries(directory, 2)):
        wanted = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
        if os.access(path, wanted, effective_ids=True) or not os.path.lexists(path):
            continue
        me, about = os.geteuid(), path.lstat()
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            raise BadRequest(f"data directory {directory}: {path} is on a read-only file system")
        if about.st_uid != me:
            raise BadRequest(
                f"data directory {directory}: {path} belongs to user {about.st_uid}, not to {me} who starts this:"
                f" `chown -R {me} {directory}`, or start it as that user"
            )
        raise BadRequest(
            f"data directory {directory}: {path} has mode {stat.S_IMODE(about.st_mode):04o}, user {me} has to read and"
            " write it"
        )


def _entries(directory: Path, depth: int) -> Iterator[Path]:
    """Some of each directory, in no order: where one was made by another user, so were others."""
    try:
        found = [Path(entry.path) for entry in islice(os.scandir(directory), ENTRIES_LOOKED_AT)]
    except OSError:
        return
    for path in found:
        yield path
        if depth > 1 and path.is_dir() and not path.is_symlink():
            yield from _entries(path, depth - 1)
