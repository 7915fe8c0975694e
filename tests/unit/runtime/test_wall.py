"""What waits for a time of the wall clock notices that the clock was set, in both directions."""

from __future__ import annotations

import asyncio

from rostra.runtime.wall import Wall
from tests.support.waiting import eventually


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now


async def test_a_clock_that_jumps_past_the_moment_ends_the_wait() -> None:
    clock = Clock(1000.0)
    wall = Wall(clock, look_s=0.005)
    waiting = [asyncio.create_task(wall.until(1000.0 + 3600 * n, asyncio.Event())) for n in (1, 2, 48)]
    await eventually(lambda: clock.looks > 10)
    assert not any(task.done() for task in waiting)
    clock.now += 30 * 3600
    assert await asyncio.wait_for(asyncio.gather(*waiting[:2]), 5) == [True, True]
    assert not waiting[2].done()
    clock.now += 30 * 3600
    assert await asyncio.wait_for(waiting[2], 5)


async def test_a_clock_that_is_set_back_to_before_the_beginning_ends_the_wait() -> None:
    clock = Clock(1000.0)
    wall = Wall(clock, look_s=0.005)
    bounded = asyncio.create_task(wall.until(5000.0, asyncio.Event(), begin=900.0))
    unbounded = asyncio.create_task(wall.until(5000.0, asyncio.Event()))
    clock.now = 899.0
    assert await asyncio.wait_for(bounded, 5)
    assert not unbounded.done()
    clock.now = 5000.0
    assert await asyncio.wait_for(unbounded, 5)


async def test_a_moment_that_has_passed_is_not_waited_for() -> None:
    wall = Wall(Clock(1000.0), look_s=3600)
    assert await asyncio.wait_for(wall.until(1000.0, asyncio.Event()), 5)
    assert await asyncio.wait_for(wall.until(2000.0, asyncio.Event(), begin=1000.5), 5)


async def test_an_event_ends_the_wait_before_its_time_and_the_others_go_on() -> None:
    clock, hurry = Clock(0.0), asyncio.Event()
    wall = Wall(clock, look_s=0.005)
    hurried = asyncio.create_task(wall.until(60.0, hurry))
    patient = asyncio.create_task(wall.until(60.0, asyncio.Event()))
    await asyncio.sleep(0)
    hurry.set()
    assert await asyncio.wait_for(hurried, 5) is False
    clock.now = 60.0
    assert await asyncio.wait_for(patient, 5)


async def test_a_moment_that_is_near_is_not_missed_by_more_than_it_takes() -> None:
    wall = Wall(look_s=3600)
    assert await asyncio.wait_for(wall.until(wall.now() + 0.02, asyncio.Event()), 5)


async def test_nothing_ticks_while_nobody_waits() -> None:
    clock = Clock(1000.0)
    wall = Wall(clock, look_s=0.001)
    task = asyncio.create_task(wall.until(4600.0, asyncio.Event()))
    await eventually(lambda: clock.looks > 5)
    assert wall._timer is not None
    task.cancel()
    await eventually(lambda: wall._timer is None)
