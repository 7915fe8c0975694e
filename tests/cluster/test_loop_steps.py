"""No step of a loop over 2 ms: the bench in small, with real processes, for a shared loop would count the clients too.

A shared CI machine adds steps of its own: interrupts and stolen time are charged to whoever runs. So the assertion is
not "no long step at all" but "no loop that has one in each of three measures": what a program does, it does with each
of the changes, in every measure; what the machine does, it hardly does three times to the same loop. See
bench/steps.py, and runtime/steps.py for how the time that a loop waited for a processor is kept out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "steps.py"


@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_no_step_exceeds_2_ms_while_300_watchers_follow_a_service_of_1000_instances() -> None:
    network = f"127.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}."  # all of 127/8 is this host
    done = subprocess.run(
        [sys.executable, str(BENCH), "--seconds", "4", "--network", network],
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, done.stdout + done.stderr
