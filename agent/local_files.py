"""The agent's own files: what was registered with it, the state of checks, and the ports of sidecars.

`agent/local.py` calls it. Each file is JSON, 0600, written beside its place and renamed over it. `save` and `remove`
are durable when they return; those that are asked for while the disk is busy are made durable together. `save_soon` is
for state that changes often: the last value per file wins and is written in the background without fsync. All disk
work is done in one worker thread, in order. Without a directory nothing is kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from rostra.runtime import log as _log
from rostra.wire.errors import Internal

log = _log.get("agent.files")


class _Wanted(NamedTuple):
    """A file as it shall be: `data` None is no file at all."""

    path: Path
    data: bytes | None
    done: asyncio.Future[None]


class Files:
    """JSON files under one directory, each named by its kind and the hash of its id."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, "files") if directory is not None else None
        self._soon: dict[Path, bytes] = {}
        self._wanted: list[_Wanted] = []
        self._committing: asyncio.Task[None] | None = None

    async def save(self, kind: str, name: str, value: Any) -> None:
        """Raises Internal when the value is not safely on disk."""
        await self._commit({(kind, name): orjson.dumps(value)})

    async def remove(self, *files: tuple[str, str]) -> None:
        """Each is (kind, name); those that are not there are none of its business."""
        await self._commit(dict.fromkeys(files))

    async def _commit(self, files: dict[tuple[str, str], bytes | None]) -> None:
        if self._directory is None:
            return
        loop = asyncio.get_running_loop()
        waited: list[asyncio.Future[None]] = []
        for (kind, name), data in files.items():
            path = self._path(kind, name)
            self._soon.pop(path, None)
            done: asyncio.Future[None] = loop.create_future()
            self._wanted.append(_Wanted(path, data, done))
            waited.append(done)
        if self._committing is None:
            self._committing = loop.create_task(self._commit_all(), name="files")
        for outcome in await asyncio.gather(*waited, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _commit_all(self) -> None:
        """Batch after batch, until nobody has asked for more."""
        try:
            while self._wanted:
                batch, self._wanted = self._wanted, []
                newest = {wanted.path: wanted.data for wanted in batch}
                try:
                    failed: dict[Path, OSError] = await self._run(_commit_batch, newest)
                except Exception as error:  # nobody may wait for ever
                    failed = dict.fromkeys(newest, OSError(str(error)))
                for wanted in batch:
                    if wanted.done.done():
                        continue
                    why = failed.get(wanted.path)
                    if why is None:
                        wanted.done.set_result(None)
                    else:
                        wanted.done.set_exception(Internal(f"cannot write {wanted.path}: {why.strerror or why}"))
        finally:
            self._committing = None

    def save_soon(self, kind: str, name: str, value: Any) -> None:
        """Errors are logged: the state of a check is not worth failing a request."""
        if self._thread is None:
            return
        path = self._path(kind, name)
        known = path in self._soon
        self._soon[path] = orjson.dumps(value)
        if not known:
            self._thread.submit(self._write_soon, path)

    async def load(self, kind: str) -> list[dict[str, Any]]:
        """The readable files of a kind; an unreadable one is named in the log and left alone."""
        if self._directory is None:
            return []
        loaded: list[dict[str, Any]] = await self._run(lambda: list(_read_all(self._directory, kind)))
        return loaded

    async def close(self) -> None:
        """Waits for what was promised to `save_soon`."""
        if self._committing is not None:
            await asyncio.gather(self._committing, return_exceptions=True)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)

    def _path(self, kind: str, name: str) -> Path:
        assert self._directory is not None
        return _path(self._directory, kind, name)

    async def _run(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _write_soon(self, path: Path) -> None:
        data = self._soon.pop(path, None)
        if data is None:
            return
        try:
            os.close(_write_beside(path, data))
            os.replace(_beside(path), path)
        except OSError as error:
            log.warn("cannot keep the state of a check", path=str(path), error=str(error))


def is_kept(directory: Path, kind: str, name: str) -> bool:
    """Whether an agent with this data directory has such a file. One that cannot be looked at has none."""
    try:
        return _path(directory, kind, name).exists()
    except OSError:
        return False


def _path(directory: Path, kind: str, name: str) -> Path:
    return directory / kind / (hashlib.sha256(name.encode()).hexdigest() + ".json")


def _commit_batch(files: dict[Path, bytes | None]) -> dict[Path, OSError]:
    """Make all files so, durably, with few waits for the disk: all are written before the first is synced."""
    failed: dict[Path, OSError] = {}
    opened: dict[Path, int] = {}
    changed: dict[Path, list[Path]] = {}  # by directory
    for path, data in files.items():
        try:
            if data is not None:
                opened[path] = _write_beside(path, data)
            else:
                path.unlink()
                changed.setdefault(path.parent, []).append(path)
        except FileNotFoundError as error:
            if data is not None:
                failed[path] = error
        except OSError as error:
            failed[path] = error
    for path, fd in opened.items():
        try:
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(_beside(path), path)
            changed.setdefault(path.parent, []).append(path)
        except OSError as error:
            failed[path] = error
    for directory, paths in changed.items():
        try:
            _sync_directory(directory)
        except OSError as error:
            failed.update(dict.fromkeys(paths, error))
    return failed


def _beside(path: Path) -> Path:
    return path.with_suffix(".tmp")


def _write_beside(path: Path, data: bytes) -> int:
    """The file that will take the place of `path`, still open."""
    for directory in (path.parent.parent, path.parent):  # `parents` would not give its mode to both
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(_beside(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_all(directory: Path | None, kind: str) -> Iterator[dict[str, Any]]:
    assert directory is not None
    for path in sorted((directory / kind).glob("*.json")):
        try:
            value = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError) as error:
            log.err("cannot read a file, it is left as it is", path=str(path), error=str(error))
            continue
        if isinstance(value, dict):
            yield value
