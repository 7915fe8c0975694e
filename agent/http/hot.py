"""Hot reads: a connection that answers a GET whose very bytes it has answered before, without parsing it again.

A request is hot when a connection is at a message boundary with nothing in flight, one whole body-less GET arrives, and
these bytes were answered from a cached entry. It waits for a barrier of its mode like every other read; if the entry is
still valid then, the stored answer is written, else aiohttp gets the bytes. Everything else goes to aiohttp untouched.
This leans on the insides of aiohttp's RequestHandler, so `insides_fit` tries them at start and hot reads stay off where
they differ. Tokens are part of the bytes; `index`, `near`, `cached` and `hash` never get here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp.web_protocol import RequestHandler
from aiohttp.web_server import Server

from rostra.agent.metrics import Metrics
from rostra.agent.servers_port import Barrier, Mode, Servers

if TYPE_CHECKING:
    from rostra.agent.http.reads import Hot

#: Answers written per turn of the loop.
BATCH = 128
#: A client that sends on without waiting for answers is parked here, then no longer read from.
HELD_BYTES_MAX = 64 << 10
REQUEST_BYTES_MAX = 4096

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,12})[ \t]*(?=\r\n|$)")
_ODD_HEADERS = (b"\r\ntransfer-encoding:", b"\r\nupgrade:", b"\r\nexpect:")


class StoredAnswer:
    """`before` and `after` the two values that each barrier brings; then the date; then the body."""

    __slots__ = ("after", "before", "body", "cost", "entry", "mode")

    def __init__(self, hot: Hot, before: bytes, after: bytes, body: bytes, request_bytes: int) -> None:
        self.entry = hot.entry
        self.mode: Mode = hot.mode
        self.before = before
        self.after = after
        self.body = body
        self.cost = request_bytes + len(before) + len(after) + len(body) + 400


class HotReads:
    """The stored answers, bounded by bytes, and the batches that wait for a barrier."""

    def __init__(
        self, servers: Servers, metrics: Metrics, date: Callable[[], bytes], *, bytes_max: int = 16 << 20
    ) -> None:
        self._servers = servers
        self._metrics = metrics
        self._date = date
        self.bytes_max = bytes_max
        self.bytes_used = 0
        self.enabled = True
        self.answers: dict[bytes, StoredAnswer] = {}  # oldest first
        self._waiting: dict[Mode, list[tuple[HotConnection, bytes, StoredAnswer]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def remember(self, request: bytes, answer: StoredAnswer) -> None:
        if not self.enabled or len(request) > REQUEST_BYTES_MAX:
            return
        self.forget(request)
        self.answers[request] = answer
        self.bytes_used += answer.cost
        while self.bytes_used > self.bytes_max:
            self.forget(next(iter(self.answers)))

    def forget(self, request: bytes) -> None:
        old = self.answers.pop(request, None)
        if old is not None:
            self.bytes_used -= old.cost

    def join(self, connection: HotConnection, request: bytes, answer: StoredAnswer) -> None:
        """Answer after a barrier that begins after now: requests of one turn of the loop share one."""
        batch = self._waiting.get(answer.mode)
        if batch is None:
            batch = self._waiting[answer.mode] = []
            asyncio.get_running_loop().call_soon(self._ask, answer.mode)
        batch.append((connection, request, answer))

    def _ask(self, mode: Mode) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(mode, self._waiting.pop(mode)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, mode: Mode, batch: list[tuple[HotConnection, bytes, StoredAnswer]]) -> None:
        barrier: Barrier | None = None
        try:
            barrier = await self._servers.barrier(mode)
        except Exception:  # noqa: S110 - the ordinary way will meet the same and say it
            pass
        for at in range(0, len(batch), BATCH):
            if at:
                await asyncio.sleep(0)
            self._write(barrier, batch[at : at + BATCH])

    def _write(self, barrier: Barrier | None, batch: list[tuple[HotConnection, bytes, StoredAnswer]]) -> None:
        between = b""
        if barrier is not None:
            known = b"true" if barrier.known_leader else b"false"
            between = b"X-Consul-KnownLeader: %s\r\nX-Consul-LastContact: %d\r\n" % (known, barrier.last_contact_ms)
        date = self._date()
        written = 0
        for connection, request, answer in batch:
            if barrier is not None and answer.entry.valid and connection.transport is not None:
                connection.hot_answer(b"".join((answer.before, between, date, answer.after, answer.body)))
                written += 1
            else:
                self.forget(request)
                connection.hot_decline(request)
        if written:
            self._metrics.count("http.hot", written)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class HotConnection(RequestHandler):
    """aiohttp's connection, with the short way in front of it and a bound on connections per client."""

    __slots__ = ("_held", "_held_bytes", "_hot", "_left", "_lost_track", "_pending", "_refused", "_whole_get", "admit")

    def __init__(
        self,
        manager: Server,
        *,
        hot: HotReads | None,
        admit: Callable[[HotConnection, asyncio.Transport], bool],
        **kwargs: Any,
    ) -> None:
        super().__init__(manager, **kwargs)
        self.admit = admit
        self._hot = hot
        self._refused = False
        self._pending = False  # a hot answer of this connection waits for its barrier
        self._held: list[bytes] = []  # what arrived meanwhile
        self._held_bytes = 0
        self._left = 0  # bytes of the current request's body still to come
        self._lost_track = False  # we no longer know where messages begin: no hot reads on this connection
        self._whole_get: bytes | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        if not self.admit(self, transport):  # type: ignore[arg-type]
            self._refused = True
            return
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._held.clear()
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        hot = self._hot
        if not data:  # aiohttp's own way of saying: look again at what you have
            super().data_received(data)
            return
        if hot is None or not hot.enabled or self._lost_track:
            self._whole_get = None
            super().data_received(data)
            return
        if self._pending:
            self._hold(data)
            return
        if not self._left:
            answer = hot.answers.get(data)
            if answer is not None and answer.entry.valid and self._idle():
                self._pending = True
                hot.join(self, data, answer)
                return
        self._pass_on(data)

    def take_whole_get(self) -> bytes | None:
        """The bytes of the request being handled, if they were one whole body-less GET that came alone. Once."""
        data, self._whole_get = self._whole_get, None
        return data

    def hot_answer(self, data: bytes) -> None:
        transport = self.transport
        self._pending = False
        if transport is None:
            return
        transport.write(data)
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if self._held:
            self._release()

    def hot_decline(self, request: bytes) -> None:
        self._pending = False
        if self.transport is None or self._manager is None:
            return
        self._pass_on(request)
        if self._held:
            self._release()

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

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > HELD_BYTES_MAX and self.transport is not None:
            self.transport.pause_reading()

    def _release(self) -> None:
        data, paused = b"".join(self._held), self._held_bytes > HELD_BYTES_MAX
        self._held.clear()
        self._held_bytes = 0
        if paused and self.transport is not None:
            self.transport.resume_reading()
        self.data_received(data)

    def _pass_on(self, data: bytes) -> None:
        self._whole_get = data if self._track(data) else None
        super().data_received(data)

    def _track(self, data: bytes) -> bool:
        """Follow where messages begin and end. True when `data` is one whole GET without a body."""
        if self._left:
            self._left -= len(data)
            self._lost_track = self._left < 0
            return False
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._lost_track = True
            return False
        head = data[:end].lower()
        length = _CONTENT_LENGTH.search(head)
        body = len(data) - end - 4
        self._left = (int(length[1]) if length else 0) - body
        if self._left < 0 or any(name in head for name in _ODD_HEADERS) or head.count(b"\r\ncontent-length") > 1:
            self._lost_track = True
            return False
        return length is None and data.startswith(b"GET ")


