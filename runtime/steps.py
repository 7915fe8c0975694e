"""How long the loop is held: a timer every few milliseconds that sees how late it is called.

No step on an agent's or a core's loop may exceed 2 ms; this measures it, `/v1/agent/metrics` shows it, a test fails on
it. Lateness alone would also count what other processes took from us. So a step is at most the processor time that this
thread used since the last tick, less the time that it waited for a processor.

A tick does not see the part of a step before it is due. Of steps of 3 ms every fifth counts as more than 2: that shows
frequent steps, and costs 1 % of a processor. ROSTRA_LOOP_TICK_MS in the environment makes the ticks finer: 1 costs 3 %,
0 measures each turn of the loop and never sleeps. bench/steps.py uses them.
"""

from __future__ import annotations

import asyncio
import os
import time
from bisect import bisect_left
from collections.abc import Callable

TICK_S = float(os.environ.get("ROSTRA_LOOP_TICK_MS") or 5) / 1000
LIMIT_MS = 2.0
BUCKETS_MS = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0)


class LoopSteps:
    """Counts steps by length while started. `on_step(ms)` also sees each one, for a metrics registry."""

    def __init__(self, on_step: Callable[[float], None] | None = None, *, tick_s: float = TICK_S) -> None:
        self.buckets = [0] * (len(BUCKETS_MS) + 1)
        self.count = 0
        self.longest_ms = 0.0
        self._on_step = on_step
        self._tick_s = tick_s
        self._handle: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._used = 0.0
        self._waited = 0
        self._schedstat = -1

    def start(self) -> None:
        """Begin on the running loop. Must be called on the thread that runs it."""
        self._loop = asyncio.get_running_loop()
        try:
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass  # a kernel that does not count it
        self._arm()

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if self._schedstat >= 0:
            os.close(self._schedstat)
            self._schedstat = -1

    def over(self, ms: float = LIMIT_MS) -> int:
        """How many steps were longer than `ms`, which must be one of BUCKETS_MS."""
        return sum(self.buckets[BUCKETS_MS.index(ms) + 1 :])

    def reset(self) -> None:
        self.buckets = [0] * (len(BUCKETS_MS) + 1)
        self.count = 0
        self.longest_ms = 0.0

    def _arm(self) -> None:
        self._due = time.perf_counter() + self._tick_s
        self._used = time.thread_time()
        self._waited = self._waited_ns()
        self._handle = self._loop.call_later(self._tick_s, self._tick)

    def _tick(self) -> None:
        late_s = time.perf_counter() - self._due
        used_s = time.thread_time() - self._used
        ran_s = late_s - (self._waited_ns() - self._waited) / 1e9
        step_ms = max(0.0, min(ran_s, used_s)) * 1000.0
        self.buckets[bisect_left(BUCKETS_MS, step_ms)] += 1
        self.count += 1
        self.longest_ms = max(self.longest_ms, step_ms)
        if self._on_step is not None:
            self._on_step(step_ms)
        self._arm()

    def _waited_ns(self) -> int:
        """How long this thread has stood in a processor's queue: the second number of its schedstat. Costs 1 µs."""
        return int(os.pread(self._schedstat, 96, 0).split()[1]) if self._schedstat >= 0 else 0
