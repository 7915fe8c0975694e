"""What results do to a check: thresholds before a change, the status of a whole service, and the bound on output.

Pure: probes report results, `agent/local.py` feeds them here and owns the timers. Nothing here knows how a result came
about.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from rostra.agent.checks.spec import CheckSpec
from rostra.server.state.rows import CheckRow

PASSING, WARNING, CRITICAL, MAINTENANCE = "passing", "warning", "critical", "maintenance"
NODE_MAINTENANCE = "_node_maintenance"
SERVICE_MAINTENANCE = "_service_maintenance:"
_ORDER = {PASSING: 0, WARNING: 1, CRITICAL: 2, MAINTENANCE: 3}


class Result(NamedTuple):
    """What one run of a probe found."""

    status: str
    output: str


@dataclass(slots=True)
class Thresholds:
    """Counts results in a row, and says which status they add up to."""

    success_before_passing: int = 0
    failures_before_warning: int = 0
    failures_before_critical: int = 0
    _successes: int = 0
    _failures: int = 0

    @classmethod
    def of(cls, spec: CheckSpec) -> Thresholds:
        return cls(spec.success_before_passing, spec.failures_before_warning, spec.failures_before_critical)

    def observe(self, status: str) -> str | None:
        """The status after a result of `status`; None while there are too few such results to change anything."""
        if status != CRITICAL:
            self._successes += 1
            self._failures = 0
            return status if self._successes >= self.success_before_passing else None
        self._failures += 1
        self._successes = 0
        if self._failures >= self.failures_before_critical:
            return CRITICAL
        if self._failures >= self.failures_before_warning:
            return WARNING
        return None


def expired_output(last_output: str) -> str:
    """The output of a TTL check that nobody renewed in time."""
    return f"TTL expired (last output before timeout follows): {last_output}" if last_output else "TTL expired"


def cap_reported(output: str, bytes_max: int) -> str:
    """Output that a client sent for a TTL check, cut behind its beginning."""
    raw = output.encode()
    if len(raw) <= bytes_max:
        return output
    return f"{raw[:bytes_max].decode(errors='ignore')} ... (captured {bytes_max} of {len(raw)} bytes)"


def cap_captured(tail: bytes, total: int) -> str:
    """Output of a script: the `tail` that was kept of `total` bytes, with a line that says so."""
    text = tail.decode(errors="replace")
    return text if total <= len(tail) else f"Captured {len(tail)} of {total} bytes\n...\n{text}"


def aggregate(checks: Iterable[CheckRow]) -> str:
    """The status of what these checks watch: the worst of them, and maintenance above all."""
    worst = PASSING
    for check in checks:
        status = MAINTENANCE if is_maintenance(check.id) else check.status
        if _ORDER.get(status, 2) > _ORDER[worst]:
            worst = status if status in _ORDER else CRITICAL
    return worst


def is_maintenance(check_id: str) -> bool:
    return check_id == NODE_MAINTENANCE or check_id.startswith(SERVICE_MAINTENANCE)
