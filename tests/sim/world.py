"""Virtual time: one scheduler for everything that happens, and an asyncio event loop for each process in it.

Time is in seconds. The scheduler knows the true time; a machine's clock drifts (`local = offset + rate * true`). A turn
of a loop takes no time, except that it may be interrupted between two callbacks, and that a process may be paused or
killed at any callback. What happens at the same time happens in the order in which it was scheduled, so that a run is
a function of its seed.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from asyncio.events import _set_running_loop
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from rostra.wire import turns

#: A loop that is never out of work lets time pass after so many rounds of it.
ITERATIONS_MAX = 100


class ProcessExit(BaseException):
    """Ends the callback in which a process has ended itself (`fail_stop`)."""


class Handle:
    """A callback that is due, as asyncio's handles are: it can be cancelled."""

    __slots__ = ("args", "callback", "due")

    def __init__(self, callback: Callable[..., Any] | None, args: tuple[Any, ...], due: float = 0.0) -> None:
        self.callback, self.args, self.due = callback, args, due

    def cancel(self) -> None:
        self.callback, self.args = None, ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.due


class Clock:
    """One machine's monotonic clock; a reboot begins a new one."""

    __slots__ = ("offset", "rate")

    def __init__(self, offset: float, rate: float) -> None:
        self.offset, self.rate = offset, rate

    def local(self, true_s: float) -> float:
        return self.offset + self.rate * true_s

    def true(self, local_s: float) -> float:
        return (local_s - self.offset) / self.rate


