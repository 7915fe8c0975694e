"""The status of a check that mirrors another service's health, computed from the checks of that service's node.

For a service of its own node `agent/local.py` calls `alias_result`, which is pure, whenever one of those checks or
services changes; a service of another node is followed by watches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rostra.agent.checks.check import CRITICAL, PASSING, WARNING, Result
from rostra.agent.checks.spec import CheckSpec
from rostra.server.state.rows import CheckRow, read_row

if TYPE_CHECKING:
    from rostra.agent.results import Live, Results


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


def follow(spec: CheckSpec, results: Results, observe: Callable[[Result], None]) -> Callable[[], None]:
    """Mirror a service of another node, from watches of that node. Returns what ends it."""
    from rostra.server.state.catalog import NodeServices
    from rostra.server.state.health import NodeChecks

    services: Live = results.live(NodeServices(spec.alias_node), token=spec.token)
    checks: Live = results.live(NodeChecks(spec.alias_node), token=spec.token)

    def refresh() -> None:
        if services.is_ready and checks.is_ready:
            rows = [read_row(CheckRow, checks.rows[key]) for key in checks.keys]
            exists = ("s", spec.alias_service) in services.rows
            observe(alias_result(spec.alias_node, spec.alias_service, rows, service_exists=exists))

    removers = (services.on_change(refresh), checks.on_change(refresh))
    asyncio.get_running_loop().call_soon(refresh)

    def stop() -> None:
        for remove in removers:
            remove()

    return stop
