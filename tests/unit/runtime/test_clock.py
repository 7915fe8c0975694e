"""The machine's clocks behind the port."""

import time

from rostra.runtime.clock import Clock, SystemClock


def test_the_system_clock_tells_three_times():
    clock: Clock = SystemClock()
    assert clock.monotonic() <= clock.monotonic()
    assert clock.boottime() >= clock.monotonic() - 1.0
    assert abs(clock.wall_ms() - time.time() * 1000) < 5000
