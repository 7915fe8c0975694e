"""How this server stands with its cluster, for as long as it runs: has it moved, was it removed, who is there?

A server keeps its place by its key, not by its address. So one that was started with another address tells the leader.
One that hears of no leader asks around: at the addresses of the list, at those of `retry_join` and wherever others were
heard from. From the answers it learns where they are, who belongs to the cluster by now, and whether it still does. One
that has a leader but cannot reach a member does the same now and then: both may have moved, and perhaps only one was
told where the other is now. Such an answer counts only if it comes from a key that this server hears already, or from
one that proves to be a server's (`introduction.py`). The same goes for the question; addresses are hints at most.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rostra.runtime.log import RateLimited, get
from rostra.server.bootstrap import Ask
from rostra.server.founding import JOIN, WAITING
from rostra.server.membership import ServerInfo, parse_membership, parse_server
from rostra.server.node import ServerNode
from rostra.server.peers import Peers
from rostra.server.raft.log import RaftLog
from rostra.server.raft.members import Member, Members
from rostra.server.roster import ALONE_S, address_of, join_address
from rostra.wire.errors import Conflict, Denied, NoLeader, RostraError, Timeout

log = get("servers")

LOOK_EVERY_S = 0.5
ASK_EVERY_S = 1.0
ASKED_MAX = 64
#: A server that was introduced is heard until this one has followed a leader of its own list for this long.
SETTLED_S = 10.0
#: How often a member that cannot be reached is looked for, while there is a leader.
LOOK_FOR_S = 5.0


class Standing:
    """`ask` calls a "bootstrap" verb of the server at an address; `asking` is what this server says with it."""

    def __init__(
        self,
        node: ServerNode,
        raft: RaftLog,
        peers: Peers,
        *,
        host: str,
        port: int,
        candidates: Callable[[], Sequence[str]],
        asking: Callable[[], dict[str, Any]],
        ask: Ask,
        moved: Callable[[str, str, int], Awaitable[None]],
        introduce: Callable[[Members], None],
        hear: Callable[[ServerInfo, Mapping[str, Any], str], bool],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node, self._raft, self._peers = node, raft, peers
        self._host, self._port = host, port
        self._candidates, self._asking, self._ask = candidates, asking, ask
        self._moved, self._introduce, self._hear, self._now = moved, introduce, hear, now
        self._lacks_leader_since: float | None = None
        self._follows_since = self._whole_at = self._looked_at = now()
        self._has_asked = False
        self._limited = RateLimited(log, 30.0)

    async def keep(self) -> None:
        while True:
            if self._needs_others():
                await self._ask_around()
                await asyncio.sleep(ASK_EVERY_S)
                continue
            if self._is_settled():
                self._introduce(())  # its own list says it all
            await self._report_address()
            # Once in any case: the join addresses may be those of another cluster.
            if self._misses_one() or not self._has_asked:
                self._has_asked = True
                self._looked_at = self._now()
                await self._ask_around(is_led=True)
            await asyncio.sleep(LOOK_EVERY_S)

    def _me(self) -> Member | None:
        return next((m for m in self._raft.members if m.id == self._node.node_id), None)

    def _needs_others(self) -> bool:
        now = self._now()
        if self._me() is None:
            return True
        if self._raft.leader_id is not None:
            self._lacks_leader_since = None
        elif self._lacks_leader_since is None:
            self._lacks_leader_since = now
        return self._lacks_leader_since is not None and now - self._lacks_leader_since > ALONE_S

    def _is_settled(self) -> bool:
        """Whether this server has followed a leader of its own list for a while."""
        now = self._now()
        if not any(m.id == self._raft.leader_id for m in self._raft.members):
            self._follows_since = now
        return now - self._follows_since > SETTLED_S

    def misses_others(self) -> bool:
        """Whether more addresses to ask would help."""
        return self._now() - self._whole_at > ALONE_S

    def _misses_one(self) -> bool:
        """Whether it is time to look for a member that cannot be reached."""
        now = self._now()
        me, caller = self._node.node_id, self._peers.client
        if self._raft.leader_id is not None and all(m.id == me or caller(m.id) for m in self._raft.members):
            self._whole_at = now
        return self.misses_others() and now - self._looked_at > LOOK_FOR_S

    # -- it has moved -------------------------------------------------------------------------------------------

    async def _report_address(self) -> None:
        me, leader_id = self._me(), self._raft.leader_id
        if me is None or leader_id is None or (me.host, me.port) == (self._host, self._port):
            return
        try:
            if self._raft.is_leader:
                await self._moved(me.id, self._host, self._port)
                return
            leader = self._peers.client(leader_id)
            if leader is not None:
                async with asyncio.timeout(6.0):
                    await leader.call("act", "raft.moved", {"host": self._host, "port": self._port})
        except (NoLeader, Timeout, Conflict, TimeoutError):
            pass  # another change is on its way, or another leader: once more, soon
        except RostraError as e:
            self._limited.warn("the leader does not take this server's new address", reason=e.message)

    # -- who is there -------------------------------------------------------------------------------------------

    async def _ask_around(self, *, is_led: bool = False) -> None:
        others = [m for m in self._raft.heard if m.id != self._node.node_id]
        known = [join_address(*self._peers.where(m)) for m in others] + [address_of(m) for m in others]
        own = join_address(self._host, self._port)
        addresses = [a for a in dict.fromkeys([*known, *self._candidates()]) if a != own][:ASKED_MAX]
        await asyncio.gather(*(self._ask_one(a, is_led=is_led) for a in addresses))

    async def _ask_one(self, address: str, *, is_led: bool = False) -> None:
        try:
            async with asyncio.timeout(2.0):
                reply, key_hash = await self._ask(address, JOIN, self._asking())
            said = parse_server(reply)
            member = next((m for m in self._raft.heard if m.key_hash == key_hash and m.id == said.node_id), None)
            if member is None:
                if not is_led:
                    self._hear(said, reply, key_hash)  # whoever that is, this server does not know it
                return
            self._peers.hint(member.id, said.address, said.rpc_port)
            if is_led:
                return  # the leader says who belongs to the cluster; the other's list may be older
            if reply.get("membership") is not None:  # settled or not: who is heard counts for nothing
                self._introduce(parse_membership(reply.get("membership")).as_members())
            elif reply.get("state") == WAITING:
                self._say_removed(member, str(reply.get("reason", "")))
        except Denied as e:
            self._limited.warn(
                "that address belongs to another cluster", key=address, address=address, reason=e.message
            )
        except Exception as e:  # a network, another program, another version: all of it means "not now"
            log.debug("no answer about the cluster", address=address, reason=str(e))

    def _say_removed(self, by: Member, reason: str) -> None:
        self._limited.warn(
            "this server was removed from the cluster and waits to be let in again",
            says=by.name,
            reason=reason[:300] or "an operator or autopilot took it out of the list of servers",
            hint=f"`rostra operator raft add-peer {self._node.name}` on one of its servers, or stop it for good",
        )
