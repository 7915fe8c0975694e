"""The agent's HTTP server: aiohttp's connections, our router. Limits, methods and errors are the same everywhere.

A request is read whole (bounded), routed, handled within a time bound and answered at once. `errors.py` makes a status
of each exception of a handler. Blocking queries end when their client goes. Listens on TCP, TLS and unix sockets.
"""

from __future__ import annotations

import asyncio
import html
import os
import posixpath
import ssl
import stat
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote

from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_request import BaseRequest

from rostra.acl.authorizer import DENIED, EVERYTHING
from rostra.agent.context import Agent
from rostra.agent.http import acl, agent, catalog, connect, health, kv, mesh, operator, session, status
from rostra.agent.http.compression import BYTES_MIN as COMPRESSED_BYTES_MIN
from rostra.agent.http.compression import Compression
from rostra.agent.http.connection import Attention, Connection, Connections, PayloadBroken, insides_fit
from rostra.agent.http.declared import WARNING_HEADER, check_parameters, warning
from rostra.agent.http.errors import OUTCOME_HEADER, HttpError, error_response, outcome
from rostra.agent.http.gate import READS, Gate
from rostra.agent.http.hot import HotReads, StoredAnswer, key_of
from rostra.agent.http.indent import indented
from rostra.agent.http.routing import (
    JSON_TYPE,
    TEXT_TYPE,
    Match,
    Request,
    Response,
    Route,
    Router,
    check_escapes,
    text_response,
)
from rostra.agent.metrics import Histogram
from rostra.wire.turns import turns

CONNECTIONS_PER_CLIENT = 200
KEEPALIVE_S = 300.0
REQUEST_S = 30.0
WRITE_S = 60.0
WRITE_BYTES = 32 << 10
TURN_BYTES = 128 << 10
#: Large bodies on their way at once: each socket that takes more is one more thing to do in a turn of the loop.
LARGE_AT_ONCE = 8
#: A large body whose reader pauses for longer goes on beside the others.
PATIENCE_S = 0.02

_REASONS = {s.value: s.phrase for s in HTTPStatus} | {413: "Request Entity Too Large"}
_TOO_MANY = (
    b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n"
    b"Your IP is issuing too many concurrent connections, please rate limit your calls\n"
)
_SPLIT_AT = ("X-Consul-KnownLeader", "X-Consul-LastContact")
_BLOCKS = ("index", "hash", "wait")


def all_routes() -> list[Route]:
    """The routes of every resource module."""
    modules: list[Any] = [acl, agent, catalog, connect, health, kv, mesh, operator, session, status]
    return [route for module in modules for route in module.ROUTES]


