"""Where snapshots come from: the local agent, by blocking requests in a thread of its own (or a file, for tests).

The agent answers when the snapshot's hash is no longer the one we name. While it is away the proxy goes on with the
last snapshot; one line tells that, and one that it is back. The HTTP client is a small one of our own, for http.client
brings the email package along. Host names in a snapshot are resolved here, because the proxy's loop must not wait.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlsplit

from rostra.connect_proxy.log import Log
from rostra.connect_proxy.snapshot import DOCUMENT_BYTES_MAX, Address, ProxySnapshot, Resolve, SnapshotError

WAIT_S: Final = 60
TIMEOUT_S: Final = 10.0
BACKOFF_FIRST_S: Final = 0.25
BACKOFF_MAX_S: Final = 10.0
#: How long the agent may know no sidecar of a service before that is an error: it may be reading its definitions.
UNKNOWN_GRACE_S: Final = 10.0
_HEADER_BYTES_MAX: Final = 64 << 10


class AgentError(Exception):
    """The agent did not answer as hoped; the message is for the operator."""


class Gone(AgentError):
    """The agent does not know the proxy, or not any more."""


class Unreachable(AgentError):
    """No agent answers there."""


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]  # lower-case names
    body: bytes


class AgentClient:
    """GETs from one agent over one kept connection: http, https or unix:///path. Not for several threads at once."""

    def __init__(self, address: str, token: str = "", *, ca_file: str = "") -> None:
        """`address` as in CONSUL_HTTP_ADDR: `host:port` or an URL."""
        parts = urlsplit(address if "://" in address else f"http://{address}")
        if parts.scheme not in ("http", "https", "unix"):
            raise AgentError(f"-http-addr {address!r}: the scheme must be http, https or unix")
        try:
            self._port = parts.port or (443 if parts.scheme == "https" else 8500 if "://" not in address else 80)
        except ValueError:
            raise AgentError(f"-http-addr {address!r}: the port is not a number") from None
        self.address = address
        self._host = parts.hostname or "127.0.0.1"
        self._path = parts.netloc + parts.path if parts.scheme == "unix" else ""
        self._is_tls = parts.scheme == "https"
        self._ca_file = ca_file
        self.token = token
        self._socket: socket.socket | None = None
        self._rest = b""

    def get(self, path: str, timeout_s: float = TIMEOUT_S) -> Answer:
        """The agent's answer, whatever its status. Unreachable when there is none."""
        was_open = self._socket is not None
        try:
            return self._get(path, timeout_s)
        except (OSError, AgentError) as error:
            self.close()
            if was_open and not isinstance(error, TimeoutError):  # the agent dropped the idle connection: once more
                try:
                    return self._get(path, timeout_s)
                except (OSError, AgentError) as second:
                    self.close()
                    error = second
            raise Unreachable(f"no answer from the agent at {self.address}: {_told(error)}") from None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._rest = b""

    def _get(self, path: str, timeout_s: float) -> Answer:
        deadline = time.monotonic() + timeout_s
        if self._socket is None:
            self._socket = self._connect(min(timeout_s, TIMEOUT_S))
        lines = [f"GET {path} HTTP/1.1", f"Host: {self._host if not self._path else 'localhost'}", "Accept: */*"]
        if self.token:
            lines.append(f"X-Consul-Token: {self.token}")
        self._socket.settimeout(timeout_s)
        self._socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        while True:
            head = self._read_until(b"\r\n\r\n", deadline).decode("latin-1").split("\r\n")
            version, _, rest = head[0].partition(" ")
            if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
                raise AgentError("it does not speak HTTP")
            status = int(rest[:3])
            if status >= 200:  # 1xx are followed by the real answer
                break
        headers = {name.strip().lower(): value.strip() for name, _, value in (h.partition(":") for h in head[1:])}
        is_last = headers.get("connection", "").lower() == "close" or version == "HTTP/1.0"
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body = self._read_chunked(deadline)
        elif "content-length" in headers:
            body = self._read_exactly(_size(headers["content-length"], 10), deadline)
        else:
            body, is_last = self._read_to_end(deadline), True
        if is_last:
            self.close()
        return Answer(status, headers, body)

    def _connect(self, timeout_s: float) -> socket.socket:
        if self._path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout_s)
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
                raise
            return sock
        sock = socket.create_connection((self._host, self._port), timeout_s)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not self._is_tls:
            return sock
        context = ssl.create_default_context(cafile=self._ca_file or None)
        return context.wrap_socket(sock, server_hostname=self._host)

    def _receive(self, deadline: float) -> bytes:
        assert self._socket is not None
        self._socket.settimeout(max(0.01, deadline - time.monotonic()))
        data = self._socket.recv(65536)
        if not data:
            raise AgentError("it closed the connection")
        return data

    def _read_until(self, mark: bytes, deadline: float) -> bytes:
        while mark not in self._rest:
            if len(self._rest) > _HEADER_BYTES_MAX:
                raise AgentError("its header is too long")
            self._rest += self._receive(deadline)
        found, _, self._rest = self._rest.partition(mark)
        return found

    def _read_exactly(self, count: int, deadline: float) -> bytes:
        pieces, missing = [self._rest[:count]], count - len(self._rest)
        self._rest = self._rest[count:]
        while missing > 0:
            data = self._receive(deadline)
            pieces.append(data[:missing])
            self._rest = data[missing:]
            missing -= len(data)
        return b"".join(pieces)

    def _read_chunked(self, deadline: float) -> bytes:
        pieces, total = [], 0
        while True:
            size = _size(self._read_until(b"\r\n", deadline).partition(b";")[0].decode("latin-1"), 16)
            total += size
            _size(str(total), 10)
            pieces.append(self._read_exactly(size, deadline))
            if not size:
                while self._read_until(b"\r\n", deadline):
                    pass  # trailers
                return b"".join(pieces)
            self._read_exactly(2, deadline)

    def _read_to_end(self, deadline: float) -> bytes:
        pieces, total = [self._rest], 0
        while True:
            try:
                pieces.append(self._receive(deadline))
            except AgentError:
                return b"".join(pieces)
            total += len(pieces[-1])
            _size(str(total), 10)


