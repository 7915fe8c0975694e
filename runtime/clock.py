"""The clock as a port: everything that decides with time takes one of these, so that tests and simulations own time.

Three kinds of time that must not be mixed: `monotonic` for deadlines within this process, `boottime` for promises that
must hold although the machine was suspended (the leader's lease), `wall_ms` for people and certificates.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic(self) -> float:
        """Seconds that never go back; stands still while the machine is suspended."""

    def boottime(self) -> float:
        """Seconds that never go back and go on while the machine is suspended."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 as this machine believes; may jump either way."""


class SystemClock:
    """The machine's clocks."""

    __slots__ = ()

    def monotonic(self) -> float:
        return time.monotonic()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000
