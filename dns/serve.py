"""The sockets: UDP and TCP on one port, for as many addresses as configured.

A query that `Resolver.hot` knows is answered in three lines; everything else goes through `Resolver.resolve`, and only
so much of it per turn of the loop (`wire/turns.py`): then a connection is read no further, and datagrams wait in line.
Queries that wait for a view are parked together, one task per view. All is bounded: parked queries, datagrams in line,
connections, what one connection may send and leave unread. No packet can raise past this module.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rostra.dns.alias import Ask
from rostra.dns.answer import DnsConfig
from rostra.dns.message import Found
from rostra.dns.recurse import Recursor
from rostra.dns.resolver import Count, Draw, Forward, Look, Resolver, Wait
from rostra.dns.source import LiveRows, Source
from rostra.runtime import log as logging
from rostra.runtime.service import Tasks
from rostra.wire.errors import Conflict
from rostra.wire.turns import Turns, turns

log = logging.get("dns")

PARKED_MAX = 4096
READY_TIMEOUT_S = 2.0
#: For all that recursors are asked about one query, and how often: a client does not wait longer either.
LOOK_TIMEOUT_S = 3.0
LOOKS_MAX = 6
TCP_CONNECTIONS_MAX = 512
TCP_IDLE_S = 10.0
TCP_QUERY_BYTES_MAX = 4096
TCP_WAITING_MAX = 32
TCP_UNREAD_BYTES_MAX = 256 << 10
UDP_BUFFER_BYTES = 4 << 20
#: Datagrams that may stand in line, by their bytes and what it costs to keep each; the kernel drops no sooner.
LINE_BYTES_MAX = 2 << 20
_KEPT_BYTES = 300

Reply = Callable[[bytes], None]


class DnsServer:
    """`await start()`, `await stop()`. `port` is the bound one where 0 was asked for."""

    def __init__(
        self,
        config: DnsConfig,
        source: Source,
        *,
        hosts: Sequence[str] = ("127.0.0.1",),
        port: int = 8600,
        count: Count | None = None,
        tcp_idle_s: float = TCP_IDLE_S,
    ) -> None:
        self.resolver = Resolver(config, source, count=count)
        self.port = port
        self.tcp_idle_s = tcp_idle_s
        self.connections: set[_TcpConnection] = set()
        self._hosts = tuple(hosts)
        self._recursor = Recursor(config.recursors) if config.recursors else None
        self._parked: dict[int, list[tuple[bytes, Reply, bool]]] = {}
        self._parked_count = 0
        self._line: deque[tuple[bytes, Reply]] = deque()
        self._line_bytes = 0
        self.turns: Turns  # the loop's, from `start` on
        self._tasks = Tasks("dns")
        self._udp: list[asyncio.BaseTransport] = []
        self._tcp: list[asyncio.Server] = []
        self._ticker: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Bind and serve. Raises Conflict with a line for the operator where an address cannot be had."""
        loop = asyncio.get_running_loop()
        self.turns = turns()
        pairs = bind_pairs(self._hosts, self.port)
        self.port = pairs[0][0].getsockname()[1]
        try:
            while pairs:
                udp, tcp = pairs[0]
                transport, _ = await loop.create_datagram_endpoint(lambda: _UdpProtocol(self), sock=udp)
                self._udp.append(transport)
                self._tcp.append(await loop.create_server(lambda: _TcpConnection(self), sock=tcp, backlog=256))
                pairs.pop(0)
        finally:
            _close_all(pairs)
        self._ticker = loop.call_later(1.0, self._tick)

    async def stop(self) -> None:
        """Close everything. Parked queries get no answer."""
        if self._ticker is not None:
            self._ticker.cancel()
        for transport in self._udp:
            transport.close()
        for server in self._tcp:
            server.close()
        for connection in list(self.connections):
            connection.abort()
        if self._recursor is not None:
            self._recursor.close()
        await self._tasks.stop()
        self.resolver.close()

    def answer(self, packet: bytes, reply: Reply, *, tcp: bool) -> None:
        """Reply now, later or never; never raise. `reply` is called at most once."""
        try:
            found = self.resolver.resolve(packet, tcp=tcp)
            if found is None:
                return
            if isinstance(found, bytes):
                reply(found)
            elif isinstance(found, Wait):
                self._park(found.view, packet, reply, tcp)
            elif isinstance(found, Look):
                self._look(found, packet, reply, tcp)
            else:
                self._forward(found, packet, reply, tcp)
        except Exception:
            log.err("DNS query failed", query=packet[:300].hex(), exc_info=True)

    def receive(self, packet: bytes, reply: Reply) -> None:
        """A datagram: answered at once while there is room in this turn of the loop, else in its turn, else dropped."""
        if not self._line and self.turns.begin():
            self.answer(packet, reply, tcp=False)
            return
        size = len(packet) + _KEPT_BYTES
        if self._line_bytes + size > LINE_BYTES_MAX:
            self.resolver.dropped += 1
            return
        if not self._line:
            self.turns.queue(self._answer_line, of_many=True)
        self._line.append((packet, reply))
        self._line_bytes += size

    def _answer_line(self) -> None:
        line, room = self._line, self.turns.room
        while line:
            packet, reply = line.popleft()
            self._line_bytes -= len(packet) + _KEPT_BYTES
            self.answer(packet, reply, tcp=False)
            if line and not room():
                self.turns.queue(self._answer_line, of_many=True)
                return

    def _park(self, view: LiveRows, packet: bytes, reply: Reply, tcp: bool) -> None:
        if self._parked_count >= PARKED_MAX:
            self._fail(packet, reply)
            return
        self._parked_count += 1
        waiting = self._parked.get(id(view))
        if waiting is not None:
            waiting.append((packet, reply, tcp))
            return
        self._parked[id(view)] = [(packet, reply, tcp)]
        self._tasks.start("wait for a view", self._answer_when_ready(view))

    async def _answer_when_ready(self, view: LiveRows) -> None:
        waiting: list[tuple[bytes, Reply, bool]] = []
        try:
            is_ready = await view.ready(READY_TIMEOUT_S)
        except Exception:
            log.err("DNS view failed", exc_info=True)
            is_ready = False
        finally:
            waiting = self._parked.pop(id(view))
        await self.turns.turn()
        for packet, reply, tcp in waiting:
            if not self.turns.room():
                await self.turns.turn()
            self._parked_count -= 1
            if is_ready and view.is_ready:
                self.answer(packet, reply, tcp=tcp)
            else:
                self._fail(packet, reply)

    def _look(self, found: Look, packet: bytes, reply: Reply, tcp: bool) -> None:
        if self._recursor is None or not self._recursor.has_room:
            self._reply_with({}, packet, reply, tcp)
            return
        self._tasks.start("look up", self._look_up(self._recursor, found, packet, reply, tcp))

    async def _look_up(self, recursor: Recursor, found: Look, packet: bytes, reply: Reply, tcp: bool) -> None:
        known: dict[Ask, list[Found]] = {}
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                for _ in range(LOOKS_MAX):
                    said = await asyncio.gather(*map(recursor.look_up, found.asks))
                    known.update(zip(found.asks, said))
                    await self.turns.turn()
                    again = self.resolver.resolve(packet, tcp=tcp, known=known)
                    if isinstance(again, Wait):
                        await again.view.ready(READY_TIMEOUT_S)
                        again = self.resolver.resolve(packet, tcp=tcp, known=known)
                    if not isinstance(again, Look):
                        break
                    found = again
        except TimeoutError:
            pass
        except Exception:
            log.err("DNS query failed", query=packet[:300].hex(), exc_info=True)
        self._reply_with(known, packet, reply, tcp)

    def _reply_with(self, known: dict[Ask, list[Found]], packet: bytes, reply: Reply, tcp: bool) -> None:
        """The best answer that can be had now: at least the alias itself."""
        try:
            answer = self.resolver.resolve(packet, tcp=tcp, known=known, may_ask=False)
        except Exception:
            log.err("DNS query failed", query=packet[:300].hex(), exc_info=True)
            answer = None
        if isinstance(answer, bytes):
            reply(answer)
        else:
            self._fail(packet, reply)

    def _forward(self, found: Forward, packet: bytes, reply: Reply, tcp: bool) -> None:
        if self._recursor is None or not self._recursor.has_room:
            self._fail(packet, reply)
            return
        self._tasks.start("recurse", self._recurse(self._recursor, packet, reply, tcp))

    async def _recurse(self, recursor: Recursor, packet: bytes, reply: Reply, tcp: bool) -> None:
        answer = await recursor.ask(packet, tcp=tcp)
        await self.turns.turn()
        if answer is None:
            self._fail(packet, reply)
        else:
            reply(answer)

    def _fail(self, packet: bytes, reply: Reply) -> None:
        answer = self.resolver.fail(packet)
        if answer is not None:
            reply(answer)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._ticker = loop.call_later(1.0, self._tick)
        try:
            self.resolver.tick()
        except Exception:
            log.err("DNS housekeeping failed", exc_info=True)
        now = loop.time()
        for connection in list(self.connections):
            connection.close_if_idle(now, self.tcp_idle_s)


