"""Hot reads: the same bytes, answered again without parsing, and never a stale byte."""

from __future__ import annotations

import asyncio
import json

import pytest

from rostra.agent.http.connection import Attention, Connection, insides_fit
from rostra.server.state.catalog import Register
from rostra.server.state.kv import SetKey
from tests.unit.agent.http.conftest import Api

GET = b"GET /v1/kv/a HTTP/1.1\r\nHost: x\r\n\r\n"


class Client:
    """One keep-alive connection on the test's own loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, api: Api) -> Client:
        return cls(*await asyncio.open_connection(api.host, api.port))

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        self.writer.write(request)
        return await self.answer()

    async def answer(self) -> tuple[bytes, bytes]:
        async with asyncio.timeout(30):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")
            )
            return head, await self.reader.readexactly(length)


def hot_count(api: Api) -> float:
    return api.agent.metrics.counter("http.hot")


def without_date(head: bytes) -> set[bytes]:
    return {line for line in head.split(b"\r\n") if not line.startswith(b"Date:")}


@pytest.fixture
async def client(api):
    api.servers.apply(SetKey("a", b"1"))
    client = await Client.connect(api)
    yield client
    client.writer.close()


async def test_the_insides_of_this_aiohttp_fit(api):
    assert api.server.hot.enabled


async def test_a_repeated_get_is_hot_and_says_the_same(api, client):
    plain = await client.ask(GET)
    hot = await client.ask(GET)
    assert hot_count(api) == 1
    assert hot[1] == plain[1]
    assert without_date(hot[0]) == without_date(plain[0])


async def test_a_change_is_seen_at_once(api, client):
    for i in range(30):
        api.servers.apply(SetKey("a", b"value %d" % i))
        for _ in range(3):
            assert b'"ModifyIndex":%d' % api.servers.store.index in (await client.ask(GET))[1]
    assert hot_count(api) >= 30


async def test_every_hot_answer_waits_for_a_barrier_of_its_own_time(api, client):
    await client.ask(GET)
    before = api.servers.barriers
    for i in range(1, 6):
        await client.ask(GET)
        assert api.servers.barriers == before + i


async def test_a_write_while_the_barrier_is_on_its_way_is_not_missed(api, client):
    await client.ask(GET)
    api.servers.barrier_gate = asyncio.Event()
    client.writer.write(GET)
    async with asyncio.timeout(30):
        while api.servers.barriers < 2:
            await asyncio.sleep(0)
    api.servers.apply(SetKey("a", b"newer"))
    api.servers.barrier_gate.set()
    assert b'"Value":"bmV3ZXI="' in (await client.answer())[1]


async def test_the_last_contact_is_that_of_the_barrier(api, client):
    stale = GET.replace(b"/a ", b"/a?stale ")
    await client.ask(stale)
    api.servers.last_contact_ms = 42
    head, _ = await client.ask(stale)
    assert hot_count(api) == 1
    assert b"X-Consul-LastContact: 42\r\n" in head


async def test_a_404_can_be_hot_and_ends_when_the_key_comes(api, client):
    missing = GET.replace(b"/a ", b"/later ")
    for _ in range(3):
        assert (await client.ask(missing))[0].startswith(b"HTTP/1.1 404")
    assert hot_count(api) == 2
    api.servers.apply(SetKey("later", b"1"))
    assert (await client.ask(missing))[0].startswith(b"HTTP/1.1 200")


async def test_without_servers_a_hot_read_is_500_like_any_other(api, client):
    await client.ask(GET)
    api.servers.disconnect()
    head, body = await client.ask(GET)
    assert head.startswith(b"HTTP/1.1 500")
    assert body == b"No cluster leader"


@pytest.mark.parametrize("query", [b"index=1", b"near=_agent", b"cached", b"index=1&wait=1ms"])
async def test_queries_that_depend_on_more_than_the_rows_are_never_hot(api, client, query):
    api.servers.apply(Register("n", "10.0.0.1", service={"id": "web", "name": "web"}))
    request = GET.replace(b"/v1/kv/a ", b"/v1/health/service/web?" + query + b" ")
    for _ in range(3):
        await client.ask(request)
    assert hot_count(api) == 0


async def test_other_methods_and_other_headers_are_other_requests(api, client):
    await client.ask(GET)
    put = b"PUT /v1/kv/b HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
    for _ in range(2):
        assert (await client.ask(put))[1] == b"true"
    other = GET.replace(b"\r\n\r\n", b"\r\nX-Consul-Token: t\r\n\r\n")
    await client.ask(other)
    assert hot_count(api) == 0
    await client.ask(GET)
    assert hot_count(api) == 1


async def test_a_connection_that_wrote_in_two_pieces_is_hot_again_afterwards(api, client):
    await client.ask(GET)
    client.writer.write(b"PUT /v1/kv/b HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
    await client.writer.drain()
    await asyncio.sleep(0.01)
    assert (await client.ask(b"67890"))[1] == b"true"
    await client.ask(GET)
    assert hot_count(api) == 1


async def test_a_body_that_looks_like_a_known_request_is_a_body(api, client):
    await client.ask(GET)
    client.writer.write(b"PUT /v1/kv/b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(GET))
    await client.writer.drain()
    await asyncio.sleep(0.01)
    assert (await client.ask(GET))[1] == b"true"
    assert hot_count(api) == 0
    assert (await client.ask(b"GET /v1/kv/b?raw HTTP/1.1\r\nHost: x\r\n\r\n"))[1] == GET


async def test_pipelined_hot_reads_are_answered_in_order(api, client):
    other = GET.replace(b"/a ", b"/b ")
    api.servers.apply(SetKey("b", b"2"))
    await client.ask(GET)
    await client.ask(other)
    client.writer.write(GET)
    await asyncio.sleep(0)
    client.writer.write(other)
    client.writer.write(GET + other)
    assert [json.loads((await client.answer())[1])[0]["Key"] for _ in range(4)] == ["a", "b", "a", "b"]


async def test_a_request_split_in_the_middle_is_answered(api, client):
    await client.ask(GET)
    for cut in (3, 20, len(GET) - 2):
        client.writer.write(GET[:cut])
        await client.writer.drain()
        await asyncio.sleep(0.01)
        head, body = await client.ask(GET[cut:])
        assert head.startswith(b"HTTP/1.1 200")
        assert b'"Key":"a"' in body


async def test_connection_close_is_honoured_every_time(api):
    api.servers.apply(SetKey("a", b"1"))
    closing = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for _ in range(3):
        got = await api.raw(closing)
        assert got.endswith(b"}]")
        assert b"Connection: close" in got
    assert hot_count(api) == 0


async def test_stored_answers_are_bounded_by_bytes(api, client):
    api.server.hot.bytes_max = 5000
    for i in range(50):
        await client.ask(GET.replace(b"/a ", b"/a?x=%d " % i))
    assert 0 < api.server.hot.bytes_used <= 5000
    assert api.server.hot.bytes_used == sum(a.cost for a in api.server.hot.answers.values())


async def test_a_client_that_leaves_while_its_barrier_is_out_harms_nobody(api, client):
    await client.ask(GET)
    api.servers.barrier_gate = asyncio.Event()
    leaving = await Client.connect(api)
    leaving.writer.write(GET)
    client.writer.write(GET)
    await asyncio.sleep(0.02)
    leaving.writer.close()
    await asyncio.sleep(0.02)
    api.servers.barrier_gate.set()
    assert (await client.answer())[1].endswith(b"}]")


async def test_hot_reads_stay_off_where_aiohttp_differs(api):
    class Changed(Connection):
        async def start(self) -> None:
            await asyncio.Event().wait()

    def make():
        return Changed(
            api.server._server,
            hot=api.server.hot,
            admit=lambda c, t: True,
            attention=Attention(),
            loop=asyncio.get_running_loop(),
        )

    assert await insides_fit(make) is False
