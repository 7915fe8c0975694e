"""The door to files: what is said to be on the disk was really handed to it, in this order."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rostra.server.raft.disk import JOURNAL, SNAPSHOT, DirectoryDisk, DirectoryInUse


class Calls:
    """What the system was asked, in order: (name of the call, name of the file)."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str]] = []

    def watch(self, patch: pytest.MonkeyPatch, name: str) -> None:
        original = getattr(os, name)

        def call(first: Any, *more: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            self.made.append((name, Path(path).name))
            return original(first, *more)

        patch.setattr(os, name, call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    for name in ("pwrite", "fdatasync", "fsync", "rename"):
        calls.watch(monkeypatch, name)
    return calls


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DirectoryDisk]:
    disk = DirectoryDisk(tmp_path / "raft")
    yield disk
    disk.close()


def test_h5_a_sync_reaches_the_disk(disk: DirectoryDisk, calls: Calls) -> None:
    file = disk.start("x")
    file.write(0, b"data")
    file.sync()
    assert calls.made == [("pwrite", "x"), ("fdatasync", "x")]
    file.close()


def test_h5_a_created_file_and_its_name_are_durable_in_this_order(disk: DirectoryDisk, calls: Calls) -> None:
    disk.create("x", b"whole").close()
    assert calls.made == [("pwrite", "x.new"), ("fdatasync", "x.new"), ("rename", "x.new"), ("fsync", "raft")]
    assert disk.names() == ["lock", "x"]


def test_h5_a_write_that_the_system_takes_in_parts_is_written_whole(
    disk: DirectoryDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: original(fd, bytes(data)[:3], offset))
    file = disk.start("x")
    file.write(5, b"in several parts")
    assert file.read(5, 100) == b"in several parts"
    file.close()


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_h7_an_error_of_the_disk_is_passed_on(disk: DirectoryDisk, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    file = disk.start("x")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012
        file.write(0, b"x")
        file.sync()
    file.close()


def test_a_directory_belongs_to_one_process(disk: DirectoryDisk, tmp_path: Path) -> None:
    with pytest.raises(DirectoryInUse, match="in use by another process"):
        DirectoryDisk(tmp_path / "raft")
    DirectoryDisk(tmp_path / "raft", lock=False).close()


def test_files_are_private(disk: DirectoryDisk, tmp_path: Path) -> None:
    disk.create("x", b"secret").close()
    assert stat.S_IMODE((tmp_path / "raft").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "raft" / "x").stat().st_mode) == 0o600


async def test_work_of_a_lane_runs_in_order_and_no_lane_waits_for_another(disk: DirectoryDisk) -> None:
    done: list[str] = []
    go = threading.Event()
    disk.submit(SNAPSHOT, lambda: go.wait(5), lambda result, error: done.append("slow"))
    disk.submit(SNAPSHOT, lambda: 1, lambda result, error: done.append("behind it"))
    disk.submit(JOURNAL, lambda: 2, lambda result, error: done.append(f"journal {result}"))
    async with asyncio.timeout(30):
        while done != ["journal 2"]:
            await asyncio.sleep(0.001)
        go.set()
        while len(done) < 3:
            await asyncio.sleep(0.001)
    assert done == ["journal 2", "slow", "behind it"]


async def test_whatever_work_raises_reaches_who_asked_for_it(disk: DirectoryDisk) -> None:
    errors: list[Exception | None] = []

    def fails() -> None:
        raise OSError(5, "Input/output error")

    disk.submit(JOURNAL, fails, lambda result, error: errors.append(error))
    async with asyncio.timeout(30):
        while not errors:
            await asyncio.sleep(0.001)
    assert isinstance(errors[0], OSError)
