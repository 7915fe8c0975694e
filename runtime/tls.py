"""TLS 1.3 contexts from the node's identity, and what a peer's certificate says.

Both sides must show a certificate that stands under a trust anchor; names are not compared, because a peer is known by
the hash of its key. The contexts read the newest certificate and anchors at each handshake, so they are made once and
given to asyncio or uvloop for the life of the process. `Handshakes` brings accepted sockets through TLS without letting
strangers keep others out. Knows neither who is a server nor what a peer may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import resource
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

NODE_URI = "rostra://node/"

#: Each handshake costs the loop a millisecond, so few run at once (1,700 agents that reconnect: 13 ms pauses, not 597).
HANDSHAKES_AT_ONCE = 16
HANDSHAKE_S = 3.0
#: Most take less. A peer that dawdles goes on, but makes room for the next: 800 a second get their turn in any case.
PLACE_S = 0.02
#: That many may have begun and dawdle; each costs 50 KiB. One more, and the first of them must go.
DAWDLERS_MAX = 256
#: Strangers that are connected at a time. One more, and the one who has been here longest must go.
STRANGERS_MAX = 4096
RECORD_BYTES_MAX = (16 << 10) + 256


class Identity(Protocol):
    """What contexts need; `runtime.identity.NodeIdentity` has it."""

    key_path: Path
    cert_path: Path
    version: int

    @property
    def anchors_pem(self) -> str: ...


def server_context(identity: Identity) -> ssl.SSLContext:
    """For listeners: TLS 1.3, a certificate is demanded of the client."""
    return _Reloading(ssl.PROTOCOL_TLS_SERVER, identity)


def client_context(identity: Identity) -> ssl.SSLContext:
    """For connecting: TLS 1.3, our certificate is shown, the server's verified; compare `peer_key_hash` afterwards.

    In TLS 1.3 a client learns only by its first read that the server refused its certificate.
    """
    return _Reloading(ssl.PROTOCOL_TLS_CLIENT, identity)


class _Reloading(ssl.SSLContext):
    """Hands each handshake to a context made of the identity's present version.

    A certificate could be loaded into a living context, but an anchor cannot be taken out of one.
    """

    _identity: Identity
    _version: int
    _current: ssl.SSLContext

    def __new__(cls, protocol: int, identity: Identity) -> _Reloading:
        self = super().__new__(cls, protocol)
        self._identity = identity
        self._current = _context(protocol, identity)
        self._version = identity.version
        return self

    def __init__(self, protocol: int, identity: Identity) -> None:
        pass

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._newest().wrap_bio(*args, **kwargs)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return self._newest().wrap_socket(*args, **kwargs)

    def _newest(self) -> ssl.SSLContext:
        version = self._identity.version
        if version != self._version:
            self._current = _context(self.protocol, self._identity)
            self._version = version
        return self._current


def _context(protocol: int, identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(identity.cert_path, identity.key_path)
    context.load_verify_locations(cadata=identity.anchors_pem)
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # nobody resumes; each would cost a message and let a dropped anchor live on
    return context


# -- the door --------------------------------------------------------------------------------------------------------


class NotTls(OSError):
    """The first bytes are not the beginning of TLS."""


class Handshakes:
    """Brings accepted connections through TLS: few at a time, each in bounded time, no matter who is at the other end.

    TLS begins when a whole first record has arrived, and a place among the few is lent for PLACE_S only. So silence,
    half a greeting or a stalled handshake cost a file descriptor for HANDSHAKE_S and nothing else.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        *,
        at_once: int = HANDSHAKES_AT_ONCE,
        strangers_max: int = STRANGERS_MAX,
        timeout_s: float = HANDSHAKE_S,
    ) -> None:
        self._context, self._timeout_s = context, timeout_s
        self._places = asyncio.Semaphore(at_once)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # files and members need descriptors too
        most = strangers_max if soft == resource.RLIM_INFINITY else max(64, soft // 4)
        self._strangers_max = min(strangers_max, most)
        self._pending: dict[socket.socket, asyncio.Timeout] = {}
        self._dawdling: dict[socket.socket, asyncio.Timeout] = {}

    @property
    def pending(self) -> int:
        return len(self._pending)

    def make_room(self) -> bool:
        """Send away who has been at the door longest. False: nobody is there."""
        if not self._pending:
            return False
        _end_oldest(self._pending)
        return True

    async def shake(self, accepted: socket.socket, protocol: asyncio.Protocol) -> None:
        """Returns when `protocol` is connected by TLS. Raises OSError, ssl.SSLError or TimeoutError, and closes it."""
        loop = asyncio.get_running_loop()
        if len(self._pending) >= self._strangers_max:
            self.make_room()
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                self._pending[accepted] = limit
                await _first_record(accepted)
                await self._places.acquire()
                place = _Place(self._places)
                back = loop.call_later(PLACE_S, place.give_back)
                self._dawdling[accepted] = limit
                if len(self._dawdling) > DAWDLERS_MAX:
                    _end_oldest(self._dawdling)
                try:
                    await loop.connect_accepted_socket(
                        lambda: protocol,
                        accepted,
                        ssl=self._context(),
                        ssl_handshake_timeout=self._timeout_s,
                        ssl_shutdown_timeout=1.0,
                    )
                finally:
                    back.cancel()
                    place.give_back()
        except BaseException:
            accepted.close()
            raise
        finally:
            self._pending.pop(accepted, None)
            self._dawdling.pop(accepted, None)


def _end_oldest(limits: dict[socket.socket, asyncio.Timeout]) -> None:
    with contextlib.suppress(RuntimeError):  # its time is up already
        limits.pop(next(iter(limits))).reschedule(asyncio.get_running_loop().time())


class _Place:
    """One of the few places, given back once."""

    __slots__ = ("_places",)

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places: asyncio.Semaphore | None = places

    def give_back(self) -> None:
        places, self._places = self._places, None
        if places is not None:
            places.release()


async def _first_record(accepted: socket.socket) -> None:
    """Wait for a whole TLS record without taking it from the kernel. Raises NotTls for anything else."""
    accepted.setblocking(False)
    wanted = 5
    for _ in range(25):
        # The kernel wakes us when so much is there, and not for each byte.
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
        await _readable(accepted)
        try:
            head = accepted.recv(wanted, socket.MSG_PEEK)
        except BlockingIOError:
            continue
        if head[:1] not in (b"", b"\x16") or head[1:2] not in (b"", b"\x03"):
            raise NotTls("what came is not TLS")
        if len(head) >= 5:
            length = 5 + int.from_bytes(head[3:5], "big")
            if length > RECORD_BYTES_MAX:
                raise NotTls("what came is not TLS")
            if len(head) >= length:
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
                return
            wanted = length
        elif not head:
            raise ConnectionResetError("closed before a word was said")
        # Woken with less than was asked for: the peer has ended its side, or this kernel does not count for us.
        await asyncio.sleep(0.02)
    raise ConnectionResetError("closed in the middle of a greeting")


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    arrived = asyncio.Event()
    loop.add_reader(sock.fileno(), arrived.set)
    try:
        await arrived.wait()
    finally:
        loop.remove_reader(sock.fileno())


# -- the peer --------------------------------------------------------------------------------------------------------


def peer_key_hash(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> str:
    """Hex SHA-256 of the SubjectPublicKeyInfo of the peer's certificate. Raises ValueError when it showed none."""
    return hashlib.sha256(peer_public_key(ssl_object)).hexdigest()


def peer_public_key(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> bytes:
    """The peer's SubjectPublicKeyInfo as DER; the handshake has proved that it holds the private key."""
    der = ssl_object.getpeercert(True) if ssl_object is not None else None
    if not der:
        raise ValueError("the peer showed no certificate")
    return public_key_of(der)


def peer_node(ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> tuple[str, str]:
    """(node id, node name) in the peer's certificate. Raises ValueError if it is not a node's.

    Under the enrolment CA a peer writes there what it likes: bind it to the key's hash before believing it.
    """
    found: dict[str, Any] = (ssl_object.getpeercert() if ssl_object is not None else None) or {}
    ids = [v[len(NODE_URI) :] for k, v in found.get("subjectAltName", ()) if k == "URI" and v.startswith(NODE_URI)]
    names = [v for part in found.get("subject", ()) for k, v in part if k == "commonName"]
    if len(ids) != 1 or len(names) != 1:
        raise ValueError("the peer's certificate is not a node's")
    return ids[0], names[0]


def explain(error: BaseException) -> str:
    """What a failed handshake or connection means to an operator."""
    text = str(error)
    reason = (getattr(error, "reason", None) or text).upper().replace(" ", "_")
    if "CERTIFICATE_HAS_EXPIRED" in text.upper().replace(" ", "_"):
        return "the peer's certificate has expired (or this machine's clock is wrong)"
    if "NOT_YET_VALID" in text.upper().replace(" ", "_"):
        return "the peer's certificate is not valid yet: compare the clocks of both machines"
    if isinstance(error, ssl.SSLCertVerificationError):
        return "the peer's certificate is not of this cluster: is `encrypt` the same on both nodes?"
    if "ALERT_CERTIFICATE_EXPIRED" in reason:
        return "the peer says that our certificate has expired (or its clock is wrong)"
    if "ALERT_UNKNOWN_CA" in reason or "ALERT_BAD_CERTIFICATE" in reason or "ALERT_DECRYPT_ERROR" in reason:
        return "the peer does not trust our certificate: is `encrypt` the same on both nodes?"
    if "CERTIFICATE_REQUIRED" in reason or "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        return "no client certificate was shown: not a node of a cluster"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or text}"
    if isinstance(error, NotTls):
        return "not TLS: another program, or a scan"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there"
    if isinstance(error, ConnectionResetError | BrokenPipeError) and (not text or error.errno):
        # A peer that does not trust our certificate mostly just goes; so do port scans and TCP checks.
        return (
            "the peer closed the connection during the TLS handshake: a scan or a TCP check, or it does not trust our"
            " certificate (is `encrypt` the same on both nodes?)"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return text or type(error).__name__


def public_key_of(certificate_der: bytes) -> bytes:
    """The SubjectPublicKeyInfo inside a certificate: seventh element of the TBSCertificate (RFC 5280 §4.1)."""
    try:
        at, _ = _enter(certificate_der, 0)  # Certificate
        at, end = _enter(certificate_der, at)  # TBSCertificate
        if certificate_der[at] == 0xA0:  # version, absent in v1
            at = _skip(certificate_der, at)
        for _ in range(5):  # serial number, signature, issuer, validity, subject
            at = _skip(certificate_der, at)
        after = _skip(certificate_der, at)
    except IndexError:
        raise ValueError("not a certificate") from None
    if certificate_der[at] != 0x30 or after > end:
        raise ValueError("not a certificate")
    return certificate_der[at:after]


def _enter(der: bytes, at: int) -> tuple[int, int]:
    """Start and end of what the element at `at` holds."""
    length = der[at + 1]
    if length < 0x80:
        start = at + 2
    else:
        count = length & 0x7F
        if not 1 <= count <= 4:
            raise ValueError("not a certificate")
        start = at + 2 + count
        length = int.from_bytes(der[at + 2 : start], "big")
    if start + length > len(der):
        raise ValueError("not a certificate")
    return start, start + length


def _skip(der: bytes, at: int) -> int:
    return _enter(der, at)[1]


# -- requests for leaf certificates ----------------------------------------------------------------------------------


def create_csr(uri: str) -> tuple[str, str]:
    """A new P-256 key and a request for a leaf certificate for the SPIFFE id `uri`: (key PEM, CSR PEM).

    The key is in the `EC PRIVATE KEY` form, which clients of Consul's API know.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    return key_pem.decode(), csr.public_bytes(serialization.Encoding.PEM).decode()
