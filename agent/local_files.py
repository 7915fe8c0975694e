"""The agent's own files: what was registered with it, the state of checks, and the ports of sidecars.

`agent/local.py` calls it. Each file is JSON, 0600, written beside its place and renamed over it. `save` and `remove`
are durable when they return; `save_soon` is for state that changes often: the last value per file wins and is written
in the background without fsync. All disk work is done in one worker thread, in order. Without a directory nothing is
kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orjson

from rostra.runtime import log as _log
from rostra.wire.errors import Internal

log = _log.get("agent.files")


class Files:
    """JSON files under one directory, each named by its kind and the hash of its id."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, "files") if directory is not None else None
        self._soon: dict[Path, bytes] = {}

    async def save(self, kind: str, name: str, value: Any) -> None:
        """Raises Internal when the value is not safely on disk."""
        if self._directory is not None:
            path = self._path(kind, name)
            self._soon.pop(path, None)
            try:
                await self._run(_write, path, orjson.dumps(value), True)
            except OSError as error:
                raise Internal(f"cannot write {path}: {error.strerror}") from None

    async def remove(self, kind: str, name: str) -> None:
        if self._directory is not None:
            path = self._path(kind, name)
            self._soon.pop(path, None)
            await self._run(_unlink, path)

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
        if self._thread is not None:
            await asyncio.to_thread(self._thread.shutdown)

    def _path(self, kind: str, name: str) -> Path:
        assert self._directory is not None
        return self._directory / kind / (hashlib.sha256(name.encode()).hexdigest() + ".json")

    async def _run(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _write_soon(self, path: Path) -> None:
        data = self._soon.pop(path, None)
        if data is None:
            return
        try:
            _write(path, data, False)
        except OSError as error:
            log.warn("cannot keep the state of a check", path=str(path), error=str(error))


def _write(path: Path, data: bytes, durable: bool) -> None:
    for directory in (path.parent.parent, path.parent):  # `parents` would not give its mode to both
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, data)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(beside, path)
    if durable:
        _sync_directory(path.parent)


def _unlink(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        return
    _sync_directory(path.parent)


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
