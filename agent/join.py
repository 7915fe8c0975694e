"""Port 8301: how nodes find servers to join and look after each other. Every agent listens here, by mTLS only.

A request is one frame with a map `{"kind": ...}`; each is answered by one frame. `ping` says that this agent lives
(asked by other agents before the leader declares a node failed); `servers` names the servers that it knows. A joining
node asks the addresses of `retry_join` with `discover`. A joiner learns hearsay of an enrolled node: TLS to the server
itself decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from rostra.runtime import log as _log
from rostra.runtime.service import Tasks
from rostra.runtime.tls import Handshakes, explain, peer_key_hash
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import BadRequest, Denied, RostraError
from rostra.wire.frames import pack, unpack_first

log = _log.get("join")

PORT = 8301
CONNECTIONS_MAX = 512
#: Asked or answered at a time: more handshakes would hold the loop, each costs it a millisecond.
HANDSHAKES_MAX = 16
TIMEOUT_S = 3.0
IDLE_S = 30.0
REQUEST_BYTES_MAX = 4096
ANSWER_BYTES_MAX = 256 << 10
SERVERS_MAX = 256
#: Of one name: a name of all servers has an address for each.
ADDRESSES_MAX = 16
#: What OpenSSL says of an answer that is no TLS.
NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")


class Identity(Protocol):
    """What this needs of `runtime.identity.NodeIdentity`."""

    def server_context(self) -> ssl.SSLContext: ...

    def client_context(self) -> ssl.SSLContext: ...


@dataclass(frozen=True, slots=True)
class ServerHint:
    """A server as another node knows it. `key_hash` is "" when that node has not seen its key."""

    host: str
    port: int
    key_hash: str = ""
    node_id: str = ""
    name: str = ""
    datacenter: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """What an agent says about itself. `rpc_address` and `rpc_port` are those of its server, if it runs one."""

    node_id: str
    name: str
    role: str  # server | client
    datacenter: str
    version: str = ""
    rpc_address: str = ""
    rpc_port: int = 0
    key_hash: str = ""


# -- the listener ----------------------------------------------------------------------------------------------------


class JoinListener:
    """Answers on 8301. Bounded in connections, handshakes and time; refusals are one line in a while."""

    def __init__(
        self,
        identity: Identity,
        info: Callable[[], AgentInfo],
        servers: Callable[[], Iterable[ServerHint]],
        *,
        connections_max: int = CONNECTIONS_MAX,
        timeout_s: float = TIMEOUT_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._identity, self._info, self._servers = identity, info, servers
        self._connections_max, self._timeout_s, self._idle_s = connections_max, timeout_s, idle_s
        self._sockets: list[socket.socket] = []
        self._tasks: Tasks | None = None
        self._open = 0
        self._handshakes = Handshakes(identity.server_context, at_once=HANDSHAKES_MAX, timeout_s=timeout_s)
        self._rejects = _log.RateLimited(log, 10.0)

    async def start(self, host: str, port: int = PORT) -> int:
        """Listen on one address; may be called for several. The port, for `port=0`. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=False)
        listener.setblocking(False)
        self._sockets.append(listener)
        if self._tasks is None:
            self._tasks = Tasks("join")
        bound: int = listener.getsockname()[1]
        self._tasks.keep(f"accept {host}:{bound}", partial(self._accept, listener, self._tasks))
        return bound

    async def stop(self) -> None:
        """Close the listeners and every connection."""
        if self._tasks is not None:
            await self._tasks.stop(1.0)
        for listener in self._sockets:
            listener.close()

    @property
    def connections(self) -> int:
        return self._open

    async def _accept(self, listener: socket.socket, tasks: Tasks) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, where = await loop.sock_accept(listener)
            except OSError as e:  # out of file descriptors, or the peer is gone already
                self._rejects.warn("connection not accepted", reason=str(e))
                await asyncio.sleep(0.05)
                continue
            if self._open >= self._connections_max and not self._handshakes.make_room():
                accepted.close()
                self._reject(where[0], f"{self._open} connections are open")
                continue
            self._open += 1
            tasks.start("connection", self._serve(accepted, where[0]))

    async def _serve(self, accepted: socket.socket, host: str) -> None:
        session = _Asker(self._info, self._servers)
        try:
            await self._handshakes.shake(accepted, session)
            await session.until_idle(self._idle_s)
        except TimeoutError:
            self._reject(host, "no TLS handshake in time")
        except (OSError, ssl.SSLError) as e:
            self._reject(host, explain(e))
        except Exception as e:
            log.err("a connection failed in an unforeseen way", peer=host, exc_info=e)
        finally:
            self._open -= 1
            session.abort("closed")
            accepted.close()

    def _reject(self, host: str, reason: str) -> None:
        self._rejects.warn("connection to the join port rejected", peer=host, reason=reason)


