"""TLS 1.3 contexts from the node's identity, and what a peer's certificate says.

Both sides must show a certificate that stands under a trust anchor; names are not compared, because a peer is known by
the hash of its key. The contexts read the newest certificate and anchors at each handshake, so they are made once and
given to asyncio or uvloop for the life of the process. Knows neither who is a server nor what a peer may do.
"""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import Any, Protocol

NODE_URI = "rostra://node/"


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
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused: nothing listens there"
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