class _FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def insides_fit(make_connection: Callable[[], RequestHandler]) -> bool:
    """Whether aiohttp's connection still behaves as HotConnection assumes. Tries one request on a fake transport."""
    transport = _FakeTransport()
    connection = make_connection()
    try:
        return await _one_request_fits(connection, transport)
    except Exception:  # whatever differs, differs
        return False
    finally:
        with suppress(Exception):
            connection.force_close()
            connection.connection_lost(None)


async def _one_request_fits(connection: RequestHandler, transport: _FakeTransport) -> bool:
    connection.connection_made(transport)
    if not await _turns(lambda: connection._waiter is not None):
        return False
    fits = not connection._messages and connection._payload_parser is None and not connection._paused
    connection.data_received(b"GET /v1/self-test HTTP/1.1\r\nHost: self-test\r\n\r\n")
    fits &= connection._waiter is None or connection._waiter.done()
    fits &= await _turns(lambda: b"\r\n\r\n" in transport.written and connection._waiter is not None)
    fits &= connection._waiter is not None and not connection._waiter.done() and not connection._messages
    fits &= not connection._close and not connection._force_close and not connection._upgraded
    return fits and connection._next_keepalive_close_time > 0 and connection._keepalive_timeout > 0


async def _turns(done: Callable[[], bool]) -> bool:
    for _ in range(50):
        if done():
            return True
        await asyncio.sleep(0)
    return done()
