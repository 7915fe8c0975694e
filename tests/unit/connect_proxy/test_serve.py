"""Two real proxies between a client and an application: what users see."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest
from mesh_certs import MeshCA, service_uri

from rostra.connect_proxy.serve import Limits
from rostra.connect_proxy.snapshot import Address, Endpoint, Rule


def exchange(connection: socket.socket, data: bytes) -> bytes:
    """What comes back for `data` from an application that echoes."""
    connection.sendall(data)
    received = b""
    while len(received) < len(data):
        piece = connection.recv(65536)
        if not piece:
            break
        received += piece
    return received


def read_to_end(connection: socket.socket) -> bytes:
    pieces = []
    while piece := connection.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def is_closed(connection: socket.socket) -> bool:
    """Waits until the other side ends or resets the connection."""
    try:
        return not connection.recv(1)
    except ConnectionError:
        return True


def is_refused(client) -> bool:
    """A new connection to `web` through this proxy comes to nothing. It may be reset even before connect() returns."""
    try:
        with client.connect("upstream:web") as connection:
            return is_closed(connection)
    except ConnectionError:
        return True


def mesh_context(mesh, service="caller", ca=None, leaf=None, tmp_path=None, with_leaf=True):
    """A foreign client's context: plain ssl module."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=mesh.ca.cert_pem)
    if with_leaf:
        pair = leaf or (ca or mesh.ca).leaf(service)
        path = tmp_path / "leaf.pem"
        path.write_text(pair.cert_pem + pair.key_pem)
        context.load_cert_chain(path)
    return context


def test_bytes_pass_both_ways_through_two_proxies(mesh):
    client = mesh.client(mesh.server(mesh.app()))
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"hello") == b"hello"
        assert exchange(connection, b"again") == b"again"


def test_the_client_may_end_its_direction_and_still_receive(mesh):
    def answer_after_the_end(connection):
        with connection:
            request = read_to_end(connection)
            connection.sendall(b"got " + request)

    client = mesh.client(mesh.server(mesh.app(answer_after_the_end)))
    with client.connect("upstream:web") as connection:
        connection.sendall(b"request")
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b"got request"


def test_the_server_may_end_its_direction_and_still_receive(mesh):
    received = []

    def speak_first_then_listen(connection):
        with connection:
            connection.sendall(b"banner")
            connection.shutdown(socket.SHUT_WR)
            received.append(read_to_end(connection))

    client = mesh.client(mesh.server(mesh.app(speak_first_then_listen)))
    with client.connect("upstream:web") as connection:
        assert read_to_end(connection) == b"banner"
        connection.sendall(b"late" * 100_000)
        connection.shutdown(socket.SHUT_WR)
        mesh_deadline = time.monotonic() + 5
        while not received and time.monotonic() < mesh_deadline:
            threading.Event().wait(0.01)
    assert received == [b"late" * 100_000]


def test_an_application_that_speaks_and_ends_before_the_relay_begins_is_heard(mesh):
    def speak_and_end(connection):
        with connection:
            connection.sendall(b"banner")
            connection.shutdown(socket.SHUT_WR)
            read_to_end(connection)

    client = mesh.client(mesh.server(mesh.app(speak_and_end)))
    for _ in range(100):  # the edge comes with the answer to connect() now and then
        with client.connect("upstream:web") as connection:
            assert read_to_end(connection) == b"banner"