class HttpServer:
    def __init__(
        self,
        agent: Agent,
        *,
        routes: Iterable[Route] | None = None,
        connections_per_client: int = CONNECTIONS_PER_CLIENT,
        kv_value_bytes_max: int = kv.VALUE_BYTES_MAX,
        gate: Gate | None = None,
    ) -> None:
        self._agent = agent
        self._gate = gate or Gate()
        chosen = list(routes) if routes is not None else all_routes()
        self._router = Router(
            replace(r, body_bytes_max=kv_value_bytes_max) if r.path == "/v1/kv/{key}" else r for r in chosen
        )
        self._per_client = connections_per_client
        self._clients: dict[str, int] = {}
        self.turns = WriteTurns()
        self._deadlines = Deadlines()
        longest_s = max(agent.config.default_query_time_s, agent.config.max_query_time_s)
        self._blocking_s = longest_s * 17 / 16 + REQUEST_S  # a sixteenth is added so that clients spread
        self.hot = HotReads(agent.servers, agent.metrics, _date_line)
        self._attention = Attention()
        self._compression = Compression()
        self._fits = True
        self._server = Connections(self.handle, self._connection, self.gone, keepalive_s=KEEPALIVE_S)
        self._listeners: list[asyncio.Server] = []
        self._unix_paths: list[str] = []
        self._histograms: dict[str, Histogram] = {}
        metrics = agent.metrics
        metrics.gauge("http.connections", lambda: float(len(self._server.connections)))
        metrics.gauge("http.hot.bytes", lambda: float(self.hot.bytes_used))
        metrics.gauge("cache.bytes", lambda: float(agent.results.bytes_used))
        metrics.gauge("cache.hits", lambda: float(agent.results.hits))
        metrics.gauge("cache.misses", lambda: float(agent.results.misses))

    # -- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Must be called once before listening."""
        self._fits = self.hot.enabled = await insides_fit(self._server)

    async def listen_tcp(
        self, host: str, port: int, *, tls: ssl.SSLContext | None = None, sock: Any = None
    ) -> tuple[str, int]:
        """Accept on `host:port` (0: any free one), or on a socket that is bound already; the address it got."""
        loop = asyncio.get_running_loop()
        if sock is not None:
            listener = await loop.create_server(self._server, sock=sock, ssl=tls, backlog=1024)
        else:
            listener = await loop.create_server(self._server, host, port, ssl=tls, backlog=1024, reuse_address=True)
        self._listeners.append(listener)
        bound = listener.sockets[0].getsockname()
        return bound[0], bound[1]

    async def listen_unix(self, path: str, *, mode: int = 0o660) -> None:
        """Accept on a unix socket. One that a dead agent left behind is replaced; anything else at `path` is not."""
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                os.unlink(path)
        except FileNotFoundError:
            pass
        before = os.umask(0o777 & ~mode)
        try:
            listener = await asyncio.get_running_loop().create_unix_server(self._server, path, backlog=1024)
        finally:
            os.umask(before)
        self._listeners.append(listener)
        self._unix_paths.append(path)

    async def close(self, timeout_s: float = 5.0) -> None:
        """Stop accepting, let answers in flight finish for `timeout_s`, close all connections."""
        for listener in self._listeners:
            listener.close()
        await self.hot.close()
        self._deadlines.stop()
        self._attention.stop()
        self._server.pre_shutdown()
        await self._server.shutdown(timeout_s)
        for path in self._unix_paths:
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    # -- one connection -------------------------------------------------------------------------------------------

    def _connection(self, manager: Connections, **options: Any) -> Connection:
        connection = _Connection(
            manager, hot=self.hot, admit=self.admit, attention=self._attention, plain=not self._fits, **options
        )
        connection.turns = self.turns
        return connection

    def admit(self, connection: Connection, transport: asyncio.Transport) -> bool:
        """Count a client's connections; past the limit it is told so and closed."""
        peer = transport.get_extra_info("peername")
        if not isinstance(peer, tuple):
            return True  # a unix socket: its file's mode is the limit
        host = peer[0]
        n = self._clients.get(host, 0)
        if n >= self._per_client and not self._attention.give_up_one(host):
            self._agent.metrics.count("http.connections.refused")
            transport.write(_TOO_MANY)
            transport.close()
            return False
        self._clients[host] = n + 1
        return True

    def gone(self, transport: asyncio.Transport | None) -> None:
        peer = transport.get_extra_info("peername") if transport is not None else None
        if isinstance(peer, tuple):
            left = self._clients.get(peer[0], 0) - 1
            if left > 0:
                self._clients[peer[0]] = left
            else:
                self._clients.pop(peer[0], None)

    # -- one request ----------------------------------------------------------------------------------------------

    async def handle(self, base: BaseRequest) -> Reply:
        """What aiohttp calls. Never raises, but for cancellation."""
        started = time.perf_counter()
        connection = base.protocol
        assert isinstance(connection, Connection)
        if connection.others_wait:
            await turns().turn()
        name = "unknown"
        keep_alive = base.keep_alive
        self._deadlines.begin(REQUEST_S)
        try:
            response, name = await self._respond(base)
        except asyncio.CancelledError:
            if not self._deadlines.expired():
                raise
            response, keep_alive = _failed(TimeoutError(), base.method), False
        except ConnectionError:
            raise
        except Exception as e:
            response = _failed(e, base.method)
            if isinstance(e, _CloseAfter):
                keep_alive = False
        finally:
            self._deadlines.end()
        if self._gate.headers:
            response.headers = {**response.headers, **self._gate.headers}
        if connection.is_last():
            keep_alive = False
        if response.hot is not None and keep_alive and base.version == (1, 1):
            self._remember(base, response)
        self._histogram(name).add((time.perf_counter() - started) * 1000.0)
        return Reply(base, response, keep_alive, self.turns)

    async def _respond(self, base: BaseRequest) -> tuple[Response, str]:
        method, target = base.method, base.raw_path
        if not target.startswith("/"):
            target = _origin_form(target)
        raw_path = target.partition("?")[0]
        path = _decoded(raw_path) if "%" in raw_path else raw_path
        if "//" in path or "/." in path:
            clean = _clean(path)
            if clean != path:
                return _moved(clean, target), "redirect"
        self._gate.check(method, path, base.remote or "")
        match = self._router.find(raw_path)
        if match is None:
            # What Consul answers where its UI is off.
            return (Response(200, b"Consul Agent") if path == "/" else Response(404)), "unknown"
        if match.redirect:
            return _moved(match.redirect, target), "redirect"
        route = match.routes.get(method)
        if route is None:
            return _other_method(method, match), "unknown"
        if "Transfer-Encoding" in base.headers and base.content is EMPTY_PAYLOAD:
            raise _CloseAfter(
                400, "400 Bad Request: Transfer-Encoding says nothing"
            )  # what follows is a body to others
        # A body that broke before anybody read of it is at its end, too.
        has_body = base.can_read_body or base.content.exception() is not None
        body = await self._body(base, route) if has_body else b""
        request = Request(
            method, target, headers=base.headers, body=body, remote=base.remote or "", params=match.params
        )
        if request.query and any(request.query.has(name) for name in _BLOCKS):
            self._deadlines.extend(self._blocking_s)
        check_parameters(request, route, self._agent.datacenter)
        request.can = can = self._agent.authorize(request.caller)
        if can is not EVERYTHING and not route.may(can, request, self._agent):
            raise HttpError(403, f"{DENIED}: {method} {route.path}")
        response = await route.handler(request, self._agent)
        if request.ignored:
            response.headers = {**response.headers, WARNING_HEADER: warning(request.ignored)}
        if request.query.has("pretty") and response.headers.get("Content-Type") == JSON_TYPE:
            response = await _pretty(response)
        if len(response.body) >= COMPRESSED_BYTES_MIN:
            await self._compression.apply(response, base.headers.get("Accept-Encoding", ""))
        return response, f"{method} {route.path}"

    async def _body(self, base: BaseRequest, route: Route) -> bytes:
        """The whole body. A request is not done whose body does not come whole."""
        try:
            return await _read_body(base, route)
        except PayloadBroken as e:
            raise _CloseAfter(400, f"400 Bad Request: the body is {e}, nothing was done") from None
        except asyncio.CancelledError:
            if not self._deadlines.expired():
                raise
            text = f"408 Request Timeout: the body did not arrive within {REQUEST_S:g} s, nothing was done"
            raise _CloseAfter(408, text) from None

    def _remember(self, base: BaseRequest, response: Response) -> None:
        raw = key_of(base)
        if raw is None:
            return
        headers = {k: v for k, v in response.headers.items() if k not in _SPLIT_AT}
        before = f"HTTP/1.1 {response.status} {_REASONS[response.status]}\r\n{_lines(headers)}".encode()
        after = b"Content-Length: %d\r\n\r\n" % len(response.body)
        self.hot.remember(raw, StoredAnswer(response.hot, before, after, response.body, len(raw)))

    def _histogram(self, name: str) -> Histogram:
        found = self._histograms.get(name)
        if found is None:
            method, _, path = name.partition(" ")
            labels = {"method": method, "path": path.removeprefix("/")} if path else {"method": "", "path": name}
            found = self._histograms[name] = self._agent.metrics.histogram("api.http", labels)
        return found


