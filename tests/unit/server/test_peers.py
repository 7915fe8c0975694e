"""Where other servers are: what they say themselves counts before what others say of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rostra.server import peers as module
from rostra.server.peers import Peers
from rostra.server.raft.members import VOTER, Member
from rostra.wire.errors import NoLeader

S2 = Member("id-s2", "10.0.0.2", 8300, "2" * 64, "s2", VOTER)


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hosts in the order in which they were tried: nobody answers."""
    hosts: list[str] = []

    async def dial(host: str, port: int, *_: Any, **__: Any) -> Any:
        hosts.append(host)
        raise NoLeader("nobody there")

    monkeypatch.setattr(module, "dial", dial)
    return hosts


def _peers() -> Peers:
    def spawn(work: Any) -> asyncio.Task[Any]:
        work.close()
        return asyncio.get_running_loop().create_task(asyncio.sleep(0))

    peers = Peers(me="id-s1", context=lambda: None, about=dict, spawn=spawn)  # type: ignore[arg-type,return-value]
    peers.follow([S2])
    return peers


async def _dial(peers: Peers) -> None:
    with pytest.raises(NoLeader):
        await peers.dial_raft(S2)


async def test_where_a_server_was_heard_from_is_tried_before_what_others_say_and_that_before_the_list(
    dialled: list[str],
) -> None:
    peers = _peers()
    peers.hint("id-s2", "10.0.0.22", 8300)
    peers.hear_say("id-s2", "10.0.0.23", 8300)
    assert peers.where(S2) == ("10.0.0.22", 8300)
    await _dial(peers)
    assert dialled == ["10.0.0.22", "10.0.0.23", "10.0.0.2"]


async def test_the_old_list_of_another_server_takes_no_address_away_that_a_server_has_shown_itself(
    dialled: list[str],
) -> None:
    peers = _peers()
    peers.hint("id-s2", "10.0.0.22", 8300)
    peers.hear_say("id-s2", "10.0.0.2", 8300)
    await _dial(peers)
    assert dialled == ["10.0.0.22", "10.0.0.2"]


async def test_hearsay_is_told_to_nobody_and_what_did_not_answer_is_not_tried_again(dialled: list[str]) -> None:
    peers = _peers()
    peers.hear_say("id-s2", "10.0.0.23", 8300)
    peers.hear_say("id-of-nobody", "10.0.0.99", 8300)
    assert peers.where(S2) == ("10.0.0.2", 8300)
    await _dial(peers)
    await _dial(peers)
    assert dialled == ["10.0.0.23", "10.0.0.2", "10.0.0.2"]
