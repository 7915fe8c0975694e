"""One proxied connection's two sockets: carries out what its session says, and moves the bytes.

`up` is from the application into the mesh (encrypted), `down` the other way. A chunk is read only when the one before
has left, so that a slow reader holds at most one chunk of memory in each direction and then fills the sender's TCP
window. Scratch buffers belong to the proxy and are shared by all links: the loop has one thread. Everything decrypted
is passed on or kept here, never left inside the TLS channel, which is what its `finish` needs.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from rostra.connect_proxy.inbound import InboundPolicy
from rostra.connect_proxy.outbound import OutboundPolicy
from rostra.connect_proxy.session import Action, Close, Dial, Finish, Identify, ProxiedConnection, Relay, Side, State
from rostra.connect_proxy.tls import TlsChannel, TlsContexts, TlsError

if TYPE_CHECKING:
    from rostra.connect_proxy.serve import Proxy

CHUNK_FIRST_BYTES: Final = 16 << 10
CHUNK_BYTES_MAX: Final = 256 << 10
_IN: Final = select.EPOLLIN
_OUT: Final = select.EPOLLOUT
_ERROR: Final = select.EPOLLERR
_GONE: Final = select.EPOLLHUP | select.EPOLLERR
_ENDS: Final = select.EPOLLRDHUP | _GONE
_READABLE: Final = _IN | _ENDS
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST
_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 20),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
)


def tune(sock: socket.socket) -> None:
    """No Nagle, and a peer that vanished is noticed within two minutes. Accepted sockets inherit it from a listener."""
    for level, option, value in _KEEPALIVE:
        sock.setsockopt(level, option, value)


class Link:
    """The two sockets of one session. Made by a listener, lives in the loop's handlers, ends by `Close`."""

    __slots__ = (
        "_contexts",
        "_dialled",
        "_dialled_at",
        "_down_chunk",
        "_down_queued",
        "_finishing_plain",
        "_finishing_secure",
        "_host",
        "_is_handshaking",
        "_plain",
        "_plain_at_end",
        "_plain_ended",
        "_plain_in",
        "_proxy",
        "_secure",
        "_secure_at_end",
        "_secure_ended",
        "_secure_in",
        "_step_queued",
        "_tls",
        "_to_plain",
        "_to_secure",
        "_up_chunk",
        "_up_queued",
        "_wants_ticket",
        "bytes_down",
        "bytes_up",
        "deadline_s",
        "has_spoken",
        "is_relaying",
        "marked_bytes",
        "policy",
        "session",
    )

    def __init__(self, proxy: Proxy, policy: InboundPolicy | OutboundPolicy, contexts: TlsContexts) -> None:
        self._proxy = proxy
        self.policy = policy
        self.session = ProxiedConnection(policy)
        self._contexts = contexts
        self._plain: socket.socket | None = None
        self._secure: socket.socket | None = None
        self._tls: TlsChannel | None = None
        self._dialled: Side | None = None  # the side whose connect() has not been answered
        self._dialled_at: Dial | None = None
        self._host = ""
        self.has_spoken = False  # the other end sent at least one byte
        self._is_handshaking = False
        self._step_queued = self._up_queued = self._down_queued = False
        self._plain_in = self._secure_in = False  # may have bytes for us: an edge came and EAGAIN has not
        self._plain_at_end = self._secure_at_end = False  # an end or error is behind the bytes: read until it shows
        self._plain_ended = self._secure_ended = False
        self._to_plain: memoryview | None = None
        self._to_secure: memoryview | None = None
        self._finishing_plain = self._finishing_secure = False
        self._up_chunk = self._down_chunk = CHUNK_FIRST_BYTES
        self._wants_ticket = False
        self.bytes_up = self.bytes_down = self.marked_bytes = 0
        self.deadline_s = 0.0
        self.is_relaying = False

    def accept_secure(self, sock: socket.socket, host: str, handshake_timeout_s: float) -> None:
        """Another proxy has connected to the public listener."""
        self._secure = sock
        self._host = host
        self._tls = self._contexts.accept(host)
        self._is_handshaking = True
        self._proxy.loop.expect(self, handshake_timeout_s)
        self._proxy.loop.add(sock.fileno(), self._on_secure)
        self._perform(self.session.accepted())

    def accept_plain(self, sock: socket.socket) -> None:
        """The application has connected to an upstream's listener."""
        self._plain = sock
        self._proxy.loop.add(sock.fileno(), self._on_plain)
        self._perform(self.session.accepted())

    @property
    def grown_bytes(self) -> int:
        """By how much its chunks have grown, to be given back to `Proxy.larger_chunk`."""
        return self._up_chunk + self._down_chunk - 2 * CHUNK_FIRST_BYTES

    def close(self, reason: str) -> None:
        """Ends it now; both sides see a broken connection."""
        self._perform(self.session.broken(reason))

    def expired(self) -> None:
        """The loop: the deadline has passed."""
        if (isinstance(self.policy, InboundPolicy) and self.session.state is State.ACCEPTED) or self._is_handshaking:
            self._handshake_failed(TlsError("timeout", "the handshake took too long"))
        else:
            self._perform(self.session.dial_failed("timeout"))

    # -- events of the sockets ----------------------------------------------------------------------------------------

    def _on_plain(self, mask: int) -> None:
        if mask & _READABLE:
            self._plain_in = True
            if mask & _ENDS:
                self._plain_at_end = True
                if mask & _ERROR and self._plain_ended and not self._finishing_plain:
                    self._perform(self.session.broken("application_reset"))
            if self.is_relaying and self._to_secure is None and not self._up_queued:
                self._pump_up()
        if mask & _OUT and self._to_plain is not None:
            self._flush_plain()
        if not self.is_relaying:
            if self._dialled is Side.PLAIN:
                self._dial_answered(self._plain)
            elif mask & _GONE and self._plain is not None:
                self._perform(self.session.broken("application_reset"))

    def _on_secure(self, mask: int) -> None:
        if mask & _READABLE:
            self._secure_in = True
            if mask & _ENDS:
                self._secure_at_end = True
                if mask & _ERROR and self._secure_ended:
                    self._perform(self.session.broken("peer_reset"))
            if self.is_relaying and self._to_plain is None and not self._down_queued:
                self._pump_down()
        if mask & _OUT and self._to_secure is not None:
            self._flush_secure()
        if not self.is_relaying:
            if self._dialled is Side.SECURE:
                self._dial_answered(self._secure)
            elif self._is_handshaking:
                self._step_soon()
            elif mask & _GONE and self._secure is not None:
                self._perform(self.session.broken("peer_reset"))

    # -- the bytes ----------------------------------------------------------------------------------------------------

    def _pump_up(self) -> None:
        """Application → mesh: one chunk."""
        self._up_queued = False
        if self._to_secure is not None or not self.is_relaying or self._plain_ended:
            return
        proxy, size = self._proxy, self._up_chunk
        try:
            count = self._plain.recv_into(proxy.scratch, size)  # type: ignore[union-attr]
        except BlockingIOError:
            self._plain_in = self._plain_at_end = False
            return
        except OSError:
            self._perform(self.session.broken("application_reset"))
            return
        if not count:
            self._plain_in = False
            self._plain_ended = True
            self._perform(self.session.ended(Side.PLAIN))
            return
        self.bytes_up += count
        try:
            data = self._tls.encrypt(proxy.scratch[:count])  # type: ignore[union-attr]
            sent = self._secure.send(data)  # type: ignore[union-attr]
        except BlockingIOError:
            sent = 0
        except (OSError, TlsError):
            self._perform(self.session.broken("peer_reset"))
            return
        if sent < len(data):
            self._to_secure = memoryview(data)[sent:]
        elif count == size:
            self._up_chunk = proxy.larger_chunk(size)
            self._again_up()
        elif self._plain_at_end:
            self._again_up()
        else:
            self._plain_in = False

    def _pump_down(self) -> None:
        """Mesh → application: one chunk."""
        self._down_queued = False
        if self._to_plain is not None or not self.is_relaying or self._secure_ended:
            return
        proxy, size = self._proxy, self._down_chunk
        try:
            count = self._secure.recv_into(proxy.scratch, size)  # type: ignore[union-attr]
        except BlockingIOError:
            self._secure_in = self._secure_at_end = False
            return
        except OSError:
            self._perform(self.session.broken("peer_reset"))
            return
        if not count:
            self._perform(self.session.broken("truncated"))
            return
        self._tls.feed(proxy.scratch[:count])  # type: ignore[union-attr]
        if not self._pass_down() or self._to_plain is not None:
            return
        if count == size:
            self._down_chunk = proxy.larger_chunk(size)
            self._again_down()
        elif self._secure_at_end:
            self._again_down()
        else:
            self._secure_in = False

    def _pass_down(self) -> bool:
        """Gives the application all that can be decrypted. False when the session ended or this direction did.

        What the TLS layer has to say in answer (key updates, tickets) waits for our next data, as RFC 8446 allows.
        """
        tls, plaintext = self._tls, self._proxy.plaintext
        try:
            count = tls.decrypt(plaintext)  # type: ignore[union-attr]
        except TlsError as error:
            self._send_best_effort(tls.output())  # type: ignore[union-attr]
            self._perform(self.session.broken(error.reason))
            return False
        if count:
            self.bytes_down += count
            try:
                sent = self._plain.send(plaintext[:count])  # type: ignore[union-attr]
            except BlockingIOError:
                sent = 0
            except OSError:
                self._perform(self.session.broken("application_reset"))
                return False
            if sent < count:
                self._to_plain = memoryview(bytes(plaintext[sent:count]))
        if self._wants_ticket:
            self._remember_session()
        if tls.is_input_ended:  # type: ignore[union-attr]
            self._secure_ended = True
            self._perform(self.session.ended(Side.SECURE))
            return False
        return True

    def _again_up(self) -> None:
        self._up_queued = True
        self._proxy.loop.again(self._pump_up)

    def _again_down(self) -> None:
        self._down_queued = True
        self._proxy.loop.again(self._pump_down)

    def _flush_plain(self) -> None:
        pending = self._to_plain
        if pending is None or self._plain is None:
            return
        try:
            sent = self._plain.send(pending)
        except BlockingIOError:
            return
        except OSError:
            self._perform(self.session.broken("application_reset"))
            return
        if sent < len(pending):
            self._to_plain = pending[sent:]
            return
        self._to_plain = None
        if self._finishing_plain:
            self._end_plain()
        elif self._secure_in and not self._down_queued:
            self._again_down()

    def _flush_secure(self) -> None:
        pending = self._to_secure
        if pending is None or self._secure is None:
            return
        try:
            sent = self._secure.send(pending)
        except BlockingIOError:
            return
        except OSError:
            self._secure_lost()
            return
        if sent < len(pending):
            self._to_secure = pending[sent:]
            return
        self._to_secure = None
        if self._finishing_secure:
            self._perform(self.session.flushed(Side.SECURE))
        elif self.is_relaying and self._plain_in and not self._up_queued:
            self._again_up()

    def _send_secure(self, data: bytes) -> None:
        if not data or self._secure is None:
            return
        pending = self._to_secure
        self._to_secure = memoryview(bytes(pending) + data if pending is not None else data)
        if pending is None:
            self._flush_secure()

    def _send_best_effort(self, data: bytes) -> None:
        """The last words, an alert: sent only if there is room and nothing before it."""
        if data and self._secure is not None and self._to_secure is None:
            try:
                self._secure.send(data)
            except OSError:
                pass

    # -- the handshake ------------------------------------------------------------------------------------------------

    def _step_soon(self) -> None:
        if self._secure_in and self._is_handshaking and not self._step_queued:
            self._step_queued = True
            self._proxy.loop.later_slow(self._handshake_step)

    def _handshake_step(self) -> None:
        self._step_queued = False
        if not self._is_handshaking or self._secure is None or self._tls is None:
            return
        scratch = self._proxy.scratch
        try:
            count = self._secure.recv_into(scratch, CHUNK_FIRST_BYTES)
        except BlockingIOError:
            self._secure_in = False
            return
        except OSError:
            self._handshake_failed(TlsError("reset", "the connection was reset during the handshake"))
            return
        if not count:
            self._handshake_failed(TlsError("hung_up", "the peer closed the connection during the handshake"))
            return
        self.has_spoken = True
        self._tls.feed(scratch[:count])
        try:
            is_done = self._tls.handshake()
            if is_done:
                certificate = self._contexts.peer_certificate(self._tls, self._proxy.wall_s())
        except TlsError as error:
            self._handshake_failed(error)
            return
        if count < CHUNK_FIRST_BYTES and not self._secure_at_end:
            self._secure_in = False
        if not is_done:
            self._send_secure(self._tls.output())
            self._step_soon()
            return
        self._is_handshaking = False
        self._proxy.loop.relieve(self)
        self._proxy.handshake_done(self, self._tls.is_resumed)
        if isinstance(self.policy, OutboundPolicy):
            self._wants_ticket = not self._tls.is_resumed
        else:
            self._contexts.accepted(self._host, self._tls.is_resumed)
            if self._tls.version != "TLSv1.3":
                self._send_secure(self._tls.output())  # 1.3: only tickets, they can travel with the first data
        actions = self.session.identified(certificate)
        if isinstance(self.policy, InboundPolicy) and self.policy.source:
            self._proxy.link_admitted(self, self.policy.source)
        self._perform(actions)

    def _handshake_failed(self, error: TlsError) -> None:
        if self._tls is not None:
            self._send_best_effort(self._tls.output())
        self._is_handshaking = False
        if isinstance(self.policy, InboundPolicy):
            self._proxy.handshake_failed(self, error)
            self._perform(self.session.broken("handshake"))
            return
        if self._dialled_at is not None:
            self._contexts.forget(self.policy.outbound.identity, self._dialled_at.host, self._dialled_at.port)
        self._proxy.handshake_failed(self, error)
        self._perform(self.session.dial_failed(error.reason))

    def _remember_session(self) -> None:
        """The peer's first data has come, and with it, or before, its ticket."""
        at = self._dialled_at
        if isinstance(self.policy, OutboundPolicy) and self._tls is not None and at is not None:
            self._wants_ticket = not self._contexts.remember(self._tls, self.policy.outbound.identity, at.host, at.port)

    # -- actions of the session ---------------------------------------------------------------------------------------

    def _perform(self, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, Finish):
                self._finish(action.side)
            elif isinstance(action, Relay):
                self._relay()
            elif isinstance(action, Dial):
                self._dial(action)
            elif isinstance(action, Identify):
                self._identify()
            else:
                self._close(action)

    def _dial(self, target: Dial) -> None:
        side = Side.PLAIN if isinstance(self.policy, InboundPolicy) else Side.SECURE
        if side is Side.SECURE:
            self._drop_secure()
        self._dialled_at = target
        try:
            sock = socket.socket(socket.AF_INET6 if ":" in target.host else socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            self._perform(self.session.dial_failed(_errno_name(error.errno)))
            return
        if side is Side.PLAIN:
            self._plain = sock
        else:
            self._secure = sock
        try:
            sock.setblocking(False)
            tune(sock)
            code = sock.connect_ex((target.host, target.port))
        except (OSError, ValueError, OverflowError):  # a host name that is no address, as far as it got
            code = errno.EADDRNOTAVAIL
        if code not in (0, errno.EINPROGRESS):
            self._perform(self.session.dial_failed(_errno_name(code)))
            return
        self._dialled = side
        handler = self._on_plain if side is Side.PLAIN else self._on_secure
        self._proxy.loop.add(sock.fileno(), handler)
        if code == 0:
            self._dialled = None
            self._perform(self.session.connected())
        else:
            self._proxy.loop.expect(self, target.timeout_s)

    def _dial_answered(self, sock: socket.socket | None) -> None:
        if sock is None:
            return
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._dialled = None
        self._proxy.loop.relieve(self)
        self._perform(self.session.dial_failed(_errno_name(code)) if code else self.session.connected())

    def _identify(self) -> None:
        policy, at = self.policy, self._dialled_at
        assert isinstance(policy, OutboundPolicy)
        assert at is not None
        outbound = policy.outbound
        self._contexts = self._proxy.contexts  # a redial after a rotation uses the new leaf
        self._tls = self._contexts.connect(outbound.server_name, outbound.identity, at.host, at.port)
        self._is_handshaking = True
        self._proxy.loop.expect(self, at.timeout_s)
        try:
            self._tls.handshake()
        except TlsError as error:
            self._handshake_failed(error)
            return
        self._send_secure(self._tls.output())
        self._step_soon()

    def _relay(self) -> None:
        self.is_relaying = True
        self._proxy.loop.relieve(self)
        tls = self._tls
        assert tls is not None
        if isinstance(self.policy, OutboundPolicy):
            self._pump_up()  # what the application has sent meanwhile goes out together with our Finished
            if self.is_relaying and tls.has_output:
                self._send_secure(tls.output())
        elif self._plain_in:  # the application has spoken or ended already
            self._again_up()
        if self.is_relaying and tls.has_input and not self._pass_down():
            return
        if self.is_relaying and self._secure_in and self._to_plain is None:
            self._again_down()

    def _finish(self, side: Side) -> None:
        if side is Side.SECURE:
            self._finishing_secure = True
            self._send_secure(self._tls.finish())  # type: ignore[union-attr]
            return
        self._finishing_plain = True
        if self._to_plain is None:
            self._end_plain()

    def _end_plain(self) -> None:
        try:
            self._plain.shutdown(socket.SHUT_WR)  # type: ignore[union-attr]
        except OSError:
            self._perform(self.session.broken("application_reset"))
            return
        self._perform(self.session.flushed(Side.PLAIN))

    def _secure_lost(self) -> None:
        if self.is_relaying or isinstance(self.policy, InboundPolicy):
            self._perform(self.session.broken("peer_reset"))
        else:
            self._handshake_failed(TlsError("reset", "the connection was reset during the handshake"))

    def _drop_secure(self) -> None:
        sock = self._secure
        if sock is not None:
            self._proxy.loop.remove(sock.fileno())
            sock.close()
        self._secure = self._tls = self._to_secure = None
        self._secure_in = self._secure_at_end = False

    def _close(self, action: Close) -> None:
        loop, was_relaying = self._proxy.loop, self.is_relaying
        self.is_relaying = self._is_handshaking = False
        loop.relieve(self)
        if not was_relaying and self.session.certificate is None and self._tls is not None:
            self._send_best_effort(self._tls.finish())  # refused: say so in order
        for sock in (self._plain, self._secure):
            if sock is None:
                continue
            loop.forget(sock.fileno())
            if action.abort and (was_relaying or sock is self._plain or self.session.certificate is not None):
                try:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                except OSError:
                    pass
            sock.close()
        self._plain = self._secure = self._tls = self._to_plain = self._to_secure = None
        self._proxy.link_closed(self, action.reason)


def _errno_name(code: int | None) -> str:
    """A short constant for counters: `refused`, `timeout`, `unreachable`, else the errno's name."""
    names: dict[Any, str] = {
        errno.ECONNREFUSED: "refused",
        errno.ETIMEDOUT: "timeout",
        errno.EHOSTUNREACH: "unreachable",
        errno.ENETUNREACH: "unreachable",
        errno.ECONNRESET: "reset",
    }
    return names.get(code) or errno.errorcode.get(code or 0, os.strerror(code or 0)).lower()
