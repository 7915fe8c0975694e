"""Waiting for a moment of the wall clock, which can be set in both directions and stands while a machine is suspended.

Timers of the loop count monotonic time, which knows nothing of that. So whoever waits for a time that is written down
somewhere (in a certificate) waits here: the clock is looked at every few seconds, once for all who wait.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

LOOK_S = 2.0


class Wall:
    """The wall clock of one loop. `now` is in seconds since 1970."""

    def __init__(self, now: Callable[[], float] = time.time, *, look_s: float = LOOK_S) -> None:
        self.now = now
        self._look_s = look_s
        self._waiting: dict[asyncio.Timeout, tuple[float, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def until(self, end: float, unless: asyncio.Event, *, begin: float = -math.inf) -> bool:
        """True once the clock shows `end`, or a time before `begin`, by a few seconds late; False when `unless` is set.

        `begin` is for what was made at that time: a clock that was set back to before it.
        """
        if not begin <= self.now() < end:
            return True
        try:
            async with asyncio.timeout(None) as limit:
                self._waiting[limit] = (begin, end)
                self._arm(end)
                await unless.wait()
                return False
        except TimeoutError:
            return True
        finally:
            self._waiting.pop(limit, None)

    def _arm(self, end: float) -> None:
        if self._timer is None:
            pause_s = max(0.0, min(self._look_s, end - self.now()))
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now, loop = self.now(), asyncio.get_running_loop()
        for limit, (begin, end) in list(self._waiting.items()):
            if not begin <= now < end:
                del self._waiting[limit]
                limit.reschedule(loop.time())
        if self._waiting:
            self._arm(min(end for _, end in self._waiting.values()))
