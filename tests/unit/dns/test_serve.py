"""Real sockets on free ports, and real `dig`."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import dnslib
import pytest
import uvloop

from rostra.dns import serve
from rostra.dns.answer import DnsConfig
from rostra.dns.serve import DnsServer
from rostra.dns.source import Instance
from rostra.wire.errors import Conflict
from rostra.wire.turns import SLICE_S, TURN_S, Turns

both_loops = pytest.mark.parametrize(
    "new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
QTYPES = ("A", "AAAA", "SRV", "ANY", "TXT", "SOA", "NS")
needs_dig = pytest.mark.skipif(shutil.which("dig") is None, reason="dig is not installed")


@contextlib.asynccontextmanager
async def serving(
    catalog: Any, *, host: str = "127.0.0.1", tcp_idle_s: float = 10.0, **config: Any
) -> AsyncIterator[DnsServer]:
    server = DnsServer(DnsConfig(**config), catalog, hosts=[host], port=0, tcp_idle_s=tcp_idle_s)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def dig(server: DnsServer, *arguments: str) -> list[str]:
    command = ["dig", "@127.0.0.1", "-p", str(server.port), "+tries=1", "+time=3", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode().splitlines()


class UdpClient(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.received: asyncio.Queue[bytes] = asyncio.Queue()

    def connection_made(self, transport: Any) -> None:
        self.send = transport.sendto
        self.close = transport.close

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.put_nowait(data)

    @classmethod
    async def connect(cls, server: DnsServer) -> UdpClient:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_datagram_endpoint(cls, remote_addr=("127.0.0.1", server.port))
        return client

    async def next(self) -> dnslib.DNSRecord:
        return dnslib.DNSRecord.parse(await asyncio.wait_for(self.received.get(), 3))


def question(name: str, qtype: str = "A") -> bytes:
    return bytes(dnslib.DNSRecord.question(name, qtype).pack())


def framed(packet: bytes) -> bytes:
    return struct.pack(">H", len(packet)) + packet


async def read_raw(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(30):
        return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))


async def read_framed(reader: asyncio.StreamReader) -> dnslib.DNSRecord:
    return dnslib.DNSRecord.parse(await read_raw(reader))


async def assert_closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(30):
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass


@needs_dig
async def test_dig_finds_a_service_over_udp_and_tcp(web: Any) -> None:
    async with serving(web) as server:
        assert sorted(await dig(server, "+short", "web.service.consul")) == ["10.0.0.1", "10.1.1.2"]
        assert sorted(await dig(server, "+short", "+tcp", "web.service.consul")) == ["10.0.0.1", "10.1.1.2"]
        srv = await dig(server, "+short", "_web._tcp.service.consul", "SRV")
        assert sorted(srv) == [
            "1 1 83 fd000000000000000000000000000004.addr.dc1.consul.",
            "1 2 81 0a010102.addr.dc1.consul.",
            "1 5 80 n1.node.dc1.consul.",
        ]


@needs_dig
async def test_dig_finds_nothing_to_complain_about(web: Any) -> None:
    web.set("big", [Instance(f"m{i}", "dc1", f"10.0.0.{i}", port=i) for i in range(1, 101)])
    async with serving(web) as server:
        names = ("web.service.consul", "big.service.consul", "n1.node.consul", "consul", "none.consul")
        for transport in ("+tcp", "+ignore", "+noedns"):
            questions = [word for name in names for qtype in QTYPES for word in (name, qtype)]
            out = "\n".join(await dig(server, transport, "+norec", *questions))
            assert out.count("Got answer") == len(names) * len(QTYPES)
            assert "warning" not in out.lower(), out
            assert "malformed" not in out, out


@needs_dig
async def test_dig_comes_back_over_tcp_for_what_udp_cut(catalog: Any) -> None:
    catalog.set("big", [Instance(f"m{i}", "dc1", f"10.0.0.{i}", port=i) for i in range(1, 201)])
    async with serving(catalog) as server:
        assert len(await dig(server, "+short", "+bufsize=1232", "big.service.consul")) == 200


async def test_a_flood_of_one_query_is_answered_with_every_id(web: Any) -> None:
    async with serving(web) as server:
        client = await UdpClient.connect(server)
        packet = question("web.service.consul")
        for n in range(300):
            client.send(struct.pack(">H", n) + packet[2:])
        assert {(await client.next()).header.id for _ in range(300)} == set(range(300))
        client.close()


async def test_garbage_changes_nothing_for_the_next_query(web: Any) -> None:
    async with serving(web) as server:
        client = await UdpClient.connect(server)
        for junk in (b"", b"x", b"\0" * 11, b"\xff" * 600, question("web.service.consul")[:-3]):
            client.send(junk)
        client.send(b"\x12\x34" + question("web.service.consul")[2:])
        while (reply := await client.next()).header.id != 0x1234:
            assert reply.header.rcode == 1
        assert len(reply.rr) == 2
        client.close()


async def test_queries_that_came_before_the_instances_are_all_answered_when_these_arrive(web: Any) -> None:
    view = web.services["web"]
    view.is_ready = False
    async with serving(web) as server:
        client = await UdpClient.connect(server)
        for n in range(250):
            client.send(struct.pack(">H", n) + question("web.service.consul")[2:])
        client.send(question("none.service.consul"))
        assert (await client.next()).header.rcode == 3  # those behind do not wait
        view.is_ready = True
        view.arrived.set()
        assert {(await client.next()).header.id for _ in range(250)} == set(range(250))
        client.close()


async def test_a_query_whose_instances_never_arrive_is_servfail(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "READY_TIMEOUT_S", 0.05)
    web.services["web"].is_ready = False
    async with serving(web) as server:
        client = await UdpClient.connect(server)
        client.send(question("web.service.consul"))
        assert (await client.next()).header.rcode == 2
        client.close()


async def test_parked_queries_are_bounded_and_the_rest_fail_at_once(web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PARKED_MAX", 3)
    web.services["web"].is_ready = False
    async with serving(web) as server:
        client = await UdpClient.connect(server)
        for _ in range(5):
            client.send(question("web.service.consul"))
        assert [(await client.next()).header.rcode for _ in range(2)] == [2, 2]
        client.close()


async def test_tcp_answers_pipelined_queries(web: Any) -> None:
    async with serving(web) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        packets = [struct.pack(">H", n) + question("web.service.consul")[2:] for n in range(100)]
        writer.write(b"".join(map(framed, packets)))
        assert {(await read_framed(reader)).header.id for _ in packets} == set(range(100))
        writer.close()


async def test_tcp_reads_a_query_that_comes_byte_by_byte(web: Any) -> None:
    async with serving(web) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for byte in framed(question("web.service.consul")):
            writer.write(bytes([byte]))
            await writer.drain()
        assert len((await read_framed(reader)).rr) == 2
        writer.close()


async def test_tcp_answers_all_before_it_closes_when_the_client_half_closes(web: Any) -> None:
    web.set("big", [Instance(f"m{i}", "dc1", f"10.0.0.{i}", port=i) for i in range(1, 201)])
    async with serving(web) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(framed(question("big.service.consul", "SRV")) * 300)
        writer.write_eof()
        for _ in range(300):
            assert (await read_raw(reader))[6:8] == struct.pack(">H", 200)
        await assert_closed(reader)
        writer.close()


async def test_tcp_closes_on_a_length_that_no_query_has(web: Any) -> None:
    async with serving(web) as server:
        for junk in (b"\0\x05hello", b"\xff\xff" + b"x" * 100, b"GET / HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(junk)
            await assert_closed(reader)
            writer.close()
        assert not server.connections


async def test_tcp_closes_a_connection_that_asks_nothing(web: Any) -> None:
    async with serving(web, tcp_idle_s=0.1) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"\0")
        await assert_closed(reader)
        writer.close()


async def test_tcp_connections_are_bounded_and_the_longest_silent_one_goes(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "TCP_CONNECTIONS_MAX", 2)
    async with serving(web) as server:
        streams = []
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            streams.append((reader, writer))
            if len(streams) < 3:
                writer.write(framed(question("web.service.consul")))
                await read_framed(reader)
        await assert_closed(streams[0][0])
        streams[2][1].write(framed(question("web.service.consul")))
        assert len((await read_framed(streams[2][0])).rr) == 2
        for _, writer in streams:
            writer.close()


async def test_a_client_that_does_not_read_is_not_answered_further(web: Any) -> None:
    web.set("big", [Instance(f"m{i}", "dc1", f"10.0.{i >> 8}.{i & 255}", port=i) for i in range(1000)])
    async with serving(web) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(300):
            writer.write(framed(question("big.service.consul", "SRV")))
        client = await UdpClient.connect(server)
        client.send(question("web.service.consul"))
        await client.next()
        (connection,) = server.connections
        assert connection._transport.get_write_buffer_size() < serve.TCP_UNREAD_BYTES_MAX + 2 * 65536
        client.close()
        writer.close()


# -- a reader's share of the loop ---------------------------------------------------------------------------------


UNIT_S = SLICE_S / 4  # what a query costs by the clock of these tests
TURN_UNITS = TURN_S / UNIT_S + 1


class Shares:
    """Counts what a server answers in each turn of the loop, by a clock that grows with each query."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.turn = 0
        self.answered: list[tuple[int, bytes]] = []  # (turn of the loop, packet)
        loop = asyncio.get_running_loop()
        shared = Turns(loop.call_soon, lambda: self.now)
        monkeypatch.setattr(serve, "turns", lambda: shared)
        answer = DnsServer.answer

        def counted(server: DnsServer, packet: bytes, reply: Any, *, tcp: bool) -> None:
            self.now += UNIT_S
            self.answered.append((self.turn, packet))
            answer(server, packet, reply, tcp=tcp)

        monkeypatch.setattr(DnsServer, "answer", counted)
        self.counter = asyncio.create_task(self._count())

    async def _count(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.turn += 1

    def of_turns(self) -> list[int]:
        counts: dict[int, int] = {}
        for turn, _ in self.answered:
            counts[turn] = counts.get(turn, 0) + 1
        return list(counts.values())


def numbered(name: str, count: int, qtype: str = "A") -> list[bytes]:
    packet = question(name, qtype)[2:]
    return [struct.pack(">H", n) + packet for n in range(count)]


@both_loops
def test_a_connection_that_pipelines_gets_its_share_of_each_turn_and_its_answers_in_order(
    new_loop: Any, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        shares = Shares(monkeypatch)
        async with serving(web) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"".join(map(framed, numbered("web.service.consul", 3000))))
            writer.write_eof()
            assert [int.from_bytes((await read_raw(reader))[:2], "big") for _ in range(3000)] == list(range(3000))
            await assert_closed(reader)
            assert max(shares.of_turns()) <= TURN_UNITS
            writer.close()
        shares.counter.cancel()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(body())


@both_loops
def test_a_second_connection_is_answered_while_the_first_one_still_waits(
    new_loop: Any, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        shares = Shares(monkeypatch)
        async with serving(web) as server:
            _, first = await asyncio.open_connection("127.0.0.1", server.port)
            reader, second = await asyncio.open_connection("127.0.0.1", server.port)
            first.write(b"".join(map(framed, numbered("web.service.consul", 4000))))
            while not shares.answered:
                await asyncio.sleep(0)
            second.write(framed(question("n1.node.consul")))
            assert len((await read_framed(reader)).rr) == 1
            assert len(shares.answered) < 1000
            first.close()
            second.close()
        shares.counter.cancel()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(body())


@both_loops
def test_a_client_that_reads_late_does_not_get_all_its_answers_in_one_turn(
    new_loop: Any, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        web.set("big", [Instance(f"m{i}", "dc1", f"10.0.{i >> 8}.{i & 255}", port=i) for i in range(600)])
        shares = Shares(monkeypatch)
        async with serving(web) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 10)
            writer.write(b"".join(map(framed, numbered("big.service.consul", 300, "SRV"))))
            (connection,) = server.connections
            async with asyncio.timeout(5):
                while not connection._paused:
                    await asyncio.sleep(0)
            for n in range(300):
                assert (await read_raw(reader))[:2] == struct.pack(">H", n)
            assert max(shares.of_turns()) <= TURN_UNITS
            writer.close()
        shares.counter.cancel()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(body())


@both_loops
def test_datagrams_beyond_a_turns_share_stand_in_line_and_all_are_answered(
    new_loop: Any, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        shares = Shares(monkeypatch)
        async with serving(web) as server:
            client = await UdpClient.connect(server)
            for packet in numbered("none.service.consul", 500):
                client.send(packet)
            assert {(await client.next()).header.id for _ in range(500)} == set(range(500))
            assert max(shares.of_turns()) <= TURN_UNITS
            assert not server._line
            assert not server._line_bytes
            client.close()
        shares.counter.cancel()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(body())


async def test_the_line_of_datagrams_is_bounded_and_what_does_not_fit_is_counted(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "LINE_BYTES_MAX", 3000)
    shares = Shares(monkeypatch)
    async with serving(web) as server:
        answered: list[bytes] = []
        for packet in numbered("none.service.consul", 100):
            server.receive(packet, answered.append)  # one turn of the loop, as many datagrams as the kernel had
        assert server._line_bytes <= 3000
        while server._line:
            await asyncio.sleep(0)
        assert len(answered) + server.resolver.dropped == 100
        assert server.resolver.dropped > 0
    shares.counter.cancel()


async def test_queries_that_waited_for_a_view_are_answered_turn_by_turn(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = Shares(monkeypatch)
    view = web.services["web"]
    view.is_ready = False
    async with serving(web) as server:
        replies: list[bytes] = []
        for packet in numbered("web.service.consul", 200):
            server.answer(packet, replies.append, tcp=False)
        shares.answered.clear()
        view.is_ready = True
        view.arrived.set()
        async with asyncio.timeout(5):
            while len(replies) < 200:
                await asyncio.sleep(0)
        assert max(shares.of_turns()) <= TURN_UNITS * 2  # a task's turn may end in the next one
        assert server._parked_count == 0
    shares.counter.cancel()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_STREAM])
async def test_a_port_in_use_is_named_with_the_way_out(catalog: Any, kind: Any) -> None:
    with socket.socket(socket.AF_INET, kind) as taken:
        taken.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            taken.listen()
        port = taken.getsockname()[1]
        server = DnsServer(DnsConfig(), catalog, port=port)
        with pytest.raises(Conflict, match=rf"127\.0\.0\.1:{port}/(udp|tcp): Address already in use.*-dns-port") as e:
            await server.start()
        assert "ports.dns" in e.value.message


async def test_one_port_serves_several_addresses(web: Any) -> None:
    server = DnsServer(DnsConfig(), web, hosts=["127.0.0.1", "127.0.0.2"], port=0)
    await server.start()
    for host in ("127.0.0.1", "127.0.0.2"):
        reader, writer = await asyncio.open_connection(host, server.port)
        writer.write(framed(question("web.service.consul")))
        assert len((await read_framed(reader)).rr) == 2
        writer.close()
    await server.stop()


async def test_stopping_leaves_the_port_free_and_no_task(web: Any) -> None:
    web.services["web"].is_ready = False
    server = DnsServer(DnsConfig(), web, port=0)
    await server.start()
    client = await UdpClient.connect(server)
    client.send(question("web.service.consul"))
    client.send(question("none.service.consul"))
    await client.next()
    await server.stop()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    again = DnsServer(DnsConfig(), web, port=server.port)
    await again.start()
    await again.stop()
    client.close()


async def test_recursors_are_asked_in_order_over_udp_and_tcp(web: Any, catalog: Any) -> None:
    catalog.add("www", "n1", "10.0.0.80")
    async with serving(catalog, domain="example") as other, serving(web, recursors=_recursors(other)) as server:
        client = await UdpClient.connect(server)
        client.send(question("www.service.example"))
        assert [str(rr.rdata) for rr in (await client.next()).rr] == ["10.0.0.80"]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(framed(question("www.service.example")))
        assert [str(rr.rdata) for rr in (await read_framed(reader)).rr] == ["10.0.0.80"]
        writer.close()
        client.close()


def _recursors(other: DnsServer) -> tuple[str, ...]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        dead = s.getsockname()[1]
    return (f"127.0.0.1:{dead}", f"127.0.0.1:{other.port}")


async def test_recursors_that_are_all_dead_give_servfail(web: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        dead = s.getsockname()[1]
    async with serving(web, recursors=(f"127.0.0.1:{dead}",)) as server:
        client = await UdpClient.connect(server)
        client.send(question("www.example.com"))
        assert (await client.next()).header.rcode == 2
        client.close()


async def test_an_alias_of_another_zone_is_answered_with_the_recursors_address(web: Any, catalog: Any) -> None:
    other_zone = type(catalog)()
    other_zone.add("www", "n1", "10.0.0.80")
    web.add("alias", "n1", "10.0.0.1", address="www.service.example", port=80)
    async with serving(other_zone, domain="example") as other, serving(web, recursors=_recursors(other)) as server:
        client = await UdpClient.connect(server)
        client.send(question("alias.service.consul"))
        assert [str(rr.rdata) for rr in (await client.next()).rr] == ["www.service.example.", "10.0.0.80"]
        client.send(question("alias.service.consul", "SRV"))
        assert [str(rr.rdata) for rr in (await client.next()).ar] == ["10.0.0.80"]
        client.close()


async def test_an_alias_of_which_no_recursor_knows_more_is_answered_alone_and_in_time(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "LOOK_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        async with serving(web, recursors=(f"127.0.0.1:{silent.getsockname()[1]}",)) as server:
            client = await UdpClient.connect(server)
            for qtype, count in (("A", 1), ("SRV", 1)):
                client.send(question("ext.service.consul", qtype))
                reply = await client.next()
                assert (reply.header.rcode, len(reply.rr), len(reply.ar)) == (0, count, 0)
            client.close()


async def test_what_waits_for_recursors_is_bounded_and_the_rest_is_answered_without_them(
    web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rostra.dns.recurse.IN_FLIGHT_MAX", 3)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        async with serving(web, recursors=(f"127.0.0.1:{silent.getsockname()[1]}",)) as server:
            client = await UdpClient.connect(server)
            for n in range(20):
                client.send(struct.pack(">H", n) + question("ext.service.consul")[2:])
            replies = [await client.next() for _ in range(12)]
            assert all(len(reply.rr) == 1 for reply in replies)
            client.close()
