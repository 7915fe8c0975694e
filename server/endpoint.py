"""Who may talk to this server, and which verb goes where.

Two doors: TCP (mTLS always, 8300) and a Unix socket for the agent of this host (the kernel says who it is). The hello
decides what a connection is for: "rpc" an agent, "peer" and "raft" another server of the replicated member list,
"bootstrap" a server that has no cluster yet. Everything else is closed with one rate-limited line.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rostra.runtime.log import RateLimited, get
from rostra.runtime.tls import explain, peer_key_hash
from rostra.server.node import ServerNode
from rostra.server.state.commands import EDGE_VOCABULARY, QUERY_VOCABULARY
from rostra.server.state.granules import granule_hash
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import BadRequest, Denied, NoLeader, RostraError
from rostra.wire.rpc import DONE, END, FULL, Served, check_hello, hello, hello_error, pack_rows

log = get("rpc")

HANDSHAKES_AT_ONCE = 16
HANDSHAKES_WAITING_MAX = 4096
HELLO_S = 3.0
#: Answers up to this many rows are evaluated in one go; larger ones in slices, by `watches.py`.
SMALL_ANSWER_ROWS = 32


@dataclass(slots=True, eq=False)
class Peer:
    """Who is at the other end, proven by TLS or by the kernel, never by what the hello says."""

    key_hash: str  # "" on the Unix socket
    address: str
    local: bool = False
    role: str = "client"
    name: str = ""
    node_id: str = ""
    about: dict[str, Any] = field(default_factory=dict)


class Endpoint:
    """The listeners of one server."""

    def __init__(
        self,
        node: ServerNode,
        *,
        spawn: Callable[..., asyncio.Task[Any]],
        server_key: Callable[[str], str | None],
        enrol: Callable[[Peer], Awaitable[None]],
        accept_raft: Callable[[str, FrameConnection], None],
        bootstrap: Callable[[str, dict[str, Any], str], dict[str, Any]],
        acts: dict[str, Callable[[Peer, dict[str, Any]], Awaitable[Any]]],
        about: Callable[[], dict[str, Any]],
    ) -> None:
        self._node, self._spawn = node, spawn
        self._server_key = server_key  # key hash -> server id in the replicated member list, or None
        self._enrol, self._accept_raft, self._bootstrap = enrol, accept_raft, bootstrap
        self._acts, self._about = acts, about
        self._handshakes = asyncio.Semaphore(HANDSHAKES_AT_ONCE)
        self._waiting = 0
        self._rejects = RateLimited(log, 10.0)
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        #: sessions of agents, by node name; the newest wins
        self.sessions: dict[str, Served] = {}
        self._connections: set[FrameConnection] = set()

    # -- doors ------------------------------------------------------------------------------------------------

    def listen_tcp(self, listener: socket.socket, context: Callable[[], ssl.SSLContext]) -> None:
        listener.setblocking(False)
        self._sockets.append(listener)
        self._spawn(self._accept(listener, lambda s, a: self._tls(s, a, context())))

    def listen_unix(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(128)
        listener.setblocking(False)
        self._sockets.append(listener)
        self._spawn(self._accept(listener, self._local))

    def close(self) -> None:
        for listener in self._sockets:
            listener.close()
        for connection in list(self._connections):
            connection.close()

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def _accept(self, listener: socket.socket, serve: Callable[[socket.socket, str], Awaitable[None]]) -> None:
        while True:
            try:
                accepted, address = await self._loop.sock_accept(listener)
            except OSError as e:
                if listener.fileno() < 0:
                    return
                # Out of file descriptors: nothing is gained by spinning.
                self._rejects.warn("cannot accept a connection", error=str(e))
                await asyncio.sleep(0.1)
                continue
            if self._waiting >= HANDSHAKES_WAITING_MAX:
                accepted.close()
                continue
            accepted.setblocking(False)
            self._spawn(serve(accepted, address[0] if isinstance(address, tuple) else "local"))

    async def _tls(self, accepted: socket.socket, address: str, context: ssl.SSLContext) -> None:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection, first = self._expecting()
        self._waiting += 1
        try:
            async with self._handshakes:
                await self._loop.connect_accepted_socket(
                    lambda: connection, accepted, ssl=context, ssl_handshake_timeout=HELLO_S
                )
        except (OSError, ssl.SSLError, TimeoutError) as e:
            accepted.close()
            self._rejects.warn("rejected a connection", peer=address, reason=explain(e))
            return
        finally:
            self._waiting -= 1
        ssl_object = connection.ssl_object
        assert ssl_object is not None
        await self._greet(connection, first, Peer(key_hash=peer_key_hash(ssl_object), address=address))

    async def _local(self, accepted: socket.socket, address: str) -> None:
        pid, uid, _ = struct.unpack("3i", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            accepted.close()
            self._rejects.warn("rejected a connection on the local socket", uid=uid, pid=pid)
            return
        connection, first = self._expecting()
        await self._loop.connect_accepted_socket(lambda: connection, accepted)
        await self._greet(connection, first, Peer(key_hash="", address="", local=True))

    def _expecting(self) -> tuple[FrameConnection, asyncio.Future[bytes]]:
        """A connection and its first frame, which may arrive with the end of the handshake."""
        first: asyncio.Future[bytes] = self._loop.create_future()
        connection = FrameConnection()

        def on_first(payload: bytes) -> None:
            if first.done():
                connection.abort("sent before the hello was answered")
            else:
                first.set_result(payload)

        connection.on_frame = on_first
        connection.on_lost = lambda reason: None if first.done() else first.set_exception(ConnectionError(reason))
        return connection, first

    async def _greet(self, connection: FrameConnection, first: asyncio.Future[bytes], peer: Peer) -> None:
        try:
            message = check_hello(await asyncio.wait_for(first, HELLO_S))
            await self._serve(connection, peer, message)
        except RostraError as e:
            self._rejects.warn("rejected a connection", peer=peer.address or "local", reason=e.message)
            connection.send(hello_error(e))
            connection.close()
        except (ConnectionError, TimeoutError) as e:
            self._rejects.warn(
                "rejected a connection: no hello", peer=peer.address or "local", error=str(e) or "timed out"
            )
            connection.abort()

    # -- what a connection is for -----------------------------------------------------------------------------

    async def _serve(self, connection: FrameConnection, peer: Peer, message: dict[str, Any]) -> None:
        protocol = message.get("protocol")
        cluster = str(message.get("cluster") or "")
        ours = self._node.cluster_id
        if cluster and ours and cluster != ours:
            raise Denied(f"the peer belongs to cluster {cluster}, this server to {ours}")
        peer.name, peer.node_id = str(message.get("name", "")), str(message.get("node_id", ""))
        if protocol in ("raft", "peer"):
            server_id = self._server_key(peer.key_hash)
            if server_id is None or server_id != peer.node_id:
                raise Denied(
                    f"{peer.name or 'the peer'} is not a server of this cluster ({protocol} connection refused)"
                )
            peer.role, peer.name = "server", peer.name
            if protocol == "raft":
                connection.send(hello("raft", **self._about()))
                connection.flush()
                self._accept_raft(server_id, connection)
                return
            self._take(connection, peer, self._handle_peer)
        elif protocol == "bootstrap":
            self._take(connection, peer, self._handle_bootstrap)
        elif protocol == "rpc":
            peer.about = message
            peer.role = str(message.get("role", "client"))
            if not peer.name:
                raise BadRequest("the hello names no node")
            await self._enrol(peer)
            served = self._take(connection, peer, self._handle_rpc)
            if served is not None:
                self.sessions[peer.name] = served
        else:
            raise BadRequest(f"unknown protocol {protocol!r}")

    def _take(
        self, connection: FrameConnection, peer: Peer, handle: Callable[[Served, int, str, tuple[Any, ...]], None]
    ) -> Served | None:
        if not connection.open:
            return None
        served = Served(connection, handle, peer)
        self._connections.add(connection)

        def lost(reason: str) -> None:
            self._connections.discard(connection)
            served.on_lost(reason)
            if self.sessions.get(peer.name) is served:
                del self.sessions[peer.name]

        connection.on_frame = served.on_frame
        connection.on_lost = lost
        connection.send(hello("ok", **self._about()))
        return served

    # -- verbs ------------------------------------------------------------------------------------------------

    def _handle_rpc(self, served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        if verb == "write":
            origin, kind, args, _token = arguments
            self._write(served, request_id, _origin(origin), kind, args, served.peer.name)
        elif verb == "read":
            kind, args, min_index, _token = arguments
            self._read(served, request_id, QUERY_VOCABULARY.decode(kind, args), int(min_index))
        elif verb == "barrier":
            mode, since = arguments
            self._barrier(served, request_id, mode, int(since))
        elif verb == "watch":
            kind, args, _token = arguments
            query = QUERY_VOCABULARY.decode(kind, args)
            self._node.counts["watches_opened"] += 1
            self._node.watches.subscribe(query, served.open_stream(request_id))
        elif verb == "act":
            kind, args, _token = arguments
            self._act(served, request_id, kind, args)
        elif verb == "ping":
            known, contact_ms = self._node.contact()
            served.reply(request_id, (known, contact_ms))
        else:
            served.fail(request_id, BadRequest(f"unknown verb {verb!r}"))

    def _handle_peer(self, served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        """Verbs between servers."""
        if verb == "propose":
            origin, kind, args, actor, source = arguments
            self._answer(served, request_id, self._node.propose(_origin(origin), kind, args, actor, source))
        elif verb == "index":
            (mode,) = arguments
            self._spawn(self._settle(served, request_id, self._node.leader_index(mode)))
        elif verb == "act":
            kind, args = arguments
            self._act(served, request_id, kind, args)
        else:
            served.fail(request_id, BadRequest(f"unknown verb {verb!r} between servers"))

    def _handle_bootstrap(self, served: Served, request_id: int, verb: str, arguments: tuple[Any, ...]) -> None:
        (args,) = arguments
        served.reply(request_id, self._bootstrap(verb, args, served.peer.key_hash))

    def _write(self, served: Served, request_id: int, origin: Any, kind: str, args: Any, actor: str) -> None:
        node = self._node
        if kind not in EDGE_VOCABULARY:
            raise Denied(f"{kind} is not a command for agents")
        if node.is_leader:
            # The common case without a task: validate, append, answer when it is applied.
            try:
                future = node.propose(origin, kind, args, actor, served.peer.address)
            except NoLeader:
                pass
            else:
                node.counts["writes"] += 1
                self._answer_write(served, request_id, future, origin, kind, args, actor)
                return
        self._spawn(
            self._settle(served, request_id, node.write(origin, kind, args, actor=actor, source=served.peer.address))
        )

    def _answer_write(
        self, served: Served, request_id: int, future: Any, origin: Any, kind: str, args: Any, actor: str
    ) -> None:
        def done(f: asyncio.Future[Any]) -> None:
            error = f.exception() if not f.cancelled() else NoLeader()
            if error is None:
                result = f.result()
                if result[0] == "ok":
                    served.reply(request_id, result[1])
                else:
                    served.refuse(request_id, result[1], result[2])
            else:
                # Leadership was lost: find the next leader under the same origin.
                self._spawn(
                    self._settle(
                        served,
                        request_id,
                        self._node.write(origin, kind, args, actor=actor, source=served.peer.address),
                    )
                )

        future.add_done_callback(done)

    def _answer(self, served: Served, request_id: int, future: Any) -> None:
        """The result tuple itself: the asking server unwraps it."""

        def done(f: asyncio.Future[Any]) -> None:
            error = f.exception() if not f.cancelled() else NoLeader()
            if error is None:
                served.reply(request_id, f.result())
            else:
                served.fail(request_id, error if isinstance(error, RostraError) else NoLeader())

        future.add_done_callback(done)

    def _read(self, served: Served, request_id: int, query: Any, min_index: int) -> None:
        self._node.counts["reads"] += 1
        stream = served.open_stream(request_id)
        if self._node.store.index < min_index:
            self._spawn(self._read_later(stream, query, min_index))
        else:
            self._read_now(stream, query)

    async def _read_later(self, stream: Any, query: Any, min_index: int) -> None:
        try:
            await self._node.at_least(min_index)
            self._read_now(stream, query)
        except RostraError as e:
            stream.fail(e)

    def _read_now(self, stream: Any, query: Any) -> None:
        try:
            evaluation = self._node.store.evaluate(query)
            if len(evaluation.keys) > SMALL_ANSWER_ROWS:
                self._node.watches.subscribe(query, stream, once=True)
                return
            rows = evaluation.step(SMALL_ANSWER_ROWS)
        except RostraError as e:
            stream.fail(e)
            return
        hashes = tuple(map(granule_hash, evaluation.granules))
        stream.send(pack_rows(FULL | DONE | END, evaluation.index, hashes, rows, ()), end=True)

    def _barrier(self, served: Served, request_id: int, mode: str, since: int) -> None:
        node = self._node
        raft = node.raft
        if raft is not None and (mode == "stale" or (mode == "default" and raft.is_leader and raft.lease_valid())):
            node.counts["barriers"] += 1
            self._reply_barrier(served, request_id, since)
        else:
            self._spawn(self._barrier_round(served, request_id, mode, since))

    async def _barrier_round(self, served: Served, request_id: int, mode: str, since: int) -> None:
        try:
            await self._node.barrier(mode)
        except RostraError as e:
            served.fail(request_id, e)
        else:
            self._reply_barrier(served, request_id, since)

    def _reply_barrier(self, served: Served, request_id: int, since: int) -> None:
        store = self._node.store
        touched = store.touched_since(since) if since else None
        known, contact_ms = self._node.contact()
        packed = None if touched is None else b"".join(h.to_bytes(8, "big") for h in touched)
        served.reply(request_id, (store.index, packed, known, contact_ms))

    def _act(self, served: Served, request_id: int, kind: str, args: dict[str, Any]) -> None:
        act = self._acts.get(kind)
        if act is None:
            raise BadRequest(f"unknown act {kind!r}")
        self._spawn(self._settle(served, request_id, act(served.peer, args)))

    async def _settle(self, served: Served, request_id: int, work: Awaitable[Any]) -> None:
        try:
            served.reply(request_id, await work)
        except RostraError as e:
            served.fail(request_id, e)


def _origin(origin: Any) -> tuple[str, int, int]:
    client, sequence, first = origin
    if not (isinstance(client, str) and isinstance(sequence, int) and isinstance(first, int) and first <= sequence):
        raise BadRequest("malformed origin of a write")
    return client, sequence, first