class AgentSource:
    """Asks the agent for the snapshots of one proxy and hands each new one to `use`, until the process ends."""

    def __init__(
        self,
        client: AgentClient,
        log: Log,
        use: Callable[[ProxySnapshot], None],
        *,
        proxy_id: str = "",
        sidecar_for: str = "",
        read_token: Callable[[], str] | None = None,
    ) -> None:
        """One of `proxy_id` and `sidecar_for`. `read_token` is asked again after a 403, for tokens that rotate."""
        self._client = client
        self._log = log
        self._use = use
        self._proxy_id = proxy_id
        self._sidecar_for = sidecar_for
        self._read_token = read_token
        self._hash = ""
        self._complaint = ""
        self._is_gone = False  # the last answer was that nobody knows this proxy

    def start(self, failed: Callable[[str], None]) -> threading.Thread:
        """`failed` is called, on that thread, when there is no sense in going on."""
        thread = threading.Thread(target=self._run, args=(failed,), name="source", daemon=True)
        thread.start()
        return thread

    def _run(self, failed: Callable[[str], None]) -> None:
        backoff_s = BACKOFF_FIRST_S
        unknown_since: float | None = None
        while True:
            try:
                if not self._proxy_id:
                    found = sidecars_of(self._services(), self._sidecar_for)
                    if len(found) == 1:
                        self._proxy_id = found[0]
                        self._log.debug("found the sidecar", service=self._sidecar_for, proxy=self._proxy_id)
                    elif found:
                        failed(too_many_text(self._sidecar_for, found))
                        return
                    else:
                        unknown_since = unknown_since or time.monotonic()
                        if time.monotonic() - unknown_since > UNKNOWN_GRACE_S:
                            failed(none_text(self._sidecar_for))
                            return
                        raise AgentError(none_text(self._sidecar_for))
                self._poll()
                backoff_s = BACKOFF_FIRST_S
                continue
            except AgentError as error:
                self._complain(error)
            except Exception as error:  # this thread must not end: nobody would see it
                self._complain(AgentError(f"internal: {error!r}"))
            time.sleep(backoff_s * (0.75 + 0.5 * random.random()))  # noqa: S311
            backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)

    def _services(self) -> dict[str, Any]:
        answer = self._client.get("/v1/agent/services")
        self._expect_ok(answer)
        try:
            services = json.loads(answer.body)
        except ValueError:
            raise AgentError("the agent's list of services is not JSON") from None
        return services if isinstance(services, dict) else {}

    def _poll(self) -> None:
        path = f"/v1/agent/connect/proxy/{quote(self._proxy_id, safe='')}"
        if self._hash:
            path += f"?hash={quote(self._hash, safe='')}&wait={WAIT_S}s"
        asked_at = time.monotonic()
        answer = self._client.get(path, WAIT_S * 17 / 16 + TIMEOUT_S)
        self._expect_ok(answer)
        if len(answer.body) > DOCUMENT_BYTES_MAX:
            raise AgentError(f"the snapshot is larger than {DOCUMENT_BYTES_MAX} bytes")
        new_hash = answer.headers.get("x-consul-contenthash", "")
        if not new_hash or new_hash != self._hash:
            try:
                snapshot = with_addresses(ProxySnapshot.from_json(answer.body), self._resolve)
            except SnapshotError as error:
                raise AgentError(f"the agent's snapshot cannot be used: {error}") from None
            self._use(snapshot)
        self._hash = new_hash
        self._is_gone = False
        if self._complaint:
            self._complaint = ""
            self._log.info("the agent answers again", agent=self._client.address)
        if time.monotonic() - asked_at < 0.05:
            time.sleep(0.05 if new_hash else 1.0)  # an agent that never blocks must not make us spin

    def _expect_ok(self, answer: Answer) -> None:
        if answer.status == 200:
            return
        text = answer.body[:300].decode("utf-8", "replace").strip()
        if answer.status == 403 and self._read_token is not None:
            try:
                self._client.token = self._read_token()
            except OSError as error:
                text += f" (and the token file cannot be read: {error.strerror})"
        raise (Gone if answer.status == 404 else AgentError)(f"the agent answered {answer.status}: {text}")

    def _complain(self, error: AgentError) -> None:
        text = str(error)
        was_gone, self._is_gone = self._is_gone, isinstance(error, Gone)
        if text == self._complaint or (self._is_gone and not was_gone):
            return  # whose service was deregistered is stopped by the agent in a moment
        self._complaint = text
        going_on = "with the last snapshot" if self._hash else "asking again until it answers"
        self._log.warn("no snapshot from the agent", error=text, going_on=going_on)

    def _resolve(self, host: str) -> str:
        try:
            return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            self._log.limited("warn", "host name cannot be resolved", host, host=host, error=_told(error))
            return host


