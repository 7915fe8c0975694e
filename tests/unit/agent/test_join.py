"""Port 8301 on real sockets and TLS: discovery, probes, and who is turned away."""

import asyncio
import contextlib
import os
import socket
import ssl
from functools import partial

import pytest
import uvloop

from rostra.agent import join
from rostra.agent.join import AgentInfo, JoinListener, ServerHint, discover, parse_address, probe
from rostra.runtime import tls
from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import Secret
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import BadRequest, Denied
from rostra.wire.frames import pack, unpack
from tests.support.waiting import eventually

SECRET = Secret(os.urandom(32))


def node(tmp_path, name, secret=SECRET) -> NodeIdentity:
    return NodeIdentity.open(tmp_path / name, name, [secret])


def about(identity, role="client", **more) -> AgentInfo:
    return AgentInfo(identity.node_id, identity.node_name, role, "dc1", "0.1.0", key_hash=identity.key_hash, **more)


@contextlib.asynccontextmanager
async def listening(identity, info=None, servers=(), **limits):
    listener = JoinListener(identity, lambda: info or about(identity), lambda: servers, **limits)
    port = await listener.start("127.0.0.1", 0)
    try:
        yield listener, f"127.0.0.1:{port}"
    finally:
        await listener.stop()


async def test_discovery_finds_the_servers_that_others_know_each_once(tmp_path):
    a, b, c = (node(tmp_path, n) for n in "abc")
    known = [ServerHint("10.0.0.1", 8300, "k1", "id1", "s1", "dc1"), ServerHint("10.0.0.2", 8300)]
    more = [ServerHint("10.0.0.2", 8300, "k2"), ServerHint("10.0.0.3", 8300, "k3")]
    agents: dict[str, AgentInfo] = {}
    async with listening(a, servers=known) as (_, first), listening(b, servers=more) as (_, second):
        found = await discover([first, second, first], c, on_agent=agents.__setitem__)
    assert [(s.host, s.key_hash) for s in found] == [("10.0.0.1", "k1"), ("10.0.0.2", "k2"), ("10.0.0.3", "k3")]
    assert {i.name for i in agents.values()} == {"a", "b"}


async def test_all_addresses_of_a_name_are_asked_each_time(tmp_path, monkeypatch):
    a, b, c = (node(tmp_path, n) for n in "abc")
    loop, resolve = asyncio.get_running_loop(), asyncio.get_running_loop().getaddrinfo
    there = ["127.0.0.1"]

    async def getaddrinfo(host, port, **options):
        if host != "servers.example":
            return await resolve(host, port, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in there]

    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    failures: dict[str, str] = {}
    async with listening(a, servers=[ServerHint("10.0.0.1", 1)]) as (_, first):
        port = int(first.rpartition(":")[2])
        asked = [f"servers.example:{port}"]
        assert [s.host for s in await discover(asked, c)] == ["10.0.0.1"]
        there += ["127.0.0.2", "127.0.0.3"]  # nobody is at the last one
        second = JoinListener(b, lambda: about(b), lambda: [ServerHint("10.0.0.2", 1)])
        await second.start("127.0.0.2", port)
        found = await discover(asked, c, on_failure=failures.__setitem__)
        await second.stop()
    assert [s.host for s in found] == ["10.0.0.1", "10.0.0.2"]
    assert not failures


@pytest.mark.parametrize("speaks", [b"HTTP/1.1 400 Bad Request\r\n\r\n", pack({"protocol": "ok"})])
async def test_another_port_than_the_join_port_is_named_as_the_mistake(tmp_path, speaks):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    is_http = speaks.startswith(b"HTTP")

    def answering():
        connection = FrameConnection()
        connection.on_frame = lambda _: connection.send(speaks)
        return connection

    async def http(reader, writer):
        await reader.read(1)
        writer.write(speaks)
        writer.close()

    if is_http:
        server = await asyncio.start_server(http, "127.0.0.1", 0)
    else:
        server = await asyncio.get_running_loop().create_server(answering, "127.0.0.1", 0, ssl=a.server_context())
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    failures: dict[str, str] = {}
    assert await discover([address], b, on_failure=failures.__setitem__) == []
    assert failures == {address: "not a join port; joins use 8301"}
    server.close()


async def test_the_agent_of_a_server_names_itself_with_the_key_that_tls_proved(tmp_path):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    info = about(a, "server", rpc_address="10.0.0.9", rpc_port=8300)
    async with listening(a, info) as (_, address):
        found = await discover([address], b)
    assert found == [ServerHint("10.0.0.9", 8300, a.key_hash, a.node_id, "a", "dc1")]


