"""The HTTP check: one request on a connection of its own; 2xx is passing, 429 is warning, all else critical.

A small HTTP/1.1 client: a check needs no pool and no cookies. The status line decides (`response.py`). The body
changes nothing, and need not end: at the timeout a check has its answer if its target has sent a head. Redirects are
followed as Go's client does, ten at most. Bytes of the other side get their share of the loop (`wire/turns.py`).
"""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
from functools import lru_cache

from rostra.agent.checks import tcp
from rostra.agent.checks.check import CRITICAL, PASSING, WARNING, Result
from rostra.agent.checks.response import Malformed, Response
from rostra.agent.checks.spec import CheckSpec
from rostra.agent.checks.url import Url, joined, masked, parse
from rostra.wire.turns import turns

_REDIRECTS_MAX = 10
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
#: Of a check's headers, what another host must not see to which it was redirected.
_SECRET = frozenset(("authorization", "www-authenticate", "cookie", "cookie2"))


async def run(spec: CheckSpec) -> Result:
    """One request. Never raises for what the other side does."""
    method = asked = spec.method.upper() or "GET"
    url, location = spec.http, ""
    try:
        parts = first = parse(url)
    except ValueError as error:
        return Result(CRITICAL, str(error) if str(error).startswith("parse ") else _failed(method, url, str(error)))
    try:
        async with asyncio.timeout(spec.timeout_s) as limit:
            for _ in range(_REDIRECTS_MAX + 1):
                response = await _exchange(spec, method, parts, first, location, limit)
                location = _redirects_to(response)
                if not location:
                    break
                url = joined(parts, location)
                try:
                    parts = parse(url)
                except ValueError as error:
                    if str(error).startswith("parse "):
                        raise Malformed(f'failed to parse Location header "{masked(location)}": {error}') from None
                    raise Malformed(str(error)) from None
                if response.status in (301, 302, 303) and method not in ("GET", "HEAD"):
                    method = "GET"
            else:
                return Result(CRITICAL, _failed(method, location, f"stopped after {_REDIRECTS_MAX} redirects"))
    except TimeoutError:
        reason = "context deadline exceeded (Client.Timeout exceeded while awaiting headers)"
        return Result(CRITICAL, _failed(method, url, reason))
    except ssl.SSLError as error:
        return Result(CRITICAL, _failed(method, url, f"tls: {error.reason or error}"))
    except ConnectionResetError as error:
        return Result(CRITICAL, _failed(method, url, f"read: {error.strerror or error}".lower()))
    except OSError as error:
        return Result(CRITICAL, _failed(method, url, tcp.describe(error, parts.host, parts.port)))
    except (Malformed, ValueError) as error:
        return Result(CRITICAL, _failed(method, url, str(error)))
    body = response.tail.decode(errors="replace")
    output = f"HTTP {asked} {masked(spec.http)}: {response.status_text} Output: {body}"
    if 200 <= response.status <= 299:
        return Result(PASSING, output)
    return Result(WARNING if response.status == 429 else CRITICAL, output)


def _failed(method: str, url: str, reason: str) -> str:
    return f'{method.capitalize()} "{masked(url)}": {reason}'


def _redirects_to(response: Response) -> str:
    if response.status not in (301, 302, 303, 307, 308):
        return ""
    location = response.fields.get("location", "")
    if not location and response.status < 304:
        raise Malformed(f"{response.status} response missing Location header")
    return location


async def _exchange(
    spec: CheckSpec, method: str, parts: Url, first: Url, location: str, limit: asyncio.Timeout
) -> Response:
    """The answer to one request: its head, and what came of its body in time."""
    secure = parts.scheme == "https"
    context = await asyncio.to_thread(_tls_context, spec.tls_skip_verify) if secure else None
    request = _request(spec, method, parts, first, location)
    unpacks = b"\r\nAccept-Encoding: gzip\r\n" in request
    exchange = _Exchange(request, Response(spec.output_bytes_max, has_body=method != "HEAD", unpacks=unpacks))
    try:
        await asyncio.get_running_loop().create_connection(
            lambda: exchange,
            parts.host,
            parts.port,
            ssl=context,
            server_hostname=(spec.tls_server_name or parts.host) if secure else None,
        )
        await exchange.decided
        if not _redirects_to(exchange.response):
            when = limit.when()
            limit.reschedule(None)  # the status is known: it is only the body that may be late
            left = max(0.0, when - asyncio.get_running_loop().time()) if when is not None else None
            await asyncio.wait((exchange.ended,), timeout=left)
        return exchange.response
    finally:
        exchange.abort()


