"""The status of a check that mirrors another service's health: pure, computed from the checks of that service's node.

`agent/local.py` calls it again whenever one of those checks or services changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from rostra.agent.checks.check import CRITICAL, PASSING, WARNING, Result
from rostra.server.state.rows import CheckRow


def alias_result(node: str, service_id: str, checks: Iterable[CheckRow], *, service_exists: bool) -> Result:
    """The worst of the node's own checks and those of `service_id`; without a service id, of the node's own."""
    status, output = PASSING, "No checks found."
    for check in checks:
        if check.service_id and check.service_id != service_id:
            continue
        if check.status == PASSING:
            if status == PASSING:
                output = "All checks passing."
            continue
        if check.status == WARNING and status != PASSING:
            continue
        status = WARNING if check.status == WARNING else CRITICAL
        output = f'Aliased check "{check.name}" failing: {check.output}'
        if status == CRITICAL:
            break
    if service_id and not service_exists:
        return Result(CRITICAL, f"Service {service_id} could not be found on node {node}")
    return Result(status, output)
