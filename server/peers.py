"""Connections from this server to the others: one for Raft (dialled by the higher id), one for questions.

Every connection is mTLS and the other end must show the key that the replicated member list names. A peer that is down
is tried again with a short back-off; a peer that does not answer a ping in time is dropped, because a cut network
closes no connection by itself. This server tries the address at which another was last heard, and those that others
name, before the address in the list. The other may have moved, and its key says who it is.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable
from typing import Any

from rostra.runtime.log import get
from rostra.runtime.tls import explain, peer_key_hash
from rostra.server.raft.members import Member
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import Denied, NoLeader, RostraError
from rostra.wire.frames import PEER_FRAME_BYTES_MAX
from rostra.wire.rpc import RpcClient, check_hello, hello

log = get("peers")

DIAL_S = 2.0
RETRY_S = 0.2
PING_EVERY_S = 0.5
PING_TIMEOUT_S = 1.5


async def dial(
    host: str, port: int, context: ssl.SSLContext, greeting: bytes, *, key_hash: str | None, timeout_s: float = DIAL_S
) -> tuple[FrameConnection, dict[str, Any], str]:
    """An open connection after both hellos, the peer's hello and its key hash. Raises as `ask` does, and BadRequest."""
    connection, answer, shown = await ask(host, port, context, greeting, key_hash=key_hash, timeout_s=timeout_s)
    try:
        return connection, check_hello(answer), shown
    except RostraError:
        connection.abort("refused")
        raise


async def ask(
    host: str, port: int, context: ssl.SSLContext, first_frame: bytes, *, key_hash: str | None, timeout_s: float
) -> tuple[FrameConnection, bytes, str]:
    """Dial, send one frame, wait for one: the connection, the answer, and the hash of the peer's key.

    `key_hash` None accepts any key that the trust anchors vouch for. Raises Denied for another key, NoLeader where
    nobody answers.
    """
    loop = asyncio.get_running_loop()
    connection = FrameConnection()
    first: asyncio.Future[bytes] = loop.create_future()
    first.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be left to look
    connection.on_frame = lambda payload: None if first.done() else first.set_result(payload)
    connection.on_lost = lambda reason: None if first.done() else first.set_exception(ConnectionError(reason))
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(lambda: connection, host, port, ssl=context, server_hostname="")
            raw = connection.info("socket")
            if raw is not None:
                raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if connection.ssl_object is None:
                raise ConnectionError("closed right after the handshake")
            shown = peer_key_hash(connection.ssl_object)
            if key_hash is not None and shown != key_hash:
                raise Denied(f"{host}:{port} showed another key than the member list names")
            connection.send(first_frame)
            return connection, await first, shown
    except (OSError, ssl.SSLError, TimeoutError, ValueError, OverflowError) as e:  # the last two: no address at all
        connection.abort("dial failed")
        raise NoLeader(f"cannot reach {host}:{port}: {explain(e)}") from None
    except BaseException:
        connection.abort("refused")
        raise


class Peers:
    """The clients to all other servers."""

    def __init__(
        self,
        *,
        me: str,
        context: Callable[[], ssl.SSLContext],
        about: Callable[[], dict[str, Any]],
        spawn: Callable[..., asyncio.Task[Any]],
    ) -> None:
        self._me, self._context, self._about, self._spawn = me, context, about, spawn
        self._members: dict[str, Member] = {}
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._clients: dict[str, RpcClient] = {}
        self._hints: dict[str, tuple[str, int]] = {}  # where a server itself was reached or heard from
        self._hearsay: dict[str, tuple[str, int]] = {}  # where another one says that it is

    def follow(self, members: Iterable[Member]) -> None:
        """Keep a client to each of `members` but ourselves, and to nobody else. The newest list counts."""
        self._members = {m.id: m for m in members if m.id != self._me}
        for server_id in [i for i in self._tasks if i not in self._members]:
            self._tasks.pop(server_id).cancel()
            self._hints.pop(server_id, None)
            self._hearsay.pop(server_id, None)
        for server_id, member in self._members.items():
            for known in (self._hints, self._hearsay):
                if known.get(server_id) == (member.host, member.port):
                    del known[server_id]
            if server_id not in self._tasks:
                self._tasks[server_id] = self._spawn(self._keep(server_id))

    def client(self, server_id: str) -> RpcClient | None:
        return self._clients.get(server_id)

    def clients(self) -> list[tuple[str, RpcClient]]:
        """(name, client) of those that can be asked now."""
        return [(self._members[i].name, c) for i, c in self._clients.items() if i in self._members and c.open]

    def hint(self, server_id: str, host: str, port: int) -> None:
        """That server, known by its key, was reached or heard from there."""
        member = self._members.get(server_id)
        if member is not None and (member.host, member.port) != (host, port):
            self._hints[server_id] = (host, port)
        else:
            self._hints.pop(server_id, None)

    def hear_say(self, server_id: str, host: str, port: int) -> None:
        """Another server says that this one is there. It may be what that one's old list says: it replaces no hint."""
        member = self._members.get(server_id)
        if member is not None and (member.host, member.port) != (host, port):
            self._hearsay[server_id] = (host, port)

    def where(self, member: Member) -> tuple[str, int]:
        """Where that server was last reached or heard from, to tell others."""
        return self._hints.get(member.id, (member.host, member.port))

    async def dial_raft(self, member: Member) -> FrameConnection:
        """For the Raft layer: a connection that has exchanged hellos. Raises RostraError."""
        connection, _ = await self._dial(member, "raft")
        return connection

    async def _dial(self, member: Member, protocol: str) -> tuple[FrameConnection, dict[str, Any]]:
        connection, answer = await self._dial_where_it_may_be(member, hello(protocol, **self._about()))
        connection.is_of_the_cluster()
        return connection, answer

    async def _dial_where_it_may_be(self, member: Member, greeting: bytes) -> tuple[FrameConnection, dict[str, Any]]:
        for known in (self._hints, self._hearsay):
            place = known.get(member.id)
            if place is None:
                continue
            try:
                connection, answer, _ = await dial(
                    *place, self._context(), greeting, key_hash=member.key_hash, timeout_s=1.0
                )
                return connection, answer
            except RostraError:
                if known.get(member.id) == place:
                    del known[member.id]
        connection, answer, _ = await dial(
            member.host, member.port, self._context(), greeting, key_hash=member.key_hash
        )
        return connection, answer

    async def _keep(self, server_id: str) -> None:
        told = ""
        while (member := self._members.get(server_id)) is not None:
            try:
                await self._session(member)
                told = ""
            except RostraError as e:
                if told != e.message:
                    log.warn("server is not reachable, trying again", server=member.name, error=e.message)
                    told = e.message
            await asyncio.sleep(RETRY_S)

    async def _session(self, member: Member) -> None:
        connection, answer = await self._dial(member, "peer")
        client = RpcClient(connection, level=answer.get("level", 1), request_bytes_max=PEER_FRAME_BYTES_MAX)
        connection.on_frame, connection.on_lost = client.on_frame, client.on_lost
        self._clients[member.id] = client
        try:
            while client.open:
                async with asyncio.timeout(PING_TIMEOUT_S):
                    await client.call("act", "ping", {})
                await asyncio.sleep(PING_EVERY_S)
        except TimeoutError:
            log.warn("server does not answer, dropping the connection", server=member.name)
        finally:
            if self._clients.get(member.id) is client:
                del self._clients[member.id]
            connection.abort("done")
