"""Real handshakes on loopback: who gets in, who does not, and what each side learns."""

import asyncio
import datetime
import hashlib
import itertools
import os
import ssl
import time

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from rostra.runtime import tls
from rostra.runtime.enrolment_ca import pem_to_der
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import Secret
from rostra.server.ca.issue import create_cluster_ca, sign_node

SECRET = Secret(os.urandom(32))


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request):
    """Runs a coroutine on either loop."""

    def run(coro):
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(asyncio.wait_for(coro, 20))

    return run


def node(tmp_path, name, secrets=(SECRET,)):
    return NodeIdentity.open(tmp_path / name, name, secrets)


def newest(context: ssl.SSLContext) -> ssl.SSLContext:
    """What a context that follows its node's certificate uses now."""
    assert isinstance(context, tls._Reloading)
    return context._newest()


async def exchange(server_ssl, client_ssl):
    """One connection: (what the server saw of the client, what the client saw of the server)."""
    loop = asyncio.get_running_loop()
    server_side = loop.create_future()

    async def served(reader, writer):
        try:
            o = writer.get_extra_info("ssl_object")
            if not server_side.done():
                server_side.set_result((tls.peer_key_hash(o), tls.peer_node(o), o.version()))
            writer.write(await reader.read(4))
            await writer.drain()
        except Exception as e:
            if not server_side.done():
                server_side.set_exception(e)
        finally:
            writer.close()

    server = await asyncio.start_server(served, "127.0.0.1", 0, ssl=server_ssl)
    try:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_ssl, ssl_handshake_timeout=5)
        try:
            o = writer.get_extra_info("ssl_object")
            verified = client_ssl.verify_mode != ssl.CERT_NONE
            seen = (tls.peer_key_hash(o), tls.peer_node(o) if verified else None, o.version())
            writer.write(b"ping")
            if await reader.read(4) != b"ping":
                raise ConnectionError("refused")
            return await server_side, seen
        finally:
            writer.close()
    finally:
        server.close()


def test_two_nodes_with_one_secret_know_each_other_by_their_keys(tmp_path, run):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    server_saw, client_saw = run(exchange(tls.server_context(a), tls.client_context(b)))
    assert server_saw == (b.key_hash, (b.node_id, "b"), "TLSv1.3")
    assert client_saw == (a.key_hash, (a.node_id, "a"), "TLSv1.3")


def test_a_client_without_a_certificate_is_refused(tmp_path, run):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with pytest.raises((ssl.SSLError, ConnectionError)) as e:
        run(exchange(tls.server_context(node(tmp_path, "a")), bare))
    assert "refused" in str(e.value) or "no client certificate" in tls.explain(e.value)


def test_another_secret_is_refused_by_both_sides_with_a_hint(tmp_path, run):
    a, b = node(tmp_path, "a"), node(tmp_path, "b", [Secret(os.urandom(32))])
    with pytest.raises(ssl.SSLCertVerificationError) as e:
        run(exchange(tls.server_context(a), tls.client_context(b)))
    assert "is `encrypt` the same" in tls.explain(e.value)
    # A client that trusts the server, but is not trusted: it learns at its first read.
    trusting = node(tmp_path, "c", [Secret(os.urandom(32))])
    context = tls.client_context(trusting)
    newest(context).load_verify_locations(cadata=a.anchors_pem)
    with pytest.raises((ssl.SSLError, ConnectionError)) as refused:
        run(exchange(tls.server_context(a), context))
    assert "refused" in str(refused.value) or "does not trust our certificate" in tls.explain(refused.value)


def test_a_peer_that_goes_in_the_handshake_is_explained_in_words():
    for error in (ConnectionResetError(), ConnectionResetError(104, "Connection reset by peer")):
        assert "is `encrypt` the same" in tls.explain(error)
        assert "a scan or a TCP check" in tls.explain(error)
    assert tls.explain(ConnectionResetError("closed after the handshake")) == "closed after the handshake"
    assert tls.explain(FileNotFoundError(2, "No such file or directory")) == "no such file or directory"


def test_a_certificate_of_another_ca_with_the_same_name_is_refused(tmp_path, run):
    a = node(tmp_path, "a")
    real = x509.load_pem_x509_certificate(a.anchors_pem.encode())
    fake = issue_by_hand(tmp_path / "fake", issuer=real.subject)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        run(exchange(tls.server_context(a), fake))


def test_an_expired_certificate_is_refused(tmp_path, run):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    now_ms = time.time_ns() // 1_000_000
    ca_cert, ca_key = create_cluster_ca(now_ms - 10_000_000)
    public = tls.public_key_of(pem_to_der(b.cert_path.read_text())[0])

    def certificate(issued_ms, ttl_s):
        about = {"node_id": b.node_id, "name": "b", "role": "client"}
        return sign_node(ca_cert, ca_key, public, **about, now_ms=issued_ms, ttl_s=ttl_s, serial=5)

    b.install_certificate(certificate(now_ms, 600), ca_cert)
    assert run(exchange(tls.server_context(a), tls.client_context(b)))  # by the cross certificate
    b.cert_path.write_text(certificate(now_ms - 9_000_000, 60))
    context = tls.client_context(b)
    a_trusts = tls.server_context(a)
    newest(a_trusts).load_verify_locations(cadata=ca_cert)
    with pytest.raises((ssl.SSLError, ConnectionError)) as e:
        run(exchange(a_trusts, context))
    assert "refused" in str(e.value) or "expired" in tls.explain(e.value)


