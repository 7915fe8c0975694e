"""The core that an agent attaches to belongs to somebody else, who may start it anew elsewhere."""

from __future__ import annotations

import socket
from pathlib import Path

from rostra.agent.core_process import CoreProcess


def test_a_core_that_moved_when_it_started_anew_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "server").mkdir()
    (tmp_path / "node-id").write_text("id\n")
    noted = tmp_path / "server" / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "first.sock"))
        listener.listen()
        noted.write_text(str(tmp_path / "first.sock"))
        core = CoreProcess({"data_dir": str(tmp_path)})
        core.begin()
    assert core.attached
    assert core.socket_path == str(tmp_path / "first.sock")
    noted.write_text(str(tmp_path / "second.sock"))
    assert core.socket_path == str(tmp_path / "second.sock")
    noted.unlink()
    assert core.socket_path == str(tmp_path / "first.sock")
