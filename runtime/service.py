"""Tasks with an owner, a name and an end, and the delays between attempts.

Every part that runs something in the background owns a `Tasks`. A task that ends by an exception is logged with its
name and told to the owner, who decides (restart, stop the process); nothing fails silently and nothing outlives `stop`.
"""

from __future__ import annotations

import asyncio
import random as _random
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self

from rostra.runtime import log as _log


class Tasks:
    """The background tasks of one owner. Use as `async with Tasks("sync") as tasks`, or call `stop` yourself."""

    def __init__(self, owner: str, on_crash: Callable[[str, BaseException], None] | None = None) -> None:
        """`on_crash(name, error)` runs on the loop after the crash was logged."""
        self._log = _log.get(owner)
        self._on_crash = on_crash
        self._running: dict[asyncio.Task[Any], str] = {}
        self._stopped = False

    def start(self, name: str, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run `coro` until it ends or `stop` is called. After `stop` it is closed unrun and RuntimeError is raised."""
        if self._stopped:
            coro.close()
            raise RuntimeError(f"task {name!r} started after its owner stopped")
        task = asyncio.get_running_loop().create_task(coro, name=name)
        self._running[task] = name
        task.add_done_callback(self._ended)
        return task

    def __len__(self) -> int:
        return len(self._running)

    @property
    def names(self) -> list[str]:
        return list(self._running.values())

    @property
    def stopped(self) -> bool:
        return self._stopped

    async def stop(self, grace_s: float = 5.0) -> None:
        """Cancel all, last started first, and wait. One that ignores it for `grace_s` is named in the log and left."""
        self._stopped = True
        current = asyncio.current_task()
        tasks = [t for t in reversed(self._running) if t is not current]
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        _, stuck = await asyncio.wait(tasks, timeout=grace_s)
        for task in stuck:
            self._log.err("task does not stop", task=self._running.get(task, task.get_name()))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        name = self._running.pop(task, task.get_name())
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        self._log.err("task crashed", task=name, exc_info=error)
        if self._on_crash is not None:
            self._on_crash(name, error)


def backoff(
    first_s: float, most_s: float, *, factor: float = 2.0, random: Callable[[], float] = _random.random
) -> Iterator[float]:
    """Delays that grow from `first_s` to `most_s`, each shortened by up to half at random so that peers spread out.

    Endless; start a new one after a success.
    """
    delay_s = first_s
    while True:
        yield delay_s * (0.5 + 0.5 * random())
        delay_s = min(most_s, delay_s * factor)
