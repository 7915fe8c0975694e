"""The proxy's loop."""

from __future__ import annotations

import os
import signal
from typing import Any

from rostra.connect_proxy.loop import Loop


def _fault(error: Exception, _whose: Any) -> None:
    raise error


def test_a_signal_that_comes_just_before_the_loop_waits_ends_its_waiting() -> None:
    loop = Loop(_fault)
    loop.wake_on_signals()
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert loop._epoll.poll(30.0)
        loop.post(loop.stop)
        loop.run()
    finally:
        signal.signal(signal.SIGUSR1, before)
        loop.close()
    assert signal.set_wakeup_fd(-1) == -1