class _UdpProtocol(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._resolver = server.resolver
        self._hot: dict[bytes, Draw] = server.resolver.hot
        self._blocked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._sendto: Callable[[bytes, Any], None] = transport.sendto  # type: ignore[attr-defined]

    def datagram_received(self, data: bytes, addr: Any) -> None:
        draw = self._hot.get(data[2:])
        if draw is not None and not self._blocked:
            self._resolver.hot_hits += 1
            try:
                self._sendto(data[:2] + draw(), addr)
            except OSError:
                pass  # an address that nothing can be sent to
        else:
            self._server.receive(data, lambda reply: self._reply(reply, addr))

    def _reply(self, reply: bytes, addr: Any) -> None:
        if self._blocked or self._transport.is_closing():
            return  # UDP may drop; a queue of answers that nobody takes must not grow
        try:
            self._sendto(reply, addr)
        except OSError:
            pass

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False

    def error_received(self, exc: Exception) -> None:
        pass  # an ICMP error about somebody's closed port


class _TcpConnection(asyncio.Protocol):
    """Frames of two length bytes; queries may be pipelined, and answers come in any order (RFC 7766).

    Reading is paused while whole queries wait: for the loop's next turn, for answers, for the client to read.
    """

    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._turns = server.turns
        self._buffer = bytearray()
        self._waiting = 0
        self._is_in_line = False
        self._paused = False
        self._ended = False
        self._lost = False
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        transport.set_write_buffer_limits(high=TCP_UNREAD_BYTES_MAX)  # type: ignore[attr-defined]
        connections = self._server.connections
        if len(connections) >= TCP_CONNECTIONS_MAX:
            min(connections, key=lambda c: c._last).abort()
        connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._lost = True
        self._buffer.clear()

    def abort(self) -> None:
        self._server.connections.discard(self)
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._go_on()

    def eof_received(self) -> bool:
        self._ended = True
        self._go_on()
        return True  # stay until what was asked is answered

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._go_on()

    def close_if_idle(self, now: float, idle_s: float) -> None:
        """Counted from the last whole query, so that a client cannot stay by sending a byte now and then."""
        if now - self._last > idle_s:
            if self._paused or self._waiting:
                self.abort()
            else:
                self._transport.close()

    def _go_on(self) -> None:
        """Something changed: handle what came, now or in this connection's turn."""
        if self._is_in_line:
            return
        if self._turns.begin():
            self._handle()
        else:
            self._wait_in_line()

    def _wait_in_line(self) -> None:
        self._is_in_line = True
        self._transport.pause_reading()
        self._turns.queue(self._handle)

    def _handle(self) -> None:
        self._is_in_line = False
        if self._lost or self._transport.is_closing():
            return
        buffer, at = self._buffer, 0
        while not self._paused and self._waiting < TCP_WAITING_MAX and len(buffer) - at >= 2:
            size = buffer[at] << 8 | buffer[at + 1]
            if not 12 <= size <= TCP_QUERY_BYTES_MAX:
                buffer.clear()
                self._transport.close()
                return
            if len(buffer) - at < 2 + size:
                break
            if at and not self._turns.room():
                del buffer[:at]
                self._wait_in_line()
                return
            packet = bytes(buffer[at + 2 : at + 2 + size])
            at += 2 + size
            self._last = self._clock()
            self._ask(packet)
        del buffer[:at]
        if self._ended and not self._waiting and not self._paused:
            self._transport.close()
        elif len(buffer) > TCP_QUERY_BYTES_MAX + 2:
            self._transport.pause_reading()
        elif not self._ended:
            self._transport.resume_reading()

    def _ask(self, packet: bytes) -> None:
        is_now, answered = True, False

        def reply(answer: bytes) -> None:
            nonlocal answered
            if answered:
                return
            answered = True
            if not self._transport.is_closing():
                self._transport.write(len(answer).to_bytes(2, "big") + answer)
            if not is_now:
                self._waiting -= 1
                self._go_on()

        self._server.answer(packet, reply, tcp=True)
        is_now = False
        if not answered:
            self._waiting += 1


# -- sockets ------------------------------------------------------------------------------------------------------


def bind_pairs(hosts: Sequence[str], port: int) -> list[tuple[socket.socket, socket.socket]]:
    """A UDP and a TCP socket per host, all on one port (any free one for 0). Raises Conflict."""
    for attempt in range(20):
        pairs: list[tuple[socket.socket, socket.socket]] = []
        try:
            chosen = port
            for host in hosts:
                pairs.append(_bind_pair(host, chosen))
                chosen = pairs[0][0].getsockname()[1]
            return pairs
        except _BindError as e:
            _close_all(pairs)
            if port == 0 and e.error.errno == errno.EADDRINUSE and attempt < 19:
                continue
            raise Conflict(e.line) from e.error
    raise AssertionError("unreachable")


class _BindError(Exception):
    def __init__(self, error: OSError, host: str, port: int, transport: str) -> None:
        super().__init__(str(error))
        self.error = error
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        what_to_do = {
            errno.EACCES: "a port below 1024 needs CAP_NET_BIND_SERVICE",
            errno.EADDRNOTAVAIL: "choose another address with -client or addresses.dns",
        }.get(error.errno or 0, "choose another port with -dns-port or ports.dns (-1 turns DNS off)")
        self.line = f"DNS cannot listen on {where}/{transport}: {error.strerror}; {what_to_do}"


def _bind_pair(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    udp = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    tcp = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    transport = "udp"
    try:
        # No SO_REUSEADDR on UDP: Linux would let two programs share the port and each see a part of the queries.
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UDP_BUFFER_BYTES)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UDP_BUFFER_BYTES)
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            for s in (udp, tcp):
                s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        udp.bind((host, port))
        transport = "tcp"
        tcp.bind((host, udp.getsockname()[1]))
        tcp.listen(256)
    except OSError as e:
        bound = port or (udp.getsockname()[1] if transport == "tcp" else 0)
        udp.close()
        tcp.close()
        raise _BindError(e, host, bound, transport) from e
    return udp, tcp


def _close_all(pairs: Sequence[tuple[socket.socket, socket.socket]]) -> None:
    for pair in pairs:
        for s in pair:
            s.close()