async def test_the_key_that_a_server_proves_itself_comes_before_what_others_remember_of_its_address(tmp_path):
    a, b, c = (node(tmp_path, n) for n in "abc")
    info = about(b, "server", rpc_address="10.0.0.2", rpc_port=8300)
    stale = [ServerHint("10.0.0.2", 8300, "of who was there before")]
    async with listening(a, servers=stale) as (_, first), listening(b, info) as (_, second):
        for addresses in ([first, second], [second, first]):
            found = await discover(addresses, c)
            assert [s.key_hash for s in found] == [b.key_hash, "of who was there before"]


async def test_where_others_differ_about_a_key_each_is_worth_a_try(tmp_path):
    a, b, c = (node(tmp_path, n) for n in "abc")
    known, more = [ServerHint("10.0.0.2", 8300, "k1")], [ServerHint("10.0.0.2", 8300, "k2")]
    async with listening(a, servers=known) as (_, first), listening(b, servers=more) as (_, second):
        found = await discover([first, second], c)
    assert [s.key_hash for s in found] == ["k1", "k2"]


async def test_addresses_that_do_not_answer_are_told_with_a_reason_and_hurt_nobody(tmp_path):
    a, b, stranger = node(tmp_path, "a"), node(tmp_path, "b"), node(tmp_path, "x", Secret(os.urandom(32)))
    failures: dict[str, str] = {}
    async with listening(a, servers=[ServerHint("h", 1)]) as (_, good), listening(stranger) as (_, foreign):
        silent = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        mute = f"127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        found = await discover(
            ["127.0.0.1:1", "bad:port", mute, foreign, good], b, timeout_s=0.5, on_failure=failures.__setitem__
        )
        silent.close()
    assert [s.host for s in found] == ["h"]
    assert "refused" in failures["127.0.0.1:1"]
    assert "not a port" in failures["bad:port"]
    assert "no answer in time" in failures[mute]
    assert "is `encrypt` the same" in failures[foreign]


async def test_a_node_whose_secret_the_listener_does_not_know_is_told_so(tmp_path):
    a, stranger = node(tmp_path, "a"), node(tmp_path, "x", Secret(os.urandom(32)))
    context = stranger.client_context()
    assert isinstance(context, tls._Reloading)
    context._newest().load_verify_locations(cadata=a.anchors_pem)
    failures: dict[str, str] = {}
    async with listening(a) as (_, address):
        assert await discover([address], stranger, on_failure=failures.__setitem__) == []
    assert "encrypt" in failures[address]


async def test_a_probe_says_whether_the_right_node_lives(tmp_path):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    async with listening(a) as (_, address):
        assert (await probe(address, a.key_hash, b)).name == "a"
        assert (await probe(address, "", b)).node_id == a.node_id
        with pytest.raises(Denied, match="another key"):
            await probe(address, b.key_hash, b)
    with pytest.raises(OSError):
        await probe(address, a.key_hash, b, timeout_s=0.5)


def test_it_works_on_uvloop_too(tmp_path):
    async def story():
        a, b = node(tmp_path, "a"), node(tmp_path, "b")
        async with listening(a, servers=[ServerHint("h", 1, "k")]) as (_, address):
            assert (await discover([address], b))[0].key_hash == "k"
            assert (await probe(address, a.key_hash, b)).name == "a"

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(story(), 10))


async def test_a_client_without_a_certificate_gets_no_answer(tmp_path, capsys):
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    async with listening(node(tmp_path, "a")) as (listener, address):
        reader, writer = await asyncio.open_connection(*parse_address(address), ssl=bare)
        writer.write(pack({"kind": "servers"}))
        try:
            assert await reader.read() == b""
        except (ssl.SSLError, ConnectionError):
            pass
        writer.close()
        await eventually(lambda: listener.connections == 0)
    assert "rejected" in capsys.readouterr().err


async def test_strangers_cause_one_line_and_not_a_thousand(tmp_path, capsys):
    async with listening(node(tmp_path, "a")) as (listener, address):
        for _ in range(30):
            _, writer = await asyncio.open_connection(*parse_address(address))
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            writer.close()
        await eventually(lambda: listener.connections == 0)
    assert capsys.readouterr().err.count("rejected") == 1


async def test_those_who_connect_and_say_nothing_do_not_keep_others_out(tmp_path):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    async with listening(a, timeout_s=30) as (listener, address):
        idle = [await asyncio.open_connection(*parse_address(address)) for _ in range(3 * join.HANDSHAKES_MAX)]
        await eventually(lambda: listener.connections == len(idle))
        assert (await probe(address, a.key_hash, b)).name == "a"
        for _, writer in idle:
            writer.close()


