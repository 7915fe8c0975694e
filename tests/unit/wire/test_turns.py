"""Fairness among readers, with a clock and a loop of our own; and on real loops."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import uvloop

from rostra.wire.turns import SLICE_S as SLICE_S_REAL
from rostra.wire.turns import TURN_S as TURN_S_REAL
from rostra.wire.turns import TURNS_OF_A_REST, Turns, turns

TURN_S, REST_S, SLICE_S, UNIT_S = 1.0, 0.5, 0.25, 0.0625


class Loop:
    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []
        self.now = 0.0

    def turn(self) -> None:
        calls, self.soon = self.soon, []
        for call in calls:
            call()


class Reader:
    """Handles units that cost UNIT_S each, as a connection does."""

    def __init__(self, loop: Loop, shared: Turns) -> None:
        self.loop, self.shared = loop, shared
        self.left = 0
        self.handled = 0
        self.waits = False

    def receive(self, units: int) -> None:
        self.left += units
        if self.waits:
            return
        if self.shared.begin():
            self.go_on()
        else:
            self.wait()

    def wait(self) -> None:
        self.waits = True
        self.shared.queue(self.go_on)

    def go_on(self) -> None:
        self.waits = False
        while self.left:
            if not self.shared.room():
                self.wait()
                return
            self.left -= 1
            self.handled += 1
            self.loop.now += UNIT_S


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def shared(loop: Loop) -> Turns:
    return Turns(lambda call: loop.soon.append(call), lambda: loop.now, turn_s=TURN_S, rest_s=REST_S, slice_s=SLICE_S)


def test_a_reader_with_little_to_do_is_never_delayed(loop: Loop, shared: Turns) -> None:
    reader = Reader(loop, shared)
    for n in range(1, 5):
        reader.receive(1)
        assert reader.handled == n
        loop.turn()


def test_a_flood_is_handled_over_many_turns_and_all_of_it(loop: Loop, shared: Turns) -> None:
    flood = Reader(loop, shared)
    flood.receive(200)
    while flood.left:
        before = loop.now
        loop.turn()
        assert loop.now - before <= TURN_S + UNIT_S
    assert flood.handled == 200
    loop.turn()
    assert not loop.soon  # nothing spins when nobody waits


def test_many_floods_together_take_no_more_of_a_turn_than_one(loop: Loop, shared: Turns) -> None:
    floods = [Reader(loop, shared) for _ in range(50)]
    before = loop.now
    for flood in floods:
        flood.receive(100)
    assert loop.now - before <= TURN_S + UNIT_S
    for _ in range(20):
        before = loop.now
        loop.turn()
        assert loop.now - before <= TURN_S + UNIT_S


def test_who_comes_with_little_waits_for_no_flood_that_has_waited_already(loop: Loop, shared: Turns) -> None:
    floods = [Reader(loop, shared) for _ in range(20)]
    for flood in floods:
        flood.receive(1000)
    honest = Reader(loop, shared)
    for n in range(10):
        before = loop.now
        loop.turn()
        assert loop.now - before <= REST_S + UNIT_S
        honest.receive(1)
        assert honest.handled == n + 1
    assert sum(flood.handled for flood in floods) >= 10 * REST_S / UNIT_S  # nor do those who come starve them


def test_those_who_come_all_the_time_leave_their_part_to_those_that_wait(loop: Loop, shared: Turns) -> None:
    flood = Reader(loop, shared)
    flood.receive(1000)
    for _ in range(10):
        handled = flood.handled
        for _ in range(TURNS_OF_A_REST):
            before = loop.now
            loop.turn()
            for come in [Reader(loop, shared) for _ in range(100)]:
                come.receive(4)
            assert loop.now - before <= TURN_S + UNIT_S
        assert flood.handled - handled >= SLICE_S / UNIT_S


def test_who_came_too_late_for_a_turn_waits_for_no_flood(loop: Loop, shared: Turns) -> None:
    floods = [Reader(loop, shared) for _ in range(20)]
    for flood in floods:
        flood.receive(1000)
    for _ in range(TURNS_OF_A_REST * len(floods)):
        loop.turn()
    waited = 0
    for _ in range(2 * TURNS_OF_A_REST):
        for other in [Reader(loop, shared) for _ in range(int(TURN_S / SLICE_S))]:
            other.receive(int(SLICE_S / UNIT_S))
        late = Reader(loop, shared)
        late.receive(1)
        waited += late.waits
        loop.turn()
        loop.turn()
        assert late.handled == 1
    assert waited > TURNS_OF_A_REST


def test_a_reader_that_is_alone_may_use_the_whole_turn(loop: Loop, shared: Turns) -> None:
    reader = Reader(loop, shared)
    reader.receive(int(TURN_S / UNIT_S))
    assert reader.left == 0


def test_readers_that_wait_are_served_in_turn(loop: Loop, shared: Turns) -> None:
    floods = [Reader(loop, shared) for _ in range(6)]
    for flood in floods:
        flood.receive(1000)
    for _ in range(60):
        loop.turn()
    handled = [flood.handled for flood in floods]
    # The first one was alone for a whole turn.
    assert max(handled) - min(handled) <= (TURN_S + 2 * SLICE_S) / UNIT_S


def test_a_reader_that_raises_stops_nobody(loop: Loop, shared: Turns) -> None:
    def bad() -> None:
        raise ValueError("a reader's fault")

    shared.queue(bad)
    reader = Reader(loop, shared)
    reader.receive(1)
    with pytest.raises(ValueError, match="a reader's fault"):
        loop.turn()
    loop.turn()
    assert reader.handled == 1


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_task_waits_for_its_turn_on_a_real_loop(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def many() -> int:
        mine = turns()
        assert turns() is mine
        done = 0
        for _ in range(1000):
            await mine.turn()
            done += 1
        return done

    async def run() -> list[int]:
        return await asyncio.wait_for(asyncio.gather(*(many() for _ in range(5))), 20)

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(run()) == [1000] * 5


def test_tasks_that_wait_together_hold_a_turn_no_longer_than_readers_do() -> None:
    async def run() -> int:
        mine, working = turns(), 0
        most = in_this_turn = 0

        def next_turn() -> None:
            nonlocal most, in_this_turn
            most, in_this_turn = max(most, in_this_turn), 0
            if working:
                asyncio.get_running_loop().call_soon(next_turn)

        async def work() -> None:
            nonlocal working, in_this_turn
            for _ in range(5):
                await mine.turn()
                in_this_turn += 1
                until = time.perf_counter() + SLICE_S_REAL
                while time.perf_counter() < until:
                    pass
            working -= 1

        tasks = [asyncio.ensure_future(work()) for _ in range(100)]
        working = len(tasks)
        next_turn()
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        return most

    assert asyncio.run(run()) <= 3 * TURN_S_REAL / SLICE_S_REAL
