"""One HTTP connection: how much of what arrives aiohttp's parser is given, and when; and the short way of hot reads.

The parser is fed in pieces: a head ends its piece, a body is counted or, if it is chunked, cut where it may end. So we
know where messages begin without a parser of our own: the parser's word counts, and where it does not say what we
expect, there are no hot reads on this connection any more. Many pieces take turns with the other readers of the loop.
This module alone leans on the insides of aiohttp. `insides_fit` tries them at start; where they differ, everything goes
to aiohttp.
"""

from __future__ import annotations

import asyncio
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from aiohttp.web_request import BaseRequest
from aiohttp.web_server import Server

from rostra.agent.http.hot import HotReads
from rostra.wire.turns import Turns, turns

#: The parser gets so much at a time: one-byte chunks and small requests cost it much work.
PIECE_BYTES = 2048
#: A body whose length is known costs it little.
BODY_PIECE_BYTES = 64 << 10
#: aiohttp joins the chunks of a body that wait in one step, each by itself. With more than this it takes no more.
CHUNKS_MAX = 256
#: A waiting connection keeps so much of what arrives; beyond this it reads no more.
HELD_BYTES_MAX = 64 << 10
LINE_BYTES_MAX = 64 << 10
HEAD_BYTES_MAX = 256 << 10
HEADERS_MAX = 2000
#: A head that began is whole within this, however its bytes trickle.
HEAD_S = 30.0
#: Seconds. A client that is there but closed its sending side answers the kernel's probes. One that has gone does not,
#: or only for as long as its kernel remembers the connection: on Linux a minute.
PROBE_AFTER, PROBE_EVERY, PROBES = 5, 5, 3

_END = b"\r\n\r\n"
_NOT_ASCII = re.compile(rb"[\x80-\xff]")


def _escaped_target(piece: bytes) -> bytes:
    """A request line as the parser takes it: clients send UTF-8 as it is, and Go reads it as if it were escaped."""
    line, newline, rest = piece.partition(b"\n")
    return _NOT_ASCII.sub(lambda found: b"%%%02X" % found[0][0], line) + newline + rest


class PayloadBroken(Exception):
    """The rest of this body cannot come: it is malformed, or the client has closed its sending side."""


class Attention:
    """Looks once a second at connections that may never do anything again: unfinished heads, half-closed clients."""

    def __init__(self, *, head_s: float = HEAD_S, look_s: float = 1.0) -> None:
        self._head_s = head_s
        self._look_s = look_s
        self._heads: dict[Connection, float] = {}  # oldest first
        self._half_closed: dict[int, Connection] = {}
        self._timer: asyncio.TimerHandle | None = None

    def head_began(self, connection: Connection) -> None:
        self._heads[connection] = asyncio.get_running_loop().time() + self._head_s
        self._arm()

    def head_ended(self, connection: Connection) -> None:
        self._heads.pop(connection, None)

    def half_closed(self, fd: int, connection: Connection) -> None:
        self._half_closed[fd] = connection
        self._arm()

    def give_up_one(self, host: str) -> bool:
        """Drop the oldest connection of this client that it has half-closed: most likely it has gone altogether."""
        for fd, connection in self._half_closed.items():
            peer = connection.peername
            if isinstance(peer, tuple) and peer[0] == host:
                del self._half_closed[fd]
                connection.abandon()
                return True
        return False

    def gone(self, fd: int, connection: Connection) -> None:
        self._heads.pop(connection, None)
        if self._half_closed.get(fd) is connection:
            del self._half_closed[fd]

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._heads and (oldest := next(iter(self._heads.items())))[1] <= now:
            del self._heads[oldest[0]]
            oldest[0].refuse(408, "the request's head did not arrive in time")
        if self._half_closed:
            poll = select.poll()
            for fd in self._half_closed:
                poll.register(fd, 0)  # POLLHUP and POLLERR come unasked
            for fd, _ in poll.poll(0):
                self._half_closed.pop(fd).abandon()
        if self._heads or self._half_closed:
            self._arm()