class FileSource:
    """Reads the snapshot from a file and again whenever the file changes."""

    def __init__(self, path: str, log: Log, use: Callable[[ProxySnapshot], None]) -> None:
        self._path = path
        self._log = log
        self._use = use

    def start(self, failed: Callable[[str], None]) -> threading.Thread:
        thread = threading.Thread(target=self._run, args=(failed,), name="source", daemon=True)
        thread.start()
        return thread

    def _run(self, failed: Callable[[str], None]) -> None:
        seen: tuple[int, int] | None = None
        while True:
            try:
                status = os.stat(self._path)
                now = (status.st_mtime_ns, status.st_ino)
                if now != seen:
                    seen = now
                    with open(self._path, "rb") as file:
                        self._use(ProxySnapshot.from_json(file.read(DOCUMENT_BYTES_MAX + 1)))
            except (OSError, SnapshotError) as error:
                if seen is None:
                    failed(f"snapshot file {self._path}: {error}")
                    return
                self._log.warn("snapshot file ignored", error=error)
            time.sleep(0.05)


def sidecars_of(services: dict[str, Any], service_id: str) -> list[str]:
    """The ids, among an agent's services, of the proxies that stand for `service_id`."""
    found = []
    for name, service in services.items():
        is_proxy = isinstance(service, dict) and service.get("Kind") == "connect-proxy"
        if is_proxy and (service.get("Proxy") or {}).get("DestinationServiceID") == service_id:
            found.append(str(service.get("ID") or name))
    return sorted(found)


def none_text(service_id: str) -> str:
    return (
        f"the agent knows no sidecar proxy of the service with ID {service_id!r}: "
        "register the service with Connect.SidecarService, or name the proxy with -proxy-id"
    )


def too_many_text(service_id: str, found: list[str]) -> str:
    return f"the service with ID {service_id!r} has several sidecar proxies ({', '.join(found)}): choose with -proxy-id"


def with_addresses(snapshot: ProxySnapshot, resolve: Resolve) -> ProxySnapshot:
    """The snapshot with every host name that will be bound or dialled replaced by an address."""
    known: dict[str, str] = {"localhost": "127.0.0.1"}

    def address_of(host: str) -> str:
        if host not in known:
            known[host] = host if _is_address(host) else resolve(host)
        return known[host]

    def replaced(address: Address | None) -> Address | None:
        return Address(address_of(address.host), address.port) if address else None

    return dataclasses.replace(
        snapshot,
        public=replaced(snapshot.public),
        local=replaced(snapshot.local),
        upstreams=tuple(
            dataclasses.replace(
                upstream,
                bind=Address(address_of(upstream.bind.host), upstream.bind.port),
                endpoints=tuple(dataclasses.replace(e, address=address_of(e.address)) for e in upstream.endpoints),
            )
            for upstream in snapshot.upstreams
        ),
    )


def _is_address(host: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
            return True
        except OSError:
            pass
    return False


def _size(text: str, base: int) -> int:
    try:
        size = int(text, base)
    except ValueError:
        raise AgentError("its answer has no valid length") from None
    if not 0 <= size <= DOCUMENT_BYTES_MAX:
        raise AgentError(f"its answer is larger than {DOCUMENT_BYTES_MAX} bytes")
    return size


def _told(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