def _failed(error: BaseException, method: str) -> Response:
    response = error_response(error)
    if method not in READS:
        response.headers = {**response.headers, OUTCOME_HEADER: outcome(error)}
    return response


class _CloseAfter(HttpError):
    """An error after which the connection cannot be used any more: what follows on it was not read."""


class _Connection(Connection):
    __slots__ = ("turns",)
    turns: WriteTurns

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> Any:
        """What could not be parsed, or failed outside our handler. Says little and closes."""
        if isinstance(exc, LineTooLong):
            status = 431
        elif message and exc is None:
            return Reply(
                request, text_response(f"{status} {_REASONS[status]}: {message}", status=status), False, self.turns
            )
        if status >= 500 and exc is not None and not isinstance(exc, TimeoutError):
            return Reply(request, error_response(exc), False, self.turns)
        text = f"{status} {_REASONS.get(status, 'Bad Request')}".encode()
        return Reply(request, Response(status, text, {"Content-Type": TEXT_TYPE}), False, self.turns)


class Deadlines:
    """Bounds the time of requests: a look at all of them now and then costs less than a timer for each."""

    LOOK_S = 1.0

    def __init__(self) -> None:
        self._due: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float) -> None:
        """Cancel the current task unless it calls `end` within about `seconds`."""
        task = asyncio.current_task()
        assert task is not None
        self._due[task] = time.monotonic() + seconds
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.LOOK_S, self._look)

    extend = begin

    def end(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._due.pop(task, None)
        self._late.discard(task)

    def expired(self) -> bool:
        """Whether the current task was cancelled by us; then it goes on."""
        task = asyncio.current_task()
        return task in self._late and task.uncancel() == 0

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        for task, due in list(self._due.items()):
            if due <= now and task not in self._late:
                self._late.add(task)
                task.cancel()
        if self._due:
            self._timer = asyncio.get_running_loop().call_later(self.LOOK_S, self._look)


class WriteTurns:
    """Shares the loop among large bodies: few are written at once, and so many bytes per turn, in order of arrival.

    When 300 watchers of a service are answered together, their sockets would all take more in the same turn.
    """

    def __init__(self, bytes_per_turn: int = TURN_BYTES, at_once: int = LARGE_AT_ONCE) -> None:
        self._bytes_per_turn = bytes_per_turn
        self._used = 0
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()
        self._armed = False
        self._places = at_once
        self._entering: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        """Wait for a place among those that write. Its holder calls `leave` once."""
        if self._places:
            self._places -= 1
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entering.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        while self._entering:
            waiter = self._entering.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._places += 1

    async def take(self, n: int) -> None:
        if not self._armed:
            self._armed = True
            asyncio.get_running_loop().call_soon(self._next_turn)
        if not self._queue and self._used < self._bytes_per_turn:
            self._used += n
            return
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((mine, n))
        await mine

    def _next_turn(self) -> None:
        self._used = 0
        while self._queue and self._used < self._bytes_per_turn:
            waiter, n = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._used += n
        self._armed = self._used > 0
        if self._armed:
            asyncio.get_running_loop().call_soon(self._next_turn)


class Reply:
    """A response on its way out: what aiohttp's connection expects of one, and nothing more."""

    __slots__ = ("_base", "_response", "_turns", "keep_alive", "status")

    def __init__(self, base: BaseRequest, response: Response, keep_alive: bool, turns: WriteTurns) -> None:
        self._base = base
        self._response = response
        self._turns = turns
        self.keep_alive = keep_alive
        self.status = response.status

    async def prepare(self, request: BaseRequest) -> None:
        """Part of aiohttp's protocol; all is done in `write_eof`."""

    async def write_eof(self, data: bytes = b"") -> None:
        base, response = self._base, self._response
        transport = base.transport
        if transport is None:
            raise ConnectionResetError("the client has gone")
        body = response.body
        head = _head(response, len(body), self.keep_alive, base.version)
        if base.method == "HEAD" or response.status in (204, 304):
            body = b""
        if len(body) <= WRITE_BYTES:
            transport.write(head + body)
            if base.protocol.writing_paused:
                await self._drained()
            return
        transport.write(head)
        await self._write_large(memoryview(body), transport)

    async def _write_large(self, body: memoryview, transport: asyncio.Transport) -> None:
        base, turns = self._base, self._turns
        has_place = True

        def give_place() -> None:
            nonlocal has_place
            if has_place:
                has_place = False
                turns.leave()

        await turns.enter()
        try:
            for at in range(0, len(body), WRITE_BYTES):
                await turns.take(WRITE_BYTES)
                if base.transport is None:
                    raise ConnectionResetError("the client has gone")
                transport.write(body[at : at + WRITE_BYTES])
                if base.protocol.writing_paused:
                    patience = asyncio.get_running_loop().call_later(PATIENCE_S, give_place)
                    try:
                        await self._drained()
                    finally:
                        patience.cancel()
        finally:
            give_place()

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout(WRITE_S):
                await self._base.writer.drain()
        except TimeoutError:
            if self._base.transport is not None:
                self._base.transport.abort()
            raise ConnectionResetError("the client does not read") from None


def _head(response: Response, length: int, keep_alive: bool, version: tuple[int, int]) -> bytes:
    status = response.status
    connection = "" if keep_alive and version == (1, 1) else _CONNECTION[keep_alive]
    return (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\n{_lines(response.headers)}"
        f"{_date_text()}Content-Length: {length}\r\n{connection}\r\n"
    ).encode("latin-1", "replace")


_CONNECTION = {True: "Connection: keep-alive\r\n", False: "Connection: close\r\n"}


def _lines(headers: dict[str, str]) -> str:
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()])