async def test_silent_connections_are_closed_in_time(tmp_path):
    async with listening(node(tmp_path, "a"), timeout_s=0.1) as (listener, address):
        reader, writer = await asyncio.open_connection(*parse_address(address))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        await eventually(lambda: listener.connections == 0)


async def test_who_says_nothing_gives_way_to_who_comes_when_all_places_are_taken(tmp_path):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    async with listening(a, connections_max=2, timeout_s=30) as (listener, address):
        held = [await asyncio.open_connection(*parse_address(address)) for _ in range(2)]
        await eventually(lambda: listener.connections == 2)
        assert (await probe(address, a.key_hash, b, timeout_s=2)).name == "a"
        assert await asyncio.wait_for(held[0][0].read(), 5) == b""
        for _, writer in held:
            writer.close()


async def test_connections_are_bounded_and_places_are_given_back(tmp_path):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    async with listening(a, connections_max=2) as (listener, address):
        held = [await session(address, b) for _ in range(2)]
        for connection, got, _ in held:
            connection.send(pack({"kind": "ping"}))
            await eventually(partial(bool, got))
        with pytest.raises(OSError):
            await probe(address, a.key_hash, b, timeout_s=2)
        for connection, _, _ in held:
            connection.close()
        await eventually(lambda: listener.connections == 0)
        await probe(address, a.key_hash, b)


async def session(address, identity):
    """A raw connection of an enrolled node: (connection, frames received, lost)."""
    got, lost = list[bytes](), asyncio.Event()
    connection = FrameConnection(got.append, lambda _: lost.set())
    host, port = parse_address(address)
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: connection, host, port, ssl=identity.client_context(), server_hostname="")
    return connection, got, lost


async def test_a_connection_answers_many_requests_and_ends_when_idle(tmp_path):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    async with listening(a, idle_s=0.2) as (listener, address):
        connection, got, lost = await session(address, b)
        for _ in range(5):
            connection.send(pack({"kind": "ping"}))
        await eventually(lambda: len(got) == 5)
        assert unpack(got[0])["self"]["name"] == "a"
        await asyncio.wait_for(lost.wait(), 5)
        await eventually(lambda: listener.connections == 0)


@pytest.mark.parametrize("payload", [b"", b"\xc1", pack([1]), pack({}), pack({"kind": 7}), pack({"kind": "elect"})])
async def test_unknown_requests_get_an_error_and_no_more(tmp_path, payload):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    async with listening(a) as (_, address):
        connection, got, _ = await session(address, b)
        connection.send(payload)
        await eventually(lambda: got)
        assert unpack(got[0])["kind"] == "error"
        connection.close()


async def test_a_request_that_is_too_long_ends_the_connection(tmp_path):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")
    async with listening(a) as (_, address):
        connection, got, lost = await session(address, b)
        connection.send(bytes(join.REQUEST_BYTES_MAX + 1))
        await asyncio.wait_for(lost.wait(), 5)
        assert got == []


@pytest.mark.parametrize(
    "reply",
    [
        [1],
        {"kind": "servers"},
        {"kind": "servers", "self": {"name": 3}, "servers": []},
        {"kind": "servers", "self": {}, "servers": {}},
        {"kind": "servers", "self": {}, "servers": [{"host": "h", "port": 70000}]},
        {"kind": "servers", "self": {}, "servers": [{"host": "h\n", "port": 7}]},
        {"kind": "error", "reason": "no"},
    ],
)
async def test_a_node_that_answers_nonsense_is_a_failure_of_its_address_only(tmp_path, reply):
    a, b = node(tmp_path, "a"), node(tmp_path, "b")

    def answering():
        connection = FrameConnection()
        connection.on_frame = lambda _: connection.send(pack(reply))
        return connection

    server = await asyncio.get_running_loop().create_server(answering, "127.0.0.1", 0, ssl=a.server_context())
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    failures: dict[str, str] = {}
    assert await discover([address], b, on_failure=failures.__setitem__) == []
    assert list(failures) == [address]
    server.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", ("10.0.0.1", 8301)),
        ("db-1.example:9", ("db-1.example", 9)),
        ("[::1]", ("::1", 8301)),
        ("[fe80::1%eth0]:77", ("fe80::1%eth0", 77)),
        ("::1", ("::1", 8301)),
        (" h ", ("h", 8301)),
    ],
)
def test_addresses_are_read(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", ":8301", "h:0x1", "h:0", "h:65536", "[::1", "[::1]8301", "a b", "h:-1"])
def test_addresses_that_are_none_are_refused(text):
    with pytest.raises(BadRequest):
        parse_address(text)
