"""The proxy's TLS, without sockets: bytes in, bytes out, over `ssl.MemoryBIO`.

asyncio's and uvloop's transports can neither half-close nor resume a session, so the proxy drives SSLObject itself.
Each direction ends by its own close_notify while the other goes on, as TCP's directions do. The caller must hand over
everything it reads (`feed`) and then take all plaintext (`decrypt`): `finish` relies on nothing being left inside.
`TlsContexts` is one generation of leaf and roots; a new snapshot makes a new one, open connections keep theirs.
"""

from __future__ import annotations

import os
import ssl
from typing import Any, Final, NamedTuple

from rostra.connect_proxy.snapshot import Leaf

#: Decrypting what one `feed` brought needs this much more room than was fed: a part of a record may lie inside already.
DECRYPT_SLACK_BYTES: Final = 64 << 10
_CERTIFICATES_KNOWN_MAX: Final = 1024
_SESSIONS_MAX: Final = 512
_HOSTS_KNOWN_MAX: Final = 4096
_TICKETS_AFTER_FULL_HANDSHAKE: Final = 4  # more than one: several proxies may live on one host
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class TlsError(Exception):
    """The peer or its certificate is not acceptable. `reason` is a short constant, to be counted; str() has details."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


class PeerCertificate(NamedTuple):
    """What the proxy needs from a certificate whose chain has been verified."""

    uri: str  # "" where there is not exactly one URI name
    not_after_s: float
    serial: str


class TlsContexts:
    """Server and client contexts of one (leaf, roots), with the sessions that can be resumed under them."""

    __slots__ = ("_certificates", "_client", "_server", "_sessions", "_tickets_due", "serial_number")

    def __init__(self, leaf: Leaf, roots: tuple[str, ...]) -> None:
        """Raises TlsError("bad_leaf" | "bad_roots") when OpenSSL refuses them."""
        self.serial_number = leaf.serial_number
        self._certificates: dict[bytes, PeerCertificate] = {}
        self._sessions: dict[tuple[str, str, int], ssl.SSLSession] = {}
        self._server = _context(ssl.PROTOCOL_TLS_SERVER, leaf, roots)
        self._tickets_due: dict[str, int] = {}  # by client host
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT, leaf, roots)

    def accept(self, host: str) -> TlsChannel:
        """A channel for a peer that connected to us from `host`. It must show a certificate."""
        # A ticket costs both sides 0.16 ms together, and proxies like this one use theirs many times, so a host gets
        # new ones only around full handshakes. Setting it counts for channels made from now on.
        self._server.num_tickets = 1 if self._tickets_due.get(host, 1) else 0
        return TlsChannel(self._server, server_side=True)

    def accepted(self, host: str, is_resumed: bool) -> None:
        """How the handshake with a peer from `host` went: decides on tickets for the next ones."""
        due = self._tickets_due
        if not is_resumed:
            if len(due) >= _HOSTS_KNOWN_MAX and host not in due:
                due.clear()
            due[host] = _TICKETS_AFTER_FULL_HANDSHAKE
        elif due.get(host):
            due[host] -= 1

    def connect(self, server_name: str, identity: str, host: str, port: int) -> TlsChannel:
        """A channel to a peer that we connected to; resumes the last session with that identity there, if any."""
        session = self._sessions.get((identity, host, port))
        return TlsChannel(self._client, server_side=False, server_name=server_name, session=session)

    def remember(self, channel: TlsChannel, identity: str, host: str, port: int) -> bool:
        """Keeps the channel's session for later ones. False while the peer has not sent a ticket yet."""
        session = channel.ticket()
        if session is None:
            return False
        sessions = self._sessions
        if len(sessions) >= _SESSIONS_MAX and (identity, host, port) not in sessions:
            del sessions[next(iter(sessions))]
        sessions[(identity, host, port)] = session
        return True

    def forget(self, identity: str, host: str, port: int) -> None:
        """Drops the session: the next handshake there is a full one."""
        self._sessions.pop((identity, host, port), None)

    def peer_certificate(self, channel: TlsChannel, now_s: float) -> PeerCertificate:
        """The verified certificate of the peer, not expired at `now_s`; TlsError otherwise.

        OpenSSL verifies the chain in full handshakes only; a resumed session brings the certificate of the first one,
        so the expiry is looked at here every time. Roots cannot change under a session: they make new contexts.
        """
        der = channel.certificate_der()
        if der is None:
            raise TlsError("no_certificate", "the peer showed no certificate")
        known = self._certificates.get(der)
        if known is None:
            known = _parse_certificate(channel.certificate_dict())
            if len(self._certificates) >= _CERTIFICATES_KNOWN_MAX:
                self._certificates.clear()
            self._certificates[der] = known
        if known.not_after_s < now_s:
            raise TlsError("certificate_expired", f"the certificate of {known.uri} has expired")
        return known


