"""The core of a server agent: attach to the one that runs on this data directory, else spawn one and keep it running.

In service mode the core is a unit of its own and outlives agents; in child mode it hangs on this agent's lifeline. Its
local socket's path is in `<data dir>/server/socket`. A core that has ended, or cannot be started, is tried again with
back-off for as long as the agent lives; only one whose data is damaged (exit 78) is not.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import Any

from rostra.runtime import log as logging
from rostra.runtime.identity import read_node_id
from rostra.runtime.lifeline import Child, LifelineClosed, spawn
from rostra.runtime.service import Ended
from rostra.wire.errors import Conflict, Internal, RostraError, from_wire

log = logging.get("core")

EXIT_DAMAGED = 78
READY_S = 60.0
COMMAND = (sys.executable, "-P", "-m", "rostra.server")


class CoreProcess:
    """The core of this host, and where it answers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._child: Child | None = None
        self._is_up = False
        self._path = ""
        self.pid = 0
        self.node_id = ""
        self.exit_status = 0  # of a core that could not start
        self.attached = False

    @property
    def socket_path(self) -> str:
        """Where the core answers, "" before `ready`. One that is not our child may have moved when it started anew."""
        return (self.attached and _noted_path(self._settings["data_dir"])) or self._path

    @property
    def is_up(self) -> bool:
        """Whether our child listens. One that is not our child is up while there is a session with it."""
        return self._is_up

    def begin(self) -> None:
        """Spawn the core now, before the rest of the agent is imported; or find one that runs already."""
        path = _running_core(self._settings["data_dir"])
        if path:
            self.node_id = read_node_id(self._settings["data_dir"])
            if not self.node_id:
                raise Conflict(
                    f"{self._settings['data_dir']}/node-id is missing while a core runs on this data directory: stop"
                    " the core; it says at its next start what else is lost"
                )
            self._path, self.attached = path, True
            log.info("attached to the core that runs on this data directory", socket=path)
        else:
            try:
                self._child = spawn(COMMAND)
            except OSError as e:
                raise Internal(f"cannot start the core ({COMMAND[0]}): {e.strerror}") from None

    async def ready(self) -> None:
        """Wait until the core listens. Raises the error that it could not start for; then it has ended."""
        child = self._child
        if child is None:
            return
        try:
            await self._hear(child)
        except BaseException:
            self._child = None
            self.exit_status = await child.stop(grace_s=1.0)
            raise
        self._is_up = True

    async def _hear(self, child: Child) -> None:
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
            await child.wait()
            raise from_wire(*message["error"])
        about = message["ready"]
        self._path, self.pid, self.node_id = about["socket"], about["pid"], about["node_id"]

    async def live(self) -> None:
        """One life of the core, begun here unless it runs already: raises how it ended. To be run again (`Tasks.keep`).

        Does not come back where it must not be started again: it is not our child, or it refuses its data.
        """
        if self.attached:
            await asyncio.Event().wait()
        if self._child is None:
            self._child = spawn(COMMAND)
            try:
                await self.ready()
            except RostraError:
                await self._not_again_if_damaged(self.exit_status)
                raise
            log.info("the core runs again", pid=self.pid)
        child = self._child
        status = await child.wait()
        self._child, self._is_up = None, False
        child.close()
        await self._not_again_if_damaged(status)
        raise Ended(f"exit status {status}")

    async def _not_again_if_damaged(self, status: int) -> None:
        if status == EXIT_DAMAGED:
            log.err(
                "the core refused its data and is not started again; HTTP answers `No cluster leader`", status=status
            )
            await asyncio.Event().wait()

    async def stop(self) -> None:
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
