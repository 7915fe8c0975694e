"""What every test may rely on, however the run was started."""

from __future__ import annotations

import signal

from hypothesis import settings


def pytest_configure() -> None:
    settings.register_profile("rostra", deadline=None)  # how long an example takes depends on what else runs here
    settings.load_profile("rostra")
    # A shell starts its background jobs with Ctrl-C ignored, and whatever they start inherits that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
