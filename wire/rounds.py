"""Requests share one answer: each joins a round that begins after it came, so that the answer is new enough for it.

At most one round is under way, and one waits for its end. An agent shares its barriers so, and a server the rounds of
Raft for barriers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from rostra.wire.errors import NoLeader, RostraError

T = TypeVar("T")


class Rounds(Generic[T]):
    """`run(since)` is one round; `since`: when the first of those who wait for it came, by `clock`."""

    def __init__(
        self,
        run: Callable[[float], Awaitable[T]],
        spawn: Callable[..., asyncio.Task[Any]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._spawn, self._clock = run, spawn, clock
        self._next: asyncio.Future[T] | None = None
        self._since = 0.0
        self._task: asyncio.Task[Any] | None = None

    def join(self) -> asyncio.Future[T]:
        """What the next round gives. Raises its RostraError, or NoLeader for what else ends it."""
        future = self._next
        if future is None:
            future = self._next = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be left to look
            self._since = self._clock()
            if self._task is None or self._task.done():
                self._task = self._spawn(self._work())
        return asyncio.shield(future)

    async def _work(self) -> None:
        while self._next is not None:
            future, self._next = self._next, None
            try:
                answer = await self._run(self._since)
            except RostraError as e:
                future.set_exception(e)
            except BaseException:
                future.set_exception(NoLeader())
                raise
            else:
                future.set_result(answer)
