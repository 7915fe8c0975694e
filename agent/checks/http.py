"""The HTTP check: one request on a connection of its own; 2xx is passing, 429 is warning, all else critical.

A small HTTP/1.1 client over asyncio streams: a check needs no pool, no cookies and no decoding, and keeps only the
last 4 KiB of the body. Redirects are followed as Go's client does, ten at most.
"""

from __future__ import annotations

import asyncio
import base64
import ssl
from functools import lru_cache
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from rostra.agent.checks import tcp
from rostra.agent.checks.check import CRITICAL, PASSING, WARNING, Result
from rostra.agent.definition import CheckSpec

_REDIRECTS_MAX = 10
_HEAD_BYTES_MAX = 64 * 1024
_BODY_BYTES_MAX = 1024 * 1024  # what is read of a body; the tail is kept
_CHUNK = 64 * 1024


class _Malformed(Exception):
    """The other side does not speak HTTP/1."""


async def run(spec: CheckSpec) -> Result:
    """One request. Never raises for what the other side does."""
    method = spec.method.upper() or "GET"
    url = spec.http
    shown = method.capitalize()
    try:
        async with asyncio.timeout(spec.timeout_s):
            for _ in range(_REDIRECTS_MAX + 1):
                status, reason, location, tail = await _exchange(spec, method, url)
                if location is None or status not in (301, 302, 303, 307, 308):
                    break
                url = urljoin(url, location)
                if status in (301, 302, 303) and method not in ("GET", "HEAD"):
                    method = "GET"
            else:
                return Result(CRITICAL, f'{shown} "{url}": stopped after {_REDIRECTS_MAX} redirects')
    except TimeoutError:
        return Result(
            CRITICAL, f'{shown} "{url}": context deadline exceeded (Client.Timeout exceeded while awaiting headers)'
        )
    except ssl.SSLError as error:
        return Result(CRITICAL, f'{shown} "{url}": tls: {error.reason or error}')
    except (OSError, EOFError) as error:
        return Result(CRITICAL, f'{shown} "{url}": {_describe(error, url)}')
    except (_Malformed, ValueError) as error:
        return Result(CRITICAL, f'{shown} "{url}": {error}')
    output = (
        f"HTTP {spec.method.upper() or 'GET'} {spec.http}: {status} {reason} Output: {tail.decode(errors='replace')}"
    )
    if 200 <= status <= 299:
        return Result(PASSING, output)
    return Result(WARNING if status == 429 else CRITICAL, output)


async def _exchange(spec: CheckSpec, method: str, url: str) -> tuple[int, str, str | None, bytes]:
    """Status, reason, Location and the tail of the body of one request."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f'unsupported protocol scheme "{parts.scheme}"')
    if not parts.hostname:
        raise ValueError("http: no Host in request URL")
    secure = parts.scheme == "https"
    context = await asyncio.to_thread(_tls_context, spec.tls_skip_verify) if secure else None
    reader, writer = await asyncio.open_connection(
        parts.hostname,
        parts.port or (443 if secure else 80),
        ssl=context,
        server_hostname=(spec.tls_server_name or parts.hostname) if secure else None,
        limit=_HEAD_BYTES_MAX,
    )
    try:
        writer.write(_request(spec, method, parts))
        return await _response(reader, method, spec.output_bytes_max)
    finally:
        writer.transport.abort()


def _request(spec: CheckSpec, method: str, parts: SplitResult) -> bytes:
    host = parts.netloc.rpartition("@")[2]
    header: dict[str, tuple[str, ...]] = {
        "Host": (host,),
        "User-Agent": ("Consul Health Check",),
        "Accept": ("text/plain, text/*, */*",),
    }
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        header["Authorization"] = ("Basic " + base64.b64encode(pair.encode()).decode(),)
    names = {name.lower(): name for name in header}
    for name, values in spec.header.items():
        header.pop(names.get(name.lower(), ""), None)
        header[name] = values
    body = spec.body.encode()
    if body or method in ("POST", "PUT", "PATCH"):
        header["Content-Length"] = (str(len(body)),)
    header["Connection"] = ("close",)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    target = target.replace(" ", "%20")
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {v}" for name, values in header.items() for v in values)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8") + body


async def _response(reader: asyncio.StreamReader, method: str, keep: int) -> tuple[int, str, str | None, bytes]:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise _Malformed("net/http: the response's headers are too large") from None
        lines = head.decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        code, _, reason = rest.partition(" ")
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit()):
            raise _Malformed(f'malformed HTTP response "{lines[0][:100]}"')
        status = int(code)
        if status >= 200:
            break
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    tail = b""
    if method != "HEAD" and status not in (204, 304):
        tail = await _body_tail(reader, fields, keep)
    return status, reason, fields.get("location"), tail


async def _body_tail(reader: asyncio.StreamReader, fields: dict[str, str], keep: int) -> bytes:
    """The last `keep` bytes of the body; reading stops after 1 MiB, for a check has seen enough by then."""
    tail = bytearray()

    async def take(size: int) -> int:
        data = await reader.read(min(size, _CHUNK))
        tail.extend(data)
        del tail[:-keep]
        return len(data)

    budget = _BODY_BYTES_MAX
    if "chunked" in fields.get("transfer-encoding", "").lower():
        while budget > 0:
            line = await reader.readline()
            size = int(line.split(b";")[0].strip() or b"0", 16)
            if size == 0:
                break
            left = size
            while left > 0 and budget > 0:
                got = await take(left)
                if not got:
                    raise EOFError("unexpected EOF")
                left -= got
                budget -= got
            await reader.readline()
        return bytes(tail)
    length = fields.get("content-length")
    left = int(length) if length is not None else _BODY_BYTES_MAX
    while left > 0 and budget > 0:
        got = await take(left)
        if not got:
            if length is not None:
                raise EOFError("unexpected EOF")
            break
        left -= got
        budget -= got
    return bytes(tail)


def _describe(error: BaseException, url: str) -> str:
    if isinstance(error, EOFError | ConnectionResetError):
        return "EOF" if isinstance(error, EOFError) else f"read: {error.strerror or error}".lower()
    parts = urlsplit(url)
    return tcp.describe(error, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


@lru_cache(maxsize=2)
def _tls_context(skip_verify: bool) -> ssl.SSLContext:
    """Loading the system's roots takes tens of milliseconds: done once, and not on the loop."""
    context = ssl.create_default_context()
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