def test_tls_1_2_is_refused(tmp_path, run):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_cert_chain(b.cert_path, b.key_path)
    old.load_verify_locations(cadata=b.anchors_pem)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        run(exchange(tls.server_context(a), old))


def test_during_a_change_of_the_secret_nodes_with_either_and_both_talk(tmp_path, run):
    old, new = SECRET, Secret(os.urandom(32))
    stages = [node(tmp_path, n, s) for n, s in [("a", [old]), ("b", [old, new]), ("c", [new, old]), ("d", [new])]]
    for x, y in itertools.pairwise(stages):
        assert run(exchange(tls.server_context(x), tls.client_context(y)))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        run(exchange(tls.server_context(stages[0]), tls.client_context(stages[3])))


def test_contexts_follow_certificate_and_anchors_without_being_made_again(tmp_path, run):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    server, client = a.server_context(), b.client_context()
    assert server is a.server_context()
    run(exchange(server, client))
    now_ms = time.time_ns() // 1_000_000
    ca_cert, ca_key = create_cluster_ca(now_ms)

    def enrol(identity, *, trust_enrolment):
        public = tls.public_key_of(pem_to_der(identity.cert_path.read_text())[0])
        about = {"node_id": identity.node_id, "name": identity.node_name, "role": "server"}
        chain = sign_node(ca_cert, ca_key, public, **about, now_ms=now_ms, serial=9)
        identity.install_certificate(chain, ca_cert, trust_enrolment=trust_enrolment)

    enrol(a, trust_enrolment=True)
    server_saw, client_saw = run(exchange(server, client))  # b knows only the enrolment CA
    assert (server_saw[0], client_saw[0]) == (b.key_hash, a.key_hash)
    run(exchange(b.server_context(), a.client_context()))
    enrol(a, trust_enrolment=False)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        run(exchange(server, client))  # a wants the cluster CA now, b has none
    enrol(b, trust_enrolment=False)
    run(exchange(server, client))
    run(exchange(b.server_context(), a.client_context()))
    stranger = node(tmp_path, "c")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        run(exchange(server, stranger.client_context()))


def test_no_session_is_kept_for_resumption(tmp_path):
    context = newest(tls.server_context(node(tmp_path, "a")))
    assert context.num_tickets == 0
    assert context.verify_mode == ssl.CERT_REQUIRED


@pytest.mark.parametrize("make", [ec.SECP256R1, ec.SECP384R1])
def test_the_key_is_cut_out_of_a_certificate_as_the_library_does(make, tmp_path):
    key = ec.generate_private_key(make())
    der = by_hand(key, x509.Name([])).public_bytes(serialization.Encoding.DER)
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert tls.public_key_of(der) == spki
    for cut in range(0, len(der), 3):
        with pytest.raises(ValueError):
            tls.public_key_of(der[:cut])


def test_a_damaged_certificate_is_an_error_and_nothing_else(tmp_path):
    der = bytearray(
        by_hand(ec.generate_private_key(ec.SECP256R1()), x509.Name([])).public_bytes(serialization.Encoding.DER)
    )
    for at in range(60):
        for value in (0, 0x30, 0x7F, 0x80, 0x84, 0xFF):
            broken = bytes(der[:at]) + bytes([value]) + bytes(der[at + 1 :])
            try:
                tls.public_key_of(broken)
            except ValueError:
                pass


def test_without_a_certificate_there_is_no_hash():
    with pytest.raises(ValueError):
        tls.peer_key_hash(None)
    with pytest.raises(ValueError):
        tls.peer_node(None)


def test_the_key_hash_is_that_of_the_identity(tmp_path):
    a = node(tmp_path, "a")
    spki = tls.public_key_of(pem_to_der(a.cert_path.read_text())[0])
    assert hashlib.sha256(spki).hexdigest() == a.key_hash


def test_a_request_names_its_identity_and_carries_a_key_that_consul_clients_read():
    key_pem, csr_pem = tls.create_csr("spiffe://x.consul/ns/default/dc/dc1/svc/web")
    assert key_pem.startswith("-----BEGIN EC PRIVATE KEY-----\n")
    assert x509.load_pem_x509_csr(csr_pem.encode()).is_signature_valid


def by_hand(key, issuer, signer=None):
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fake")]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .sign(signer or key, hashes.SHA256())
    )


def issue_by_hand(directory, issuer):
    """A client context with a certificate that claims `issuer` but was signed by someone else."""
    directory.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    (directory / "c.pem").write_bytes(
        by_hand(key, issuer, ec.generate_private_key(ec.SECP256R1())).public_bytes(serialization.Encoding.PEM)
    )
    (directory / "k.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(directory / "c.pem", directory / "k.pem")
    return context
