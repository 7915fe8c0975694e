"""Answers of one request given for another: what pipelining clients did to plain ones through the short way of reads.

A real HTTP server on a port of its own, its loop shared with the clients, so that each piece arrives by itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from rostra.server.state.kv import SetKey
from tests.fuzz.http import Style, run_clients
from tests.unit.agent.http.conftest import Api, make_api


def get(key: str, more: str = "") -> bytes:
    return f"GET /v1/kv/{key}?raw{more} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, api: Api) -> Client:
        return cls(*await asyncio.open_connection(api.host, api.port))

    async def ask(self, data: bytes) -> bytes:
        self.writer.write(data)
        return await self.told()

    async def told(self) -> bytes:
        async with asyncio.timeout(20):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = next(int(h[15:]) for h in head.split(b"\r\n") if h.startswith(b"Content-Length:"))
            return await self.reader.readexactly(length)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    api = await make_api()
    for key, value in (("a", b"A"), ("b", b"B"), ("secret", b"SECRET")):
        api.servers.apply(SetKey(key, value))
    yield api
    await api.server.close(1.0)
    await api.agent.results.close()


async def test_what_a_client_pipelines_behind_a_slow_request_changes_nobodys_answers(api: Api) -> None:
    victim, attacker = await Client.of(api), await Client.of(api)
    attacker.writer.write(get("nothing", "&index=99999&wait=100ms"))
    for key in ("a", "b"):
        await asyncio.sleep(0.01)
        attacker.writer.write(get(key))
    assert [await attacker.told() for _ in range(3)] == [b"", b"A", b"B"]
    for _ in range(3):
        assert await victim.ask(get("b")) == b"B"
        assert await victim.ask(get("a")) == b"A"
    api.servers.apply(SetKey("b", b"B2"))
    assert await victim.ask(get("b")) == b"B2"
    assert api.agent.metrics.counter("http.hot") > 0


async def test_two_pipelined_requests_change_nobodys_answers_whenever_the_second_comes(api: Api) -> None:
    victim = await Client.of(api)
    for n in range(300):
        attacker = await Client.of(api)
        first, second = get("a", f"&n={n}"), get("b", f"&n={n}")
        await attacker.ask(get("a"))
        attacker.writer.write(first)
        for _ in range(n % 12):
            await asyncio.sleep(0)
        attacker.writer.write(second)
        assert [await attacker.told(), await attacker.told()] == [b"A", b"B"]
        for _ in range(2):
            assert [await victim.ask(first), await victim.ask(second)] == [b"A", b"B"]
        attacker.writer.close()


@pytest.mark.parametrize("digits", [1, 12, 13, 20, 300])
async def test_a_body_is_no_request_however_its_length_is_written(api: Api, digits: int) -> None:
    client, inner = await Client.of(api), get("secret", "&smuggle")
    head = get("a", "&s").replace(b"\r\n\r\n", b"\r\nContent-Length: %0*d\r\n\r\n" % (digits, len(inner)))
    await client.ask(inner)  # so that it is hot
    for _ in range(4):
        client.writer.write(head)
        await asyncio.sleep(0.01)
        assert await client.ask(inner) == b"A"
        assert await client.ask(get("b")) == b"B"


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_hundred_thousand_requests_in_every_form_get_their_own_answers(api: Api) -> None:
    chance = random.Random()
    for _ in range(10):
        await run_clients([(api.host, api.port)], chance, clients=64, requests=10_000, style=Style())
