from __future__ import annotations

import asyncio
import socket

import pytest

from rostra.agent.http.app import Deadlines, WriteTurns
from rostra.agent.http.permissions import anybody
from rostra.agent.http.routing import Response, Route, text_response
from tests.unit.agent.http.conftest import make_api

BIG = 524289


async def test_an_unknown_path_is_404_with_no_body(api):
    for method in ("GET", "PUT", "OPTIONS", "HEAD"):
        reply = await api.call(method, "/v1/nope")
        assert (reply.status, reply.body) == (404, b"")


async def test_a_wrong_method_is_405_and_names_those_allowed(api):
    reply = await api.call("POST", "/v1/kv/a", b"x")
    assert (reply.status, reply.text) == (405, "method POST not allowed")
    assert reply.headers["Allow"] == "OPTIONS,GET,PUT,DELETE"


async def test_head_is_405_without_a_body(api):
    reply = await api.call("HEAD", "/v1/catalog/nodes")
    assert (reply.status, reply.body) == (405, b"")
    assert reply.headers["Content-Length"] == "23"


async def test_options_lists_the_methods(api):
    reply = await api.call("OPTIONS", "/v1/catalog/nodes")
    assert (reply.status, reply.body, reply.headers["Allow"]) == (200, b"", "OPTIONS,GET")


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/v1/kv", "/v1/kv/"),
        ("/v1/kv//a?x=1", "/v1/kv/a?x=1"),
        ("/v1/kv/../catalog/nodes", "/v1/catalog/nodes"),
        ("/v1/kv/a%2F..%2Fb", "/v1/kv/b"),
    ],
)
async def test_unclean_paths_are_redirected(api, path, location):
    reply = await api.get(path)
    assert (reply.status, reply.headers["Location"]) == (301, location)


async def test_the_root_says_what_answers_here(api):
    reply = await api.get("/")
    assert (reply.status, reply.text) == (200, "Consul Agent")


