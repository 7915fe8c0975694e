"""When a check that the agent runs itself is due.

`agent/local.py` keeps one such task per check and is told each result, and decides what a result changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rostra.agent.checks import kinds
from rostra.agent.checks.check import CRITICAL, Result
from rostra.agent.checks.spec import CheckSpec

FIRST_RUN_WITHIN_S = 0.5
FIRST_PAUSE_S = 0.25


async def run_periodically(
    spec: CheckSpec,
    probe: kinds.Probe,
    *,
    observe: Callable[[Result], None],
    is_critical: Callable[[], bool],
    settles_s: float,
    random: Callable[[], float],
) -> None:
    """From start to start the interval; a run that takes longer delays the next, never overlaps it.

    A service, or a sidecar's process, is often registered just before it listens. So until the first success the
    pause grows from a quarter of a second to the interval; a script is not run more often than it asks for.
    `is_critical`: whether the check is, whatever its last result was.
    """
    loop, kind = asyncio.get_running_loop(), kinds.of(spec)
    await asyncio.sleep(settles_s + random() * min(spec.interval_s, FIRST_RUN_WITHIN_S))
    due = loop.time()
    pause_s = spec.interval_s if kind.runs_programs else FIRST_PAUSE_S
    while True:
        try:
            result = await probe(spec)
        except Exception as error:
            observe(Result(CRITICAL, f"the check could not be run: {error!r}"))
            raise
        observe(result)
        if result.status != CRITICAL or not is_critical():
            pause_s = spec.interval_s
        due = max(due + min(pause_s, spec.interval_s), loop.time())
        pause_s *= 2
        await asyncio.sleep(max(0.0, due - loop.time()))
