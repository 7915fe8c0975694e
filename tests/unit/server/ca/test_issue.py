"""The certificates that the leader issues: as Consul's, good for openssl, and for nothing but what was allowed."""

import asyncio
import ssl
import subprocess
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from rostra.runtime.tls import create_csr
from rostra.server.ca.issue import (
    create_cluster_ca,
    create_root,
    serial_hex,
    sign_leaf,
    sign_node,
)
from rostra.server.state.rows import RootRow
from rostra.wire.errors import BadRequest, Internal

TRUST_DOMAIN = "6ed03719-deb1-4a02-9077-3418ddcf0f49.consul"
WEB = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web"
NOW_MS = time.time_ns() // 1_000_000
FIELDS, KEY_PEM = create_root(TRUST_DOMAIN, NOW_MS, 7)
ROOT = (RootRow(**FIELDS), KEY_PEM)


@pytest.fixture
def root():
    return ROOT


def leaf(root, uri=WEB, *, csr=None, **more):
    key_pem, csr_pem = create_csr(uri)
    row, root_key_pem = root
    return sign_leaf(row, root_key_pem, csr or csr_pem, uri=uri, **{"now_ms": NOW_MS, "serial": 8, **more}), key_pem


def openssl(*argv) -> str:
    run = subprocess.run(["openssl", *map(str, argv)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def extensions(pem: str) -> list[tuple[str, bool]]:
    certificate = x509.load_pem_x509_certificate(pem.encode())
    return [(e.oid._name, e.critical) for e in certificate.extensions]


def test_a_root_has_the_fields_of_consuls(root):
    row, key_pem = root
    certificate = x509.load_pem_x509_certificate(row.cert_pem.encode())
    assert extensions(row.cert_pem) == [
        ("keyUsage", True),
        ("basicConstraints", True),
        ("subjectKeyIdentifier", False),
        ("authorityKeyIdentifier", False),
        ("subjectAltName", False),
    ]
    assert row.id == certificate.fingerprint(hashes.SHA1()).hex(":")
    assert len(row.signing_key_id.split(":")) == 32
    assert row.serial == certificate.serial_number == 7
    assert (row.key_type, row.key_bits, row.active, row.trust_domain) == ("ec", 256, True, TRUST_DOMAIN)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}")]
    years = (row.not_after_ms - row.not_before_ms) / (365 * 86400_000)
    assert 9.9 < years < 10.1
    assert row.not_before_ms == int(certificate.not_valid_before_utc.timestamp() * 1000)
    assert key_pem.startswith("-----BEGIN EC PRIVATE KEY-----")


def test_a_leaf_has_the_fields_of_consuls(root):
    issued, _ = leaf(root)
    certificate = x509.load_pem_x509_certificate(issued.cert_pem.encode())
    assert extensions(issued.cert_pem) == [
        ("keyUsage", True),
        ("extendedKeyUsage", False),
        ("basicConstraints", True),
        ("subjectKeyIdentifier", False),
        ("authorityKeyIdentifier", False),
        ("subjectAltName", False),
    ]
    assert certificate.subject.rfc4514_string() == "CN=web.svc.default.6ed03719.consul"
    assert issued.uri == WEB
    assert issued.serial_hex == "08"
    assert issued.valid_after_ms == NOW_MS // 1000 * 1000 - 60_000
    assert issued.valid_before_ms == NOW_MS // 1000 * 1000 + 72 * 3600_000


def test_openssl_accepts_root_and_leaf_for_both_sides(root, tmp_path):
    issued, _ = leaf(root)
    (tmp_path / "root.pem").write_text(root[0].cert_pem)
    (tmp_path / "leaf.pem").write_text(issued.cert_pem)
    for purpose in ("sslclient", "sslserver"):
        argv = ["verify", "-x509_strict", "-purpose", purpose, "-CAfile", tmp_path / "root.pem", tmp_path / "leaf.pem"]
        assert "OK" in openssl(*argv)
    text = openssl("x509", "-in", tmp_path / "leaf.pem", "-noout", "-text")
    assert "Digital Signature, Key Encipherment, Data Encipherment, Key Agreement" in text
    assert f"URI:{WEB}" in text
    assert "CA:FALSE" in text


async def test_two_leaves_shake_hands_and_see_each_others_identity(root, tmp_path):
    (tmp_path / "root.pem").write_text(root[0].cert_pem)

    def context(protocol, uri):
        issued, key_pem = leaf(root, uri)
        (tmp_path / "c.pem").write_text(issued.cert_pem + key_pem)
        made = ssl.SSLContext(protocol)
        made.check_hostname, made.verify_mode = False, ssl.CERT_REQUIRED
        made.load_cert_chain(tmp_path / "c.pem")
        made.load_verify_locations(tmp_path / "root.pem")
        return made

    seen = asyncio.get_running_loop().create_future()

    async def served(reader, writer):
        seen.set_result(writer.get_extra_info("ssl_object").getpeercert()["subjectAltName"])
        writer.close()

    api = WEB.replace("/web", "/api")
    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=context(ssl.PROTOCOL_TLS_SERVER, api))
    port = server.sockets[0].getsockname()[1]
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context(ssl.PROTOCOL_TLS_CLIENT, WEB))
    assert writer.get_extra_info("ssl_object").getpeercert()["subjectAltName"] == (("URI", api),)
    assert await asyncio.wait_for(seen, 5) == (("URI", WEB),)
    writer.close()
    server.close()


