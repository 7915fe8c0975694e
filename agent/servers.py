"""The agent's one session with a server: writes, reads, barriers, watches, acts; and the next server when it is lost.

Exactly once is decided here and in the state machine: each write keeps its (client id, sequence) however often it is
sent, to whichever server. Barriers are shared: a request joins only one that starts after it arrived. See
`servers_port.py` for what callers may rely on.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from rostra.agent.servers_port import Barrier, Delta, Mode, ReadAnswer
from rostra.runtime.log import RateLimited, get
from rostra.runtime.tls import explain
from rostra.wire.caller import ANONYMOUS, Caller
from rostra.wire.codec import encode_value
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import Conflict, Denied, NoLeader, RostraError, Timeout
from rostra.wire.frames import ANSWER_FRAME_BYTES_MAX
from rostra.wire.rounds import Rounds
from rostra.wire.rpc import DONE, END, FULL, Lost, RpcClient, check_hello, hello

log = get("servers")

#: Consul's rpc_hold_timeout: how long a request waits for a server that can answer it.
HOLD_S = 7.0
UNKNOWN = "the server was lost before it answered: the write may or may not have been done"
#: What a barrier gets at least, however long those who share it have waited for the one before.
ASK_MIN_S = 0.5
DIAL_S = 3.0
PING_EVERY_S = 0.5
#: With PING_EVERY_S, how long a cut cable can go unnoticed; writes are promised again 1.5 s after it.
PING_TIMEOUT_S = 0.75
#: A server that has known no leader for so long may be cut off from the others while we are not.
LEADERLESS_S = 3.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 5.0
#: How long to wait at most before the join addresses are asked again, while none of them knows a server.
DISCOVER_MAX_S = 1.0
#: A refusal is not a passing thing: an operator has to act, or another node has to be found dead.
REFUSED_RETRY_S, REFUSED_TELL_S = 5.0, 60.0


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server answers: the path of its local socket, or host, port and the hash of its key ("" if unknown)."""

    path: str = ""
    host: str = ""
    port: int = 0
    key_hash: str = ""

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


