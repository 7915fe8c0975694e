"""Hot reads: a GET whose very bytes have been answered before is answered without parsing it again.

An answer is stored under the bytes that its own request, as aiohttp parsed it, has when it is written plainly: what a
connection received when, and in what pieces, plays no part in it. A request is hot when a connection that has nothing
else to do and expects a request (`connection.py`) receives exactly such bytes. It waits for a barrier of its mode like
every other read; if the entry is still valid then, the stored answer is written, else aiohttp gets the bytes.
Tokens are part of the bytes; `index`, `near`, `cached` and `hash` never get here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from aiohttp.web_request import BaseRequest

from rostra.agent.metrics import Metrics
from rostra.agent.servers_port import Barrier, Mode, Servers

if TYPE_CHECKING:
    from rostra.agent.http.reads import Hot

#: Answers written per turn of the loop.
BATCH = 128
REQUEST_BYTES_MAX = 4096

#: What an answer may be stored under: one request, plainly written, that has no body and keeps the connection.
_PLAIN_GET = re.compile(
    rb"GET /[!-~]* HTTP/1\.1\r\n"
    rb"(?:(?!(?i:content-length|transfer-encoding|upgrade|expect|trailer|connection: (?!keep-alive\r)):?)"
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: (?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?\r\n)*\r\n"
)


def key_of(request: BaseRequest) -> bytes | None:
    """The bytes that are this very request when they come alone; None where its answer must not be stored."""
    if request.method != "GET" or request.can_read_body:
        return None
    lines = [b"GET %s HTTP/1.1" % request.raw_path.encode("utf-8", "surrogateescape")]
    lines += [b"%s: %s" % header for header in request.raw_headers]
    key = b"\r\n".join(lines) + b"\r\n\r\n"
    return key if len(key) <= REQUEST_BYTES_MAX and _PLAIN_GET.fullmatch(key) else None


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


class Asker(Protocol):
    """A connection whose request is hot."""

    @property
    def transport(self) -> asyncio.BaseTransport | None: ...

    def hot_answer(self, data: bytes) -> None: ...

    def hot_decline(self, request: bytes) -> None: ...


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
        self._waiting: dict[Mode, list[tuple[Asker, bytes, StoredAnswer]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def remember(self, request: bytes, answer: StoredAnswer) -> None:
        if not self.enabled:
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

    def join(self, connection: Asker, request: bytes, answer: StoredAnswer) -> None:
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

    async def _answer(self, mode: Mode, batch: list[tuple[Asker, bytes, StoredAnswer]]) -> None:
        barrier: Barrier | None = None
        try:
            barrier = await self._servers.barrier(mode)
        except Exception:  # noqa: S110 - the ordinary way will meet the same and say it
            pass
        for at in range(0, len(batch), BATCH):
            if at:
                await asyncio.sleep(0)
            self._write(barrier, batch[at : at + BATCH])

    def _write(self, barrier: Barrier | None, batch: list[tuple[Asker, bytes, StoredAnswer]]) -> None:
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
