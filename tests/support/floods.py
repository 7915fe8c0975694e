"""Floods in processes of their own, and what an agent says of itself meanwhile."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence

from tests.support.processes import REPO, Agent


class Flood:
    """A process of `module` for each of `kinds`, all at once; each is told its kind and `words`."""

    def __init__(self, module: str, kinds: Sequence[str], *words: str) -> None:
        self._running = [
            subprocess.Popen([sys.executable, "-m", module, kind, *words], cwd=REPO, stdout=subprocess.PIPE)
            for kind in kinds
        ]

    @property
    def is_on(self) -> bool:
        return any(process.poll() is None for process in self._running)

    def done(self) -> list[int]:
        """What each of them did."""
        return [int(process.communicate(timeout=60)[0]) for process in self._running]


def long_steps(agent: Agent, above_ms: float) -> int:
    """How many steps of the agent's loop took longer."""
    text = agent.api.get("/v1/agent/metrics?format=prometheus").text
    counts = dict(re.findall(r'consul_loop_step_bucket\{le="([^"]+)"\} (\S+)', text))
    return int(float(counts["+Inf"]) - float(counts[str(above_ms)]))


def metric(agent: Agent, name: str) -> float:
    found = agent.api.get("/v1/agent/metrics").json()["Gauges"]
    return float(next(gauge["Value"] for gauge in found if gauge["Name"] == f"consul.{name}"))