def test_a_closed_session_leaves_nothing_open(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    with client.connect("upstream:web") as connection:
        exchange(connection, b"x")
    eventually(lambda: client.stats["outbound_open"] == 0 and server.stats["inbound_open"] == 0)
    assert client.stats["closed"] == {"done": 1}
    assert server.stats["closed"] == {"done": 1}


def test_a_reset_by_the_application_reaches_the_other_end_as_a_reset(mesh):
    def reset(connection):
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()

    client = mesh.client(mesh.server(mesh.app(reset)))
    with client.connect("upstream:web") as connection:
        connection.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_64_mib_each_way_at_once_arrive_unchanged(mesh):
    client = mesh.client(mesh.server(mesh.app()))
    block = os.urandom(1 << 20)
    sent = hashlib.sha256()
    for _ in range(64):
        sent.update(block)
    with client.connect("upstream:web") as connection:

        def send() -> None:
            for _ in range(64):
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        received, total = hashlib.sha256(), 0
        while piece := connection.recv(1 << 18):
            received.update(piece)
            total += len(piece)
        sender.join(10)
    assert total == 64 << 20
    assert received.digest() == sent.digest()


def test_a_reader_that_stops_holds_up_the_sender_and_not_the_memory(mesh, eventually):
    def never_read(connection):
        threading.Event().wait(30)

    server = mesh.server(mesh.app(never_read))
    client = mesh.client(server)
    before = resident_bytes()
    connections = [client.connect("upstream:web") for _ in range(8)]
    for connection in connections:
        connection.setblocking(False)
    block, sent, still = b"x" * (1 << 20), 0, 0
    while still < 10:
        moved = 0
        for connection in connections:
            try:
                moved += connection.send(block)
            except BlockingIOError:
                pass
        sent += moved
        still = 0 if moved else still + 1
        threading.Event().wait(0.02)
    assert sent > 1 << 20
    # 8 links x 2 proxies x (one chunk kept + OpenSSL's copy); sockets' buffers are the kernel's.
    assert resident_bytes() - before < 32 << 20
    with client.connect("upstream:web") as other:
        other.sendall(b"still served")
        eventually(lambda: server.stats["inbound_open"] == 9)
    for connection in connections:
        connection.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_peer_of_another_trust_domain_is_refused(mesh, eventually):
    server = mesh.server(mesh.app())
    stranger = mesh.ca.leaf("caller", uris=[service_uri("caller", "99999999-2222-3333-4444-555555555555.consul")])
    client = mesh.client(server, leaf=stranger)
    assert is_refused(client)
    eventually(lambda: server.stats["denied"] == 1)
    assert "reason=wrong_trust_domain" in server.log


@pytest.mark.parametrize(
    "uris",
    [[], ["spiffe://x.consul/agent/client/dc/dc1/id/n"], ["https://a.example"], ["spiffe://a/b", "spiffe://a/c"]],
)
def test_a_certificate_that_names_no_service_is_refused(mesh, uris, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server, leaf=mesh.ca.leaf("caller", uris=uris))
    assert is_refused(client)
    eventually(lambda: server.stats["denied"] == 1)
    assert "reason=not_a_service" in server.log


def test_a_peer_with_an_unknown_ca_is_refused(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server, ca=MeshCA())
    assert is_refused(client)
    eventually(lambda: server.stats["handshake_failures"].get("certificate_untrusted") == 1)


def test_an_expired_leaf_is_refused_by_both_sides(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server, leaf=mesh.ca.leaf("caller", lives_s=-5))
    assert is_refused(client)
    eventually(lambda: server.stats["handshake_failures"].get("certificate_expired") == 1)
    server.change(leaf=mesh.snapshot("web", leaf=mesh.ca.leaf("web", lives_s=-5)).leaf)
    honest = mesh.client(server)
    assert is_refused(honest)
    assert honest.stats["dial_failures"] == {"certificate_expired": 1}


def test_a_resumed_session_does_not_outlive_its_certificate(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server, leaf=mesh.ca.leaf("caller", lives_s=2))
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"
    server.proxy.wall_s = lambda: time.time() + 3600
    assert is_refused(client)
    eventually(lambda: server.stats["handshake_failures"].get("certificate_expired") == 1)


def test_a_client_without_certificate_is_refused(mesh, tmp_path, eventually):
    server = mesh.server(mesh.app())
    context = mesh_context(mesh, with_leaf=False)
    # TLS 1.3: the client learns of it with its first read
    with (
        socket.create_connection(server.address(), 5) as raw,
        context.wrap_socket(raw) as secure,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        secure.recv(1)
    eventually(lambda: server.stats["handshake_failures"].get("no_certificate") == 1)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_foreign_client_of_either_tls_version_is_served(mesh, tmp_path, version):
    server = mesh.server(mesh.app())
    context = mesh_context(mesh, tmp_path=tmp_path)
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(server.address(), 5) as raw, context.wrap_socket(raw) as secure:
        assert exchange(secure, b"hello") == b"hello"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_data_that_comes_with_the_servers_last_flight_is_delivered(mesh, tmp_path, version):
    path = tmp_path / "web.pem"
    pair = mesh.ca.leaf("web")
    path.write_text(pair.cert_pem + pair.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    context.minimum_version = context.maximum_version = version

    def speak_with_the_finished(connection):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))
        tls.write(b"banner")
        connection.sendall(outgoing.read())
        connection.recv(1)

    server = mesh.app(speak_with_the_finished)
    client = mesh.proxy("caller", upstreams=(mesh.upstream("web", server.address),))
    with client.connect("upstream:web") as connection:
        assert connection.recv(6) == b"banner"


def test_tls_1_1_is_refused(mesh, tmp_path, eventually):
    server = mesh.server(mesh.app())
    context = mesh_context(mesh, tmp_path=tmp_path)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(server.address(), 5) as raw, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(raw)
    eventually(lambda: server.stats["handshake_failures"].get("protocol") == 1)


def test_an_upstream_is_itself_in_whatever_case_it_was_registered(mesh):
    server = mesh.server(mesh.app(), service="WEB")
    client = mesh.client(server)
    with client.connect("upstream:web") as connection:
        connection.sendall(b"hello")
        assert connection.recv(5) == b"hello"


def test_the_server_must_be_the_upstream_that_was_asked_for(mesh, eventually):
    impostor = mesh.server(mesh.app(), service="billing")
    client = mesh.client(impostor)
    with client.connect("upstream:web") as connection:
        connection.sendall(b"secret")
        assert is_closed(connection)
    assert client.stats["dial_failures"] == {"wrong_identity": 1}
    assert client.stats["bytes_to_mesh"] == 0
    assert "reason=wrong_identity" in client.log


def test_garbage_on_the_public_port_harms_nobody(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\x16\x03\x01\xff\xff" + b"\0" * 70000, b""):
        with socket.create_connection(server.address(), 5) as raw:
            try:
                raw.sendall(garbage)
                raw.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            try:
                read_to_end(raw)  # an alert, perhaps, and the end
            except ConnectionError:
                pass
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"
    eventually(lambda: sum(server.stats["handshake_failures"].values()) == 4)


def test_a_peer_that_ends_without_close_notify_resets_the_application(mesh, tmp_path):
    ends: list[bytes | str] = []

    def note_the_end(connection):
        try:
            ends.append(read_to_end(connection))
        except ConnectionResetError:
            ends.append("reset")

    server = mesh.server(mesh.app(note_the_end))
    raw = socket.create_connection(server.address(), 5)
    secure = mesh_context(mesh, tmp_path=tmp_path).wrap_socket(raw)
    secure.sendall(b"half a message")
    os.close(secure.detach())
    deadline = time.monotonic() + 5
    while not ends and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert ends == ["reset"]


def test_a_handshake_that_never_ends_is_cut(mesh):
    server = mesh.proxy(
        "web",
        public=Address("127.0.0.1", 0),
        local=Address("127.0.0.1", 9),
        limits=Limits(handshake_timeout_s=0.2),
    )
    with socket.create_connection(server.address(), 5) as raw:
        raw.sendall(b"\x16\x03\x01")
        assert is_closed(raw)
    assert server.stats["handshake_failures"] == {"timeout": 1}


def test_an_intention_decides_and_the_refusal_names_it(mesh, eventually):
    rules = (Rule("caller", "deny", 9, "id-9"), Rule("*", "allow", 8, "id-8"))
    server = mesh.server(mesh.app(), intentions=rules)
    denied, allowed = mesh.client(server), mesh.client(server, service="other")
    assert is_refused(denied)
    with allowed.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"
    eventually(lambda: server.stats["denied"] == 1)
    found = re.search(r".*connection denied.*", server.log)
    assert found
    line = found[0]
    assert "intention=id-9" in line
    assert "precedence=9" in line
    assert "*=>web:allow(8)" in line


def test_without_a_fitting_intention_the_default_decides(mesh):
    server = mesh.server(mesh.app(), default_allow=False)
    client = mesh.client(server)
    assert is_refused(client)
    server.change(default_allow=True)
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"


def test_a_deny_closes_the_open_connections_of_that_source_only(mesh):
    server = mesh.server(mesh.app())
    caller, other = mesh.client(server), mesh.client(server, service="other")
    opened = [caller.connect("upstream:web") for _ in range(5)]
    kept = other.connect("upstream:web")
    for connection in [*opened, kept]:
        assert exchange(connection, b"x") == b"x"
    server.change(intentions=(Rule("caller", "deny", 9, "the-id"),))
    assert all(is_closed(connection) for connection in opened)
    assert exchange(kept, b"still") == b"still"
    assert server.stats["cut_off"] == 5
    assert "connections closed by intention: source=caller connections=5 intention=the-id" in server.log
    assert is_refused(caller)
    server.change(intentions=())
    with caller.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"
    kept.close()


def test_a_leaf_rotation_under_traffic_breaks_no_connection(mesh):
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    stop, errors, done = threading.Event(), [], [0]

    def traffic() -> None:
        try:
            old = client.connect("upstream:web")
            while not stop.is_set():
                assert exchange(old, b"long lived") == b"long lived"
                with client.connect("upstream:web") as new:
                    assert exchange(new, b"new") == b"new"
                done[0] += 1
            old.close()
        except (OSError, AssertionError) as error:
            errors.append(error)

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        server.change(leaf=mesh.snapshot("web").leaf)
        client.change(leaf=mesh.snapshot("caller").leaf)
    seen = done[0]
    deadline = time.monotonic() + 10
    while done[0] < seen + 10 and not errors and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert errors == []
    assert done[0] >= seen + 10


def test_a_removed_root_counts_for_new_connections_only(mesh):
    new_ca = MeshCA()
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    old = client.connect("upstream:web")
    assert exchange(old, b"x") == b"x"
    server.change(roots=(new_ca.cert_pem,))
    assert exchange(old, b"goes on") == b"goes on"
    assert is_refused(client)
    old.close()


def test_an_unusable_leaf_changes_nothing(mesh):
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    broken = dataclasses.replace(server.snapshot.leaf, key_pem="-----BEGIN nothing")
    assert server.change(leaf=broken) is False
    assert "snapshot refused" in server.log
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"


def test_sessions_are_resumed_and_a_new_leaf_ends_that(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server)

    def once() -> None:
        with client.connect("upstream:web") as connection:
            assert exchange(connection, b"x") == b"x"

    for _ in range(4):
        once()
    assert client.stats["handshakes_resumed"] == 3
    assert server.stats["handshakes_resumed"] == 3
    server.change(leaf=mesh.snapshot("web").leaf)
    once()
    assert server.stats["handshakes_resumed"] == 3


def test_an_endpoint_that_is_down_is_skipped_and_rests(mesh):
    server = mesh.server(mesh.app())
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = gone.getsockname()
    upstream = mesh.upstream("web", dead, server.address())
    client = mesh.proxy("caller", upstreams=(upstream,))
    for _ in range(20):
        with client.connect("upstream:web") as connection:
            assert exchange(connection, b"x") == b"x"
    assert client.stats["dial_failures"].get("refused", 0) <= 3


def test_an_upstream_without_endpoint_refuses_and_gets_better(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.proxy("caller", upstreams=(mesh.upstream("web"),))
    assert is_refused(client)
    eventually(lambda: "no endpoint: upstream=web" in client.log)
    before = client.address("upstream:web")
    client.change(upstreams=(mesh.upstream("web", server.address()),))
    assert client.address("upstream:web") == before
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"


def test_an_application_that_is_down_is_told_and_counted(mesh, eventually):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        dead = gone.getsockname()
    server = mesh.proxy("web", public=Address("127.0.0.1", 0), local=Address(*dead))
    client = mesh.client(server)
    assert is_refused(client)
    eventually(lambda: server.stats["dial_failures"] == {"refused": 1})
    assert f"nothing listens on 127.0.0.1:{dead[1]}: proxy=" in server.log
    assert 'change="proxy.local_service_address or local_service_port, if' in server.log


def test_upstreams_come_and_go_without_touching_the_others(mesh):
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    kept = client.connect("upstream:web")
    assert exchange(kept, b"x") == b"x"
    first = client.snapshot.upstreams[0]
    second = dataclasses.replace(mesh.upstream("web", server.address()), name="web2")
    client.change(upstreams=(first, dataclasses.replace(second, bind=Address("127.0.0.2", 0))))
    with client.connect("upstream:web2") as connection:
        assert exchange(connection, b"x") == b"x"
    gone = client.address("upstream:web2")
    client.change(upstreams=(first,))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(gone, 5)
    assert exchange(kept, b"untouched") == b"untouched"
    kept.close()


def test_a_port_in_use_is_told_in_one_line_and_taken_when_free(mesh):
    blocker = socket.create_server(("127.0.0.1", 0))
    taken = Address(*blocker.getsockname())
    server = mesh.server(mesh.app())
    upstream = dataclasses.replace(mesh.upstream("web", server.address()), bind=taken)
    client = mesh.proxy("caller", upstreams=(upstream,))
    found = re.search(r".*cannot listen.*", client.log)
    assert found
    line = found[0]
    assert f"address={taken}" in line
    assert 'change="LocalBindPort of upstream web"' in line
    assert "running without all listeners" in client.log
    assert "ready" not in client.log
    blocker.close()
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"
    assert client.log.count("cannot listen") == 1


def test_connections_above_the_limit_are_refused_and_counted(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server, limits=Limits(connections_max=2))
    kept = [client.connect("upstream:web") for _ in range(2)]
    for connection in kept:
        assert exchange(connection, b"x") == b"x"
    assert is_refused(client)
    eventually(lambda: client.stats["over_limit"] == 1)
    kept.pop().close()
    eventually(lambda: client.stats["outbound_open"] == 1)
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"
    kept.pop().close()


def test_an_idle_connection_is_closed_only_if_asked_for(mesh):
    server = mesh.server(mesh.app())
    client = mesh.client(server, limits=Limits(idle_timeout_s=0.2))
    with client.connect("upstream:web") as connection:
        for _ in range(6):
            assert exchange(connection, b"busy") == b"busy"
            threading.Event().wait(0.05)
        assert is_closed(connection)
    assert client.stats["closed"] == {"idle": 1}


def test_bytes_are_counted(mesh, eventually):
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    with client.connect("upstream:web") as connection:
        exchange(connection, b"x" * 1000)
        assert client.stats["bytes_to_mesh"] == 1000
    eventually(lambda: server.stats["inbound_open"] == 0)
    assert server.stats["bytes_from_mesh"] == 1000
    assert server.stats["bytes_to_mesh"] == 1000


def test_many_connections_at_once_are_all_served(mesh):
    server = mesh.server(mesh.app())
    client = mesh.client(server)
    connections = [client.connect("upstream:web") for _ in range(200)]
    for number, connection in enumerate(connections):
        connection.sendall(b"%03d" % number)
    for number, connection in enumerate(connections):
        assert connection.recv(3) == b"%03d" % number
        connection.close()


def test_endpoints_may_be_ipv6(mesh):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on loopback here")
    app = mesh.app()
    server = mesh.proxy("web", public=Address("::1", 0), local=Address(*app.address))
    port = server.address()[1]
    upstream = dataclasses.replace(mesh.upstream("web"), endpoints=(Endpoint("::1", port),))
    client = mesh.proxy("caller", upstreams=(upstream,))
    with client.connect("upstream:web") as connection:
        assert exchange(connection, b"x") == b"x"


def test_a_tcp_check_of_the_public_port_is_not_worth_a_line_and_a_broken_handshake_is(mesh, eventually):
    for said, level in ((b"", "[DEBUG]"), (b"\x16", "[INFO] ")):
        server = mesh.server(mesh.app())
        with socket.create_connection(server.address()) as peer:
            peer.sendall(said)
        eventually(lambda server=server: server.stats["handshake_failures"] == {"hung_up": 1})
        assert f"{level} proxy: handshake failed: reason=hung_up" in server.log
