"""The TLS layer without sockets: two channels and bytes carried by hand."""

from __future__ import annotations

import dataclasses
import time

import pytest
from mesh_certs import MeshCA, service_uri

from rostra.connect_proxy.tls import TlsChannel, TlsContexts, TlsError, _days, _seconds

CA = MeshCA()


def contexts(as_leaf, service: str = "web", ca: MeshCA = CA, roots: tuple[str, ...] = ()) -> TlsContexts:
    return TlsContexts(as_leaf(ca.leaf(service)), roots or (CA.cert_pem,))


def shake_hands(server: TlsChannel, client: TlsChannel) -> None:
    done = [False, False]
    while not all(done):
        done[0] = done[0] or client.handshake()
        server.feed(client.output())
        done[1] = done[1] or server.handshake()
        client.feed(server.output())


def pair(server_side: TlsContexts, client_side: TlsContexts) -> tuple[TlsChannel, TlsChannel]:
    server, client = server_side.accept("h"), client_side.connect("web.mesh", "id", "h", 1)
    shake_hands(server, client)
    server_side.accepted("h", server.is_resumed)
    return server, client


def read(channel: TlsChannel, data: bytes = b"") -> bytes:
    if data:
        channel.feed(data)
    into = memoryview(bytearray(len(data) + (64 << 10)))
    return bytes(into[: channel.decrypt(into)])


def test_both_sides_learn_the_others_uri(as_leaf):
    a, b = contexts(as_leaf, "web"), contexts(as_leaf, "api")
    server, client = pair(a, b)
    assert a.peer_certificate(server, time.time()).uri == service_uri("api")
    assert b.peer_certificate(client, time.time()).uri == service_uri("web")
    assert server.version == "TLSv1.3"


def test_many_records_fed_at_once_are_all_decrypted(as_leaf):
    server, client = pair(contexts(as_leaf), contexts(as_leaf))
    records = b"".join(client.encrypt(b"%02d" % n * 3000) for n in range(40))
    assert read(server, records) == b"".join(b"%02d" % n * 3000 for n in range(40))
    assert read(server) == b""


def test_a_record_in_pieces_is_decrypted_when_it_is_whole(as_leaf):
    server, client = pair(contexts(as_leaf), contexts(as_leaf))
    record = client.encrypt(b"x" * 1000)
    assert read(server, record[:7]) == b""
    assert read(server, record[7:900]) == b""
    assert read(server, record[900:] + client.encrypt(b"y")) == b"x" * 1000 + b"y"


def test_each_direction_ends_by_itself(as_leaf):
    server, client = pair(contexts(as_leaf), contexts(as_leaf))
    assert read(server, client.encrypt(b"last words") + client.finish()) == b"last words"
    assert server.is_input_ended
    for _ in range(3):
        assert read(client, server.encrypt(b"z" * 100_000)) == b"z" * 100_000
        assert not client.is_input_ended
    assert read(client, server.finish()) == b""
    assert client.is_input_ended


def test_a_session_is_resumed_at_the_same_place_with_the_same_identity_only(as_leaf):
    a, b = contexts(as_leaf, "web"), contexts(as_leaf, "api")
    server, client = pair(a, b)
    read(client, server.encrypt(b"x"))
    assert b.remember(client, "id", "h", 1)
    server, client = pair(a, b)
    assert server.is_resumed
    assert client.is_resumed
    assert a.peer_certificate(server, time.time()).uri == service_uri("api")
    other = b.connect("web.mesh", "another id", "h", 1)
    shake_hands(a.accept("h"), other)
    assert not other.is_resumed


def test_a_host_that_resumes_gets_few_tickets_and_after_a_full_handshake_some(as_leaf):
    a, b = contexts(as_leaf, "web"), contexts(as_leaf, "api")
    server, client = pair(a, b)
    read(client, server.encrypt(b"x"))
    assert b.remember(client, "id", "h", 1)
    sizes = []
    for _ in range(6):
        server, client = pair(a, b)
        sizes.append(len(server.output()))
        assert server.is_resumed
    assert sizes == [0] * 6  # shake_hands has carried them
    assert a._tickets_due == {"h": 0}
    b.forget("id", "h", 1)
    server, client = pair(a, b)
    assert not server.is_resumed
    server, client = pair(a, b)
    read(client, server.encrypt(b"x"))
    assert client.ticket() is not None


def test_a_resumed_session_shows_an_expired_certificate(as_leaf):
    a, b = contexts(as_leaf, "web"), contexts(as_leaf, "api")
    server, _client = pair(a, b)
    with pytest.raises(TlsError, match="has expired") as refused:
        a.peer_certificate(server, time.time() + 7200)
    assert refused.value.reason == "certificate_expired"


def test_an_unknown_ca_is_refused_with_a_reason(as_leaf):
    with pytest.raises(TlsError) as refused:
        pair(contexts(as_leaf), contexts(as_leaf, "api", MeshCA()))
    assert refused.value.reason == "certificate_untrusted"


def test_garbage_is_refused_and_answered_with_an_alert(as_leaf):
    server = contexts(as_leaf).accept("h")
    server.feed(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(TlsError) as refused:
        server.handshake()
    assert refused.value.reason == "protocol"


def test_a_forged_record_is_refused(as_leaf):
    server, client = pair(contexts(as_leaf), contexts(as_leaf))
    record = bytearray(client.encrypt(b"x" * 100))
    record[50] ^= 1
    with pytest.raises(TlsError):
        read(server, bytes(record))


@pytest.mark.parametrize("spoil", ["key", "cert", "other key", "roots"])
def test_unusable_pem_is_refused_without_asking_anybody(as_leaf, spoil):
    leaf, roots = as_leaf(CA.leaf("web")), (CA.cert_pem,)
    if spoil == "roots":
        roots = ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",)
    elif spoil == "other key":
        leaf = dataclasses.replace(leaf, key_pem=CA.leaf("api").key_pem)
    else:
        leaf = dataclasses.replace(leaf, **{f"{spoil}_pem": "nonsense"})
    with pytest.raises(TlsError) as refused:
        TlsContexts(leaf, roots)
    assert refused.value.reason == ("bad_roots" if spoil == "roots" else "bad_leaf")


def test_openssls_dates_are_read():
    assert _seconds("Nov 22 18:03:31 2026 GMT") == 1795370611
    assert _seconds("Feb 29 00:00:00 2028 GMT") == 1835395200
    assert _seconds("Jan  1 00:00:00 1970 GMT") == 0
    assert _seconds("nonsense") == 0
    assert _days(2000, 3, 1) == 11017
