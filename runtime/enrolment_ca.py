"""The enrolment CA: what every holder of the cluster secret can make of it, byte for byte the same.

HKDF(secret) yields an Ed25519 key, and nothing else is derived from it. `cryptography` is imported inside the functions
that need it, so that `rostra keygen` does not pay for it.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
from typing import TYPE_CHECKING

from rostra.runtime.secret import Secret

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519


NODE_URI = "rostra://node/"

_HKDF_INFO = b"rostra enrolment CA v1"
# Dates of what every holder of the secret can issue for itself protect nothing, and a machine whose clock is wrong at
# boot must be able to enrol. RFC 5280 §4.1.2.5: the latter means "no well-defined expiration date".
_BEGINNING = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END_OF_TIME = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.UTC)

if TYPE_CHECKING:
    Authority = tuple[x509.Certificate, ed25519.Ed25519PrivateKey]


def enrolment_authority(secret: Secret) -> Authority:
    """The enrolment CA of a secret, byte for byte the same on every holder (Ed25519 signatures are deterministic)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    seed = HKDF(hashes.SHA256(), 32, salt=None, info=_HKDF_INFO).derive(secret.value)
    key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
    public = key.public_key()
    identifier = x509.SubjectKeyIdentifier.from_public_key(public)
    name = x509.Name(
        [x509.NameAttribute(x509.NameOID.COMMON_NAME, f"Rostra enrolment CA {identifier.digest.hex()[:8]}")]
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(1)
        .not_valid_before(_BEGINNING)
        .not_valid_after(_END_OF_TIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, None)
    )
    return certificate, key


def issue_enrolment(
    authority: Authority, key: ec.EllipticCurvePrivateKey, node_id: str, node_name: str
) -> x509.Certificate:
    """The certificate that this node issues to itself; always the same for the same input."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    public = key.public_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, node_name)])
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(NODE_URI + node_id)])
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    return _sign(
        authority,
        _serial(key_hash_of(key), node_id, node_name),
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(purposes, critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False),
    )


def cross_certify(authority: Authority, anchor_pem: str) -> x509.Certificate:
    """The CA in `anchor_pem` with its own name and key, but certified by `authority`."""
    from cryptography import x509

    anchor = x509.load_pem_x509_certificate(anchor_pem.encode())
    identifier = anchor.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return _sign(
        authority,
        _serial("cross", anchor_pem),
        x509.CertificateBuilder()
        .subject_name(anchor.subject)
        .public_key(anchor.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(identifier, critical=False),
    )


def _sign(authority: Authority, serial: int, builder: x509.CertificateBuilder) -> x509.Certificate:
    from cryptography import x509

    issuer, key = authority
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        builder.issuer_name(issuer.subject)
        .serial_number(serial)
        .not_valid_before(_BEGINNING)
        .not_valid_after(_END_OF_TIME)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, None)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _serial(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:16], "big") | 1


_PEM_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----\n.*?\n-----END CERTIFICATE-----\n?", re.DOTALL)


def pem(certificate: x509.Certificate) -> str:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def split_pem(text: str) -> list[str]:
    """The certificates in `text`, each as PEM of its own."""
    return [block.rstrip("\n") + "\n" for block in _PEM_BLOCK.findall(text)]


def pem_to_der(text: str) -> list[bytes]:
    """The certificates in `text` as DER."""
    return [base64.b64decode("".join(block.splitlines()[1:-1])) for block in split_pem(text)]


def key_hash_of(holder: ec.EllipticCurvePrivateKey | x509.Certificate) -> str:
    """SHA-256 of its public key, in hex: what servers know a node by."""
    from cryptography.hazmat.primitives import serialization

    der = holder.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
