"""Pre-votes of servers that lose their leader at the same moment: one of them asks on, the other lets it."""

from __future__ import annotations

import random
from typing import Any

from rostra.server.raft.core import Timing
from rostra.server.raft.elections import YIELD_S, Elections

MS = 1_000_000


class Disconnected:
    """What `Elections` sees of a core and a journal whose leader is gone for long."""

    def __init__(self, last: tuple[bytes, int, int] = (b"", 7, 2)) -> None:
        self.last = last

    def __getitem__(self, index: int) -> tuple[bytes, int, int]:
        return self.last

    def term(self) -> int:
        return 2

    def is_leader(self) -> bool:
        return False

    def forget_leader(self) -> None: ...


class Server:
    def __init__(self, name: str, network: dict[str, Server], last: tuple[bytes, int, int] = (b"", 7, 2)) -> None:
        self.name, self.network, self.now = name, network, 0
        self.inbox: list[tuple[str, dict[str, Any]]] = []
        core: Any = Disconnected(last)
        self.elections = Elections(
            core,
            core,
            node_id=name,
            timing=Timing(),
            clock=lambda: self.now,
            chance=random.Random(1),
            send=self.send,
            lease_valid=lambda: False,
        )
        self.elections.set_voters("abc")
        network[name] = self
        self.now = 1000 * MS  # the leader has not been heard for a second

    def send(self, peer_id: str, message: dict[str, Any]) -> None:
        if peer_id in self.network:
            self.network[peer_id].inbox.append((self.name, message))

    def read(self) -> None:
        inbox, self.inbox = self.inbox, []
        for peer_id, message in inbox:
            if message["type"] == "pre_vote":
                self.elections.on_pre_vote(peer_id, message)
            else:
                self.elections.on_pre_vote_reply(peer_id, message)


def exchange(*servers: Server) -> None:
    while any(s.inbox for s in servers):
        for server in servers:
            server.read()


def test_of_two_that_ask_at_the_same_moment_exactly_one_may_campaign() -> None:
    network: dict[str, Server] = {}
    b, c = Server("b", network), Server("c", network)
    assert [b.elections.may_campaign(), c.elections.may_campaign()] == [False, False]
    exchange(b, c)
    assert [b.elections.may_campaign(), c.elections.may_campaign()] == [True, False]


def test_who_has_the_longer_log_may_campaign_whatever_its_rank() -> None:
    network: dict[str, Server] = {}
    b, c = Server("b", network), Server("c", network, last=(b"", 9, 2))
    b.elections.may_campaign()
    c.elections.may_campaign()
    exchange(b, c)
    assert [b.elections.may_campaign(), c.elections.may_campaign()] == [False, True]


def test_who_granted_a_pre_vote_asks_for_itself_a_little_later_if_nothing_came_of_it() -> None:
    network: dict[str, Server] = {}
    b, c = Server("b", network), Server("c", network)
    b.elections.may_campaign()
    exchange(b, c)
    asked = c.elections.pre_votes
    c.elections.may_campaign()
    assert c.elections.pre_votes == asked
    c.now += int(YIELD_S * 2 * 1e9)
    c.elections.may_campaign()
    assert c.elections.pre_votes == asked + 1
