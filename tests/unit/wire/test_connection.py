"""A connection's frames in their share of the loop: order, the end after the last frame, and who waits for whom."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from rostra.wire.connection import FrameConnection
from rostra.wire.frames import frame
from rostra.wire.turns import SLICE_S, TURN_S
from tests.support.waiting import eventually

#: What the handling of one frame costs here.
UNIT_S = SLICE_S / 4


class Ends:
    """A connection and the socket at its other end; what it handles costs time."""

    def __init__(self) -> None:
        self.handled: list[bytes] = []
        self.when: list[float] = []
        self.lost: list[str] = []
        self.connection: FrameConnection
        self.socket: socket.socket

    async def open(self) -> Ends:
        ours, self.socket = socket.socketpair()
        self.connection = FrameConnection(self._handle, self.lost.append)
        await asyncio.get_running_loop().create_connection(lambda: self.connection, sock=ours)
        return self

    def _handle(self, payload: bytes) -> None:
        began = time.perf_counter()
        self.handled.append(payload)
        self.when.append(began)
        while time.perf_counter() < began + UNIT_S:
            pass

    def flood(self, count: int) -> list[bytes]:
        payloads = [str(i).encode() for i in range(count)]
        self.socket.sendall(b"".join(map(frame, payloads)))
        return payloads


async def others_had_their_turns() -> None:
    """A later flood is through: what was still to come of an earlier one has come."""
    later = await Ends().open()
    sent = later.flood(100)
    await eventually(lambda: len(later.handled) == len(sent))
    later.connection.abort()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    def run(main: Callable[[], Any]) -> Any:
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main())

    return run


def test_a_flood_comes_in_its_order_and_other_work_goes_on_meanwhile(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        ends = await Ends().open()
        sent = ends.flood(2000)
        turns = 0
        while len(ends.handled) < len(sent):
            before = len(ends.handled)
            await asyncio.sleep(0)
            turns += 1
            assert len(ends.handled) - before <= 2 * TURN_S / UNIT_S
        assert ends.handled == sent
        assert turns > 50

    run(main)


def test_what_came_before_the_end_is_handled_before_the_end_is_told_and_that_once(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        ends = await Ends().open()
        seen_at_the_end: list[int] = []

        def on_lost(reason: str) -> None:
            seen_at_the_end.append(len(ends.handled))
            ends.lost.append(reason)

        ends.connection.on_lost = on_lost
        sent = ends.flood(500)
        ends.socket.close()
        await eventually(lambda: ends.lost)
        await others_had_their_turns()
        assert ends.handled == sent
        assert seen_at_the_end == [len(sent)]
        assert len(ends.lost) == 1

    run(main)


@pytest.mark.parametrize("end", ["close", "abort"])
def test_who_ends_it_gets_nothing_more_and_is_told_once(run: Callable[[Any], Any], end: str) -> None:
    async def main() -> None:
        ends = await Ends().open()
        ends.flood(500)
        await eventually(lambda: ends.handled)
        getattr(ends.connection, end)()
        had = len(ends.handled)
        await eventually(lambda: ends.lost)
        assert len(ends.handled) == had < 500
        await others_had_their_turns()
        assert len(ends.handled) == had
        assert len(ends.lost) == 1
        assert not ends.connection.open

    run(main)


def test_a_peer_whose_frames_wait_for_their_turn_counts_as_heard(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        ends = await Ends().open()
        ends.flood(3000)
        heard = set()

        def all_is_handled() -> bool:
            heard.add(ends.connection.heard_at)
            return len(ends.handled) == 3000

        await eventually(all_is_handled, 20)
        assert len(heard) > 2  # again and again, not only when the bytes came

    run(main)


def test_the_cluster_s_own_frames_wait_for_nobody_else_s(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        floods = [await Ends().open() for _ in range(40)]
        member = await Ends().open()
        member.connection.is_of_the_cluster()
        for flood in floods:
            flood.flood(400)
        await eventually(lambda: all(flood.handled for flood in floods))

        def of_others() -> int:
            return sum(len(flood.handled) for flood in floods)

        came_after: list[int] = []
        member.connection.on_frame = lambda _: came_after.append(of_others())
        before = of_others()
        member.flood(1)
        await eventually(lambda: came_after)
        between = came_after[0] - before
        # Of those who wait there are 40, with a slice of at least one frame each: it comes before they all had theirs.
        assert between <= 2 * 2 * TURN_S / UNIT_S
        for flood in floods:
            flood.connection.abort()

    run(main)


def test_a_frame_that_fails_ends_its_connection_and_no_other(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        bad, good = await Ends().open(), await Ends().open()
        handle = bad._handle

        def fail(payload: bytes) -> None:
            handle(payload)
            if payload == b"100":
                raise ValueError("unforeseen")

        bad.connection.on_frame = fail
        bad.flood(400)
        sent = good.flood(400)
        await eventually(lambda: bad.lost and len(good.handled) == len(sent))
        assert len(bad.lost) == 1
        assert bad.handled[-1] == b"100"
        assert good.handled == sent

    run(main)


def test_a_frame_above_the_bound_behind_a_flood_ends_the_connection_after_the_flood(run: Callable[[Any], Any]) -> None:
    async def main() -> None:
        ends = await Ends().open()
        sent = ends.flood(300)
        ends.socket.sendall(b"\x7f\xff\xff\xff")
        await eventually(lambda: ends.lost)
        assert ends.handled == sent
        assert ends.lost[0].startswith("frame of 2147483647 bytes")

    run(main)
