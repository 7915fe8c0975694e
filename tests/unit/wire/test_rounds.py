"""Barriers of one server share a round of Raft, and none of them one that had begun before it came."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rostra.wire.errors import NoLeader
from rostra.wire.rounds import Rounds as SharedRounds


class Rounds:
    """Rounds that last until the test ends them."""

    def __init__(self) -> None:
        self.begun: list[asyncio.Future[None]] = []
        self.rounds = SharedRounds(self._run, asyncio.ensure_future)

    async def _run(self, since: float) -> None:
        self.begun.append(asyncio.get_running_loop().create_future())
        await self.begun[-1]

    def join(self) -> asyncio.Future[None]:
        return self.rounds.join()

    async def turns(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)


async def test_requests_that_come_together_share_a_round() -> None:
    rounds = Rounds()
    requests = [rounds.join() for _ in range(10)]
    await rounds.turns()
    assert len(rounds.begun) == 1
    rounds.begun[0].set_result(None)
    await asyncio.gather(*requests)


async def test_a_request_never_joins_a_round_that_has_begun() -> None:
    rounds = Rounds()
    first = rounds.join()
    await rounds.turns()
    second = rounds.join()
    rounds.begun[0].set_result(None)
    await first
    await rounds.turns()
    assert not second.done()
    assert len(rounds.begun) == 2
    rounds.begun[1].set_result(None)
    await second


@pytest.mark.parametrize("error", [NoLeader(), ZeroDivisionError()])
async def test_who_waits_for_a_round_that_fails_is_told(error: Any) -> None:
    rounds = Rounds()
    request = rounds.join()
    await rounds.turns()
    rounds.begun[0].set_exception(error)
    with pytest.raises(NoLeader):
        await request
