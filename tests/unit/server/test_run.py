"""Parts of the core's composition that need no cluster."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rostra.runtime.data_directory import DataDirectory
from rostra.server.run import STALE_S, remove_stale


def development_directory(where: Path, name: str, *, age_s: float = STALE_S + 1) -> Path:
    directory = where / name
    (directory / "tls").mkdir(parents=True)
    (directory / "tls" / "node.key").write_text("x")
    DataDirectory.lock(directory / "server").release()
    os.utime(directory, (time.time() - age_s,) * 2)
    return directory


def test_directories_of_dead_development_servers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    dead = development_directory(tmp_path, "rostra-dev-dead")
    young = development_directory(tmp_path, "rostra-dev-young", age_s=0)
    other = development_directory(tmp_path, "rostra-else")
    target = development_directory(tmp_path, "kept")
    (tmp_path / "rostra-dev-link").symlink_to(target)
    (tmp_path / "rostra-dev-file").write_text("x")
    alive = development_directory(tmp_path, "rostra-dev-alive")
    with DataDirectory.lock(alive / "server"):
        os.utime(alive, (time.time() - STALE_S - 1,) * 2)
        remove_stale(tmp_path)
    assert not dead.exists()
    for kept in (young, other, target, alive, tmp_path / "rostra-dev-link", tmp_path / "rostra-dev-file"):
        assert kept.exists()
