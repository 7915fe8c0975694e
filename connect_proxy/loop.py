"""The proxy's event loop: one thread, one epoll, and turns that are fair.

Sockets are registered once, edge-triggered, for everything: pausing a reader then costs no system call. A reader with
more than one chunk says `again` and gets its next chunk in the next turn, after all others. Handshake steps cost a
third of a millisecond each, so they go through `later_slow` and a turn takes at most a few. Other threads only `post`.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

EDGE: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
LEVEL: Final = select.EPOLLIN
SLOW_STEPS_PER_TURN: Final = 8
_EVENTS_PER_TURN: Final = 512


class Waits(Protocol):
    """What can be given a deadline; `deadline_s` belongs to the loop."""

    deadline_s: float

    def expired(self) -> None: ...


class Loop:
    """Runs until `stop`. Everything but `post` and `stop` is for its own thread."""

    def __init__(self, fault: Callable[[Exception, Callable[..., None] | None], None]) -> None:
        """`fault` hears of an exception that a callback let out, and whose; the loop goes on."""
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._level: set[int] = set()
        self._again: deque[Callable[[], None]] = deque()
        self._slow: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._deadlines: dict[float, dict[Waits, float]] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._signals: tuple[int, int] | None = None
        self._fault = fault
        self._is_stopping = False
        self.now = time.monotonic()
        self.again = self._again.append
        self.later_slow = self._slow.append
        self.add(self._wake, self._woken, LEVEL)

    def add(self, fd: int, handler: Callable[[int], None], events: int = EDGE) -> None:
        self._handlers[fd] = handler
        if events == LEVEL:
            self._level.add(fd)
        self._epoll.register(fd, events)

    def remove(self, fd: int) -> None:
        """Before the socket is closed. Events of this turn for it are dropped."""
        if self._handlers.pop(fd, None) is not None:
            self._level.discard(fd)
            self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """Like `remove` for a socket that is closed in the same breath: the kernel unregisters it then."""
        self._handlers.pop(fd, None)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """For rare things: it cannot be taken back."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), callback))

    def expect(self, who: Waits, within_s: float) -> None:
        """Calls `who.expired()` unless `relieve`d before; a new deadline replaces the old one."""
        self.relieve(who)
        who.deadline_s = within_s
        self._deadlines.setdefault(within_s, {})[who] = self.now + within_s

    def relieve(self, who: Waits) -> None:
        if who.deadline_s:
            waiting = self._deadlines.get(who.deadline_s)
            if waiting is not None:
                waiting.pop(who, None)
            who.deadline_s = 0.0

    def post(self, callback: Callable[[], None]) -> None:
        """From any thread or signal handler: run it on the loop."""
        self._posted.append(callback)
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:
            pass

    def wake_on_signals(self) -> None:
        """On the main thread: Python runs a handler between its own steps only. A signal that comes just before the
        loop waits would wait as long."""
        ours, theirs = self._signals = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        self.add(ours, self._signalled, LEVEL)

    def stop(self) -> None:
        self._is_stopping = True
        self.post(lambda: None)

    def run(self) -> None:
        poll, handlers, again, slow = self._epoll.poll, self._handlers, self._again, self._slow
        while not self._is_stopping:
            events = poll(0 if again or slow else self._patience(), _EVENTS_PER_TURN)
            self.now = time.monotonic()
            current: Callable[..., None] | None = None
            try:
                for fd, mask in events:
                    current = handlers.get(fd)
                    if current is not None:
                        current(mask)
                for _ in range(len(again)):
                    current = again.popleft()
                    current()
                for _ in range(min(len(slow), SLOW_STEPS_PER_TURN)):
                    current = slow.popleft()
                    current()
                current = None
                if self._deadlines or self._timers:
                    self._run_due()
            except Exception as error:
                self._fault(error, current)
                self._tell_again(events)

    def close(self) -> None:
        """After `run`; later posts are dropped."""
        self._epoll.close()
        wake, self._wake = self._wake, -1
        os.close(wake)
        if self._signals is not None:
            signal.set_wakeup_fd(-1)
            for fd in self._signals:
                os.close(fd)

    def _tell_again(self, events: list[tuple[int, int]]) -> None:
        """The rest of a turn was lost: an edge is told once, unless the registration is renewed."""
        for fd, _ in events:
            if fd in self._handlers and fd not in self._level:
                try:
                    self._epoll.modify(fd, EDGE)
                except OSError:
                    pass

    def _patience(self) -> float | None:
        """Seconds until the next timer or deadline; None without one."""
        soonest = self._timers[0][0] if self._timers else None
        for waiting in self._deadlines.values():
            if waiting:
                at = next(iter(waiting.values()))  # equal delays: the oldest is the first
                soonest = at if soonest is None or at < soonest else soonest
        return None if soonest is None else max(0.0, soonest - time.monotonic())

    def _run_due(self) -> None:
        now = self.now
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        for within_s, waiting in list(self._deadlines.items()):
            while waiting:
                who, at = next(iter(waiting.items()))
                if at > now:
                    break
                del waiting[who]
                who.deadline_s = 0.0
                who.expired()
            if not waiting:
                self._deadlines.pop(within_s, None)

    def _signalled(self, _mask: int) -> None:
        if self._signals is not None:
            os.read(self._signals[0], 64)

    def _woken(self, _mask: int) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass
        posted: Any = self._posted
        for _ in range(len(posted)):
            posted.popleft()()
