"""Certificates for tests of the mesh: a CA of a trust domain and leafs with SPIFFE URIs, P-256, made in memory."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

TRUST_DOMAIN = "11111111-2222-3333-4444-555555555555.consul"


def service_uri(service: str, trust_domain: str = TRUST_DOMAIN, datacenter: str = "dc1") -> str:
    return f"spiffe://{trust_domain}/ns/default/dc/{datacenter}/svc/{service}"


@dataclass(frozen=True)
class LeafPair:
    cert_pem: str
    key_pem: str
    serial: str
    valid_after_ms: int
    valid_before_ms: int


class MeshCA:
    """One root of a trust domain."""

    def __init__(self, trust_domain: str = TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"mesh test CA {trust_domain[:8]}")])
        now = dt.datetime.now(dt.UTC)
        self._cert = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), False
            )
            .sign(self._key, hashes.SHA256())
        )
        self.cert_pem = self._cert.public_bytes(serialization.Encoding.PEM).decode()

    def leaf(
        self, service: str, *, uris: list[str] | None = None, lives_s: float = 3600.0, age_s: float = 60.0
    ) -> LeafPair:
        """A leaf of `service` that ends in `lives_s` (negative: has ended). `uris` replaces the usual SPIFFE URI."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        names = [service_uri(service, self.trust_domain)] if uris is None else uris
        after, before = now - dt.timedelta(seconds=age_s), now + dt.timedelta(seconds=lives_s)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service)]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(after)
            .not_valid_after(before)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), False
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(n) for n in names]), critical=False
            )
        cert = builder.sign(self._key, hashes.SHA256())
        return LeafPair(
            cert.public_bytes(serialization.Encoding.PEM).decode(),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
            f"{cert.serial_number:x}",
            int(after.timestamp() * 1000),
            int(before.timestamp() * 1000),
        )
