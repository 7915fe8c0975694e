"""Who may talk to this server, and which verb goes where.

Two doors: TCP (mTLS always, 8300) and a Unix socket for the agent of this host (the kernel says who it is). The hello
decides what a connection is for: "rpc" an agent, "peer" and "raft" another server of the replicated member list,
"bootstrap" a server that has no cluster yet. Everything else is closed with one rate-limited line. A peer gets an error
or its connection's end at worst: nothing that it sends may end this process or fill it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rostra.acl.authorizer import DENIED, EVERYTHING, Authorizer
from rostra.runtime.log import RateLimited, get
from rostra.runtime.tls import HANDSHAKE_S, Handshakes, explain, peer_key_hash, peer_node, peer_public_key
from rostra.server.agents import Agents
from rostra.server.node import ServerNode
from rostra.server.requests import Peer, caller_of_peer, index_in, origin_in, text_in
from rostra.server.state.commands import EDGE_VOCABULARY, QUERY_VOCABULARY
from rostra.server.state.granules import granule_hash
from rostra.server.state.operator import SetAutopilot
from rostra.server.state.tables import Tables
from rostra.server.watches import bytes_of
from rostra.server.writes import Write
from rostra.wire.bounds import NAME_CHARS_MAX, NODE_NAME_RULE, check_arguments, is_node_name
from rostra.wire.caller import Caller, read_caller
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import BadRequest, Denied, Internal, NoLeader, RostraError, TooLarge
from rostra.wire.frames import PEER_FRAME_BYTES_MAX, RPC_FRAME_BYTES_MAX
from rostra.wire.rpc import CHUNK_BYTES, DONE, END, FULL, Served, check_hello, hello, hello_error, pack_rows

log = get("rpc")

HELLO_S = HANDSHAKE_S
HELLO_BYTES_MAX = 16 << 10
#: Agents and servers ping every 0.5 s. A peer that is silent for this long is gone although no packet said so.
SILENT_S = 15.0
#: The role of a server's connection once the server is no longer in the list, and for how long it stays open.
FORMER, FAREWELL_S = "former server", 2.0
#: What one node may have open here: a session, the one before it that is not known to be lost, a greeting or two.
CONNECTIONS_OF_A_NODE_MAX = 8
#: Streams (watches and large reads) of one connection. An agent has one for each distinct query of its host.
STREAMS_MAX = 8192
#: An agent is one client of the log. Each remembered client costs every server memory, and the oldest is forgotten.
CLIENTS_OF_A_CONNECTION_MAX = 8
#: Answers up to this many rows are evaluated in one go; larger ones in slices, by `watches.py`.
SMALL_ANSWER_ROWS = 32


@dataclass(frozen=True, slots=True)
class Act:
    """`run(peer, arguments, caller)` answers; `may(can, tables, arguments)`: may that caller ask for it?"""

    run: Callable[[Peer, dict[str, Any], Caller | None], Awaitable[Any]]
    may: Callable[[Authorizer, Tables, dict[str, Any]], bool]


class Endpoint:
    """The listeners of one server."""

    def __init__(
        self,
        node: ServerNode,
        *,
        spawn: Callable[..., asyncio.Task[Any]],
        server_key: Callable[[str], str | None],
        stranger_key: Callable[[str], str | None] = lambda key_hash: None,
        enrol: Callable[[Peer], Awaitable[None]],
        accept_raft: Callable[[str, FrameConnection], None],
        bootstrap: Callable[[str, dict[str, Any], Peer], dict[str, Any]],
        acts: dict[str, Act],
        about: Callable[[], dict[str, Any]],
        met: Callable[[str, dict[str, Any]], None] = lambda server_id, hello: None,
    ) -> None:
        self._node, self._spawn = node, spawn
        self._met = met  # (server id, its hello): a server of the list has connected
        self._server_key = server_key  # key hash -> server id in the replicated member list, or None
        self._stranger_key = stranger_key  # the same of servers that were introduced: for Raft only
        self._enrol, self._accept_raft, self._bootstrap = enrol, accept_raft, bootstrap
        self._acts, self._about = acts, about
        self._rejects = RateLimited(log, 10.0)
        #: Connections that were closed: at the door, and later for what their peer sent or did not do.
        self.rejected = self.dropped = 0
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self.agents = Agents(self._loop.time)
        self._connections: dict[FrameConnection, Peer] = {}
        self._of_node: dict[str, dict[FrameConnection, None]] = {}
        self._timer = self._loop.call_later(1.0, self._drop_silent)

    # -- doors ------------------------------------------------------------------------------------------------

    def listen_tcp(self, listener: socket.socket, context: Callable[[], ssl.SSLContext]) -> None:
        listener.setblocking(False)
        self._sockets.append(listener)
        handshakes = Handshakes(context)
        self._spawn(self._accept(listener, lambda s, a: self._tls(s, a, handshakes)))

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

    def hang_up(self) -> None:
        """This server stops: who is connected goes on elsewhere at once, where a refusal would be an answer."""
        for connection in list(self._connections):
            connection.close()

    def close(self) -> None:
        self._timer.cancel()
        for listener in self._sockets:
            listener.close()
        self.hang_up()

    @property
    def connections(self) -> int:
        return len(self._connections)

    def drop_former_servers(self) -> None:
        """The list of servers has changed: who is not in it any more speaks as one no longer.

        It gets the answers that it waits for: it may have asked for its own removal.
        """
        for connection, peer in self._connections.items():
            if peer.role == "server" and self._server_key(peer.key_hash) is None:
                peer.role = FORMER
                self._loop.call_later(FAREWELL_S, connection.abort, "not a server of this cluster any more")

    def _drop_silent(self) -> None:
        self._timer = self._loop.call_later(1.0, self._drop_silent)
        now = self._loop.time()
        for connection in [c for c in self._connections if now - c.heard_at > SILENT_S]:
            connection.abort("silent")

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
            accepted.setblocking(False)
            self._spawn(self._admit(accepted, address[0] if isinstance(address, tuple) and address else "local", serve))

    async def _admit(
        self, accepted: socket.socket, address: str, serve: Callable[[socket.socket, str], Awaitable[None]]
    ) -> None:
        """A stranger is at the door. Nothing that he makes happen may leave this function."""
        try:
            await serve(accepted, address)
        except (OSError, ssl.SSLError, TimeoutError) as e:
            self._reject(address, explain(e))
            accepted.close()
        except Exception as e:
            log.err("a connection failed in an unforeseen way", peer=address, exc_info=e)
            accepted.close()

    def _reject(self, address: str, reason: str) -> None:
        self.rejected += 1
        self._rejects.warn("rejected a connection", peer=address, reason=reason)

    async def _tls(self, accepted: socket.socket, address: str, handshakes: Handshakes) -> None:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection, first = self._expecting(address)
        try:
            await handshakes.shake(accepted, connection)
        except BaseException:
            connection.abort("no TLS")  # its callbacks hold it
            raise
        ssl_object = connection.ssl_object
        if ssl_object is None:
            raise ConnectionResetError("closed after the handshake")
        try:
            public_key, (node_id, name) = peer_public_key(ssl_object), peer_node(ssl_object)
            key_hash = peer_key_hash(ssl_object)
        except ValueError as e:
            connection.abort("not a node")
            self._reject(address, str(e))
            return
        peer = Peer(key_hash=key_hash, address=address, public_key=public_key, node_id=node_id, name=name)
        await self._greet(connection, first, peer)

    async def _local(self, accepted: socket.socket, address: str) -> None:
        pid, uid, _ = struct.unpack("3i", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (0, os.geteuid()):
            accepted.close()
            self.rejected += 1
            self._rejects.warn("rejected a connection on the local socket", uid=uid, pid=pid)
            return
        connection, first = self._expecting(address)
        connection.is_of_the_cluster()
        await self._loop.connect_accepted_socket(lambda: connection, accepted)
        await self._greet(connection, first, Peer(key_hash="", address="", local=True))

    def _expecting(self, address: str) -> tuple[FrameConnection, asyncio.Future[bytes]]:
        """A connection and its first frame, which may arrive with the end of the handshake."""
        first: asyncio.Future[bytes] = self._loop.create_future()
        first.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be left to look
        connection = FrameConnection(frame_bytes_max=HELLO_BYTES_MAX)

        def on_first(payload: bytes) -> None:
            if first.done():
                self._reject(address, "sent before the hello was answered")
                connection.abort("sent before the hello was answered")
            else:
                first.set_result(payload)

        connection.on_frame = on_first

        def lost(reason: str) -> None:
            if not first.done():
                first.set_exception(ConnectionError(reason))
            elif reason.startswith(_VIOLATIONS):  # between the hello and its answer
                self._reject(address, reason)

        connection.on_lost = lost
        return connection, first

    async def _greet(self, connection: FrameConnection, first: asyncio.Future[bytes], peer: Peer) -> None:
        where = peer.address or "local"
        try:
            async with asyncio.timeout(HELLO_S):
                message = check_hello(await first)
            await self._serve(connection, peer, message)
        except RostraError as e:
            if isinstance(e, NoLeader):
                self._rejects.info("a node has to wait", key=peer.name, node=peer.name, peer=where, reason=e.message)
            else:
                self._reject(where, e.message)
            connection.send(hello_error(e))
            connection.close()
        except TimeoutError:
            self._reject(where, "no hello in time")
            connection.abort("no hello")
        except ConnectionError as e:
            if peer.local:
                log.debug("a connection to the local socket ended without a hello")  # an agent looked whether we live
            else:
                self._reject(where, f"no hello: {e}")
            connection.abort("no hello")
        except BaseException:
            connection.abort("failed")
            raise
        finally:
            del first  # it holds its exception, whose traceback holds this frame

    # -- what a connection is for -----------------------------------------------------------------------------

    async def _serve(self, connection: FrameConnection, peer: Peer, message: dict[str, Any]) -> None:
        protocol = message.get("protocol")
        cluster = text_in(message, "cluster", 64)
        ours = self._node.cluster_id
        if cluster and ours and cluster != ours:
            raise Denied(f"the peer belongs to cluster {cluster}, this server to {ours}")
        name, node_id = text_in(message, "name", 64), text_in(message, "node_id", 64)
        if peer.local:
            peer.name, peer.node_id = name, node_id
        elif name != peer.name or (node_id and node_id != peer.node_id):
            raise Denied(f"the hello speaks for node {name!r}, but the certificate is that of {peer.name!r}")
        if not is_node_name(peer.name):
            raise BadRequest(f"the hello names no node: {NODE_NAME_RULE}")
        if protocol in ("raft", "peer"):
            server_id = self._server_key(peer.key_hash) if peer.key_hash else None
            if server_id is None and protocol == "raft" and peer.key_hash:
                server_id = self._stranger_key(peer.key_hash)
            if server_id is None or server_id != peer.node_id:
                raise Denied(f"{self._no_server(peer)} ({protocol} connection refused)")
            peer.role = "server"
            self._met(server_id, message)
            connection.is_of_the_cluster()
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
            await self._enrol(peer)
            served = self._take(connection, peer, self._handle_rpc)
            if served is not None:
                self.agents.took(peer, served)
        else:
            raise BadRequest(f"unknown protocol {str(protocol)[:32]!r}")

    def _no_server(self, peer: Peer) -> str:
        """What is told to one that speaks as a server of this cluster and is none."""
        row = self._node.store.tables.members.get(peer.name)
        if row is not None and row.role == "server" and row.key_hash == peer.key_hash and row.status == "left":
            return (
                f"{peer.name} was removed from this cluster: stop it, or let it in again with"
                f" `rostra operator raft add-peer {peer.name}` on one of its servers"
            )
        return f"{peer.name} is not a server of this cluster"

    def _take(
        self, connection: FrameConnection, peer: Peer, handle: Callable[[Served, int, str, Sequence[Any]], None]
    ) -> Served | None:
        if not connection.open:
            return None
        served = Served(connection, handle, peer, unforeseen=self._unforeseen)
        self._connections[connection] = peer
        of_node = self._of_node.setdefault(peer.key_hash, {})
        of_node[connection] = None

        def lost(reason: str) -> None:
            self._connections.pop(connection, None)
            of_node.pop(connection, None)
            if not of_node and self._of_node.get(peer.key_hash) is of_node:
                del self._of_node[peer.key_hash]
            served.on_lost(reason)
            self.agents.lost(peer, served)
            if reason.startswith(_VIOLATIONS):
                self.dropped += 1
                self._rejects.warn("dropped a connection", key=peer.name, node=peer.name, reason=reason)

        connection.on_frame = served.on_frame
        connection.on_lost = lost
        connection.raise_bound(PEER_FRAME_BYTES_MAX if peer.role == "server" else RPC_FRAME_BYTES_MAX)
        connection.send(hello("ok", **self._about()))
        while not peer.local and len(of_node) > CONNECTIONS_OF_A_NODE_MAX:
            next(iter(of_node)).abort("too many connections of one node")
        return served

    # -- verbs ------------------------------------------------------------------------------------------------

    def _handle_rpc(self, served: Served, request_id: int, verb: str, arguments: Sequence[Any]) -> None:
        if verb == "write":
            self._write(served, request_id, arguments)
        elif verb in ("read", "watch") and self._node.raft is None:
            raise NoLeader("No cluster leader: this server has not read its log yet")
        elif verb == "read":
            kind, args, min_index, caller = arguments
            query = _query(served, kind, args)
            self._read(
                served, request_id, query, self._node.check_query(query, read_caller(caller)), index_in(min_index)
            )
        elif verb == "barrier":
            mode, since = arguments
            served.count_question()
            self._barrier(served, request_id, mode, index_in(since))
        elif verb == "watch":
            kind, args, caller, *seen = arguments
            query, min_index = _query(served, kind, args), index_in(seen[0]) if seen else 0
            can = self._node.check_query(query, read_caller(caller))
            self._node.counts["watches_opened"] += 1
            stream = served.open_stream(request_id)
            if self._node.store.index < min_index:
                self._spawn(self._later(stream, min_index, self._node.watches.subscribe, query, stream, can))
            else:
                self._node.watches.subscribe(query, stream, can)
        elif verb == "act":
            kind, args, caller = arguments
            self._act(served, request_id, kind, args, read_caller(caller))
        elif verb == "ping":
            served.count_question()
            known, contact_ms = self._node.contact()
            served.reply(request_id, (known, contact_ms))
        else:
            served.fail(request_id, BadRequest(f"unknown verb {verb!r}"))

    def _handle_peer(self, served: Served, request_id: int, verb: str, arguments: Sequence[Any]) -> None:
        """Verbs between servers."""
        if served.peer.role == FORMER and tuple(arguments[:1]) != ("ping",):
            if verb in ("propose", "index"):  # it speaks for its clients, to whom another server is a leader
                raise NoLeader(f"No cluster leader: {self._no_server(served.peer)}")
            raise Denied(self._no_server(served.peer))
        if verb == "propose":
            origin, kind, args, actor, source, *caller = arguments
            proposed = _Proposed(served, request_id)
            self._node.append(proposed, origin_in(origin), kind, args, actor, source, caller_of_peer(caller))
        elif verb == "index":
            (mode,) = arguments
            self._spawn(self._settle(served, request_id, partial(self._node.leader_index, mode)))
        elif verb == "act":
            kind, args, *caller = arguments
            self._act(served, request_id, kind, args, caller_of_peer(caller))
        else:
            served.fail(request_id, BadRequest(f"unknown verb {verb!r} between servers"))

    def _handle_bootstrap(self, served: Served, request_id: int, verb: str, arguments: Sequence[Any]) -> None:
        (args,) = arguments
        if not isinstance(args, dict):
            raise BadRequest("the arguments of a greeting are a map")
        served.reply(request_id, self._bootstrap(verb, args, served.peer))

    def _write(self, served: Served, request_id: int, arguments: Sequence[Any]) -> None:
        origin, kind, args, caller = arguments
        peer, origin, caller = served.peer, origin_in(origin), read_caller(caller)
        if kind not in _EDGE_KINDS:
            raise Denied(f"{str(kind)[:64]} is not a command for agents")
        if served.request_bytes > NAME_CHARS_MAX or kind not in _FLAT_KINDS:
            check_arguments(args)
            if kind == SetAutopilot.kind and args.get("auto_admit_servers") and not peer.local:
                # A server gets every secret of the cluster. A node that may only enrol must not make a server of
                # itself.
                raise Denied("AutoAdmitServers is set from the host of a server: run the command there")
        clients = peer.clients
        if origin[0] not in clients:
            if len(clients) >= CLIENTS_OF_A_CONNECTION_MAX:
                raise Denied(f"more than {CLIENTS_OF_A_CONNECTION_MAX} clients write on one connection")
            clients.add(origin[0])
        AgentWrite(self._node, origin, kind, args, peer.name, peer.address, caller).answer(served, request_id)

    def _read(self, served: Served, request_id: int, query: Any, can: Authorizer, min_index: int) -> None:
        self._node.counts["reads"] += 1
        stream = served.open_stream(request_id)
        if self._node.store.index < min_index:
            self._spawn(self._later(stream, min_index, self._read_now, stream, query, can))
        else:
            self._read_now(stream, query, can)

    async def _later(self, stream: Any, min_index: int, answer: Callable[..., None], *args: Any) -> None:
        """`answer` when this server has caught up with what its asker has seen elsewhere."""
        if stream.cancelled:
            return
        stream.on_cancel = asyncio.current_task().cancel  # type: ignore[union-attr]
        try:
            await self._node.at_least(min_index)
            if not stream.cancelled:
                answer(*args)
        except RostraError as e:
            stream.fail(e)
        except Exception as e:
            stream.fail(self._unforeseen("read", e))

    def _read_now(self, stream: Any, query: Any, can: Authorizer) -> None:
        try:
            evaluation = self._node.store.evaluate(query, can)
            if len(evaluation.keys) > SMALL_ANSWER_ROWS:
                self._node.watches.subscribe(query, stream, can, once=True)
                return
            rows = evaluation.step(SMALL_ANSWER_ROWS)
            if sum(bytes_of(row) for _, row in rows) > CHUNK_BYTES:
                self._node.watches.subscribe(query, stream, can, once=True)
                return
        except RostraError as e:
            stream.fail(e)
            return
        hashes = tuple(map(granule_hash, evaluation.granules))
        stream.send(pack_rows(FULL | DONE | END, evaluation.index, hashes, rows, ()), end=True)

    def _barrier(self, served: Served, request_id: int, mode: str, since: int) -> None:
        node = self._node
        raft = node.raft
        if raft is not None and (
            mode == "stale" or (mode == "default" and raft.is_leader and raft.lease_valid() and raft.applied_all)
        ):
            node.counts["barriers"] += 1
            self._reply_barrier(served, request_id, since)
        else:
            self._spawn(self._barrier_round(served, request_id, mode, since))

    async def _barrier_round(self, served: Served, request_id: int, mode: str, since: int) -> None:
        try:
            await self._node.barrier(mode)
            self._reply_barrier(served, request_id, since)
        except RostraError as e:
            served.fail(request_id, e)
        except Exception as e:
            served.fail(request_id, self._unforeseen("barrier", e))

    def _reply_barrier(self, served: Served, request_id: int, since: int) -> None:
        store = self._node.store
        touched = store.touched_since(since) if since else None
        known, contact_ms = self._node.contact()
        packed = None if touched is None else b"".join(h.to_bytes(8, "big") for h in touched)
        served.reply(request_id, (store.index, packed, known, contact_ms))

    def _act(self, served: Served, request_id: int, kind: str, args: dict[str, Any], caller: Caller | None) -> None:
        act = self._acts.get(kind)
        if act is None:
            raise BadRequest(f"unknown act {str(kind)[:64]!r}")
        if not isinstance(args, dict):
            raise BadRequest(f"{kind}: the arguments are a map")
        self._spawn(self._settle(served, request_id, partial(self._run, act, kind, served.peer, args, caller)))

    async def _run(self, act: Act, kind: str, peer: Peer, args: dict[str, Any], caller: Caller | None) -> Any:
        can = self._node.can(caller)
        if can is not EVERYTHING and not act.may(can, self._node.store.tables, args):
            raise Denied(f"{DENIED}: {kind}")
        return await act.run(peer, args, caller)

    async def _settle(self, served: Served, request_id: int, work: Callable[[], Awaitable[Any]]) -> None:
        """Reply with what becomes of `work`, which is begun only here: at a stop this may never run."""
        try:
            served.reply(request_id, await work())
        except RostraError as e:
            served.fail(request_id, e)
        except (TypeError, ValueError, LookupError) as e:
            # Arguments of the wrong kind or missing ones: the peer's mistake, told to the peer.
            served.fail(request_id, BadRequest(f"malformed arguments: {type(e).__name__}: {e}"))
        except Exception as e:
            served.fail(request_id, self._unforeseen("request", e))

    def _unforeseen(self, what: str, error: Exception) -> Internal:
        self._rejects.err("a request failed in an unforeseen way", verb=what, error=repr(error))
        return Internal(f"{what}: unforeseen error")


# -- who waits for the outcome of a proposal ---------------------------------------------------------------------------


class _Proposed:
    """Another server: it gets the result tuple itself, and unwraps it."""

    __slots__ = ("_request_id", "_served")

    def __init__(self, served: Served, request_id: int) -> None:
        self._served, self._request_id = served, request_id

    def done(self) -> bool:
        return False

    def set_result(self, result: Any) -> None:
        self._served.reply(self._request_id, result)

    def set_exception(self, error: Exception) -> None:
        self._served.fail(self._request_id, error if isinstance(error, RostraError) else NoLeader())


class AgentWrite(Write):
    """An agent's, answered on its connection."""

    __slots__ = ("_request_id", "_served")

    def answer(self, served: Served, request_id: int) -> None:
        self._served, self._request_id = served, request_id
        self.submit()

    def ended(self, result: Any) -> None:
        if result[0] == "ok":
            self._served.reply(self._request_id, result[1])
        else:
            self._served.refuse(self._request_id, result[1], result[2])

    def failed(self, error: RostraError) -> None:
        self._served.fail(self._request_id, error)


# -- what a peer may say ---------------------------------------------------------------------------------------------

_EDGE_KINDS = frozenset(EDGE_VOCABULARY)
#: Commands with nothing inside of their fields: what decodes and came in a small frame needs no other check.
_FLAT_KINDS = frozenset(kind for kind in EDGE_VOCABULARY if EDGE_VOCABULARY.is_flat(kind)) - {SetAutopilot.kind}
#: Beginnings of the reasons for which `FrameConnection` and `Served` end a connection by themselves.
_VIOLATIONS = ("frame of", "malformed", "peer does not read", "silent", "too many")


def _query(served: Served, kind: Any, args: Any) -> Any:
    if len(served.streams) >= STREAMS_MAX:
        raise TooLarge(f"more than {STREAMS_MAX} watches on one connection")
    query = QUERY_VOCABULARY.decode(kind, args)
    check_arguments(args)
    return query
