"""The agent's files: durable together, whole, and never in the way of others."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from rostra.agent.local_files import Files
from rostra.wire.errors import Internal


async def test_what_is_saved_while_the_disk_is_busy_is_synced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, opened = Files(tmp_path), []
    run = files._run

    async def counted(work: object, *args: object) -> object:
        opened.append(len(args[0]) if args and isinstance(args[0], dict) else 0)
        return await run(work, *args)

    monkeypatch.setattr(files, "_run", counted)
    await asyncio.gather(*(files.save("services", f"s{i}", {"n": i}) for i in range(50)))
    assert sum(opened) == 50
    assert len(opened) <= 2
    assert sorted(kept["n"] for kept in await files.load("services")) == list(range(50))
    await files.close()


async def test_the_last_of_several_values_of_one_file_counts(tmp_path: Path) -> None:
    files = Files(tmp_path)
    await asyncio.gather(*(files.save("services", "one", {"n": i}) for i in range(20)))
    assert await files.load("services") == [{"n": 19}]
    await asyncio.gather(files.save("services", "one", {"n": 20}), files.remove(("services", "one")))
    assert await files.load("services") == []
    await files.close()


async def test_a_file_that_cannot_be_written_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, fsync = Files(tmp_path), os.fsync
    await files.save("services", "first", {})

    def full(fd: int) -> None:
        if os.fstat(fd).st_size > 100 and os.path.isfile(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    outcomes = await asyncio.gather(
        files.save("services", "large", {"x": "y" * 200}), files.save("services", "small", {}), return_exceptions=True
    )
    assert isinstance(outcomes[0], Internal)
    assert "No space left on device" in outcomes[0].message
    assert outcomes[1] is None
    assert len(await files.load("services")) == 2
    await files.close()