class World:
    """The scheduler. `chance` is the only source of chance in a run."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.events = 0  # that happened: the witness that two runs were the same
        self._heap: list[tuple[float, int, Loop | None, Handle]] = []
        self._sequence = 0
        #: asyncio's running loop: that of the process which did something last.
        self.running: Loop | None = None
        #: Lines of what happened, the newest last; only where somebody wants to read them.
        self.trace: deque[str] | None = None
        #: (what, detail) of the first broken invariant.
        self.violation: tuple[str, str] | None = None

    def at(self, when: float, callback: Callable[..., Any], *args: Any) -> Handle:
        """Something that happens outside of all processes."""
        handle = Handle(callback, args)
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, None, handle))
        return handle

    def after(self, seconds: float, callback: Callable[..., Any], *args: Any) -> Handle:
        return self.at(self.now + seconds, callback, *args)

    def post(self, when: float, loop: Loop, handle: Handle) -> None:
        """`handle` is due in the process of `loop`."""
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, loop, handle))

    def run(self, until: Callable[[], bool], deadline: float) -> None:
        """Let things happen until `until()` (asked after each event of the world), a violation or the deadline."""
        heap, pop = self._heap, heapq.heappop
        while heap and self.violation is None:
            if heap[0][0] > deadline:  # it stays for the next run
                self.now = deadline
                return
            when, _, loop, handle = pop(heap)
            if handle.callback is None:
                continue
            self.now = when
            self.events += 1
            if loop is not None:
                loop.fire(handle)
            else:
                handle.callback(*handle.args)
                if until():
                    return

    def leave(self) -> None:
        """No process is running."""
        self.running = None
        _set_running_loop(None)

    def note(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now:10.6f} {who:<4} {what}")

    def violated(self, invariant: str, detail: str) -> None:
        """The run has failed; only the first failure counts."""
        if self.violation is None:
            self.violation = (invariant, detail)
            self.note("", f"VIOLATION {invariant}: {detail}")


class Unhurried(turns.Turns):
    """No time passes within a turn, so there is always room in it."""

    def begin(self) -> bool:
        return True

    def queue(self, go_on: Callable[[], None], *, of_many: bool = False) -> None:
        self._call_soon(go_on)

    async def turn(self) -> None:
        await asyncio.sleep(0)

    def room(self) -> bool:
        return True


class Loop(asyncio.AbstractEventLoop):
    """The event loop of one process. Dead, it runs nothing, and nothing that it scheduled happens."""

    def __init__(self, world: World, name: str, clock: Clock, *, unhandled: Callable[[dict[str, Any]], None]) -> None:
        self.world, self.name, self.clock = world, name, clock
        #: whose loop this is
        self.process: Any = None
        self.is_dead = False
        #: So many callbacks on, `burnt` is called in the middle of its work and kills or pauses it; below zero: never.
        self.fuse = -1
        self.burnt: Callable[[], None] = lambda: None
        #: How likely a turn is interrupted between two callbacks, so that others get in between.
        self.interrupted = 0.0
        #: How much longer each look at the fine clock says that work has taken.
        self.perf_step = 0.0
        self._perf = 0.0
        turns._of_loop[self] = {whose: Unhurried(self.call_soon) for whose in (turns.EVERYBODY, turns.CLUSTER)}
        self._ready: deque[Handle] = deque()
        self._now = clock.local(world.now)
        self._paused_until = 0.0
        self._missed: list[Handle] = []
        self._tasks: list[asyncio.Task[Any]] = []
        self._unhandled = unhandled
        #: Runs blocking work elsewhere: (work, done(result, error)).
        self.executor: Callable[[Callable[[], Any], Callable[[Any, Exception | None], None]], None]
        #: Connects: (protocol factory, host) -> (transport, protocol).
        self.connector: Callable[[Callable[[], Any], str], Awaitable[tuple[Any, Any]]]

    # -- what the world does

    def fire(self, handle: Handle) -> None:
        """A timer or something from outside is due."""
        if self.is_dead:
            return
        if self._paused_until > self.world.now:
            self._missed.append(handle)
            return
        self._ready.append(handle)
        self._run()

    def pause(self, seconds: float) -> None:
        """The process stands still: its clock runs, its sockets fill."""
        until = self.world.now + seconds
        if until > self._paused_until:
            self._paused_until = until
            self.world.at(until, self._resume)

    @property
    def is_paused(self) -> bool:
        return self._paused_until > self.world.now

    def _resume(self) -> None:
        if self.is_dead or self._paused_until > self.world.now:
            return
        missed, self._missed = self._missed, []
        # asyncio looks at its sockets first, libuv at its timers; sockets come in any order, each in its own.
        sources: dict[Any, list[Handle]] = {}
        for handle in missed:
            source = "timers" if handle.due > 0.0 else getattr(handle.callback, "__self__", handle)
            sources.setdefault(source, []).append(handle)
        groups = list(sources.values())
        self.world.chance.shuffle(groups)
        for group in groups:
            self._ready.extend(group)
        self._run()

    def _run(self) -> None:
        world, ready = self.world, self._ready
        self._now = self.clock.local(world.now)
        if world.running is not self:
            world.running = self
            _set_running_loop(self)
        for _ in range(ITERATIONS_MAX):
            for _ in range(len(ready)):
                handle = ready.popleft()
                callback = handle.callback
                if callback is None:
                    continue
                if self.fuse >= 0:
                    self.fuse -= 1
                    if self.fuse < 0:
                        ready.appendleft(handle)
                        self.burnt()
                        return
                try:
                    callback(*handle.args)
                except ProcessExit:
                    return
                except Exception as e:
                    self._unhandled({"message": f"exception in {callback!r}", "exception": e})
                if self.is_dead:
                    return
            if not ready:
                return
            if self.interrupted and world.chance.random() < self.interrupted:
                break
        world.post(world.now + world.chance.random() * 0.001, self, Handle(_nothing, ()))

    def run_now(self, callback: Callable[..., Any], *args: Any) -> None:
        """As if the process had called it; for what the simulator starts."""
        self.fire(Handle(callback, args))

    def kill(self) -> None:
        self.is_dead = True
        self._ready.clear()
        self._missed.clear()

    def clear(self) -> None:
        """After the run: end what it has begun, in an order, so that no finalizer does it at some other time."""
        self.is_dead = True
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                try:
                    task.get_coro().close()
                except Exception:
                    continue
        self._tasks.clear()

    # -- what asyncio and the code under test ask

    def time(self) -> float:
        return self._now

    def boottime_ns(self) -> int:
        return int(self._now * 1e9)

    def perf(self) -> float:
        self._perf += self.perf_step
        return self._now + self._perf

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self.is_dead

    def is_closed(self) -> bool:
        return self.is_dead

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        handle = Handle(callback, args)
        if not self.is_dead:
            self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(self, when: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        handle = Handle(callback, args, when or 1e-9)
        if not self.is_dead:
            # Time passes, if only a nanosecond: who waits for what is left of a moment would wait for ever.
            soonest = self.world.now + (1e-9 if when > self._now else 0.0)
            self.world.post(max(self.clock.true(when), soonest), self, handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        return self.call_at(self._now + delay, callback, *args)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(coro, loop=self, name=name or "task")
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        future = self.create_future()

        def done(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.executor((lambda: func(*args)) if args else func, done)
        return future

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:  # type: ignore[override]
        return await self.connector(protocol_factory, host)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.is_dead:
            self._unhandled(context)


def _nothing() -> None:
    pass
