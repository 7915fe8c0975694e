"""Keeps a proxy process running for each sidecar that this agent registered itself.

A sidecar comes from `connect { sidecar_service }`; `proxy.config.supervise = false` leaves its process to the user.
The process holds one end of a socket pair and dies with the agent; it has no session or process group of its own. One
that ends is started again with back-off; on deregistration and at the end of the agent it is stopped in order within a
second.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rostra.agent.local import LocalAgent, LocalService
from rostra.runtime import log as _log
from rostra.runtime.lifeline import Child, spawn
from rostra.runtime.service import Ended, Tasks

STOP_WITHIN_S = 1.0

log = _log.get("agent.sidecars")


@dataclass(slots=True, eq=False)
class _Supervised:
    task: asyncio.Task[None] | None = None
    child: Child | None = None


def wants_supervision(service: LocalService) -> bool:
    """Whether the agent runs this proxy's process."""
    if service.row.kind != "connect-proxy" or not service.sidecar_of:
        return False
    config = (service.row.proxy or {}).get("config") or {}
    return config.get("supervise", True) not in (False, "false")


class Sidecars:
    """Constructed without IO. `http_addr` is where the proxies reach this agent, e.g. `http://127.0.0.1:8500`."""

    def __init__(
        self,
        local: LocalAgent,
        *,
        http_addr: str,
        log_level: str = "",
        command: tuple[str, ...] = (sys.executable, "-P", "-m", "rostra.connect_proxy"),
        first_delay_s: float = 0.1,
        most_delay_s: float = 30.0,
    ) -> None:
        self._local = local
        self._http_addr = http_addr
        self._log_level = log_level
        self._command = command
        self._first_delay_s = first_delay_s
        self._most_delay_s = most_delay_s
        self._running: dict[str, _Supervised] = {}
        self._tasks = Tasks("agent.sidecars")
        self._remover: Callable[[], None] | None = None

    async def start(self) -> None:
        """Call when HTTP answers: the first thing that a proxy does is to ask."""
        self._remover = self._local.on_change(self._compare)
        self._compare()

    async def stop(self) -> None:
        """Every process has ended when this returns."""
        if self._remover is not None:
            self._remover()
        for supervised in self._running.values():
            if supervised.task is not None:
                supervised.task.cancel()
        ending = [s.task for s in self._running.values() if s.task is not None]
        self._running.clear()
        await asyncio.gather(*ending, return_exceptions=True)
        await self._tasks.stop()

    def pids(self) -> dict[str, int]:
        """The processes that run now, by proxy id."""
        return {i: s.child.pid for i, s in self._running.items() if s.child is not None}

    def _compare(self) -> None:
        wanted = {i for i, s in self._local.services.items() if wants_supervision(s)}
        for proxy_id, supervised in list(self._running.items()):
            if proxy_id not in wanted:
                del self._running[proxy_id]
                if supervised.task is not None:
                    supervised.task.cancel()
        for proxy_id in wanted - self._running.keys():
            supervised = self._running[proxy_id] = _Supervised()
            supervised.task = self._tasks.keep(
                f"sidecar {proxy_id}",
                partial(self._run_once, proxy_id, supervised),
                first_s=self._first_delay_s,
                most_s=self._most_delay_s,
            )

    async def _run_once(self, proxy_id: str, supervised: _Supervised) -> None:
        """One life of the process: raises how it ended. When cancelled, the process is stopped before this returns."""
        argv = [*self._command, "-proxy-id", proxy_id, "-http-addr", self._http_addr]
        if self._log_level:
            argv += ["-log-level", self._log_level]
        # Starting a process can take longer than a step of the loop may; the lifeline does not depend on the thread.
        starting = asyncio.get_running_loop().run_in_executor(None, spawn, argv)
        child: Child | None = None
        try:
            child = supervised.child = await asyncio.shield(starting)
            log.info("sidecar proxy started", proxy=proxy_id, pid=child.pid)
            raise Ended(f"exit status {await child.wait()}")
        except asyncio.CancelledError:
            child = child or await starting
            await child.stop(STOP_WITHIN_S)
            raise
        finally:
            supervised.child = None
            if child is not None:
                child.close()
