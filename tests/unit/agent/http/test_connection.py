"""What a connection does with its bytes, in whatever pieces they come: whose answer is whose, what ends, what waits."""

from __future__ import annotations

import asyncio
import random
import socket
import struct

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from rostra.agent.http.connection import HEAD_BYTES_MAX, HELD_BYTES_MAX, PIECE_BYTES, Attention, Connection
from rostra.agent.http.permissions import anybody
from rostra.agent.http.routing import Response, Route, text_response
from rostra.server.state.kv import SetKey
from tests.fuzz.http import Style, run_clients
from tests.unit.agent.http.conftest import Api, make_api

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
GET = b"GET /v1/kv/a?raw HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"PUT /v1/kv/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_client_gets_its_own_answers_in_order_and_none_older_than_an_acknowledged_write(
    loop: str, seed: int
) -> None:
    async def run() -> float:
        api = await make_api()
        try:
            where = [(api.host, api.port)]
            await run_clients(where, random.Random(seed), clients=8, requests=320, style=Style())
            return api.agent.metrics.counter("http.hot")
        finally:
            await api.server.close(1.0)
            await api.agent.results.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        assert runner.run(run()) > 0  # or nothing was tried


async def _with_parked(**options: object) -> tuple[Api, asyncio.Event, asyncio.Event]:
    entered, left = asyncio.Event(), asyncio.Event()

    async def parked(request, agent):
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return Response()

    return await make_api([Route("GET", "/v1/parked", parked, anybody)], **options), entered, left


PARKED = b"GET /v1/parked HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_a_handler_ends_when_its_client_resets_the_connection():
    api, entered, left = await _with_parked()
    _, writer = await asyncio.open_connection(api.host, api.port)
    writer.write(PARKED)
    await asyncio.wait_for(entered.wait(), 5)
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    await asyncio.wait_for(left.wait(), 5)
    await api.server.close(1.0)


async def test_a_handler_ends_when_its_client_closes_its_sending_side_and_then_resets():
    api, entered, left = await _with_parked()
    api.server._attention = Attention(look_s=0.01)
    _, writer = await asyncio.open_connection(api.host, api.port)
    writer.write(PARKED)
    await asyncio.wait_for(entered.wait(), 5)
    writer.write_eof()
    async with asyncio.timeout(5):
        while not api.server._attention._half_closed:
            await asyncio.sleep(0)
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    await asyncio.wait_for(left.wait(), 5)
    await api.server.close(1.0)


async def test_a_handler_ends_when_its_client_on_a_unix_socket_goes(tmp_path):
    api, entered, left = await _with_parked()
    api.server._attention = Attention(look_s=0.01)
    await api.server.listen_unix(str(tmp_path / "s"))
    _, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    writer.write(PARKED)
    await asyncio.wait_for(entered.wait(), 5)
    writer.close()
    await asyncio.wait_for(left.wait(), 5)
    await api.server.close(1.0)


async def test_at_its_limit_a_client_gets_the_place_of_a_connection_that_it_has_half_closed():
    api, entered, left = await _with_parked(connections_per_client=1)
    _, writer = await asyncio.open_connection(api.host, api.port)
    writer.write(PARKED)
    await asyncio.wait_for(entered.wait(), 5)
    assert (await api.raw(b"")).startswith(b"HTTP/1.1 429 ")
    writer.close()
    async with asyncio.timeout(5):
        while not api.server._attention._half_closed:
            await asyncio.sleep(0)
    assert (await api.raw(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))).startswith(b"HTTP/1.1 404 ")
    await asyncio.wait_for(left.wait(), 5)
    await api.server.close(1.0)


async def test_a_client_that_connects_and_goes_leaves_nothing_behind(api):
    for data in (b"", b"GET /v1/kv/a HT", GET):
        _, writer = await asyncio.open_connection(api.host, api.port)
        writer.write(data)
        writer.close()
    async with asyncio.timeout(5):
        while api.server._clients:
            await asyncio.sleep(0)
    assert not api.server._attention._heads
    assert not api.server._attention._half_closed


async def test_a_head_that_trickles_is_refused_when_its_time_is_over(api):
    api.server._attention = Attention(head_s=0.2, look_s=0.02)
    reader, writer = await asyncio.open_connection(api.host, api.port)

    async def trickle() -> None:
        for byte in GET * 100:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    trickling = asyncio.create_task(trickle())
    got = await asyncio.wait_for(reader.read(), 5)
    trickling.cancel()
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"Connection: close" in got


async def test_a_head_that_came_whole_is_not_measured_by_that(api):
    api.servers.apply(SetKey("a", b"1"))
    api.server._attention = Attention(head_s=0.05, look_s=0.01)
    reader, writer = await asyncio.open_connection(api.host, api.port)
    for piece in (GET[:9], GET[9:]):
        writer.write(piece)
        await asyncio.sleep(0.01)
    assert b"200 OK" in await reader.readuntil(b"\r\n\r\n1")
    assert not api.server._attention._heads
    writer.close()