class Connection(RequestHandler):
    """aiohttp's connection, given its bytes piece by piece, with a bound on connections per client."""

    __slots__ = (
        "_admit",
        "_answers",
        "_attention",
        "_body_left",
        "_broken",
        "_chunked",
        "_eof",
        "_exact",
        "_fd",
        "_half_close",
        "_head_bytes",
        "_held",
        "_held_at",
        "_held_bytes",
        "_hot",
        "_line_done",
        "_payload",
        "_pending",
        "_plain",
        "_queued",
        "_refused",
        "_seam",
        "_stopped",
        "_transport_paused",
        "_turns",
    )

    def __init__(
        self,
        manager: Server,
        *,
        hot: HotReads,
        admit: Callable[[Connection, asyncio.Transport], bool],
        attention: Attention,
        plain: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(manager, **kwargs)
        self._admit = admit
        self._attention = attention
        self._hot = hot
        self._answers = hot.answers
        self._turns: Turns = turns()
        self._plain = plain  # aiohttp's insides are not as we know them: it gets all as it comes
        self._refused = False
        self._fd = -1
        self._half_close = False  # whether this kind of transport can be closed one way
        self._eof = False  # the client has closed its sending side
        self._broken = False  # what follows cannot be understood, or is not wanted
        # Where we are in the stream.
        self._exact = True  # the parser has agreed with us so far: only then are there hot reads
        self._head_bytes = 0  # of a head that has begun
        self._line_done = False  # its first line has been seen
        self._seam = b""  # its last bytes, or those of a chunked body: its end may lie across two pieces
        self._body_left = 0
        self._chunked = False
        self._payload: StreamReader = EMPTY_PAYLOAD  # the body that came last
        # What waits.
        self._pending = False  # a hot answer waits for its barrier
        self._held: deque[bytes] = deque()
        self._held_at = 0  # how much of the first of them has been handled
        self._held_bytes = 0
        self._queued = False  # `_go_on` is called when our turn comes
        self._stopped = False  # aiohttp takes no more for now
        self._transport_paused = False

    # -- the transport's calls --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        if not self._admit(self, transport):  # type: ignore[arg-type]
            self._refused = True
            return
        # On TLS there is no half-close: asyncio closes whatever `eof_received` says.
        self._half_close = not self._plain and transport.get_extra_info("sslcontext") is None
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._drop_held()
        self._attention.gone(self._fd, self)
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not data or self._plain:  # no data: aiohttp looks again at what its parser kept
            if self._feed(data):
                self._exact = False
        elif self._pending or self._held or self._stopped:
            self._hold(data)
        elif (
            (answer := self._answers.get(data)) is not None
            and answer.entry.valid
            and self._idle()
            and self._at_boundary()
        ):
            self._pending = True
            self._hot.join(self, data, answer)
        elif len(data) <= PIECE_BYTES:
            self._take(data)
        elif self._turns.begin():
            self._take(data, begun=True)
        else:
            self._hold(data)
            self._queue()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Keeps the connection while there is something to answer. Gone or half-closed: the kernel finds out."""
        if not self._half_close or self._refused or self.transport is None:
            return False
        self._eof = True
        if not self._held:
            self._ended()
        if self._is_done():
            return False
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            if sock.family != socket.AF_UNIX:
                with suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_EVERY)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
            self._fd = sock.fileno()
            self._attention.half_closed(self._fd, self)
        return True

    # -- hot reads --------------------------------------------------------------------------------------------------

    def hot_answer(self, data: bytes) -> None:
        transport = self.transport
        self._pending = False
        if transport is None:
            return
        transport.write(data)
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._held:
            self._release()
        elif self._eof:
            self.force_close()

    def hot_decline(self, request: bytes) -> None:
        self._pending = False
        if self.transport is None or self._manager is None:
            return
        self._held.appendleft(request)
        self._held_bytes += len(request)
        self._go_on(begun=False)

    def _idle(self) -> bool:
        waiter = self._waiter
        return (
            waiter is not None
            and not waiter.done()
            and not self._messages
            and not self._close
            and not self._force_close
            and not self._paused
            and self._payload_parser is None
            and not self._upgraded
        )

    def _at_boundary(self) -> bool:
        """Whether the parser expects the first byte of a request: it agreed about all that it was given so far."""
        return self._exact and not (self._head_bytes or self._body_left or self._broken) and self._payload.is_eof()

    def _release(self) -> None:
        if len(self._held) > 1:
            self._go_on(begun=False)
            return
        data = self._held[0]
        self._drop_held()
        self.data_received(data)
        self._look_for_the_end()

    # -- asked by who handles requests ------------------------------------------------------------------------------

    @property
    def others_wait(self) -> bool:
        """Whether more requests of this connection have been parsed already."""
        return bool(self._messages)

    def is_last(self) -> bool:
        """Whether nothing can follow the request that is being handled. Then the connection closes after it."""
        if self._eof and not self._messages and not self._held:
            self._close = True
        return self._close

    def refuse(self, status: int, text: str) -> None:
        """Answer with an error when what came before is answered; read no more."""
        if self._broken or self.transport is None:
            return
        self._stop_understanding()
        self._messages.append((_ErrInfo(status=status, exc=None, message=text), EMPTY_PAYLOAD))  # type: ignore[arg-type]
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def abandon(self) -> None:
        """The client has gone."""
        if self.transport is not None:
            self.transport.abort()

    # -- where messages begin and end -------------------------------------------------------------------------------

    def _take(self, data: bytes, at: int = 0, begun: bool = False) -> None:
        """Give the parser what there is, piece by piece while there is room; keep the rest."""
        end = len(data)
        at += self._step(data, at)
        while at < end and not self._stopped:
            if not (self._turns.room() if begun else self._turns.begin()):
                break
            begun = True
            at += self._step(data, at)
        if at < end:
            self._held.appendleft(data)
            self._held_at = at
            self._held_bytes += end - at
            self._settle_reading()
            if not self._stopped:
                self._queue()

    def _step(self, data: bytes, at: int) -> int:
        """Feed the next piece of `data`; its length."""
        if self._broken or self._close or self._force_close:
            return len(data) - at
        if self._body_left:
            return self._step_in_body(data, at)
        if self._chunked and self._payload.is_eof():
            self._chunked = False
        limit = min(len(data), at + PIECE_BYTES)
        end = -1
        if self._seam:
            near = (self._seam + data[at : at + 3]).find(_END)
            end = -1 if near < 0 else at + near + 4 - len(self._seam)
        if end < 0 and (found := data.find(_END, at, limit)) >= 0:
            end = found + 4
        piece = data[at:end] if end >= 0 else data[at:limit]
        if self._chunked:
            self._feed(piece)
            self._seam = (self._seam + piece)[-3:] if end < 0 else b""
        else:
            self._feed_head(piece, end >= 0)
            if self._body_left and end < len(data):
                return len(piece) + self._step_in_body(data, end)
        return len(piece)

    def _step_in_body(self, data: bytes, at: int) -> int:
        piece = data[at : at + min(self._body_left, BODY_PIECE_BYTES)]
        self._body_left -= len(piece)
        if self._feed(piece):
            self._stop_understanding()  # a request within a body of another
        return len(piece)

    def _feed_head(self, piece: bytes, is_end: bool) -> None:
        if not piece.isascii() and not self._line_done:
            piece = _escaped_target(piece)
        if not self._feed(piece):
            if not self._head_bytes:
                self._attention.head_began(self)
            self._head_bytes += len(piece)
            self._line_done = self._line_done or b"\n" in piece
            self._seam = b"" if is_end else (self._seam + piece)[-3:]
            if self._head_bytes > HEAD_BYTES_MAX:
                self.refuse(431, "the request's head is too large")
            return
        if self._head_bytes:
            self._head_bytes = 0
            self._line_done = False
            self._seam = b""
            self._attention.head_ended(self)
        message, payload = self._messages[-1]
        if isinstance(message, _ErrInfo):
            return
        self._payload = payload
        if message.chunked:
            self._chunked = True
            self._exact = False
            payload._high_water_chunks, payload._low_water_chunks = CHUNKS_MAX, CHUNKS_MAX // 2
        elif payload is not EMPTY_PAYLOAD:
            self._body_left = int(message.headers.get("Content-Length", 0))
        if not is_end:  # the parser saw an end where we saw none
            self._exact = False

    def _feed(self, data: bytes) -> int:
        """Give it to aiohttp; the number of requests that began."""
        before = self._request_count
        super().data_received(data)
        began = self._request_count - before
        if self._upgraded and not self._plain:  # we take up no other protocol
            assert self._parser is not None
            self._parser.set_upgraded(False)  # type: ignore[attr-defined]
            self._upgraded = False
        if began and not self._plain and isinstance(self._messages[-1][0], _ErrInfo):
            self._stop_understanding()
            if not self._payload.is_eof():
                self._break_payload("malformed")
        return began

    def _break_payload(self, why: str) -> None:
        payload = self._payload
        payload.set_exception(PayloadBroken(why))
        payload.feed_eof()

    def _stop_understanding(self) -> None:
        self._broken = True
        self._exact = False
        self._body_left = 0
        self._attention.head_ended(self)

    # -- what waits -------------------------------------------------------------------------------------------------

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        self._settle_reading()

    def _drop_held(self) -> None:
        self._held.clear()
        self._held_at = self._held_bytes = 0
        self._settle_reading()

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self._turns.queue(self._my_turn)

    def _my_turn(self) -> None:
        self._queued = False
        if self._held and not self._pending and not self._stopped:
            self._go_on(begun=True)

    def _go_on(self, *, begun: bool) -> None:
        """Handle what is held. `begun`: the turn is ours."""
        while self._held and not self._stopped and self.transport is not None:
            data, at = self._held.popleft(), self._held_at
            self._held_at = 0
            self._held_bytes -= len(data) - at
            self._take(data, at, begun)
            if self._queued:
                return
            if self._held and not (self._turns.room() if begun else self._turns.begin()):
                self._queue()
                return
            begun = True
        if self.transport is None:
            self._drop_held()
        self._settle_reading()
        self._look_for_the_end()

    def _look_for_the_end(self) -> None:
        if self._eof and not self._held:
            self._ended()
            if self._is_done():
                self.force_close()

    def _ended(self) -> None:
        """All that the client sent has been handed over: a body that is not whole will not be."""
        if not self._payload.is_eof():
            self._break_payload("unfinished")
        if self._head_bytes:
            self._attention.head_ended(self)
        if not self._messages and self._in_flight():
            self._close = True  # after the answer that is on its way

    def _is_done(self) -> bool:
        return not (self._messages or self._pending or self._held or self._in_flight())

    def _in_flight(self) -> bool:
        """Whether aiohttp handles a request: it waits for none, and not because it has only just begun."""
        return self._waiter is None and self._request_count > 0

    def _settle_reading(self) -> None:
        pause = self._stopped or self._held_bytes > HELD_BYTES_MAX
        if pause is self._transport_paused or self._eof:
            return
        self._transport_paused = pause
        if pause:
            super()._pause_transport_reading()
        else:
            super()._resume_transport_reading()

    def _pause_transport_reading(self) -> None:
        self._stopped = True
        self._settle_reading()

    def _resume_transport_reading(self) -> None:
        self._stopped = False
        if self._held and not self._pending:
            self._queue()
        self._settle_reading()

    def _process_keepalive(self) -> None:
        if self._pending or self._held or self._head_bytes:  # not idle
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()


class Connections(Server):
    """aiohttp's server, making our connections."""

    def __init__(
        self,
        handler: Callable[[BaseRequest], Any],
        make: Callable[..., Connection],
        gone: Callable[[asyncio.Transport | None], None],
        *,
        keepalive_s: float,
    ) -> None:
        super().__init__(
            handler,
            handler_cancellation=True,
            keepalive_timeout=keepalive_s,
            access_log=None,
            auto_decompress=False,
            lingering_time=2.0,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
            max_headers=HEADERS_MAX,
        )
        self._make = make
        self._gone = gone

    def __call__(self) -> Connection:
        return self._make(self, loop=self._loop, **self._kwargs)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self._gone(self._connections.get(handler))
        super().connection_lost(handler, exc)


class _FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False
        self.paused = 0

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused += 1

    def resume_reading(self) -> None: ...


_ASK = b"GET /v1/self-test HTTP/1.1\r\nHost: self-test\r\n\r\n"
_PUT = b"PUT /v1/self-test HTTP/1.1\r\nHost: self-test\r\n"
_CHUNKED = _PUT + b"Transfer-Encoding: chunked\r\n\r\n"


async def insides_fit(make_connection: Callable[[], Connection]) -> bool:
    """Whether aiohttp's connection still behaves as we assume. Tries requests on a fake transport."""
    for trial in (_plain_requests_fit, _bodies_fit, _upgrades_fit, _refusals_fit, _full_queues_fit):
        transport = _FakeTransport()
        connection = make_connection()
        try:
            connection._turns = Turns(asyncio.get_running_loop().call_soon, turn_s=60, rest_s=60, slice_s=60)
            connection.connection_made(transport)
            if not await _soon(connection._idle) or not await trial(connection, transport):
                return False
        except Exception:  # whatever differs, differs
            return False
        finally:
            with suppress(Exception):
                connection.force_close()
                connection.connection_lost(None)
    return True


async def _plain_requests_fit(connection: Connection, transport: _FakeTransport) -> bool:
    fits = connection._request_count == 0 and connection._next_keepalive_close_time > 0
    connection.data_received(_ASK)
    fits &= connection._request_count == 1 and not connection._idle() and connection._at_boundary()
    fits &= await _soon(connection._idle) and transport.written.count(b"\r\n\r\n") == 1
    connection.data_received(_ASK[:20])
    fits &= connection._head_bytes == 20 and not connection._at_boundary()
    connection.data_received(_ASK[20:-2])
    connection.data_received(_ASK[-2:])
    fits &= connection._request_count == 2 and connection._at_boundary()
    return fits and await _soon(lambda: transport.written.count(b"\r\n\r\n") == 2)


async def _bodies_fit(connection: Connection, transport: _FakeTransport) -> bool:
    connection.data_received(_PUT + b"Content-Length: 0000000000000055\r\n\r\n12345")
    fits = connection._body_left == 50 and not connection._at_boundary()
    connection.data_received(b"x" * 50)
    fits &= connection._at_boundary() and connection._request_count == 1
    for piece in (_CHUNKED + b"1\r", b"\nx\r\n0\r\n\r", b"\n" + _ASK):
        fits &= not connection._payload.is_eof() or connection._request_count == 1
        connection.data_received(piece)
    fits &= connection._request_count == 3 and connection._payload.is_eof() and not connection._exact
    connection.data_received(_CHUNKED + b"1\r\nx\r\n" * (CHUNKS_MAX + 1))
    fits &= connection._stopped
    connection.data_received(b"0\r\n\r\n")
    return fits and await _soon(lambda: transport.written.count(b"HTTP/1.1 ") == 4)


async def _upgrades_fit(connection: Connection, transport: _FakeTransport) -> bool:
    for protocol in (b"h2c", b"websocket"):
        upgrade = b"Connection: Upgrade\r\nUpgrade: %s\r\n" % protocol
        connection.data_received(_PUT + upgrade + b"Content-Length: 1\r\n\r\nx" + _ASK)
    fits = connection._request_count == 4
    return fits and await _soon(lambda: transport.written.count(b"HTTP/1.1 ") == 4)


async def _refusals_fit(connection: Connection, transport: _FakeTransport) -> bool:
    connection.data_received(_CHUNKED)
    fits = not connection._payload.is_eof()
    connection.data_received(b"zz\r\n")
    fits &= connection._broken and connection._payload.is_eof() and connection._payload.exception() is not None
    return fits and await _soon(lambda: transport.closed)


async def _full_queues_fit(connection: Connection, transport: _FakeTransport) -> bool:
    connection.data_received(_ASK * 40)
    fits = connection._stopped and transport.paused == 1 and bool(connection._held)
    fits &= await _soon(lambda: transport.written.count(b"HTTP/1.1 ") == 40)
    return fits and not connection._stopped and not connection._held and connection._at_boundary()


async def _soon(done: Callable[[], bool]) -> bool:
    """Whether it is so within a few turns of the loop, of which others may take some."""
    deadline = time.monotonic() + 2.0
    while not done() and time.monotonic() < deadline:
        await asyncio.sleep(0)
    return done()
