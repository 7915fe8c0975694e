"""A reader's share of the loop: so much per turn, then reading is paused and the rest waits its turn.

One piece for everything that reads what others send: RPC and Raft frames, DNS, HTTP, check targets, proxies' snapshots.
All readers of a loop share one `Turns`, so that eight hostile connections hold a loop no longer than one. The cluster's
own traffic has a second one, and waits for none of them. A reader asks `begin` when bytes arrive and `room` before each
further unit; where the answer is no, it pauses its transport, keeps the rest, and gives `queue` the function that goes
on. Knows no transport, and no loop but `call_soon`.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

#: What all readers of a loop may take of one turn; what those may take of it that wait since an earlier one; and what
#: one reader may take while others wait.
TURN_S = 0.0015
REST_S = 0.0005
SLICE_S = 0.00025
#: Those that did not finish wait for so many turns: one read through an agent takes about ten turns of a loop, and
#: waited for the floods in each of them. Turns that nobody else uses take no time, so this delays them by little.
TURNS_OF_A_REST = 6


class Turns:
    """`call_soon(f)` calls `f` in the next turn of the loop; `clock()` is in seconds and only ever grows."""

    __slots__ = (
        "_again",
        "_armed",
        "_call_soon",
        "_clock",
        "_ends",
        "_had_some",
        "_late",
        "_rest_ends",
        "_rest_s",
        "_slice_ends",
        "_slice_s",
        "_turn_ends",
        "_turn_s",
        "_turns_left",
        "_turns_of_a_rest",
    )

    def __init__(
        self,
        call_soon: Callable[[Callable[[], None]], Any],
        clock: Callable[[], float] = time.perf_counter,
        *,
        turn_s: float = TURN_S,
        rest_s: float = REST_S,
        slice_s: float = SLICE_S,
        turns_of_a_rest: int = TURNS_OF_A_REST,
    ) -> None:
        self._call_soon = call_soon
        self._clock = clock
        self._turn_s = turn_s
        self._rest_s = rest_s
        self._slice_s = slice_s
        self._turns_of_a_rest = self._turns_left = turns_of_a_rest
        self._late: deque[Callable[[], None]] = deque()  # who have had nothing yet
        self._again: deque[Callable[[], None]] = deque()  # who have had a slice and did not finish
        self._had_some = False  # whether the reader that is being called has had a slice
        self._armed = False
        self._turn_ends = self._rest_ends = 0.0
        self._slice_ends = self._ends = 0.0  # of the reader that began last: while others wait, and while nobody does

    def begin(self) -> bool:
        """Whether a reader with something new may handle it now. False: this turn is used up; queue.

        Those that wait have a part of the turn of their own, which is smaller: they have more to do than others, so
        who comes with little does not wait behind them.
        """
        now = self._clock()
        self._had_some = False
        if not self._armed:
            self._armed = True
            self._turn_ends = now + self._turn_s
            self._call_soon(self._next_turn)
        elif now >= self._turn_ends:
            return False
        self._had_some = True
        self._ends = self._turn_ends
        self._slice_ends = min(now + self._slice_s, self._turn_ends)
        return True

    def room(self) -> bool:
        """Whether the reader that began last may handle one more unit before it queues.

        If nobody waits it may go on to the end of the turn: bytes that come at once are better handled at once.
        """
        return self._clock() < (self._slice_ends if self._late or self._again else self._ends)

    def queue(self, go_on: Callable[[], None], *, of_many: bool = False) -> None:
        """Call `go_on` when its turn has come, after those that wait. It may use `room` at once, and queue again.

        A reader queues at once after `begin` or `room` said no, and at most once at a time: the queues are as long as
        there are readers. `of_many`: what is left is from others than those who have had something, as datagrams are.
        """
        (self._again if self._had_some and not of_many else self._late).append(go_on)
        if not self._armed:
            self._armed = True
            self._turn_ends = 0.0
            self._call_soon(self._next_turn)

    async def turn(self) -> None:
        """For tasks, before each piece of work of at most a slice: come back at once where there is room, else when the
        turn has come.
        """
        if self.begin():
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def go_on() -> None:
            if not mine.done():
                self._rest_ends -= self._slice_s  # it runs a little later, and what it takes then was taken of this
                mine.set_result(None)

        self.queue(go_on)
        await mine

    def _next_turn(self) -> None:
        if not (self._late or self._again):
            self._armed = False
            return
        self._call_soon(self._next_turn)  # first, so that a reader that raises stops nobody
        now = self._clock()
        self._turn_ends = now + self._turn_s
        self._rest_ends = now + self._rest_s
        queue = self._late
        self._turns_left -= 1
        if self._turns_left <= 0 and self._again:
            self._turns_left = self._turns_of_a_rest
            queue = self._again
        for _ in range(len(queue)):
            if now >= self._rest_ends:
                return
            self._had_some = True
            self._ends = self._rest_ends
            self._slice_ends = min(now + self._slice_s, self._rest_ends)
            queue.popleft()()
            now = self._clock()


#: Whose share of a loop: everybody's, and that of the cluster itself (servers among themselves, an agent and the server
#: of its session, as far as they trust each other), which waits for nobody else: a leader goes on leading whatever
#: others send. Its turn is longer, so that what many callers have asked for at once goes into one entry of the log.
EVERYBODY, CLUSTER = "everybody", "cluster"
CLUSTER_TURN_S = 0.004

_of_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Turns]] = WeakKeyDictionary()


def turns(whose: str = EVERYBODY) -> Turns:
    """The one `Turns` of the running loop for `whose` share."""
    loop = asyncio.get_running_loop()
    shares = _of_loop.get(loop)
    if shares is None:
        shares = _of_loop[loop] = {}
    found = shares.get(whose)
    if found is None:
        if whose == CLUSTER:
            part = CLUSTER_TURN_S
            found = Turns(loop.call_soon, turn_s=part, rest_s=part, slice_s=part, turns_of_a_rest=1)
        else:
            found = Turns(loop.call_soon)
        shares[whose] = found
    return found
