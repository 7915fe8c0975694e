"""The agents that are connected to this server: by the name of their node and the key that TLS has proved.

A name may go to another key, so it is the key that counts: who is heard, who is connected, and whose session ends when
its name is another's. Called by the endpoint; the leader's duties and enrolment ask it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from rostra.runtime.log import RateLimited, get
from rostra.server.state.rows import MemberRow
from rostra.wire.rpc import Served

if TYPE_CHECKING:
    from rostra.server.requests import Peer

log = get("rpc")

#: Agents ping every 0.5 s. One that was not heard for this long is not reported as alive.
FRESH_S = 1.5


class Agents:
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        #: By node name and key ("" for the agent of this host); the newest wins.
        self.sessions: dict[tuple[str, str], Served] = {}
        self._of: dict[str, dict[Served, Peer]] = {}  # all connections of agents, by node name
        self._ended = RateLimited(log, 10.0)

    def took(self, peer: Peer, served: Served) -> None:
        self.sessions[peer.name, peer.key_hash] = served
        self._of.setdefault(peer.name, {})[served] = peer

    def lost(self, peer: Peer, served: Served) -> None:
        """A connection, perhaps an agent's, has ended."""
        if self.sessions.get((peer.name, peer.key_hash)) is served:
            del self.sessions[peer.name, peer.key_hash]
        of_name = self._of.get(peer.name)
        if of_name is not None and of_name.pop(served, None) is not None and not of_name:
            del self._of[peer.name]

    def heard(self) -> Iterator[tuple[str, str]]:
        """The nodes whose agents have a session here and were heard just now, each with its key: a cut network closes
        no connection."""
        now = self._now()
        return (node for node, served in self.sessions.items() if now - served.connection.heard_at <= FRESH_S)

    def holds(self, name: str, key_hash: str) -> bool:
        """Whether an agent of that name and key has a connection here that is not known to be lost."""
        return any(peer.key_hash == key_hash for peer in self._of.get(name, {}).values())

    def end_former(self, name: str, key_hash: str) -> None:
        """That name belongs to this key: who has it under another one speaks for that node no longer. It comes back at
        once, and is told why at its hello."""
        for served, peer in list(self._of.get(name, {}).items()):
            if peer.key_hash != key_hash and not peer.local:
                self._ended.warn(
                    "ended the session of a node whose name belongs to another key now",
                    key=name,
                    node=name,
                    peer=peer.address,
                    its_key=peer.key_hash,
                    key_now=key_hash,
                )
                served.connection.abort("the node's name belongs to another key")

    def end_all_former(self, members: Mapping[str, MemberRow]) -> None:
        """As `end_former`, of all names: the state has become another one."""
        for name in list(self._of):
            row = members.get(name)
            if row is not None:
                self.end_former(name, row.key_hash)