class ServerLink:
    """Implements `Servers` over whichever server can be reached."""

    def __init__(
        self,
        *,
        addresses: Callable[[], Awaitable[list[ServerAddress]]],
        context: Callable[[], ssl.SSLContext],
        about: Callable[[], dict[str, Any]],
        key_of: Callable[[ssl.SSLObject], str],
        spawn: Callable[..., asyncio.Task[Any]],
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._addresses, self._context, self._about, self._key_of = addresses, context, about, key_of
        self._spawn, self._jitter = spawn, jitter
        self._loop = asyncio.get_running_loop()
        self._client: RpcClient | None = None
        self._connection: FrameConnection | None = None
        self._changed = asyncio.Event()
        self._client_id = str(uuid.uuid4())
        self._sequence = 0
        self._outstanding: dict[int, None] = {}
        self._since = 0
        self._barriers = {m: Rounds(partial(self._barrier, m), self._spawn) for m in ("default", "consistent", "stale")}
        self._touched: list[Callable[[int, frozenset[int] | None], None]] = []
        self.on_connected: list[Callable[[], None]] = []
        self.server_hello: dict[str, Any] = {}
        self._left: ServerAddress | None = None  # the server of the last session: tried last
        self.last_error = ""
        self.reconnects = 0
        self._quiet = RateLimited(log, REFUSED_TELL_S)
        self._leaderless = False  # the server that was left last knew no leader, and none has since

    # -- the port ---------------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.open

    def on_touched(self, callback: Callable[[int, frozenset[int] | None], None]) -> None:
        self._touched.append(callback)

    async def write(self, command: Any, *, caller: Caller = ANONYMOUS, timeout_s: float = 10.0) -> Any:
        kind, args = encode_value(command)
        self._sequence += 1
        sequence = self._sequence
        self._outstanding[sequence] = None
        deadline = time.monotonic() + timeout_s
        is_unknown = False  # an attempt was sent and not answered; the others have the same number
        try:
            while True:
                try:
                    client = self._client
                    if client is None or not client.open:
                        client = await self._connected_by(deadline)
                    first = next(iter(self._outstanding))
                    call = client.call("write", (self._client_id, sequence, first), kind, args, caller.packed())
                    return await _by(call, deadline)
                except Lost as e:
                    is_unknown |= e.was_sent
                    if time.monotonic() >= deadline:
                        if is_unknown:
                            raise Timeout(UNKNOWN) from None
                        raise
                except NoLeader:
                    if is_unknown:
                        raise Timeout(UNKNOWN) from None
                    raise
        finally:
            del self._outstanding[sequence]

    async def read(self, query: Any, *, min_index: int = 0, token: str = "") -> ReadAnswer:
        kind, args = encode_value(query)
        deadline = time.monotonic() + HOLD_S
        while True:
            client = await self._connected_by(deadline)
            try:
                return await _by(self._read(client, kind, args, min_index, Caller(token)), deadline)
            except Timeout:
                raise NoLeader from None
            except Lost:
                if time.monotonic() >= deadline:
                    raise

    async def _read(self, client: RpcClient, kind: str, args: Any, min_index: int, caller: Caller) -> ReadAnswer:
        stream = client.stream("read", kind, args, min_index, caller.packed())
        try:
            rows: list[Any] = []
            while (chunk := await stream.next()) is not None:
                rows += chunk.rows
                if chunk.flags & END:
                    return ReadAnswer(chunk.index, chunk.granules, rows)
            raise Lost
        finally:
            stream.close()

    async def barrier(self, mode: Mode) -> Barrier:
        return await self._barriers[mode].join()

    async def watch(self, query: Any, *, token: str = "") -> AsyncIterator[Delta]:
        kind, args = encode_value(query)
        seen = 0  # the next server may be behind the last one: it answers when it has caught up
        while True:
            try:
                client = await self._connected_by(time.monotonic() + 60.0)
            except NoLeader:
                continue
            stream = client.stream("watch", kind, args, Caller(token).packed(), *((seen,) if seen else ()))
            full = True
            try:
                while (chunk := await stream.next()) is not None:
                    yield Delta(
                        chunk.index,
                        bool(chunk.flags & FULL),
                        bool(chunk.flags & DONE),
                        chunk.granules,
                        list(chunk.rows),
                        list(chunk.removed),
                    )
                    full, seen = False, chunk.index
            except Lost:
                await asyncio.sleep(self._jitter(0.0, 0.05) if full else 0)
            except NoLeader:
                await asyncio.sleep(self._jitter(0.05, 0.2))  # the server only starts
            except Timeout:
                seen = 0  # it does not catch up; perhaps it knows another past (a development server, a restored one)
            finally:
                stream.close()

    async def act(
        self,
        kind: str,
        args: dict[str, Any],
        *,
        caller: Caller = ANONYMOUS,
        timeout_s: float = 10.0,
        once: bool = False,
    ) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            client = await self._connected_by(deadline)
            try:
                return await _by(client.call("act", kind, args, caller.packed()), deadline)
            except Lost:
                if once:
                    raise Timeout("the server was lost before it answered; it may or may not have been done") from None
                if time.monotonic() >= deadline:
                    raise

    # -- the session ------------------------------------------------------------------------------------------

    async def _connected_by(self, deadline: float) -> RpcClient:
        while True:
            client = self._client
            if client is not None and client.open:
                return client
            left = min(deadline, time.monotonic() + HOLD_S) - time.monotonic()
            if left <= 0:
                raise NoLeader
            try:
                async with asyncio.timeout(left):
                    await self._changed.wait()
            except TimeoutError:
                raise NoLeader from None

    async def run(self) -> None:
        """Keep a session. Ends only by cancellation."""
        delay = RECONNECT_MIN_S
        told = 0.0
        refusals = RateLimited(log, REFUSED_TELL_S)
        while True:
            tried: list[str] = []
            refused: dict[str, None] = {}
            held = False
            for address in sorted(await self._addresses(), key=lambda a: a == self._left):
                try:
                    connection, server = await self._dial(address)
                except (Conflict, Denied) as e:
                    refused[e.message] = None
                    continue
                except RostraError as e:
                    tried.append(f"{address}: {e.message}")
                    continue
                delay, tried, told, self.last_error = RECONNECT_MIN_S, [], 0.0, ""
                refused, refusals = {}, RateLimited(log, REFUSED_TELL_S)
                held = True
                await self._hold(connection, server, address)
                break
            if refused:
                self.last_error = reason = "; ".join(refused)
                refusals.err("the servers refuse this node, trying again", key=reason, reason=reason)
                delay = REFUSED_RETRY_S
            elif tried:
                self.last_error = "; ".join(tried)
                now = time.monotonic()
                if now - told > 10.0:
                    told = now
                    log.warn("no server can be reached, trying again", tried=self.last_error)
            await asyncio.sleep(self._jitter(delay / 2, delay))
            if held or refused:
                delay = RECONNECT_MIN_S
            else:
                delay = min(delay * 1.6, RECONNECT_MAX_S if tried else DISCOVER_MAX_S)

    async def _hold(self, connection: FrameConnection, server: dict[str, Any], address: ServerAddress) -> None:
        client = RpcClient(connection, level=server.get("level", 1))
        lost = asyncio.Event()

        def on_lost(reason: str) -> None:
            lost.set()
            if self._client is client:  # before anyone resumes who would look for the next session in a loop
                self._changed.clear()
                self._client = None
            client.on_lost(reason)

        connection.on_frame, connection.on_lost = client.on_frame, on_lost
        if not connection.open:
            return
        self.server_hello = server
        self._client, self._connection = client, connection
        self._since = 0
        self.reconnects += 1
        self._forget()
        self._changed.set()
        # One that knows no leader is left after some seconds and perhaps found again: not news each time.
        (self._quiet if self._leaderless else log).info(
            "connected to a server", server=str(address), name=server.get("name", "")
        )
        for callback in self.on_connected:
            callback()
        led = self._loop.time()
        try:
            while not lost.is_set():
                asked = self._loop.time()
                try:
                    async with asyncio.timeout(PING_TIMEOUT_S):
                        known_leader, _ = await client.call("ping")
                except TimeoutError:
                    if self._loop.time() - asked > 2 * PING_TIMEOUT_S:
                        continue  # it was this process that stood still; the answer may lie unread
                    log.warn("the server does not answer, trying another", server=str(address))
                    return
                now = self._loop.time()
                if known_leader or address.path:
                    led = now
                    if self._leaderless:
                        self._leaderless = False
                        log.info("the servers have a leader again", server=str(address))
                elif now - led > LEADERLESS_S:
                    self._leaderless = True
                    self._quiet.warn(
                        "the server knows no leader, trying another", key=str(address), server=str(address)
                    )
                    return
                try:
                    async with asyncio.timeout(PING_EVERY_S):
                        await lost.wait()
                except TimeoutError:
                    pass
        except RostraError:
            pass
        finally:
            self._left = address
            self._changed.clear()
            self._client = self._connection = None
            connection.abort("session over")

    async def _dial(self, address: ServerAddress) -> tuple[FrameConnection, dict[str, Any]]:
        connection = FrameConnection(frame_bytes_max=ANSWER_FRAME_BYTES_MAX)
        connection.is_of_the_cluster()
        first: asyncio.Future[bytes] = self._loop.create_future()
        first.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be left to look
        connection.on_frame = lambda payload: None if first.done() else first.set_result(payload)
        connection.on_lost = lambda reason: None if first.done() else first.set_exception(ConnectionError(reason))
        try:
            async with asyncio.timeout(DIAL_S if not address.path else HOLD_S + 1):
                if address.path:
                    await self._loop.create_unix_connection(lambda: connection, address.path)
                else:
                    await self._loop.create_connection(
                        lambda: connection, address.host, address.port, ssl=self._context(), server_hostname=""
                    )
                    raw = connection.info("socket")
                    if raw is not None:
                        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    if connection.ssl_object is None:
                        raise ConnectionError("closed right after the handshake")
                    if address.key_hash and self._key_of(connection.ssl_object) != address.key_hash:
                        # The server that named it may not know yet that it was replaced. It refuses nobody.
                        raise NoLeader("it has another key than the servers' list names: was it replaced?")
                connection.send(hello("rpc", **self._about()))
                return connection, check_hello(await first)
        except (OSError, ssl.SSLError, TimeoutError, ValueError, OverflowError) as e:  # the last two: no address at all
            connection.abort("dial failed")
            raise NoLeader(explain(e)) from None
        except BaseException:
            connection.abort("refused")
            raise

    def _forget(self) -> None:
        for callback in self._touched:
            callback(0, None)

    async def _barrier(self, mode: str, first_came: float) -> Barrier:
        """For all who wait, the first of them since `first_came`. NoLeader when its time is over."""
        # A request that waited for the end of the last round has used up that part of its time.
        deadline = max(first_came + HOLD_S, time.monotonic() + ASK_MIN_S)
        while True:
            client = await self._connected_by(deadline)
            since = self._since
            try:
                index, packed, known, contact_ms = await _by(client.call("barrier", mode, since), deadline)
            except Timeout:
                raise NoLeader from None
            except Lost:
                if time.monotonic() >= deadline:
                    raise
                continue
            if client is not self._client:
                continue  # its session is over: what it says was touched is not ours to count from
            if packed is None or index < since:
                touched = None
            else:
                touched = frozenset(int.from_bytes(packed[i : i + 8], "big") for i in range(0, len(packed), 8))
            self._since = max(index, self._since)
            for callback in self._touched:
                callback(index, touched)
            return Barrier(index, known, contact_ms)


async def _by(work: Awaitable[Any], deadline: float) -> Any:
    """`work`, or Timeout at `deadline` (monotonic seconds)."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await work
    except TimeoutError:
        raise Timeout("the servers did not answer in time: a write may or may not have been done") from None