_date: tuple[int, str, bytes] = (0, "", b"")


def _date_text() -> str:
    global _date
    now = int(time.time())
    if now != _date[0]:
        text = f"Date: {formatdate(now, usegmt=True)}\r\n"
        _date = (now, text, text.encode())
    return _date[1]


def _date_line() -> bytes:
    _date_text()
    return _date[2]


async def _read_body(base: BaseRequest, route: Route) -> bytes:
    length = base.content_length
    if length is not None and length > route.body_bytes_max:
        raise _too_large(length, route)
    if base.headers.get("Expect", "").lower() == "100-continue" and base.transport is not None:
        base.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    chunks: list[bytes] = []
    size = 0
    while chunk := await base.content.readany():
        size += len(chunk)
        if size > route.body_bytes_max:
            raise _too_large(size, route)
        chunks.append(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _decoded(raw_path: str) -> str:
    """The path of text that can be shown: what is not UTF-8 or not printable ends up in no key, log or header."""
    check_escapes(raw_path)
    try:
        path = unquote(raw_path, errors="strict")
    except UnicodeDecodeError:
        raise HttpError(400, "the path is not UTF-8") from None
    if not path.isprintable():
        raise HttpError(400, "the path has unprintable characters")
    return path


def _too_large(size: int, route: Route) -> HttpError:
    text = f"Request body({size} bytes) too large, max size: {route.body_bytes_max} bytes."
    is_value = route.path.startswith("/v1/kv/")
    return _CloseAfter(413, f"{text} limits.kv_max_value_size changes it." if is_value else text)


def _other_method(method: str, match: Match) -> Response:
    if method == "OPTIONS":
        return Response(200, b"", {"Allow": match.allow})
    headers = {"Allow": match.allow, "Content-Type": TEXT_TYPE}
    return Response(405, f"method {method} not allowed".encode(), headers)


def _moved(path: str, target: str) -> Response:
    _, mark, query = target.partition("?")
    location = quote(path, safe="/:@!$&'()*+,;=~") + mark + query
    body = f'<a href="{html.escape(location)}">Moved Permanently</a>.\n\n'.encode()
    return Response(301, body, {"Content-Type": "text/html; charset=utf-8", "Location": location})


def _clean(path: str) -> str:
    clean = posixpath.normpath("/" + path.lstrip("/"))
    return clean + "/" if path.endswith("/") and clean != "/" else clean


def _origin_form(target: str) -> str:
    """`http://host/path` (as sent to proxies) → `/path`; `*` stays unknown."""
    _, mark, rest = target.partition("://")
    return "/" + rest.partition("/")[2] if mark else "/*"


async def _pretty(response: Response) -> Response:
    pieces: list[bytes] = []
    for piece in indented(response.body):
        if pieces:
            await turns().turn()
        pieces.append(piece)
    response.body = b"".join(pieces)
    return response
