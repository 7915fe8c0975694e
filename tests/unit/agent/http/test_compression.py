from __future__ import annotations

import gzip

import pytest

from rostra.agent.http.compression import BYTES_MIN, INLINE_BYTES, Compression, accepts_gzip
from rostra.agent.http.routing import Response
from rostra.server.state.kv import SetKey


@pytest.mark.parametrize(
    ("accepted", "is_accepted"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5, br", True),
        ("gzip;q=0", False),
        ("gzip; q=0.000", False),
        ("gzip;q=1", True),
        ("", False),
        ("*", False),  # as Consul
        ("xgzip, gzipped", False),
    ],
)
def test_gzip_is_used_only_where_it_is_named(accepted, is_accepted):
    assert accepts_gzip(accepted) is is_accepted


@pytest.mark.parametrize("size", [BYTES_MIN, INLINE_BYTES + 1, 300_000])
async def test_a_client_that_accepts_gzip_gets_it_hot_or_not_and_never_another_clients(api, size):
    value = b"v" * size
    api.servers.apply(SetKey("a", value))
    for _ in range(3):
        reply = await api.get("/v1/kv/a?raw", **{"Accept-Encoding": "deflate, gzip"})
        assert reply.headers["Content-Encoding"] == "gzip"
        assert reply.headers["Vary"] == "Accept-Encoding"
        assert int(reply.headers["Content-Length"]) == len(reply.body) < size // 10
        assert gzip.decompress(reply.body) == value
        plain = await api.get("/v1/kv/a?raw")
        assert plain.headers["Content-Encoding"] is None
        assert plain.body == value
    api.servers.apply(SetKey("a", b"w" * size))
    reply = await api.get("/v1/kv/a?raw", **{"Accept-Encoding": "gzip"})
    assert gzip.decompress(reply.body) == b"w" * size


async def test_small_answers_are_not_compressed(api):
    api.servers.apply(SetKey("a", b"1"))
    reply = await api.get("/v1/kv/a?raw", **{"Accept-Encoding": "gzip"})
    assert (reply.body, reply.headers["Content-Encoding"]) == (b"1", None)


async def test_a_body_is_compressed_once_and_what_is_kept_is_bounded():
    kept = Compression(kept_bytes_max=100_000)
    body = bytes(20_000)
    first, second = Response(200, body), Response(200, body)
    await kept.apply(first, "gzip")
    await kept.apply(second, "gzip")
    assert first.body is second.body
    for i in range(50):
        await kept.apply(Response(200, bytes([i]) * 20_000), "gzip")
        assert 0 < kept.kept_bytes <= 100_000
