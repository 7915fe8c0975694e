"""Requests whose limits can be read in more than one way, bodies that break, targets that are none, clients that stop.

A real HTTP server on a port of its own. However a request is framed and cut: its body is never run as a request, the
request behind it gets its own answer or none, and how it is cut changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from rostra.server.state.kv import SetKey
from tests.unit.agent.http.conftest import Api, make_api

INNER = b"GET /v1/kv/secret?raw HTTP/1.1\r\nHost: x\r\n\r\n"
N = len(INNER)
AFTER = b"GET /v1/kv/after?raw HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
PUT = b"PUT /v1/kv/frame HTTP/1.1\r\nHost: x\r\n"
CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (N, INNER)


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    api = await make_api()
    api.servers.apply(SetKey("secret", b"SECRET"))
    api.servers.apply(SetKey("after", b"AFTER"))
    yield api
    await api.server.close(1.0)
    await api.agent.results.close()


def _lengths() -> list[bytes]:
    n = str(N).encode()
    values = [n, b"0" + n, b"%013d" % N, b"%040d" % N, b"+" + n, b"-" + n, b" " + n, b"\t" + n, n + b" ", n + b"\t"]
    values += [
        n + b"," + n,
        n + b", " + n,
        b"0x" + n,
        n + b".0",
        n + b";",
        n + b"\x00",
        n + b"\x0b",
        b"",
        b"\xb2",
        b"1e1",
    ]
    values += [b"18446744073709551616", b"18446744073709551617", b"99999999999999999999999", b"'%s'" % n, n + b" 0"]
    heads = [b"Content-Length: " + v for v in values]
    heads += [b"content-length:" + n, b"CONTENT-LENGTH: " + n, b"Content-Length : " + n, b" Content-Length: " + n]
    heads += [
        b"Content-Length:\r\n " + n,
        b"X: y\r\n\tContent-Length: " + n,
        b"Content-Length\t: " + n,
    ]
    heads += [b"Content-Length: %s\r\nContent-Length: %s" % pair for pair in ((n, n), (n, b"0"), (b"0", n))]
    heads += [b"Content-Length: %s\nX: y" % n, b"X: y\rContent-Length: " + n, b"X\x00: y\r\nContent-Length: " + n]
    return [PUT + head + b"\r\n\r\n" + INNER for head in heads]


def _encodings() -> list[bytes]:
    values = [
        b"chunked",
        b"Chunked",
        b"CHUNKED",
        b" chunked",
        b"\tchunked",
        b"chunked ",
        b"chunked\t",
        b"chunked,",
        b",chunked",
    ]
    values += [b"chunked, chunked", b"identity", b"identity, chunked", b"gzip, chunked", b"chunked, gzip", b"xchunked"]
    values += [b"\x0bchunked", b"chunked\x00", b"'chunked'", b"chunke", b""]
    heads = [b"Transfer-Encoding: " + v for v in values]
    heads += [b"Transfer-Encoding : chunked", b" Transfer-Encoding: chunked"]
    heads += [b"Transfer-Encoding:\r\n chunked", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity"]
    heads += [b"Transfer-Encoding: chunked\r\nContent-Length: %d" % n for n in (0, N, N + 20)]
    heads += [b"Content-Length: 0\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\nX: y"]
    return [PUT + head + b"\r\n\r\n" + CHUNK for head in heads]


def _chunks() -> list[bytes]:
    n, head = b"%x" % N, PUT + b"Transfer-Encoding: chunked\r\n\r\n"
    sizes = [
        n,
        b"0" + n,
        n.upper(),
        n + b";a=b",
        n + b' ;a="\r',
        n + b" ",
        b"0x" + n,
        b"+" + n,
        b"-1",
        b"",
        b" " + n,
        n + b"\n",
    ]
    sizes += [b"f" * 16, b"f" * 17, b"1" + b"0" * 16, n + b"\x00"]
    bodies = [size + b"\r\n" + INNER + b"\r\n0\r\n\r\n" for size in sizes]
    bodies += [n + b"\n" + INNER + b"\n0\n\n", n + b"\r\n" + INNER + b"0\r\n\r\n", n + b"\r\n" + INNER + b"XX0\r\n\r\n"]
    bodies += [
        n + b"\r\n" + INNER + b"\r\n0\r\nContent-Length: 99\r\n\r\n",
        n + b"\r\n" + INNER + b"\r\n0000\r\nX: y\r\n\r\n",
    ]
    return [head + body for body in bodies]


FRAMINGS = _lengths() + _encodings() + _chunks()


def _splits(data: bytes) -> list[list[bytes]]:
    head = data.index(b"\r\n\r\n") + 4
    lines = data.split(b"\n")
    half = len(data) // 2
    return [
        [data],
        [data[:head], data[head:]],
        [data[:half], data[half:]],
        [line + b"\n" for line in lines[:-1]] + lines[-1:],
        [data[i : i + 7] for i in range(0, len(data), 7)],
        [data[i : i + 1] for i in range(len(data))],
    ]


async def _told(api: Api, pieces: list[bytes]) -> bytes:
    reader, writer = await asyncio.open_connection(api.host, api.port)
    try:
        for piece in pieces:
            if writer.is_closing() or reader.at_eof():
                break
            writer.write(piece)
            await asyncio.sleep(0)
        if not writer.is_closing():
            writer.write_eof()  # or who expects more of a body waits for it
        async with asyncio.timeout(20):
            return await reader.read()
    except OSError:
        return b""  # refused, and what we still sent was not read any more
    finally:
        writer.close()


async def test_however_a_request_is_framed_and_cut_its_body_is_no_request(api: Api) -> None:
    taken = 0
    for framing in FRAMINGS:
        told = await asyncio.gather(*(_told(api, split) for split in _splits(framing + AFTER)))
        firsts = {t[9:12] for t in told if t}
        for t in told:
            assert b"SECRET" not in t, framing
            assert t.count(b"HTTP/1.1 200") in (0, 2), (framing, t)
            if t.startswith(b"HTTP/1.1 200"):
                assert t.endswith(b"AFTER"), (framing, t)
        assert len(firsts) == 1, (framing, firsts)
        taken += firsts == {b"200"}
    assert taken >= 15  # or nothing but refusals was tried
    assert (await _told(api, [AFTER])).endswith(b"AFTER")


DEEP = [b"[" * n + b"]" * n for n in (101, 500, 1000, 1024, 20_000)]
HOSTILE_JSON = [
    *(b'{"Node":"n","Address":"10.0.0.1","Service":{"Service":"a","Meta":' + deep + b"}}" for deep in DEEP),
    *(b'{"Node":"n","Address":"10.0.0.1","NodeMeta":' + b'{"a":' * n + b"1" + b"}" * n + b"}" for n in (101, 1000)),
    b"",
    b" ",
    b"null",
    b"[]",
    b"{",
    b'"',
    b'{"Node":',
    b'{"Node":"\xff"}',
    b'{"Node":"\\ud800"}',
    b'{"Node":1e999}',
    b"NaN",
    b"{}}",
    b'{"Node":"n","Address":"10.0.0.1","Service":[]}',
    b'{"Node":{},"Address":"10.0.0.1"}',
    b"\xef\xbb\xbf{}",
    b"\x00",
    b'{"Node":"n","Address":"10.0.0.1","Service":{"Service":"a","Port":99999999999999999999}}',
    b"1" * 5000,
    b"-",
    b'{"a":1,}',
]
HOSTILE_TARGETS = [
    b"/v1/kv/100%",
    b"/v1/kv/%",
    b"/v1/kv/%z",
    b"/v1/kv/%zz",
    b"/v1/kv/a%2",
    b"/v1/kv/%ff",
    b"/v1/kv/%00",
    b"/v1/kv/%0d%0aX:%20y",
    b"/v1/kv/\xff",
    b"/v1/kv/\xed\xa0\x80",
    b"/v1/health/service/a?tag=%zz",
    b"/v1/kv/a?%zz",
    b"/v1/kv/a?raw&x=%",
    b"/v1/kv/a?x=%f",
    b"/v1/catalog/service/a?tag=%ff",
    b"/v1/kv/a b",
    b"/v1/kv/a\tb",
    b"x",
    b"",
    b"http://",
    b"//",
    b"*",
    b"/v1/kv/a\x00b",
    b"?raw",
]


async def test_hostile_bodies_are_refused_with_the_reason_and_leave_nothing(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    for path in ("/v1/catalog/register", "/v1/session/create", "/v1/connect/intentions"):
        for body in HOSTILE_JSON:
            method = "POST" if path.endswith("intentions") else "PUT"
            reply = await api.call(method, path, body)
            if path == "/v1/session/create" and body in (b"", b" ", b"null", b"{}"):
                continue  # a session without wishes
            assert reply.status in (400, 500), (path, body[:80], reply.body)  # 500 is Consul's "Must provide node"
            assert not reply.text.startswith("Internal error")
            assert 0 < len(reply.body) < 500
    assert (await api.get("/v1/catalog/node/n")).json is None
    assert not caplog.records


async def test_hostile_targets_are_refused_and_leave_no_key(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    for target in HOSTILE_TARGETS:
        for method in (b"PUT", b"GET"):
            request = b"%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\nv" % (method, target)
            told = await api.raw(request)
            assert told[9:12] in (b"400", b"404", b"405", b"301"), (target, told)
    assert (await api.get("/v1/kv/?keys")).json == ["after", "secret"]
    assert not caplog.records


@pytest.mark.parametrize("target", ["/v1/kv/ü", "/v1/kv/%C3%BC"])
async def test_utf8_in_a_target_is_what_its_escapes_are_wherever_it_is_cut(api: Api, target: str) -> None:
    put = f"PUT {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\nv".encode()
    for cut in range(1, 25):
        assert (await api.raw(put[:cut], put[cut:])).endswith(b"true")
    got = await api.raw(f"GET {target}?raw&x={target} HTTP/1.1\r\nHost: ü\r\nConnection: close\r\n\r\n".encode())
    assert got.endswith(b"\r\n\r\nv")
    assert (await api.get("/v1/kv/?keys")).json == ["after", "secret", "ü"]


GET = b"GET /v1/kv/after?raw HTTP/1.1\r\nHost: x\r\n\r\n"
LEADER = b"GET /v1/status/leader HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("what", "sent", "answers"),
    [
        ("one", GET, 1),
        ("three pipelined", GET * 3, 3),
        ("a hundred pipelined", GET * 100, 100),
        ("HTTP/1.0", GET.replace(b"/1.1", b"/1.0"), 1),
        ("a write", b"PUT /v1/kv/hc HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n1", 1),
        ("not from the state", LEADER, 1),
        ("a blocking query", GET.replace(b"?raw", b"?raw&index=99999999&wait=50ms"), 1),
        ("a query behind a blocking one", GET.replace(b"?raw", b"?index=99999999&wait=50ms") + GET, 2),
        ("and half a head", GET + GET[:20], 1),
    ],
)
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("pause_s", [0, 0.02])
async def test_a_client_that_closes_its_sending_side_gets_its_answers(
    api: Api, what: str, sent: bytes, answers: int, is_warm: bool, pause_s: float
) -> None:
    reader, writer = await asyncio.open_connection(api.host, api.port)
    for _ in range(2 if is_warm else 0):  # so that its GET is hot
        writer.write(GET)
        await reader.readuntil(b"AFTER")
    writer.write(sent)
    if pause_s:
        await asyncio.sleep(pause_s)
    writer.write_eof()
    async with asyncio.timeout(20):
        told = await reader.read()
    assert told.count(b"HTTP/1.1 200 OK") == answers, what
    writer.close()
