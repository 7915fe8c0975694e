"""The core of a server agent: attach to the one that runs on this data directory, else spawn one and keep it running.

In service mode the core is a unit of its own and outlives agents; in child mode it hangs on this agent's lifeline. Its
local socket's path is in `<data dir>/server/socket`. A core that stopped itself because a promise could not be kept
(exit 70) is started again with back-off; one whose data is damaged (78) is not.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rostra.runtime import log as logging
from rostra.runtime.lifeline import Child, LifelineClosed, spawn
from rostra.wire.errors import Internal, RostraError, from_wire

log = logging.get("core")

EXIT_DAMAGED = 78
READY_S = 60.0
RESTART_MIN_S, RESTART_MAX_S = 0.2, 10.0


class CoreProcess:
    """The core of this host, and where it answers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._child: Child | None = None
        self._stopping = False
        self._path = ""
        self.pid = 0
        self.node_id = ""
        self.exit_status = 0  # of a core that could not start
        self.attached = False

    @property
    def socket_path(self) -> str:
        """Where the core answers, "" before `ready`. One that is not our child may have moved when it started anew."""
        return (self.attached and _noted_path(self._settings["data_dir"])) or self._path

    def begin(self) -> None:
        """Spawn the core now, before the rest of the agent is imported; or find one that runs already."""
        path = _running_core(self._settings["data_dir"])
        if path:
            self._path, self.attached = path, True
            self.node_id = (Path(self._settings["data_dir"]) / "node-id").read_text().strip()
            log.info("attached to the core that runs on this data directory", socket=path)
        else:
            self._child = spawn([sys.executable, "-P", "-m", "rostra.server"])

    async def ready(self) -> None:
        """Wait until the core listens. Raises the error that it could not start for."""
        child = self._child
        if child is None:
            return
        try:
            await child.send(self._settings)
            async with asyncio.timeout(READY_S):
                message = await child.receive()
        except LifelineClosed:
            raise Internal(
                f"the core ended while it started (exit status {await child.wait()}); see its lines above"
            ) from None
        except TimeoutError:
            raise Internal(f"the core did not become ready in {READY_S:.0f} s") from None
        if "error" in message:
            self.exit_status = await child.wait()
            raise from_wire(*message["error"])
        about = message["ready"]
        self._path, self.pid, self.node_id = about["socket"], about["pid"], about["node_id"]

    async def keep(self, on_restart: Callable[[], None]) -> None:
        """Restart the core when it ends by itself. Ends when it must not be started again, or by cancellation."""
        delay = RESTART_MIN_S
        while self._child is not None:
            started = time.monotonic()
            status = await self._child.wait()
            if self._stopping:
                return
            self._child.close()
            if status == EXIT_DAMAGED:
                log.err(
                    "the core refused its data and is not started again; HTTP answers `No cluster leader`",
                    status=status,
                )
                return
            if time.monotonic() - started > 30:
                delay = RESTART_MIN_S
            log.err("the core ended, starting it again", status=status, in_s=round(delay, 1))
            await asyncio.sleep(delay)
            delay = min(delay * 2, RESTART_MAX_S)
            self._child = spawn([sys.executable, "-P", "-m", "rostra.server"])
            try:
                await self.ready()
            except RostraError as e:
                log.err("the core did not start", error=e.message)
            on_restart()

    async def stop(self) -> None:
        self._stopping = True
        if self._child is not None:
            await self._child.stop(grace_s=3.0)  # a leader hands leadership over first


def _running_core(data_dir: str) -> str:
    """The socket of a live core on `data_dir`, "" where there is none."""
    path = _noted_path(data_dir)
    if not path:
        return ""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(path)
        return path
    except OSError:
        return ""


def _noted_path(data_dir: str) -> str:
    """Where the core that was last started on `data_dir` said that it answers."""
    if not data_dir:
        return ""
    try:
        return (Path(data_dir) / "server" / "socket").read_text().strip()
    except OSError:
        return ""
