"""The links to the other servers: at most one live connection per pair, and nothing leaves before the disk has it.

Connections come in authenticated: `accept` takes inbound ones, `dial` (given) makes outbound ones; the higher id dials.
A new connection replaces the old one. A link that falls silent is dropped, since a peer behind a dead network sends no
farewell. Within a link messages are in order and never repeated; a lost link loses its queue. Messages that promise
something (answers, votes) wait until the journal has what they promise; appends and pre-votes do not.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from pysyncobj.transport import Transport

from rostra.runtime import log as logging
from rostra.runtime.service import Tasks
from rostra.server.raft.core import Timing, server
from rostra.server.raft.journal import Journal
from rostra.server.raft.members import Member, Members
from rostra.server.raft.messages import BadMessage, Message, decode, encode
from rostra.wire.connection import FrameConnection
from rostra.wire.frames import RAFT_FRAME_BYTES_MAX

log = logging.get("raft")

#: Said in the heat of the moment: they promise nothing that a crash could break.
#: A piece of a snapshot is of a file that is whole on this server's disk; timeout_now gives up a lease, no promise.
#: lived says what is on the disk already.
_UNBOUND = frozenset({"append_entries", "pre_vote", "ready", "lived", "outlived", "ping", "snapshot", "timeout_now"})

DIAL_AGAIN_MIN_S, DIAL_AGAIN_MAX_S = 0.02, 0.5


Dial = Callable[[Member], Awaitable[FrameConnection]]


class Link:
    """The connection to one member, while there is one."""

    __slots__ = ("connection", "dialer", "heard_s", "is_up", "lost", "member", "node", "spoke_s")

    def __init__(self, member: Member) -> None:
        self.member = member
        self.node = server(member.id)
        self.connection: FrameConnection | None = None
        self.is_up = False  # the core may send
        self.heard_s = self.spoke_s = 0.0
        self.dialer: asyncio.Task[None] | None = None
        self.lost = asyncio.Event()
        self.lost.set()


class Links(Transport):  # type: ignore[misc]
    """pysyncobj's transport; `on_message(peer_id, message)`, `on_link(peer_id, is_up)`, `rewrite` are the owner's."""

    def __init__(
        self,
        *,
        node_id: str,
        cluster_id: str,
        journal: Journal,
        timing: Timing,
        dial: Dial,
        chance: random.Random,
        on_message: Callable[[str, Message], None],
        on_link: Callable[[str, bool], None],
        rewrite: Callable[[Message], tuple[Message, bool]],
    ) -> None:
        super().__init__(None, None, [])
        self._node_id, self._cluster_id, self._journal, self._dial = node_id, cluster_id, journal, dial
        self._on_message, self._on_link, self._rewrite = on_message, on_link, rewrite
        self.links: dict[str, Link] = {}
        self._chance = chance
        self._waiting: deque[tuple[int, FrameConnection, bytes]] = deque()  # (lsn, …): spoken when that is durable
        self._loop = asyncio.get_running_loop()
        self._silent_after_s = max(2.0, 4 * timing.election_max_s)
        self._unflushed: dict[FrameConnection, None] = {}
        self._started = self._closed = False
        self.reconnects = 0
        self._tasks = Tasks("raft")

    # -- the life of links

    def set_members(self, members: Members) -> None:
        """Have a link to each of `members` but this server, and to nobody else (H21)."""
        wanted = {member.id: member for member in members if member.id != self._node_id}
        for gone in [link for peer_id, link in self.links.items() if peer_id not in wanted]:
            del self.links[gone.member.id]
            if gone.dialer is not None:
                gone.dialer.cancel()
            connection = gone.connection
            if connection is not None:
                self._detach(gone, connection, "not a member any more")
                connection.abort("not a member any more")
        for member in wanted.values():
            link = self.links.get(member.id)
            if link is None:
                link = self.links[member.id] = Link(member)
            link.member = member  # a new address counts from the next dialling on
            if self._started and link.dialer is None and member.id < self._node_id:
                self._dial_for_ever(link)

    def start(self) -> None:
        """Dial the members with lower ids, for ever."""
        self._started = True
        for link in self.links.values():
            if link.dialer is None and link.member.id < self._node_id:
                self._dial_for_ever(link)

    def _dial_for_ever(self, link: Link) -> None:
        link.dialer = self._tasks.keep(f"dial {link.member.name}", partial(self._keep_dialled, link))

    async def stop(self) -> None:
        self._closed = True
        await self._tasks.stop()
        self._waiting.clear()
        for link in self.links.values():
            connection = link.connection
            if connection is not None:
                self._detach(link, connection, "this server stops")
                connection.close()

    def accept(self, peer_id: str, connection: FrameConnection) -> None:
        """An inbound connection, proved to be `peer_id`'s."""
        link = self.links.get(peer_id)
        if self._closed or link is None or peer_id < self._node_id:
            log.warn("raft connection refused", peer=peer_id, reason="not a member" if link is None else "wrong side")
            connection.abort("not expected here")
            return
        self._attach(link, connection)

    async def _keep_dialled(self, link: Link) -> None:
        wait_s = DIAL_AGAIN_MIN_S
        while True:
            try:
                async with asyncio.timeout(self._silent_after_s / 2):
                    connection = await self._dial(link.member)
            except Exception as e:  # the dialler is given; whatever it raises, the member is not there now
                log.debug("raft dial failed", peer=link.member.name, error=str(e) or type(e).__name__)
            else:
                self._attach(link, connection)
                self._send_now(link, {"type": "ready"})
                self._up(link)
                connected_s = self._loop.time()
                await link.lost.wait()
                if self._loop.time() - connected_s > 1.0:
                    wait_s = DIAL_AGAIN_MIN_S
            await asyncio.sleep(wait_s * self._chance.uniform(0.5, 1.0))
            wait_s = min(wait_s * 2, DIAL_AGAIN_MAX_S)

    def _attach(self, link: Link, connection: FrameConnection) -> None:
        old = link.connection
        if old is not None:
            self._detach(link, old, "replaced by a new connection")
            old.abort("replaced by a new connection")
        link.connection = connection
        link.lost.clear()
        link.heard_s = link.spoke_s = self._loop.time()
        connection.raise_bound(RAFT_FRAME_BYTES_MAX)
        connection.on_frame = partial(self._on_frame, link, connection)
        connection.on_lost = partial(self._detach, link, connection)
        if not connection.open:
            self._detach(link, connection, "lost before it was used")

    def _up(self, link: Link) -> None:
        if link.connection is None or link.is_up:
            return
        link.is_up = True
        self.reconnects += 1
        log.debug("raft link up", peer=link.member.name)
        self._onNodeConnected(link.node)
        self._on_link(link.member.id, True)

    def _detach(self, link: Link, connection: FrameConnection, reason: str) -> None:
        """`connection` is of no use any more. Its queue goes with it."""
        if link.connection is not connection:
            return
        link.connection = None
        connection.on_frame = connection.on_lost = None
        self._waiting = deque(item for item in self._waiting if item[1] is not connection)
        link.lost.set()
        if link.is_up:
            link.is_up = False
            log.debug("raft link down", peer=link.member.name, reason=reason)
            self._onNodeDisconnected(link.node)
            self._on_link(link.member.id, False)

    def check(self) -> None:
        """Called on a timer: drop silent links, keep quiet ones alive."""
        now = self._loop.time()
        for link in self.links.values():
            if link.connection is None:
                continue
            if now - link.heard_s > self._silent_after_s:
                connection = link.connection
                self._detach(link, connection, "silent")
                connection.abort("silent")
            elif link.is_up and now - link.spoke_s > self._silent_after_s / 4:
                self._send_now(link, {"type": "ping"})

    def forgive_silence(self) -> None:
        """This process itself was stopped for a while: what the peers said meanwhile is still unread."""
        now = self._loop.time()
        for link in self.links.values():
            link.heard_s = now

    # -- messages

    def _on_frame(self, link: Link, connection: FrameConnection, payload: bytes) -> None:
        if link.connection is not connection:
            return
        link.heard_s = self._loop.time()
        try:
            message = decode(self._cluster_id, payload)
            if message is None:
                return
            if not link.is_up:  # the dialling side says "ready" first, whatever it says
                self._up(link)
            if message["type"] not in ("ready", "ping"):
                self._on_message(link.member.id, message)
        except BadMessage as e:
            log.warn("raft link closed for a bad message", peer=link.member.name, error=str(e))
            self._detach(link, connection, "bad message")
            connection.abort("bad message")

    def send(self, node: Any, message: Message) -> bool:
        """The core's way out."""
        message, is_urgent = self._rewrite(message)
        self.post(node.id, message)
        if is_urgent and self._waiting:
            # The disk is at work. That this server lives and follows needs no disk; the answer itself follows later.
            link = self.links.get(node.id)
            if link is not None and link.connection is not None:
                self._send_now(link, {**message, "success": False, "reset": False, "next_node_idx": 1})
        return True

    def post(self, peer_id: str, message: Message) -> None:
        """Send now, or as soon as the journal has what the message promises."""
        link = self.links.get(peer_id)
        if link is None or link.connection is None or not link.is_up:
            return
        if message["type"] in _UNBOUND or (self._journal.is_durable and not self._waiting):
            self._send_now(link, message)
        else:
            self._waiting.append((self._journal.lsn, link.connection, encode(self._cluster_id, message)))

    def _send_now(self, link: Link, message: Message) -> None:
        if link.connection is not None:
            link.spoke_s = self._loop.time()
            link.connection.send(encode(self._cluster_id, message))
            self._unflushed[link.connection] = None

    def release(self) -> None:
        """Send what the disk has by now."""
        while self._waiting and self._waiting[0][0] <= self._journal.durable_lsn:
            _, connection, payload = self._waiting.popleft()
            connection.send(payload)
            self._unflushed[connection] = None

    def flush(self) -> None:
        """Write what was sent in this turn."""
        unflushed, self._unflushed = self._unflushed, {}
        for connection in unflushed:
            connection.flush()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    # -- the rest of pysyncobj's interface

    @property
    def ready(self) -> bool:
        return True

    def destroy(self) -> None:
        """The owner calls `stop`."""
