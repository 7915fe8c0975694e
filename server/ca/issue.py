"""Certificates: the mesh's roots and leaves, the cluster CA and the certificates of nodes.

Functions of their arguments and of fresh keys: time and serial numbers come from the caller. Called by the leader for
roots and by every server for leaves and nodes, whose serial numbers are random. Knows neither where keys are stored nor
who may ask. The mesh certificates have the fields of Consul's, so that Envoy and clients that look inside find what
they expect; `runtime/tls.py` makes the requests.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rostra.acl import identity as spiffe
from rostra.server.state.rows import RootRow
from rostra.wire.errors import BadRequest, Internal

ROOT_TTL_S = 87600 * 3600
LEAF_TTL_S = 72 * 3600
NODE_TTL_S = 8760 * 3600
#: Certificates begin a little in the past: clocks of hosts differ.
SKEW_S = 60
CSR_BYTES_MAX = 16 << 10
NODE_URI = "rostra://node/"

_COMMON_NAME_CHARS_MAX = 64  # RFC 5280, ub-common-name


@dataclass(frozen=True, slots=True)
class LeafCertificate:
    cert_pem: str
    serial_hex: str  # as Consul shows it: "08", "01:0a"
    valid_after_ms: int
    valid_before_ms: int
    uri: str


# -- the mesh CA -----------------------------------------------------------------------------------------------------


def create_root(
    trust_domain: str, now_ms: int, serial: int, name: str = "Consul CA Root Cert"
) -> tuple[dict[str, Any], str]:
    """A new root of the mesh: the fields of its RootRow, and its private key as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = _key_identifier(key.public_key())
    common_name = f"pri-{identifier.digest.hex()[:8]}.rostra.ca.{trust_domain[:8]}.{_suffix(trust_domain)}"
    subject = _name(common_name)
    begin, end = _validity(now_ms, ROOT_TTL_S)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(_key_usage(digital_signature=True, key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .add_extension(_uri_name(spiffe.AuthorityIdentity(trust_domain).uri), critical=False)
        .sign(key, hashes.SHA256())
    )
    fields = {
        "id": _colons(certificate.fingerprint(hashes.SHA1())),  # noqa: S303 -- a name that Consul gives roots, not a protection
        "name": name,
        "serial": serial,
        "signing_key_id": _colons(identifier.digest),
        "trust_domain": trust_domain,
        "not_before_ms": _ms(begin),
        "not_after_ms": _ms(end),
        "cert_pem": _pem(certificate),
        "intermediates_pem": (),
        "active": True,
        "key_type": "ec",
        "key_bits": 256,
    }
    return fields, _key_pem(key)


def sign_leaf(
    root: RootRow, root_key_pem: str, csr_pem: str, *, uri: str, now_ms: int, serial: int, ttl_s: int = LEAF_TTL_S
) -> LeafCertificate:
    """A certificate for the key in `csr_pem` and the one identity `uri`, which the request must name too.

    Nothing but the key is taken from the request. Raises BadRequest for a request that is not exactly that.
    """
    try:
        identity = spiffe.parse(uri)
    except spiffe.BadIdentity as e:
        raise BadRequest(f"certificate request for {uri!r}: {e}") from None
    if isinstance(identity, spiffe.AuthorityIdentity) or identity.trust_domain != root.trust_domain:
        raise BadRequest(f"certificate request: {uri} is not a service or agent of {root.trust_domain}")
    public = _checked_request(csr_pem, uri)
    issuer = x509.load_pem_x509_certificate(root.cert_pem.encode())
    begin, end = _validity(now_ms, ttl_s)
    end = min(end, issuer.not_valid_after_utc)
    if _at(now_ms) >= issuer.not_valid_after_utc:
        raise Internal(f"the active root {root.id} expired at {issuer.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}")
    usage = _key_usage(digital_signature=True, key_encipherment=True, data_encipherment=True, key_agreement=True)
    certificate = _issue(
        issuer,
        _load_key(root_key_pem),
        public,
        subject=_name(_common_name(identity, root.trust_domain)),
        serial=serial,
        begin=begin,
        end=end,
        usage=usage,
        uri=uri,
    )
    return LeafCertificate(_pem(certificate), serial_hex(serial), _ms(begin), _ms(end), uri)


def serial_hex(serial: int) -> str:
    """The serial number as Consul writes it: bytes in hexadecimal, colons between."""
    return _colons(serial.to_bytes((serial.bit_length() + 7) // 8 or 1, "big"))


def _checked_request(csr_pem: str, uri: str) -> ec.EllipticCurvePublicKey:
    """The key of a sound request for `uri`. Raises BadRequest."""
    if len(csr_pem) > CSR_BYTES_MAX:
        raise BadRequest("certificate request: too long")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        signed = request.is_signature_valid
        public = request.public_key()
        names = list(request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        raise BadRequest(f"certificate request: names no identity, expected {uri}") from None
    except Exception as e:  # bad ASN.1, unknown curves and algorithms: a dozen types
        raise BadRequest(f"certificate request: cannot be read: {type(e).__name__}") from None
    if not signed:
        raise BadRequest("certificate request: not signed by its own key")
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise BadRequest("certificate request: the key must be on P-256")
    if names != [x509.UniformResourceIdentifier(uri)]:
        raise BadRequest(f"certificate request: must name {uri} and nothing else")
    return public


def _common_name(identity: spiffe.Identity, trust_domain: str) -> str:
    """For people only; machines read the URI. Consul's form, shortened to what a common name may hold."""
    match identity:
        case spiffe.ServiceIdentity(service=label, namespace=namespace):
            kind = f"svc.{namespace}"
        case spiffe.AgentIdentity(node=label):
            kind = "agnt"
        case _:
            raise AssertionError(identity)
    label = re.sub(r"[^a-z0-9-]", "", label.lower())
    rest = f".{kind}.{trust_domain[:8]}.{_suffix(trust_domain)}"
    return (label[: max(1, _COMMON_NAME_CHARS_MAX - len(rest))] + rest)[:_COMMON_NAME_CHARS_MAX]


def _suffix(trust_domain: str) -> str:
    return trust_domain.rpartition(".")[2][:16]


# -- the cluster CA --------------------------------------------------------------------------------------------------


def create_cluster_ca(now_ms: int, serial: int = 1) -> tuple[str, str]:
    """A new CA for the certificates of nodes: (certificate PEM, private key PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = _key_identifier(key.public_key())
    subject = _name(f"Rostra cluster CA {identifier.digest.hex()[:8]}")
    begin, end = _validity(now_ms, ROOT_TTL_S)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(_key_usage(digital_signature=True, key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(certificate), _key_pem(key)


def sign_node(
    ca_cert_pem: str,
    ca_key_pem: str,
    public_key_der: bytes,
    *,
    node_id: str,
    name: str,
    role: str,
    now_ms: int,
    serial: int,
    ttl_s: int = NODE_TTL_S,
) -> str:
    """The certificate (PEM) of a node for the key that it showed in TLS (`runtime.tls.peer_public_key`).

    `role` (server or client) is there for people: what a node may do stands in the member list.
    """
    try:
        public = serialization.load_der_public_key(public_key_der)
    except Exception:
        raise BadRequest(f"node {name}: its public key cannot be read") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise BadRequest(f"node {name}: its key must be on P-256")
    issuer = x509.load_pem_x509_certificate(ca_cert_pem.encode())
    begin, end = _validity(now_ms, ttl_s)
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)]
    )
    certificate = _issue(
        issuer,
        _load_key(ca_key_pem),
        public,
        subject=subject,
        serial=serial,
        begin=begin,
        end=min(end, issuer.not_valid_after_utc),
        usage=_key_usage(digital_signature=True),
        uri=NODE_URI + node_id,
    )
    return _pem(certificate)


# -- parts of certificates -------------------------------------------------------------------------------------------


def _issue(
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    *,
    subject: x509.Name,
    serial: int,
    begin: datetime.datetime,
    end: datetime.datetime,
    usage: x509.KeyUsage,
    uri: str,
) -> x509.Certificate:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_identifier(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .add_extension(_uri_name(uri), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _key_identifier(public: ec.EllipticCurvePublicKey) -> x509.SubjectKeyIdentifier:
    """SHA-256 of the whole SubjectPublicKeyInfo, as Consul has it (SigningKeyID is this)."""
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return x509.SubjectKeyIdentifier(hashlib.sha256(der).digest())


def _key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    data_encipherment: bool = False,
    key_agreement: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=data_encipherment,
        key_agreement=key_agreement,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:_COMMON_NAME_CHARS_MAX])])


def _uri_name(uri: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])


def _validity(now_ms: int, ttl_s: int) -> tuple[datetime.datetime, datetime.datetime]:
    """Whole seconds, because certificates know no others."""
    now = _at(now_ms // 1000 * 1000)
    return now - datetime.timedelta(seconds=SKEW_S), now + datetime.timedelta(seconds=ttl_s)


def _at(ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC)


def _ms(moment: datetime.datetime) -> int:
    return round(moment.timestamp() * 1000)


def _colons(data: bytes) -> str:
    return data.hex(":")


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    ).decode()


def _load_key(pem: str) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem.encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Internal("a CA's key is not an EC key")
    return key