class _Asker(FrameConnection):
    """One peer that asks."""

    def __init__(self, info: Callable[[], AgentInfo], servers: Callable[[], Iterable[ServerHint]]) -> None:
        super().__init__(self._answer, self._end, frame_bytes_max=REQUEST_BYTES_MAX)
        self._info, self._servers = info, servers
        self._ended = asyncio.Event()
        self._asked = False

    async def until_idle(self, idle_s: float) -> None:
        """Until the peer goes, or has asked nothing for a while."""
        while not self._ended.is_set():
            self._asked = False
            try:
                async with asyncio.timeout(idle_s):
                    await self._ended.wait()
            except TimeoutError:
                if not self._asked:
                    return

    def _end(self, _reason: str) -> None:
        self._ended.set()

    def _answer(self, payload: bytes) -> None:
        self._asked = True
        try:
            request = unpack_first(payload)
            kind = request.get("kind") if isinstance(request, dict) else None
            if kind == "ping":
                reply: dict[str, Any] = {"kind": "pong", "self": asdict(self._info())}
            elif kind == "servers":
                servers = list(self._servers())[:SERVERS_MAX]
                reply = {"kind": "servers", "self": asdict(self._info()), "servers": [asdict(s) for s in servers]}
            else:
                raise BadRequest("unknown request")
        except (ValueError, RostraError) as e:
            reply = {"kind": "error", "reason": str(e)}
        self.send(pack(reply))
        if self.queued_bytes > ANSWER_BYTES_MAX:
            self.abort("peer does not read")


# -- asking ----------------------------------------------------------------------------------------------------------


async def discover(
    addresses: Sequence[str],
    identity: Identity,
    *,
    timeout_s: float = TIMEOUT_S,
    on_agent: Callable[[str, AgentInfo], None] | None = None,
    on_failure: Callable[[str, str], None] | None = None,
) -> list[ServerHint]:
    """The servers known at any of `addresses` (host or host:port, 8301 if none), each once, in the order of asking.

    A name stands for all of its addresses. Never raises for what does not answer: `on_failure(address, reason)` is
    told, in words for an operator, where nobody does.
    """
    places = asyncio.Semaphore(HANDSHAKES_MAX)
    proved: dict[tuple[str, int], str] = {}  # where a server's own agent has shown its key

    async def ask(address: str) -> list[ServerHint]:
        try:
            host, port = parse_address(address)
            hosts = await _resolve(host, timeout_s)
        except (OSError, RostraError) as e:
            answers: list[list[ServerHint] | Exception] = [e]
        else:
            answers = await asyncio.gather(*(ask_one(address, host, port) for host in hosts))
        failures = [a for a in answers if isinstance(a, Exception)]
        if len(failures) == len(answers) and on_failure is not None:
            reasons = dict.fromkeys(e.message if isinstance(e, RostraError) else explain(e) for e in failures)
            on_failure(address, "; ".join(reasons))
        return [server for answer in answers if isinstance(answer, list) for server in answer]

    async def ask_one(address: str, host: str, port: int) -> list[ServerHint] | Exception:
        try:
            async with places:
                reply, key_hash = await _ask(host, port, identity, {"kind": "servers"}, timeout_s)
            info = _parse_info(reply.get("self"))
            servers = [_parse_server(s) for s in _list(reply.get("servers"))[:SERVERS_MAX]]
        except ssl.SSLError as e:
            return BadRequest(_no_join_port(port)) if e.reason in NOT_TLS else e
        except (OSError, ValueError, RostraError) as e:
            return e
        if on_agent is not None:
            on_agent(address, info)
        if info.role == "server" and info.rpc_port:
            own = ServerHint(
                info.rpc_address or host, info.rpc_port, key_hash, info.node_id, info.name, info.datacenter
            )
            servers.insert(0, own)
            proved[own.host, own.port] = key_hash
        return servers

    answers = await asyncio.gather(*(ask(a) for a in dict.fromkeys(addresses)))
    return _each_once([server for answer in answers for server in answer], proved)


def _each_once(named: Sequence[ServerHint], proved: Mapping[tuple[str, int], str]) -> list[ServerHint]:
    """Each server once. If they differ about the key at an address, the key that a server's own agent has proved is
    tried first: others may remember a former server."""
    found: dict[tuple[str, int], dict[str, ServerHint]] = {}
    for server in named:
        found.setdefault((server.host, server.port), {}).setdefault(server.key_hash, server)
    servers: list[ServerHint] = []
    for place, keys in found.items():
        at_place = sorted(keys.values(), key=lambda s: s.key_hash != proved.get(place))
        servers += [s for s in at_place if s.key_hash or len(keys) == 1]
    return servers


async def _resolve(host: str, timeout_s: float) -> list[str]:
    """All addresses of a name, resolved now; an address is itself. Raises OSError."""
    with contextlib.suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    async with asyncio.timeout(timeout_s):
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(where[0]) for *_, where in found))[:ADDRESSES_MAX]


