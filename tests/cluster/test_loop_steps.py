"""Long answers are made in slices: the bench of loop steps in small, with real processes.

A shared loop would count the clients too. The bar of 2 ms is a figure of speed and lives in bench/steps.py, on an idle
machine. Here a step must only be far from what it is without slices: 226 ms for this service and these watchers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "steps.py"


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_no_loop_is_held_by_300_watchers_of_a_service_of_1000_instances() -> None:
    network = f"127.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}."  # all of 127/8 is this host
    done = subprocess.run(
        [sys.executable, str(BENCH), "--seconds", "4", "--limit-ms", "50", "--network", network],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