@pytest.mark.parametrize("end", [b"zz\r\n", b"3\r\nabcd\r\n", b"3\nabc\n0\n\n", b"-1\r\n\r\n"])
async def test_a_malformed_body_is_400_at_once_and_nothing_is_done(api, end):
    async with asyncio.timeout(5):
        got = await api.raw(CHUNKED + b"3\r\nabc\r\n", end)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nX-Rostra-Outcome: refused\r\n" in got
    assert b"Connection: close" in got
    assert (await api.get("/v1/kv/c")).status == 404


@pytest.mark.parametrize("body", [b"zz\r\nabc\r\n", b"3\r\nabcd\r\n", b"\r\n"])
async def test_a_malformed_body_that_comes_with_its_head_is_400_and_nothing_is_done(api, body):
    got = await api.raw(CHUNKED + body)
    assert got.startswith(b"HTTP/1.1 400 ")
    assert got.count(b"HTTP/1.1 ") == 1
    assert (await api.get("/v1/kv/c")).status == 404


@pytest.mark.parametrize(
    "head", [CHUNKED + b"3\r\nabc\r\n", CHUNKED.replace(b"Transfer-Encoding: chunked", b"Content-Length: 9") + b"abc"]
)
async def test_a_body_that_its_client_leaves_unfinished_is_400_and_nothing_is_done(api, head):
    reader, writer = await asyncio.open_connection(api.host, api.port)
    writer.write(head)
    writer.write_eof()
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 400 ")
    assert (await api.get("/v1/kv/c")).status == 404


async def test_a_body_that_does_not_come_is_408_and_not_done(monkeypatch):
    monkeypatch.setattr("rostra.agent.http.app.REQUEST_S", 0.05)
    monkeypatch.setattr("rostra.agent.http.app.Deadlines.LOOK_S", 0.02)
    api = await make_api()
    got = await api.raw(CHUNKED + b"3\r\nabc\r\n", until=b"nothing was done")
    assert got.startswith(b"HTTP/1.1 408 ")
    assert b"\r\nX-Rostra-Outcome: not-done\r\n" in got
    assert (await api.get("/v1/kv/c")).status == 404
    await api.server.close(1.0)


async def test_a_head_is_bounded(api):
    lines = b"".join(b"X-%d: %s\r\n" % (i, b"y" * 1000) for i in range(HEAD_BYTES_MAX // 1000 + 2))
    got = await api.raw(b"GET / HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
    assert got.startswith(b"HTTP/1.1 431 ")


async def test_what_a_connection_keeps_is_bounded_and_it_is_not_read_from_beyond_that():
    api, entered, _ = await _with_parked()
    _, writer = await asyncio.open_connection(api.host, api.port)
    writer.write(PARKED)
    await asyncio.wait_for(entered.wait(), 5)
    (connection,) = api.server._server.connections
    assert isinstance(connection, Connection)
    writer.transport.set_write_buffer_limits(high=0)

    async def send_for_ever() -> None:
        while True:
            writer.write(GET * 200)
            await writer.drain()

    with pytest.raises(TimeoutError):
        await asyncio.wait_for(send_for_ever(), 0.5)
    assert connection._transport_paused
    assert connection._held_bytes <= HELD_BYTES_MAX + (256 << 10)
    assert len(connection._messages) < 100
    writer.transport.abort()
    await api.server.close(1.0)


@pytest.mark.parametrize("loop", LOOPS)
def test_others_go_on_while_one_client_sends_one_byte_chunks_and_pipelines(loop: str) -> None:
    """In each turn of the loop a connection is given so much only; how long a turn takes is the bench's to say."""

    async def run() -> None:
        async def sink(request, agent):
            return text_response(str(len(request.body)))

        api = await make_api([Route("PUT", "/v1/sink", sink, anybody)])
        head = CHUNKED.replace(b"/v1/kv/c", b"/v1/sink")
        flood = head + b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n" + GET * 500
        reader, writer = await asyncio.open_connection(api.host, api.port)
        fed: list[int] = []
        real = Connection._feed

        def feed(self: Connection, data: bytes) -> int:
            fed.append(len(data))
            return real(self, data)

        Connection._feed = feed  # type: ignore[method-assign]
        try:
            writer.write(flood)
            got = await asyncio.wait_for(reader.readuntil(b"40000"), 30)
            for _ in range(500):
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
                assert head.startswith(b"HTTP/1.1 404 ")
        finally:
            Connection._feed = real  # type: ignore[method-assign]
        assert got.startswith(b"HTTP/1.1 200 ")
        assert max(fed) <= PIECE_BYTES
        writer.close()
        await api.server.close(1.0)

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(run())


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
@pytest.mark.parametrize(
    "body", [b"\r\n", b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"]
)
async def test_what_is_pipelined_behind_a_request_for_an_upgrade_is_answered(api, upgrade, body):
    first = b"GET /v1/status/leader HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n" + body
    got = await api.raw(first + b"GET /v1/status/peers HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert got.count(b"HTTP/1.1 200 OK") == 2
    assert got.endswith(b'["127.0.0.1:8300"]')


async def test_where_aiohttp_differs_its_own_way_still_answers(api):
    api.servers.apply(SetKey("a", b"1"))
    api.server._fits = False
    got = await api.raw(GET + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert got.count(b"HTTP/1.1 200 OK") == 2
