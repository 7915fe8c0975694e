from __future__ import annotations

import asyncio
import time

from rostra.runtime.steps import LoopSteps


async def ticks(steps: LoopSteps, n: int) -> None:
    async with asyncio.timeout(30):
        while steps.count < n:
            await asyncio.sleep(0.001)


async def test_a_loop_that_works_long_is_seen():
    seen: list[float] = []
    steps = LoopSteps(seen.append)
    steps.start()
    await ticks(steps, 2)
    steps.reset()
    until = time.thread_time() + 0.03
    while time.thread_time() < until:
        pass
    await ticks(steps, 1)
    steps.stop()
    assert steps.longest_ms > 15
    assert steps.over(10.0) >= 1
    assert max(seen) == steps.longest_ms


async def test_waiting_is_not_work():
    steps = LoopSteps()
    steps.start()
    await ticks(steps, 2)
    steps.reset()
    time.sleep(0.03)
    await ticks(steps, 1)
    steps.stop()
    assert steps.longest_ms < 10


async def test_it_stops():
    steps = LoopSteps(tick_s=0.001)
    steps.start()
    await ticks(steps, 1)
    steps.stop()
    count = steps.count
    await asyncio.sleep(0.01)
    assert steps.count == count
