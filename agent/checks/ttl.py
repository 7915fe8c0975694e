"""The TTL check: its service reports in time, or it turns critical.

A deadline that moves with each report; `agent/local.py` hears about its passing. `local.py` keeps what must survive a
restart of the agent: status, output, the wall-clock time of the deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Deadline:
    """Calls `expired` once, `ttl_s` after the last `renew`. Starts running when made."""

    __slots__ = ("_expired", "_handle", "_loop", "ttl_s")

    def __init__(self, ttl_s: float, expired: Callable[[], None], *, first_s: float | None = None) -> None:
        self.ttl_s = ttl_s
        self._expired = expired
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_later(ttl_s if first_s is None else first_s, expired)

    def renew(self) -> None:
        self._handle.cancel()
        self._handle = self._loop.call_later(self.ttl_s, self._expired)

    def stop(self) -> None:
        self._handle.cancel()
