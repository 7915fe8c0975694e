"""Which servers this agent knows, and the keys that they show: learnt from the servers, remembered for the next start.

Nodes that join ask agents for this list (`join.py`). So it has to follow the servers as they are added, replaced and
moved, also where one session lasts for months.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path

from rostra.agent.servers import ServerAddress
from rostra.agent.servers_port import Servers
from rostra.runtime.files import write_if_changed
from rostra.wire.errors import RostraError

#: How often the servers' list is asked for. A server's agent asks over its local socket, and it is asked by joiners.
EVERY_S, EVERY_AT_SERVER_S = 60.0, 2.0


class KnownServers:
    """`path`: where they are remembered, if anywhere."""

    def __init__(self, session: Servers, path: Path | None, *, every_s: float = EVERY_S) -> None:
        self._session, self._path, self._every_s = session, path, every_s
        self.now: list[ServerAddress] = []  # as the servers said last

    def __bool__(self) -> bool:
        return bool(self.now)

    def remembered(self) -> list[ServerAddress]:
        """As they are known, if only from the last run: their keys are known, so no stranger can take their place."""
        if self.now or self._path is None:
            return list(self.now)
        try:
            rows = json.loads(self._path.read_text())
            return [ServerAddress(host=r["host"], port=r["port"], key_hash=r["key_hash"]) for r in rows]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    async def learn(self) -> None:
        """Ask once. If nobody answers, the known ones stay."""
        with contextlib.suppress(RostraError):
            rows = await self._session.act("servers", {})
            self.now = [ServerAddress(host=r["host"], port=r["port"], key_hash=r["key_hash"]) for r in rows]
            if self._path is not None and rows:
                text = json.dumps([{k: r[k] for k in ("host", "port", "key_hash")} for r in rows])
                await asyncio.to_thread(write_if_changed, self._path, text.encode())

    async def keep(self) -> None:
        """Follow them. Ends only by cancellation."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.learn()
