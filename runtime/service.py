"""Tasks with an owner, a name and an end, and the delays between attempts.

Every part that runs something in the background owns a `Tasks`. `start` is for work that ends: where it ends by an
exception, that is logged with its name and told to the owner. `keep` is for work that must not end while its owner
lives: it is started again with back-off, or the owner's `on_crash` ends the process. Nothing fails silently, nothing
outlives `stop`, and no task is made anywhere else (tests/unit/test_imports.py). Threads have no owner: one that dies by
an exception ends the process (`end_with_threads`).
"""

from __future__ import annotations

import asyncio
import os
import random as _random
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self

from rostra.runtime import log as _log
from rostra.wire.errors import RostraError

AGAIN_MIN_S, AGAIN_MAX_S = 0.2, 10.0
#: Work that ran this long before it ended begins its back-off anew, and its end is said again.
STEADY_S = 30.0
#: The same end of the same work is said once in this time.
SAY_AGAIN_S = 600.0
#: A thread died, or a promise cannot be kept: whoever supervises this process starts it again.
EXIT_FAIL_STOP = 70
#: How long one thread may run Python while another waits. It is shorter than any turn of a loop (wire/turns.py).
THREAD_TURN_S = 0.0001


class Ended(Exception):
    """How work that must not end ended, in words for the log. No traceback: it is not a defect of ours."""


class Tasks:
    """The background tasks of one owner. Use as `async with Tasks("sync") as tasks`, or call `stop` yourself."""

    def __init__(self, owner: str, on_crash: Callable[[str, BaseException], None] | None = None) -> None:
        """`on_crash(name, error)` runs on the loop after the crash was logged; with it, `keep` starts nothing again."""
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

    def keep(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, Any]],
        *,
        first_s: float = AGAIN_MIN_S,
        most_s: float = AGAIN_MAX_S,
        steady_s: float = STEADY_S,
    ) -> asyncio.Task[None]:
        """Run `work()` for as long as this owner lives: whenever it ends, in whatever way, it is said and run again."""
        return self.start(name, self._again(name, work, lambda: backoff(first_s, most_s), steady_s))

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

    async def _again(
        self,
        name: str,
        work: Callable[[], Coroutine[Any, Any, Any]],
        new_delays: Callable[[], Iterator[float]],
        steady_s: float,
    ) -> None:
        loop, delays, said, said_at = asyncio.get_running_loop(), new_delays(), "", 0.0
        while True:
            began = loop.time()
            try:
                await work()
                error: BaseException = Ended("it came to an end")
            except Exception as e:
                error = e
            except asyncio.CancelledError:
                if _is_wanted_end():
                    raise
                error = Ended("something that it waited for was cancelled")
            if _is_wanted_end():
                return
            if self._on_crash is not None:
                raise RuntimeError(f"{name} has ended, which it must not") from error
            now = loop.time()
            if now - began >= steady_s:
                said, delays = "", new_delays()
            in_s, reason = next(delays), str(error) or repr(error)
            if reason != said or now - said_at >= SAY_AGAIN_S:
                said, said_at = reason, now
                is_ours = not isinstance(error, (Ended, OSError, RostraError))
                fields = {"exc_info": error} if is_ours else {}
                self._log.err("has ended, is started again", what=name, reason=reason, in_s=round(in_s, 2), **fields)
            await asyncio.sleep(in_s)

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


def end_with_threads() -> None:
    """From now on a thread that dies by an exception ends this process with status 70: nobody else would see it."""

    def died(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is SystemExit:
            return
        name = args.thread.name if args.thread is not None else "?"
        try:
            _log.get("threads").err("a thread has died, stopping at once", thread=name, exc_info=args.exc_value)
        finally:
            os._exit(EXIT_FAIL_STOP)

    threading.excepthook = died


def take_turns_with_threads() -> None:
    """From now on threads of this process do not wait for each other's Python for longer than THREAD_TURN_S.

    With Python's 5 ms the disk's thread waited that long, and often again, for a loop that floods keep busy: each write
    of the log took 20 to 100 ms. A thread that packs a snapshot, on the other hand, held the loop for 5 ms at a time.
    """
    sys.setswitchinterval(THREAD_TURN_S)


def cannot(error: OSError) -> str:
    """What the system refused, in words for an operator: the file comes first."""
    what = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {what}" if isinstance(error.filename, str | bytes) else what


def _is_wanted_end() -> bool:
    """Whether somebody asked the current task to end."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


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