class TlsChannel:
    """One TLS connection as a value machine: `feed`, then `handshake` or `decrypt`; send what `output` returns."""

    __slots__ = ("_incoming", "_object", "_outgoing", "_read", "_write", "is_input_ended")

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_name: str = "",
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        #: bytes, not str: the ssl module would run str through the IDNA codec, which is slow and large
        name: Any = server_name.encode() if server_name and not server_side else None
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=name, session=session
        )
        self._read = self._object.read
        self._write = self._object.write
        self.is_input_ended = False  # the peer's close_notify has come

    def feed(self, data: memoryview | bytes) -> None:
        """Takes ciphertext from the peer."""
        self._incoming.write(data)

    def output(self) -> bytes:
        """Ciphertext that must be sent now; empty when there is none."""
        return self._outgoing.read()

    @property
    def has_input(self) -> bool:
        """Something that was fed has not been looked at: data that came together with the end of the handshake."""
        return self._incoming.pending > 0

    @property
    def has_output(self) -> bool:
        return self._outgoing.pending > 0

    def handshake(self) -> bool:
        """Goes on with the handshake; True once it is complete. TlsError ends it (`output` holds the alert)."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise _tls_error(error) from None
        return True

    def encrypt(self, data: memoryview | bytes) -> bytes:
        """All output, `data` included."""
        written = self._write(data)
        while written < len(data):
            written += self._write(data[written:])
        return self._outgoing.read()

    def decrypt(self, into: memoryview) -> int:
        """Fills `into` with all plaintext there is and returns how much. It must have DECRYPT_SLACK_BYTES of room
        beyond what was fed. Sets `is_input_ended` when the peer has ended its direction."""
        read, incoming, filled, room = self._read, self._incoming, 0, len(into)
        try:
            while filled < room:
                got = read(room - filled, into[filled:])
                if not got:
                    self.is_input_ended = True
                    break
                filled += int(got)
                # A read takes one record and, as read-ahead is off, leaves the rest in the BIO: no need for the
                # exception that an empty BIO would raise.
                if not incoming.pending and not self._object.pending():
                    break
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.is_input_ended = True
        except ssl.SSLError as error:
            raise _tls_error(error) from None
        return filled

    def finish(self) -> bytes:
        """Ends our direction: all output, close_notify included. Reading goes on. Call once."""
        try:
            # SSL_shutdown, which Python calls a second time to wait for the peer's answer; with nothing fed and not
            # read this second call only says that it wants to read.
            self._object.unwrap()
        except (ssl.SSLError, OSError):
            pass
        return self._outgoing.read()

    def ticket(self) -> ssl.SSLSession | None:
        """The session if it can be resumed; the peer's ticket comes with or before its first data."""
        session = self._object.session
        return session if session is not None and session.has_ticket else None

    @property
    def is_resumed(self) -> bool:
        return bool(self._object.session_reused)

    @property
    def version(self) -> str:
        return self._object.version() or ""

    def certificate_der(self) -> bytes | None:
        return self._object.getpeercert(True)

    def certificate_dict(self) -> dict[str, Any]:
        return self._object.getpeercert() or {}


def _context(protocol: int, leaf: Leaf, roots: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False  # peers are known by their SPIFFE URI, which the caller compares
    context.verify_mode = ssl.CERT_REQUIRED
    # Any listed certificate is an anchor, self-signed or not, as it is for Go's peers.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    try:
        context.load_verify_locations(cadata="\n".join(roots))
    except (ssl.SSLError, ValueError) as error:
        raise TlsError("bad_roots", f"the roots cannot be loaded: {error}") from None
    _load_leaf(context, leaf)
    return context


def _load_leaf(context: ssl.SSLContext, leaf: Leaf) -> None:
    """The ssl module reads keys from files only: a memory file keeps the key off every disk."""
    fd = os.memfd_create("leaf", os.MFD_CLOEXEC)
    try:
        os.write(fd, f"{leaf.cert_pem.strip()}\n{leaf.key_pem.strip()}\n".encode())
        # The password: an encrypted key must fail, not ask at the terminal.
        context.load_cert_chain(f"/proc/self/fd/{fd}", password="")
    except (ssl.SSLError, ValueError, OSError) as error:
        raise TlsError("bad_leaf", f"the leaf certificate or its key cannot be loaded: {error}") from None
    finally:
        os.close(fd)


def _tls_error(error: ssl.SSLError) -> TlsError:
    if isinstance(error, ssl.SSLCertVerificationError):
        detail = error.verify_message
        return TlsError("certificate_expired" if "expired" in detail else "certificate_untrusted", detail)
    if isinstance(error, ssl.SSLEOFError):
        return TlsError("truncated", "the connection ended without close_notify")
    code = (error.reason or "").lower()
    if "did_not_return_a_certificate" in code:
        return TlsError("no_certificate", "the peer showed no certificate")
    if "alert" in code:
        return TlsError("refused_by_peer", code.replace("_", " "))
    return TlsError("protocol", code.replace("_", " ") or str(error))


def _parse_certificate(decoded: dict[str, Any]) -> PeerCertificate:
    uris = [value for kind, value in decoded.get("subjectAltName", ()) if kind == "URI"]
    return PeerCertificate(
        uri=uris[0] if len(uris) == 1 else "",
        not_after_s=_seconds(str(decoded.get("notAfter", ""))),
        serial=str(decoded.get("serialNumber", "")),
    )


def _seconds(text: str) -> float:
    """`Nov 22 18:03:31 2026 GMT` as seconds since 1970; 0, the past, for anything else. (`time.strptime` would import
    the locale machinery for this one format.)"""
    try:
        month, day, clock, year, zone = text.split()
        if zone != "GMT":
            return 0.0
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return _days(int(year), _MONTHS.index(month) + 1, int(day)) * 86400.0 + hours * 3600 + minutes * 60 + seconds
    except ValueError:
        return 0.0


def _days(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 in the Gregorian calendar; years begin in March so that leap days come last."""
    year -= month <= 2
    in_year = (153 * ((month + 9) % 12) + 2) // 5 + day - 1
    return year * 365 + year // 4 - year // 100 + year // 400 + in_year - 719468
