"""Waiting for what must come, in tests that run on a loop: one function for all of them.

A deadline here is patience and no figure of speed: what an idle machine needs many times over, and a busy one gets
PATIENCE times as long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from rostra.wire.errors import NoLeader, Timeout

PATIENCE = 5.0
POLL_S = 0.003


async def eventually(condition: Callable[[], Any], within_s: float = 10.0, what: str = "") -> Any:
    """The condition's first true value; it may be a plain or an async function. Raises AssertionError.

    An election under way, a row that is not there yet and a failed `assert` in the condition count as not yet.
    """
    seen: Any = "nothing"
    try:
        async with asyncio.timeout(within_s * PATIENCE):
            while True:
                try:
                    value = condition()
                    if isinstance(value, Awaitable):
                        value = await value
                    seen = value
                except (NoLeader, Timeout, AssertionError, LookupError) as e:
                    value, seen = None, e
                if value:
                    return value
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"{what or condition}: not within {within_s:g} s, last seen: {seen!r}") from None