def request(key=None, names=(WEB,), *, san=True, **more) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if san:
        general = [x509.UniformResourceIdentifier(n) if isinstance(n, str) else n for n in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    for extension in more.get("extensions", ()):
        builder = builder.add_extension(extension, critical=True)
    key = key or ec.generate_private_key(ec.SECP256R1())
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("csr", "why"),
    [
        (lambda: request(names=[WEB.replace("/web", "/db")]), "nothing else"),
        (lambda: request(names=[WEB, WEB.replace("/web", "/db")]), "nothing else"),
        (lambda: request(names=[WEB, x509.DNSName("db.internal")]), "nothing else"),
        (lambda: request(names=[x509.DNSName(WEB)]), "nothing else"),
        (lambda: request(san=False), "names no identity"),
        (lambda: request(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (lambda: request(rsa.generate_private_key(65537, 2048)), "P-256"),
        (lambda: request(ed25519.Ed25519PrivateKey.generate()), "P-256"),
        (lambda: "nonsense", "cannot be read"),
        (lambda: "\n", "cannot be read"),
        (lambda: "x" * 20000, "too long"),
    ],
)
def test_requests_for_anything_else_are_refused(root, csr, why):
    with pytest.raises(BadRequest, match=why):
        leaf(root, csr=csr())


def test_a_request_signed_by_another_key_is_refused(root):
    der = bytearray(x509.load_pem_x509_csr(request().encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM).decode()
    with pytest.raises(BadRequest, match="not signed by its own key"):
        leaf(root, csr=broken)


def test_nothing_but_the_key_is_taken_from_a_request(root):
    wanted = request(extensions=[x509.BasicConstraints(ca=True, path_length=None)])
    certificate = x509.load_pem_x509_certificate(leaf(root, csr=wanted)[0].cert_pem.encode())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://other.consul/ns/default/dc/dc1/svc/web",
        f"spiffe://{TRUST_DOMAIN}",
        f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/web?x=1",
        "https://example.com/",
        "",
    ],
)
def test_identities_that_are_not_of_this_mesh_are_refused(root, uri):
    with pytest.raises(BadRequest):
        leaf(root, uri, csr=request())


def test_a_leaf_never_outlives_its_root_and_an_expired_root_signs_nothing(root):
    row = root[0]
    late = row.not_after_ms - 3600_000
    assert leaf(root, now_ms=late)[0].valid_before_ms == row.not_after_ms
    with pytest.raises(Internal, match="expired"):
        leaf(root, now_ms=row.not_after_ms + 1)


@given(st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=63))
def test_names_of_any_length_fit_into_the_common_name(service):
    uri = f"spiffe://{TRUST_DOMAIN}/ns/default/dc/dc1/svc/{service}"
    issued, _ = leaf(ROOT, uri)
    certificate = x509.load_pem_x509_certificate(issued.cert_pem.encode())
    (name,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert isinstance(name.value, str)
    assert len(name.value) <= 64
    assert name.value.endswith(".svc.default.6ed03719.consul")


def test_an_agent_gets_a_leaf_too(root):
    uri = f"spiffe://{TRUST_DOMAIN}/agent/client/dc/dc1/id/web-1"
    issued, _ = leaf(root, uri)
    certificate = x509.load_pem_x509_certificate(issued.cert_pem.encode())
    assert certificate.subject.rfc4514_string() == "CN=web-1.agnt.6ed03719.consul"


@pytest.mark.parametrize(("number", "text"), [(1, "01"), (8, "08"), (255, "ff"), (256, "01:00"), (266, "01:0a")])
def test_serial_numbers_are_written_as_consul_writes_them(number, text):
    assert serial_hex(number) == text


# -- the cluster CA --------------------------------------------------------------------------------------------------


def public_der(key) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_a_node_certificate_stands_under_the_cluster_ca_and_names_node_and_role(tmp_path):
    ca_cert, ca_key = create_cluster_ca(NOW_MS)
    key = ec.generate_private_key(ec.SECP256R1())
    pem = sign_node(
        ca_cert, ca_key, public_der(key), node_id="id-1", name="web-1", role="server", now_ms=NOW_MS, serial=3
    )
    (tmp_path / "ca.pem").write_text(ca_cert)
    (tmp_path / "node.pem").write_text(pem)
    for purpose in ("sslclient", "sslserver"):
        openssl("verify", "-x509_strict", "-purpose", purpose, "-CAfile", tmp_path / "ca.pem", tmp_path / "node.pem")
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert public_der(key) == certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert "CN=web-1" in certificate.subject.rfc4514_string()
    assert "OU=server" in certificate.subject.rfc4514_string()
    assert 364 < (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days < 367
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier("rostra://node/id-1")]


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"junk",
        public_der(ec.generate_private_key(ec.SECP384R1())),
        public_der(ed25519.Ed25519PrivateKey.generate()),
    ],
    ids=["nothing", "junk", "P-384", "Ed25519"],
)
def test_node_keys_of_another_kind_are_refused(der):
    ca_cert, ca_key = create_cluster_ca(NOW_MS)
    with pytest.raises(BadRequest):
        sign_node(ca_cert, ca_key, der, node_id="i", name="n", role="client", now_ms=NOW_MS, serial=1)


def test_the_two_cas_do_not_trust_each_others_certificates(root, tmp_path):
    ca_cert, _ = create_cluster_ca(NOW_MS)
    (tmp_path / "ca.pem").write_text(ca_cert)
    (tmp_path / "leaf.pem").write_text(leaf(root)[0].cert_pem)
    argv = ["openssl", "verify", "-CAfile", tmp_path / "ca.pem", tmp_path / "leaf.pem"]
    assert subprocess.run(argv, capture_output=True).returncode != 0