class _Exchange(asyncio.Protocol):
    """The connection of one request."""

    def __init__(self, request: bytes, response: Response) -> None:
        self.response = response
        loop = asyncio.get_running_loop()
        self.decided: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._request, self._turns = request, turns()
        self._transport: asyncio.Transport | None = None
        self._waits = self._is_closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._transport.write(self._request)  # type: ignore[union-attr]

    def data_received(self, data: bytes) -> None:
        self.response.feed(data)
        if self._waits:
            return
        if self._turns.begin() and self._handle():
            return
        self._waits = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
        self._turns.queue(self._go_on)

    def _go_on(self) -> None:
        if self.ended.done():
            return
        if not self._handle():
            self._turns.queue(self._go_on)
            return
        self._waits = False
        if self._is_closed:
            self._finish()
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _handle(self) -> bool:
        """What has come, as far as there is room in this turn. Whether that was all."""
        response, room = self.response, self._turns.room
        is_all = True
        try:
            while is_all and response.step():
                is_all = room()
        except Malformed as error:
            self._fail(error)
            return True
        if response.decided and not self.decided.done():
            self.decided.set_result(None)
        if response.ended:
            self.abort()
        return is_all

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._is_closed = True
        if exc is not None and not self.response.decided:
            self._fail(exc)
        elif not self._waits:
            self._finish()

    def _finish(self) -> None:
        try:
            self.response.end_of_stream()
        except Malformed as error:
            self._fail(error)
        else:
            self.abort()

    def _fail(self, error: Exception) -> None:
        if not self.decided.done():
            self.decided.set_exception(error)
        self.abort()

    def abort(self) -> None:
        """Nothing more is wanted."""
        for future in (self.decided, self.ended):
            if not future.done():
                future.set_result(None)
            elif not future.cancelled():
                future.exception()  # nobody may be left to look
        if self._transport is not None:
            self._transport.abort()


def _request(spec: CheckSpec, method: str, parts: Url, first: Url, location: str) -> bytes:
    """`location`: the Location that led here from `first`, if one did."""
    header: dict[str, tuple[str, ...]] = {
        "Host": (parts.place,),
        "User-Agent": ("Consul Health Check",),
        "Accept": ("text/plain, text/*, */*",),
    }
    if parts.user is not None:
        pair = f"{parts.user}:{parts.password}"
        header["Authorization"] = ("Basic " + base64.b64encode(pair.encode()).decode(),)
    if method != "HEAD" and not {"accept-encoding", "range"} & {name.lower() for name in spec.header}:
        header["Accept-Encoding"] = ("gzip",)
    is_elsewhere = parts.host != first.host and not parts.host.endswith("." + first.host)
    names = {name.lower(): name for name in header}
    for name, values in spec.header.items():
        lower = name.lower()
        if (lower == "host" and location and parts.place != first.place) or (lower in _SECRET and is_elsewhere):
            continue
        if not _TOKEN.fullmatch(name) or any(c in value for value in values for c in "\r\n\0"):
            raise ValueError(f"net/http: invalid header field {name!r}")
        header.pop(names.get(lower, ""), None)
        header[name] = values
    if not _TOKEN.fullmatch(method):
        raise ValueError(f'net/http: invalid method "{method}"')
    body = spec.body.encode() if not location or method == (spec.method.upper() or "GET") else b""
    if body or method in ("POST", "PUT", "PATCH"):
        header["Content-Length"] = (str(len(body)),)
    header["Connection"] = ("close",)
    lines = [f"{method} {parts.target} HTTP/1.1", *(f"{name}: {v}" for name, values in header.items() for v in values)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8") + body


@lru_cache(maxsize=2)
def _tls_context(skip_verify: bool) -> ssl.SSLContext:
    """Loading the system's roots takes tens of milliseconds: done once, and not on the loop."""
    context = ssl.create_default_context()
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