async def test_a_redirect_cannot_smuggle_a_header(api):
    got = await api.raw(b"GET /v1/kv//a%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert b"\r\nX-Evil" not in got
    assert got.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("path", ["/v1/kv/a%00b", "/v1/kv/%0d%0a", "/v1/kv/%ff", "/v1/kv/%1b[31m"])
async def test_a_path_that_cannot_be_shown_is_400(api, path):
    assert (await api.put(path, b"x")).status == 400
    assert (await api.get("/v1/kv/?keys")).json == []


@pytest.mark.parametrize(
    "target", ["/v1/kv/100%", "/v1/kv/a%2", "/v1/kv/a%zz", "/v1/kv/a?x=%zz", "/v1/kv/a?%", "/v1/kv/a?x=%ff"]
)
async def test_a_target_with_a_wrong_escape_is_400_and_stores_nothing(api, target):
    reply = await api.put(target, b"x")
    assert reply.status == 400
    assert "invalid URL escape" in reply.text or "not UTF-8" in reply.text
    assert (await api.get("/v1/kv/?keys")).json == []


async def test_150_lines_of_headers_are_taken(api):
    lines = b"".join(b"X-%d: y\r\n" % i for i in range(150))
    got = await api.raw(b"GET /v1/status/leader HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + lines + b"\r\n")
    assert got.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_value_larger_than_512_kib_is_413_with_the_text_that_clients_match(api, chunked):
    body = iter([b"x" * BIG]) if chunked else b"x" * BIG
    headers = {"Transfer-Encoding": "chunked"} if chunked else {}

    def put():
        import http.client

        c = http.client.HTTPConnection(api.host, api.port, timeout=20)
        c.request("PUT", "/v1/kv/big", body=body, headers=headers, encode_chunked=chunked)
        r = c.getresponse()
        return r.status, r.read(), r.headers["Connection"]

    status, text, connection = await asyncio.to_thread(put)
    assert status == 413
    assert text.startswith(f"Request body({BIG} bytes) too large, max size: 524288 bytes".encode())
    assert b"limits.kv_max_value_size" in text
    assert connection == "close"


async def test_a_value_of_512_kib_is_stored(api):
    assert (await api.put("/v1/kv/big", b"x" * (BIG - 1))).text == "true"
    assert len((await api.get("/v1/kv/big?raw")).body) == BIG - 1


async def test_a_body_of_another_endpoint_is_bounded_too(api):
    reply = await api.put("/v1/session/create", b" " * (BIG + 100))
    assert reply.status == 413
    assert reply.text == f"Request body({BIG + 100} bytes) too large, max size: 524288 bytes."


async def test_expect_100_continue_is_answered_before_the_body(api):
    got = await api.raw(
        b"PUT /v1/kv/a HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 1\r\nConnection: close\r\n\r\n",
        b"x",
    )
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"BAD\r\n\r\n", b"400"),
        (b"GET /v1/status/leader HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /v1/status/leader HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70000 + b"\r\n\r\n", b"431"),
        (b"GET /v1/kv/a HTTP/1.1\r\nHost: a\r\nContent-Length: zz\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
    ],
)
async def test_what_is_not_http_is_refused_and_closed_without_a_traceback(api, request_bytes, status):
    got = await api.raw(request_bytes)
    assert got.startswith(b"HTTP/1.1 " + status)
    assert b"Connection: close" in got
    assert b"Traceback" not in got


async def test_http_1_0_is_answered_and_closed(api):
    got = await api.raw(b"GET /v1/status/leader HTTP/1.0\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200 OK")
    assert got.endswith(b'"127.0.0.1:8300"')


async def test_an_absolute_request_target_is_understood(api):
    got = await api.raw(b"GET http://x/v1/status/leader HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert got.endswith(b'"127.0.0.1:8300"')


async def test_pipelined_requests_are_answered_in_order(api):
    one = b"GET /v1/status/leader HTTP/1.1\r\nHost: a\r\n\r\n"
    last = b"GET /v1/status/peers HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    got = await api.raw(one + one + last)
    assert got.count(b"HTTP/1.1 200 OK") == 3
    assert got.endswith(b'["127.0.0.1:8300"]')


async def test_pretty_indents_by_four_and_ends_with_a_newline(api):
    assert (await api.get("/v1/status/peers?pretty")).text == '[\n    "127.0.0.1:8300"\n]\n'


async def test_a_large_answer_arrives_whole(api):
    for i in range(5):
        await api.put(f"/v1/kv/big/{i}", bytes([65 + i]) * 500_000)
    rows = (await api.get("/v1/kv/big/?recurse")).json
    assert [len(row["Value"]) for row in rows] == [666668] * 5


async def test_a_failing_handler_is_500_and_says_nothing_of_its_insides(capsys):
    async def broken(request, agent):
        raise ValueError("a secret of the insides")

    api = await make_api([Route("GET", "/v1/broken", broken, anybody)])
    reply = await api.get("/v1/broken")
    assert reply.status == 500
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text
    assert "a request failed" in capsys.readouterr().err
    await api.server.close(1.0)


async def test_a_request_that_takes_too_long_is_ended_with_500(monkeypatch):
    async def endless(request, agent):
        await asyncio.Event().wait()
        return Response()

    monkeypatch.setattr(Deadlines, "LOOK_S", 0.02)
    monkeypatch.setattr("rostra.agent.http.app.REQUEST_S", 0.05)
    api = await make_api([Route("GET", "/v1/endless", endless, anybody)])
    reply = await api.get("/v1/endless")
    assert (reply.status, reply.text) == (500, "The request took too long")
    await api.server.close(1.0)


async def test_a_client_may_hold_only_so_many_connections_and_gets_room_again():
    api = await make_api(connections_per_client=2)
    held = [await asyncio.open_connection(api.host, api.port) for _ in range(2)]
    got = await api.raw(b"")
    assert got.startswith(b"HTTP/1.1 429 Too Many Requests")
    for _, writer in held:
        writer.close()
        await writer.wait_closed()
    async with asyncio.timeout(30):
        while (await api.raw(b"GET /v1/status/leader HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 429"):
            await asyncio.sleep(0)
    assert api.server._clients == {} or sum(api.server._clients.values()) <= 1
    await api.server.close(1.0)


async def test_it_listens_on_a_unix_socket_and_replaces_one_left_behind(api, tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(path)
    await api.server.listen_unix(path, mode=0o600)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"GET /v1/status/leader HTTP/1.0\r\n\r\n")
    assert (await reader.read()).endswith(b'"127.0.0.1:8300"')
    writer.close()


async def test_it_does_not_remove_a_file_that_is_no_socket(api, tmp_path):
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(OSError):
        await api.server.listen_unix(str(path))
    assert path.read_text() == "data"


async def test_without_servers_every_read_and_write_is_500_no_cluster_leader(api):
    api.servers.disconnect()
    for method, path in [
        ("GET", "/v1/kv/a"),
        ("PUT", "/v1/kv/a"),
        ("GET", "/v1/status/leader"),
        ("GET", "/v1/catalog/nodes"),
    ]:
        reply = await api.call(method, path)
        assert (reply.status, reply.text) == (500, "No cluster leader")


async def test_requests_are_counted_by_route_not_by_path(api):
    await api.get("/v1/kv/a")
    await api.get("/v1/kv/b")
    histogram = api.agent.metrics.histogram("api.http", {"method": "GET", "path": "v1/kv/{key}"})
    assert histogram.count == 2


async def test_close_lets_an_answer_in_flight_finish():
    entered, go = asyncio.Event(), asyncio.Event()

    async def slow(request, agent):
        entered.set()
        await go.wait()
        return text_response("done")

    api = await make_api([Route("GET", "/v1/slow", slow, anybody)])
    call = asyncio.create_task(api.get("/v1/slow"))
    await asyncio.wait_for(entered.wait(), 5)
    closing = asyncio.create_task(api.server.close(5.0))
    go.set()
    assert (await call).text == "done"
    await closing


async def test_write_turns_let_the_loop_turn_between_large_writes():
    turns, order = WriteTurns(bytes_per_turn=10), list[int | str]()

    async def writer(name: int) -> None:
        for _ in range(3):
            await turns.take(10)
            order.append(name)

    async def other() -> None:
        for _ in range(3):
            order.append("other")
            await asyncio.sleep(0)

    await asyncio.gather(*(writer(i) for i in range(3)), other())
    assert order.count("other") == 3
    assert order.index("other") < 3
    assert sorted(x for x in order if x != "other") == [0, 0, 0, 1, 1, 1, 2, 2, 2]
