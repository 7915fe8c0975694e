"""The proxy process's inside: listeners, links and what changes when a new snapshot comes.

One thread and one loop (`loop`). `apply` is the only way in for configuration. It keeps what did not change: a new
endpoint or intention touches no listener and no connection. Only a source that is denied now loses its open
connections, at once. Old connections keep the certificates they began with; new ones get the new leaf and roots.
"""

from __future__ import annotations

import errno
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from rostra.connect_proxy.inbound import Decision, Inbound, InboundPolicy
from rostra.connect_proxy.log import Log
from rostra.connect_proxy.loop import LEVEL, Loop
from rostra.connect_proxy.outbound import Outbound, OutboundPolicy
from rostra.connect_proxy.relay import CHUNK_BYTES_MAX, Link, tune
from rostra.connect_proxy.snapshot import Address, ProxySnapshot, Upstream
from rostra.connect_proxy.tls import DECRYPT_SLACK_BYTES, PeerCertificate, TlsContexts, TlsError

ACCEPTS_PER_TURN: Final = 16
#: Unfinished handshakes on the public port; when a stranger opens more, the oldest gives way.
HANDSHAKES_MAX: Final = 1024
#: All links together may grow their chunks by this much: OpenSSL's buffers grow with them and do not shrink.
GROWN_BYTES_MAX: Final = 16 << 20
_FDS_RESERVED: Final = 64
#: What a listener does with a new connection and the host that it comes from.
Accept = Callable[[socket.socket, str], None]
_BIND_RETRY_S: Final = (0.25, 1.0, 5.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the operator may set."""

    connections_max: int = 0  # 0: as many as file descriptors allow
    handshake_timeout_s: float = 10.0
    idle_timeout_s: float = 0.0  # 0: never


@dataclass(slots=True)
class Stats:
    """Counters since the start; bytes of connections that are open are added by `Proxy.stats`."""

    inbound_total: int = 0
    outbound_total: int = 0
    denied: int = 0
    cut_off: int = 0  # open connections ended by a deny
    over_limit: int = 0
    handshakes: int = 0
    handshakes_resumed: int = 0
    handshake_failures: Counter[str] = field(default_factory=Counter)
    dial_failures: Counter[str] = field(default_factory=Counter)
    closed: Counter[str] = field(default_factory=Counter)
    bytes_to_mesh: int = 0
    bytes_from_mesh: int = 0


class Proxy:
    """All listeners and connections of one proxy. Only `post_snapshot`, `stats` and `stop` are for other threads."""

    def __init__(
        self,
        log: Log,
        limits: Limits = Limits(),
        *,
        wall_s: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.log = log
        self.wall_s = wall_s
        self.loop = Loop(self._fault)
        self.scratch = memoryview(bytearray(CHUNK_BYTES_MAX))
        self.plaintext = memoryview(bytearray(CHUNK_BYTES_MAX + DECRYPT_SLACK_BYTES))
        self.contexts: TlsContexts
        self.snapshot: ProxySnapshot | None = None
        self.counters = Stats()
        self.links: dict[Link, None] = {}
        self._limits = limits
        self._chance = chance
        self._connections_max = limits.connections_max or connections_allowed()
        self._inbound: Inbound
        self._outbounds: dict[tuple[str, str, Address], Outbound] = {}
        self._listeners: dict[tuple[str, Address], Listener] = {}
        self._by_source: dict[str, dict[Link, None]] = {}
        self._unidentified: dict[Link, None] = {}
        self._grown_bytes = 0
        if limits.idle_timeout_s:
            self._watch_idle()

    # -- the life of the proxy ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until `stop`; then everything is closed."""
        try:
            self.loop.run()
        finally:
            for listener in self._listeners.values():
                listener.close()
            for link in list(self.links):
                link.close("stopping")
            self.loop.close()

    def stop(self) -> None:
        """From any thread or a signal handler."""
        self.loop.stop()

    def post_snapshot(self, snapshot: ProxySnapshot) -> None:
        """From any thread: use this one from now on."""

        def apply() -> None:
            self.apply(snapshot)

        self.loop.post(apply)

    def stats(self) -> dict[str, Any]:
        """Counters and present state; may be called from any thread, then the sums are approximate."""
        counters, links = self.counters, list(self.links)
        inbound = sum(isinstance(link.policy, InboundPolicy) for link in links)
        snapshot = self.snapshot
        return {
            "proxy_id": snapshot.proxy_id if snapshot else "",
            "service": snapshot.service if snapshot else "",
            "leaf_serial": self.contexts.serial_number if snapshot else "",
            "leaf_valid_before_ms": snapshot.leaf.valid_before_ms if snapshot else 0,
            "listeners": {str(lst.key[0]): lst.bound for lst in list(self._listeners.values())},
            "inbound_open": inbound,
            "inbound_total": counters.inbound_total,
            "outbound_open": len(links) - inbound,
            "outbound_total": counters.outbound_total,
            "denied": counters.denied,
            "cut_off": counters.cut_off,
            "over_limit": counters.over_limit,
            "handshakes": counters.handshakes,
            "handshakes_resumed": counters.handshakes_resumed,
            "handshake_failures": dict(counters.handshake_failures),
            "dial_failures": dict(counters.dial_failures),
            "closed": dict(counters.closed),
            "bytes_to_mesh": counters.bytes_to_mesh + sum(link.bytes_up for link in links),
            "bytes_from_mesh": counters.bytes_from_mesh + sum(link.bytes_down for link in links),
        }

    # -- configuration ------------------------------------------------------------------------------------------------

    def apply(self, snapshot: ProxySnapshot) -> bool:
        """Makes it so. A snapshot whose leaf or roots OpenSSL refuses changes nothing and is False."""
        old = self.snapshot
        if old is None or old.leaf != snapshot.leaf or old.roots != snapshot.roots:
            try:
                self.contexts = TlsContexts(snapshot.leaf, snapshot.roots)
            except TlsError as error:
                kept = "the one before stays in use" if old else "waiting for a better one"
                self.log.error("snapshot refused", error=error, kept=kept)
                return False
            if old is not None:
                self.log.info("certificates replaced", leaf_serial=snapshot.leaf.serial_number or "-")
        self.snapshot = snapshot
        self._inbound = Inbound(snapshot)
        self._cut_off_denied()
        self._apply_upstreams(snapshot, is_renamed=old is not None and old.trust_domain != snapshot.trust_domain)
        self._apply_listeners(snapshot)
        if old is None:
            about = {"proxy": snapshot.proxy_id, "service": snapshot.service, "upstreams": len(snapshot.upstreams)}
            if all(listener.bound for listener in self._listeners.values()):
                self.log.info("ready", **about)
            else:
                self.log.warn("running without all listeners", **about)
        return True

    def _apply_upstreams(self, snapshot: ProxySnapshot, *, is_renamed: bool) -> None:
        outbounds: dict[tuple[str, str, Address], Outbound] = {}
        for upstream in snapshot.upstreams:
            outbound = self._outbounds.get(upstream.key)
            if outbound is None:
                outbound = Outbound(upstream, snapshot.trust_domain, self._chance)
            elif is_renamed or outbound.upstream != upstream:
                outbound.update(upstream, snapshot.trust_domain)
            outbounds[upstream.key] = outbound
        self._outbounds = outbounds

    def _apply_listeners(self, snapshot: ProxySnapshot) -> None:
        wanted: dict[tuple[str, Address], tuple[Accept, str]] = {}
        if snapshot.public is not None:
            wanted[("public", snapshot.public)] = (self._accept_inbound, "the sidecar's port (Connect.SidecarService)")
        for upstream in snapshot.upstreams:
            key = (_upstream_label(upstream), upstream.bind)
            fix = f"LocalBindPort of upstream {upstream.name}"
            wanted[key] = (self._acceptor(self._outbounds[upstream.key]), fix)
        for key in [key for key in self._listeners if key not in wanted]:
            self._listeners.pop(key).close()
            self.log.info("listener closed", listener=key[0], address=key[1])
        for key, (accept, fix) in wanted.items():
            if key not in self._listeners:
                self._listeners[key] = Listener(self, key, accept, fix)

    def _acceptor(self, outbound: Outbound) -> Accept:
        def accept(sock: socket.socket, _host: str) -> None:
            self._accept_outbound(sock, outbound)

        return accept

    def _cut_off_denied(self) -> None:
        for source in list(self._by_source):
            decision = self._inbound.decide(source)
            if decision.allowed:
                continue
            links = list(self._by_source[source])
            self.counters.cut_off += len(links)
            self.log.warn("connections closed by intention", source=source, connections=len(links), **decision.fields())
            for link in links:
                link.close("denied")

    # -- new connections ----------------------------------------------------------------------------------------------

    def _accept_inbound(self, sock: socket.socket, host: str) -> None:
        if len(self._unidentified) >= HANDSHAKES_MAX:
            next(iter(self._unidentified)).close("too_many_handshakes")
        self.counters.inbound_total += 1
        policy = InboundPolicy(self._current_inbound, self._inbound_refused, self._local_failed)
        link = Link(self, policy, self.contexts)
        self.links[link] = None
        self._unidentified[link] = None
        link.accept_secure(sock, host, self._limits.handshake_timeout_s)

    def _accept_outbound(self, sock: socket.socket, outbound: Outbound) -> None:
        self.counters.outbound_total += 1
        link = Link(self, OutboundPolicy(outbound, self._loop_now, self._endpoint_failed), self.contexts)
        self.links[link] = None
        link.accept_plain(sock)

    def has_room(self) -> bool:
        """Whether one more connection may be made; otherwise it is counted and told."""
        if len(self.links) < self._connections_max:
            return True
        self.counters.over_limit += 1
        self.log.limited("warn", "connection refused: limit reached", "", limit=self._connections_max)
        return False

    def _current_inbound(self) -> Inbound:
        return self._inbound

    def _loop_now(self) -> float:
        return self.loop.now

    # -- what links tell ----------------------------------------------------------------------------------------------

    def larger_chunk(self, size: int) -> int:
        """A link has filled a chunk of this size: the size of its next one."""
        if size >= CHUNK_BYTES_MAX or self._grown_bytes + size > GROWN_BYTES_MAX:
            return size
        self._grown_bytes += size
        return size * 2

    def handshake_done(self, link: Link, is_resumed: bool) -> None:
        self.counters.handshakes += 1
        self.counters.handshakes_resumed += is_resumed
        self._unidentified.pop(link, None)

    def handshake_failed(self, link: Link, error: TlsError) -> None:
        self.counters.handshake_failures[error.reason] += 1
        if isinstance(link.policy, InboundPolicy):
            level = "info" if link.has_spoken else "debug"  # our own TCP check connects and says nothing
            self.log.limited(level, "handshake failed", error.reason, reason=error.reason, error=error)

    def _inbound_refused(self, certificate: PeerCertificate, reason: str, decision: Decision | None) -> None:
        self.counters.denied += 1
        why = decision.fields() if decision else {}
        self.log.limited(
            "info", "connection denied", certificate.uri, reason=reason, peer=certificate.uri or "-", **why
        )

    def _local_failed(self, reason: str) -> None:
        self.counters.dial_failures[reason] += 1
        snapshot = self.snapshot
        about = {"proxy": snapshot.proxy_id, "service": snapshot.service} if snapshot else {}
        local = snapshot.local if snapshot else None
        if reason == "refused":
            change = "proxy.local_service_address or local_service_port, if the application listens elsewhere"
            self.log.limited("warn", f"nothing listens on {local}", reason, **about, change=change)
        else:
            self.log.limited("warn", "application cannot be reached", reason, **about, address=local, reason=reason)

    def _endpoint_failed(self, outbound: Outbound, host: str, port: int, reason: str) -> None:
        self.counters.dial_failures[reason] += 1
        address = Address(host, port)
        name = outbound.upstream.name
        self.log.limited("warn", "endpoint failed", f"{name}@{address}", upstream=name, address=address, reason=reason)

    def link_admitted(self, link: Link, source: str) -> None:
        """An inbound peer was let in: a later deny of `source` must find it."""
        self._by_source.setdefault(source, {})[link] = None

    def link_closed(self, link: Link, reason: str) -> None:
        self.links.pop(link, None)
        self._grown_bytes -= link.grown_bytes
        counters, policy = self.counters, link.policy
        counters.closed[reason] += 1
        counters.bytes_to_mesh += link.bytes_up
        counters.bytes_from_mesh += link.bytes_down
        if isinstance(policy, OutboundPolicy):
            policy.release()
            if reason in ("no_endpoint",):
                name = policy.outbound.upstream.name
                self.log.limited("warn", "no endpoint", name, upstream=name)
            return
        self._unidentified.pop(link, None)
        links = self._by_source.get(policy.source)
        if links is not None:
            links.pop(link, None)
            if not links:
                del self._by_source[policy.source]

    def _watch_idle(self) -> None:
        """Twice per timeout: a link that has moved nothing since the last look but one is closed."""
        self.loop.call_later(self._limits.idle_timeout_s / 2, self._watch_idle)
        for link in list(self.links):
            if not link.is_relaying:
                continue
            moved = link.bytes_up + link.bytes_down + 1
            if link.marked_bytes == -moved:
                link.close("idle")
            else:
                link.marked_bytes = -moved if link.marked_bytes == moved else moved

    def _fault(self, error: Exception, culprit: Callable[..., None] | None) -> None:
        """A defect of ours: it costs one connection, not the proxy."""
        owner = getattr(culprit, "__self__", None)
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = f"{where.tb_frame.f_code.co_name}:{where.tb_lineno}" if where else "-"
        self.log.limited("error", "internal error", line, error=repr(error), at=line)
        if isinstance(owner, Link):
            try:
                owner.close("internal")
            except Exception:
                self.link_closed(owner, "internal")


class Listener:
    """One listening socket. A port in use is told in one line and tried again until it is free."""

    def __init__(self, proxy: Proxy, key: tuple[str, Address], accept: Accept, fix: str) -> None:
        """`fix` names the setting to change when the address is taken."""
        self.key = key
        self.bound = ""
        self._proxy = proxy
        self._accept = accept
        self._fix = fix
        self._socket: socket.socket | None = None
        self._is_closed = False
        self._attempts = 0
        self._open()

    def close(self) -> None:
        self._is_closed = True
        if self._socket is not None:
            self._proxy.loop.remove(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _open(self) -> None:
        if self._is_closed:
            return
        name, address = self.key
        log, loop = self._proxy.log, self._proxy.loop
        sock: socket.socket | None = None
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tune(sock)
            sock.bind((address.host, address.port))
            sock.listen(4096)
        except OSError as error:
            if sock is not None:
                sock.close()
            if self._attempts == 0:
                why = "the address is in use" if error.errno == errno.EADDRINUSE else error.strerror
                log.error(
                    "cannot listen",
                    listener=name,
                    address=address,
                    error=why,
                    change=self._fix,
                    retrying="until it works",
                )
            loop.call_later(_BIND_RETRY_S[min(self._attempts, len(_BIND_RETRY_S) - 1)], self._open)
            self._attempts += 1
            return
        sock.setblocking(False)
        self._socket = sock
        self.bound = str(Address(*sock.getsockname()[:2]))
        loop.add(sock.fileno(), self._on_event, LEVEL)
        log.info("listening", listener=name, address=self.bound)

    def _on_event(self, _mask: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            listener = self._socket
            if listener is None:
                return
            try:
                sock, peer = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause()
                    return
                continue  # the peer is gone already
            if not self._proxy.has_room():
                sock.close()
                continue
            sock.setblocking(False)
            self._accept(sock, peer[0])

    def _pause(self) -> None:
        """Out of descriptors or memory: let the backlog wait a moment instead of spinning."""
        listener = self._socket
        if listener is None:
            return
        self._proxy.log.limited("warn", "cannot accept: too few file descriptors or memory", self.key[0])
        self._proxy.loop.remove(listener.fileno())
        self._proxy.loop.call_later(0.1, self._resume)

    def _resume(self) -> None:
        if self._socket is not None and not self._is_closed:
            self._proxy.loop.add(self._socket.fileno(), self._on_event, LEVEL)


def connections_allowed() -> int:
    """How many connections the file descriptors allow: two sockets each."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        soft = 1 << 20
    return max(8, (min(soft, 1 << 17) - _FDS_RESERVED) // 2)


def _upstream_label(upstream: Upstream) -> str:
    return f"upstream:{upstream.name}" + (f"@{upstream.datacenter}" if upstream.datacenter else "")