async def probe(address: str, expected_key_hash: str, identity: Identity, *, timeout_s: float = TIMEOUT_S) -> AgentInfo:
    """What the agent at `address` says, if it lives and holds that key ("" takes any key of the cluster).

    Raises OSError, TimeoutError (it does not answer) or Denied (someone else answers).
    """
    host, port = parse_address(address)
    reply, _ = await _ask(host, port, identity, {"kind": "ping"}, timeout_s, expected_key_hash)
    return _parse_info(reply.get("self"))


async def _ask(
    host: str, port: int, identity: Identity, request: dict[str, Any], timeout_s: float, expected_key_hash: str = ""
) -> tuple[dict[str, Any], str]:
    """One request on a connection of its own: (answer, hash of the peer's key)."""
    asking = _Asking()
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().create_connection(
                lambda: asking,
                host,
                port,
                ssl=identity.client_context(),
                server_hostname="",
                ssl_handshake_timeout=timeout_s,
                ssl_shutdown_timeout=1.0,
            )
            key_hash = peer_key_hash(asking.ssl_object)
            if expected_key_hash and key_hash != expected_key_hash:
                raise Denied(f"the node at {host}:{port} has another key than expected")
            asking.send(pack(request))
            reply = unpack_first(await asking.answer())
    finally:
        asking.close()
    if not isinstance(reply, dict) or reply.get("kind") not in ("pong", "servers", "error"):
        raise BadRequest(_no_join_port(port))  # it is the port of a server's RPC, most likely
    if reply.get("kind") == "error":
        raise BadRequest(f"{host}:{port}: {str(reply.get('reason'))[:200]}")
    return reply, key_hash


def _no_join_port(port: int) -> str:
    return f"not a join port; joins use {PORT}" if port != PORT else "another program than a Rostra agent answers there"


class _Asking(FrameConnection):
    """Our side of one request."""

    def __init__(self) -> None:
        super().__init__(self._answered, frame_bytes_max=ANSWER_BYTES_MAX)
        self._payload: bytes | None = None
        self._error: Exception | None = None
        self._changed = asyncio.Event()

    async def answer(self) -> bytes:
        """Raises what ended the connection."""
        await self._changed.wait()
        if self._payload is not None:
            return self._payload
        if isinstance(self._error, ssl.SSLError):
            raise self._error
        # What the peer said about it may have been lost with the connection (it is reset when our request is unread).
        raise ConnectionResetError(
            "the peer ended the connection after the handshake: it may not trust our certificate"
            " (is `encrypt` the same on both nodes?) or have no place for us"
        )

    def connection_lost(self, exc: Exception | None) -> None:
        # In TLS 1.3 a client learns by its first read that its certificate was refused: keep the reason whole.
        self._error = exc
        self._changed.set()
        super().connection_lost(exc)

    def _answered(self, payload: bytes) -> None:
        self._payload = payload
        self._changed.set()


def parse_address(address: str, port: int = PORT) -> tuple[str, int]:
    """host and port of `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address. Raises BadRequest."""
    text = address.strip()
    host, given = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise BadRequest(f"address {address!r}: expected [address]:port")
        given = rest[1:]
    elif text.count(":") == 1:
        host, _, given = text.partition(":")
    if given:
        if not (given.isascii() and given.isdigit() and 0 < int(given) < 65536):
            raise BadRequest(f"address {address!r}: {given!r} is not a port")
        port = int(given)
    if not host or any(c.isspace() for c in host):
        raise BadRequest(f"address {address!r}: no host")
    return host, port


def _parse_info(data: Any) -> AgentInfo:
    if not isinstance(data, Mapping):
        raise BadRequest("the answer does not say who gives it")
    return AgentInfo(
        node_id=_text(data, "node_id"),
        name=_text(data, "name"),
        role=_text(data, "role"),
        datacenter=_text(data, "datacenter"),
        version=_text(data, "version"),
        rpc_address=_text(data, "rpc_address"),
        rpc_port=_port(data, "rpc_port"),
        key_hash=_text(data, "key_hash"),
    )


def _parse_server(data: Any) -> ServerHint:
    if not isinstance(data, Mapping) or not data.get("host"):
        raise BadRequest("the answer names a server without an address")
    return ServerHint(
        host=_text(data, "host"),
        port=_port(data, "port"),
        key_hash=_text(data, "key_hash"),
        node_id=_text(data, "node_id"),
        name=_text(data, "name"),
        datacenter=_text(data, "datacenter"),
    )


def _list(value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise BadRequest("the answer lists no servers")
    return value


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name, "")
    if not isinstance(value, str) or len(value) > 255 or not value.isprintable():
        raise BadRequest(f"the answer's {name} is not a text")
    return value


def _port(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name, 0)
    if not isinstance(value, int) or not 0 <= value < 65536:
        raise BadRequest(f"the answer's {name} is not a port")
    return value
