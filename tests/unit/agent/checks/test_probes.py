"""HTTP, TCP and script checks against real servers and real processes."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rostra.agent.checks import http, script, tcp, wrapper
from rostra.agent.checks.response import BODY_BYTES_MAX, Response
from rostra.agent.checks.spec import CheckSpec
from tests.support.waiting import eventually


@asynccontextmanager
async def server(
    answer: bytes | Callable[[bytes], bytes], *, hang: bool = False
) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that sends `answer` to each request; what it was asked is in the list."""
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-l")), 0)
            asked.append(head + await reader.readexactly(length))
            if hang:
                await reader.read()
            writer.write(answer(head) if callable(answer) else answer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], asked
    finally:
        listening.close()


def spec(**fields: Any) -> CheckSpec:
    return CheckSpec(id="c", name="c", **{"type": "http", "timeout_s": 5.0, **fields})


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("200 OK", "passing"),
        ("204 No Content", "passing"),
        ("429 Too Many Requests", "warning"),
        ("304 Not Modified", "critical"),
        ("307 Temporary Redirect", "critical"),
        ("200", "passing"),
        ("099 Small", "critical"),
        ("404 Not Found", "critical"),
        ("500 Internal Server Error", "critical"),
    ],
)
async def test_the_status_code_decides_an_http_check(line: str, status: str) -> None:
    async with server(f"HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n".encode()) as (port, _):
        url = f"http://127.0.0.1:{port}/health"
        assert await http.run(spec(http=url)) == (status, f"HTTP GET {url}: {line} Output: ")


async def test_an_http_check_sends_method_headers_and_body_and_says_who_it_is() -> None:
    async with server(b"HTTP/1.1 200 OK\r\n\r\n") as (port, asked):
        header = {"X-One": ("a", "b"), "host": ("other",)}
        await http.run(spec(http=f"http://127.0.0.1:{port}/x?y=1", method="post", header=header, body="hello"))
    head, _, body = asked[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /x?y=1 HTTP/1.1"
    assert body == b"hello"
    assert {b"User-Agent: Consul Health Check", b"X-One: a", b"X-One: b", b"host: other"} <= set(lines)
    assert {b"Accept: text/plain, text/*, */*", b"Connection: close"} <= set(lines)
    assert not any(line.startswith(b"Host:") for line in lines)


async def test_the_end_of_a_long_body_is_kept() -> None:
    body = b"x" * 10000 + b"the end"
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with server(answer) as (port, _):
        result = await http.run(spec(http=f"http://127.0.0.1:{port}/"))
    kept = result.output.partition("Output: ")[2]
    assert len(kept) == 4096
    assert kept.endswith("the end")


async def test_a_chunked_body_is_read() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=1\r\n world\r\n0\r\n\r\n"
    async with server(answer) as (port, _):
        assert (await http.run(spec(http=f"http://127.0.0.1:{port}/"))).output.endswith("Output: hello world")


async def test_a_redirect_is_followed() -> None:
    def answer(head: bytes) -> bytes:
        if b"GET /there " in head:
            return b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
        return b"HTTP/1.1 302 Found\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n"

    async with server(answer) as (port, asked):
        assert (await http.run(spec(http=f"http://127.0.0.1:{port}/here"))).status == "passing"
    assert len(asked) == 2


async def test_redirects_in_a_circle_are_critical() -> None:
    async with server(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n") as (port, asked):
        result = await http.run(spec(http=f"http://127.0.0.1:{port}/"))
    assert result.status == "critical"
    assert "stopped after 10 redirects" in result.output
    assert len(asked) == 11


async def test_an_http_server_that_never_answers_is_critical_after_the_timeout() -> None:
    async with server(b"", hang=True) as (port, _):
        result = await http.run(spec(http=f"http://127.0.0.1:{port}/", timeout_s=0.05))
    assert result.status == "critical"
    assert "deadline exceeded" in result.output


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: y"])
async def test_what_is_not_http_is_critical_and_not_an_error(answer: bytes) -> None:
    async with server(answer) as (port, _):
        assert (await http.run(spec(http=f"http://127.0.0.1:{port}/"))).status == "critical"


GZIP = gzip.compress(b"hello", mtime=0)  # a time would be in the names of the tests


@pytest.mark.parametrize(
    ("answer", "status", "end"),
    [
        # As Consul 1.8.7 was seen to take them.
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "passing", "200 OK Output: short"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 9\r\n\r\nshort", "critical", "500 No Output: short"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n", "passing", "200 OK Output: "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n", "passing", "200 OK Output: "),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "passing", "200 OK Output: hel"),
        (b"HTTP/1.1 200 OK\nContent-Length: 2\nX: y\n\nhi", "passing", "200 OK Output: hi"),
        (b"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nhi\n0\n\n", "passing", "200 OK Output: hi"),
        (b"HTTP/1.1 200 OK\r\nX: y\n z\r\n\nhi", "passing", "200 OK Output: hi"),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhi", "passing", "200 OK Output: hi"),
        (b"HTTP/2.0 200 OK\r\n\r\nhi", "passing", "200 OK Output: hi"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi", "passing", "Output: hi"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + GZIP, "passing", "200 OK Output: hello"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n" + GZIP[:-6], "passing", "200 OK Output: hello"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nhello", "passing", "200 OK Output: "),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n\r\nhi", "passing", "200 OK Output: hi"),
        (b"HTTP/1.1 103 Early\r\n\r\n" * 5 + b"HTTP/1.1 200 OK\r\n\r\nhi", "passing", "200 OK Output: hi"),
        (
            b"HTTP/1.1 103 Early\r\n\r\n" * 6 + b"HTTP/1.1 200 OK\r\n\r\nhi",
            "critical",
            "too many 1xx informational responses",
        ),
        (b"HTTP/1.1 20 OK\r\n\r\nhi", "critical", 'malformed HTTP status code "20"'),
        (b"ICY 200 OK\r\n\r\nhi", "critical", 'malformed HTTP version "ICY"'),
        (b"hi\n", "critical", 'malformed HTTP response "hi"'),
        (b"HTTP/1.1 200 OK\r\nnocolon\r\n\r\n", "critical", 'malformed MIME header: missing colon: "nocolon"'),
        (b"HTTP/1.1 200 OK\r\n X: y\r\n\r\n", "critical", "malformed MIME header initial line:  X: y"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "critical", 'bad Content-Length "-1"'),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nhi", "critical", 'got ["2" "3"]'),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "critical", 'unsupported transfer encoding: "gzip"'),
        (b"HTTP/1.1 302 Found\r\n\r\n", "critical", "302 response missing Location header"),
        (b"HTTP/1.1 302 Found\r\nLocation: ftp://x/\r\n\r\n", "critical", 'unsupported protocol scheme "ftp"'),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100_000, "critical", "response headers exceeded 262144 bytes; aborted"),
    ],
)
async def test_the_status_line_decides_whatever_the_body_is(answer: bytes, status: str, end: str) -> None:
    async with server(answer) as (port, _):
        result = await http.run(spec(http=f"http://127.0.0.1:{port}/"))
    assert result.status == status
    assert result.output.endswith(end)


async def test_a_target_that_has_sent_its_head_and_waits_has_answered() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await reader.read()
        await reader.read()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    assert await http.run(spec(http=url, timeout_s=0.2)) == ("passing", f"HTTP GET {url}: 200 OK Output: 12345")
    head = head.partition(b"\r\n\r\n")[0]
    late = await http.run(spec(http=url, timeout_s=0.2))
    assert late.status == "critical"
    assert "deadline exceeded" in late.output
    listening.close()


@pytest.mark.parametrize("data", [b"1\r\nx\r\n" * 1000, b"400\r\n" + b"x" * 1024 + b"\r\n"])
async def test_an_answer_may_come_in_any_pieces_and_never_grows(data: bytes) -> None:
    stream = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + data * 20 + b"0\r\n\r\n"
    for size in (1, 7, 5000, len(stream)):
        response = Response(100)
        for at in range(0, len(stream), size):
            response.feed(stream[at : at + size])
            while response.step():
                assert len(response.tail) <= 100
        assert response.ended
        assert bytes(response.tail) == b"x" * 100


@pytest.mark.parametrize("kind", ["plain", "chunked", "bomb"])
def test_no_more_than_a_mebibyte_is_read_or_unpacked_of_a_body(kind: str) -> None:
    response = Response(100)
    head = {"plain": b"", "chunked": b"Transfer-Encoding: chunked\r\n", "bomb": b"Content-Encoding: gzip\r\n"}[kind]
    piece = {"plain": b"x" * 10_000, "chunked": b"1\r\nx\r\n" * 1000, "bomb": gzip.compress(b"\0" * (50 << 20))}[kind]
    response.feed(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
    fed = 0
    while not response.ended:
        response.feed(piece)
        fed += len(piece)
        while response.step():
            pass
        assert fed < 2 * BODY_BYTES_MAX
    assert response.status == 200


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://bob:hunter2@127.0.0.1:1/x", 'Get "http://bob:***@127.0.0.1:1/x": dial tcp 127.0.0.1:1'),
        ("http://bob:hunter2@h:99999/", 'Get "http://bob:***@h:99999/": dial tcp: address 99999: invalid port'),
        ("http://bob:hunter2@[::1/", "parse \"http://bob:***@[::1/\": missing ']' in host"),
        ("http://bob:hunter2@h:ssh/", 'parse "http://bob:***@h:ssh/": invalid port ":ssh" after host'),
        ("http://bob:hun/ter2@h/", 'parse "http://bob:***@h/": invalid port ":hun" after host'),
        ("http://bob:hun%zz2@h/", 'parse "http://bob:***@h/": invalid URL escape'),
        ("http://bob:hunter2@h/\x01", 'parse "http://bob:***@h/\x01": net/url: invalid control character in URL'),
        ("ftp://bob:hunter2@h/", 'Get "ftp://bob:***@h/": unsupported protocol scheme "ftp"'),
        ("127.0.0.1:80/x", 'parse "127.0.0.1:80/x": first path segment in URL cannot contain colon'),
        ("http:///x", 'Get "http:///x": http: no Host in request URL'),
    ],
)
async def test_a_url_that_cannot_be_asked_is_critical_and_shown_without_its_password(url: str, shown: str) -> None:
    result = await http.run(spec(http=url))
    assert result.status == "critical"
    assert result.output.startswith(shown)
    assert "hun" not in result.output.replace('":hun"', "")


async def test_a_password_is_sent_and_never_shown() -> None:
    async with server(b"HTTP/1.1 200 OK\r\n\r\nhi") as (port, asked):
        result = await http.run(spec(http=f"http://bob:hunter2@127.0.0.1:{port}/"))
    assert b"Authorization: Basic Ym9iOmh1bnRlcjI=" in asked[0]
    assert result == ("passing", f"HTTP GET http://bob:***@127.0.0.1:{port}/: 200 OK Output: hi")


async def test_brackets_around_an_ipv4_address_are_taken() -> None:
    async with server(b"HTTP/1.1 200 OK\r\n\r\n") as (port, asked):
        assert (await http.run(spec(http=f"http://[127.0.0.1]:{port}/x"))).status == "passing"
    assert f"Host: [127.0.0.1]:{port}\r\n".encode() in asked[0]


async def test_who_is_redirected_to_does_not_get_the_secrets_of_the_check() -> None:
    async with server(b"HTTP/1.1 200 OK\r\n\r\n") as (port, there):
        elsewhere = f"HTTP/1.1 307 Go\r\nLocation: http://localhost:{port}/\r\n\r\n".encode()
        async with server(elsewhere) as (first, here):
            header = {"Authorization": ("Bearer x",), "Cookie": ("c",), "X-Other": ("y",)}
            await http.run(spec(http=f"http://127.0.0.1:{first}/", header=header))
    assert b"Bearer x" in here[0]
    assert b"Bearer x" not in there[0]
    assert b"Cookie" not in there[0]
    assert b"X-Other: y" in there[0]


@pytest.mark.parametrize(
    ("location", "target"),
    [("?q=1", b"/a/b?q=1"), ("c", b"/a/c"), ("../d", b"/d"), ("/e f", b"/e%20f"), ("//127.0.0.1:{port}/g", b"/g")],
)
async def test_a_relative_location_is_of_the_place_that_sent_it(location: str, target: bytes) -> None:
    def answer(head: bytes) -> bytes:
        if head.startswith(b"GET /a/b "):
            return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n\r\n".replace("{port}", str(port)).encode()
        return b"HTTP/1.1 200 OK\r\n\r\n"

    async with server(answer) as (port, asked):
        assert (await http.run(spec(http=f"http://[127.0.0.1]:{port}/a/b"))).status == "passing"
    assert asked[1].split()[1] == target


async def test_a_refused_connection_is_told_in_consuls_words() -> None:
    port = closed_port()
    dial = f"dial tcp 127.0.0.1:{port}: connect: connection refused"
    assert await http.run(spec(http=f"http://127.0.0.1:{port}/")) == (
        "critical",
        f'Get "http://127.0.0.1:{port}/": {dial}',
    )
    assert await tcp.run(spec(tcp=f"127.0.0.1:{port}")) == ("critical", dial)


async def test_a_tcp_check_passes_where_something_listens() -> None:
    async with server(b"") as (port, _):
        assert await tcp.run(spec(tcp=f"127.0.0.1:{port}")) == ("passing", f"TCP connect 127.0.0.1:{port}: Success")


async def test_a_tcp_check_without_a_port_is_critical() -> None:
    assert await tcp.run(spec(tcp="foo")) == ("critical", "dial tcp: address foo: missing port in address")


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:99999", "dial tcp: address 99999: invalid port"),
        ("127.0.0.1:-1", "dial tcp: address -1: invalid port"),
        ("127.0.0.1:no-such-service", "dial tcp: address tcp/no-such-service: unknown port"),
        ("127.0.0.1:0", "dial tcp 127.0.0.1:0: connect: connection refused"),
        ("127.0.0.1:", "dial tcp 127.0.0.1:0: connect: connection refused"),
    ],
)
async def test_a_port_that_is_none_is_critical_and_said(address: str, says: str) -> None:
    assert await tcp.run(spec(tcp=address)) == ("critical", says)


async def test_the_port_of_a_tcp_check_may_be_the_name_of_a_service() -> None:
    # A reserved address of the loopback network: nobody listens there.
    for name in ("ssh", "SSH"):
        assert await tcp.run(spec(tcp=f"127.255.255.254:{name}")) == (
            "critical",
            "dial tcp 127.255.255.254:22: connect: connection refused",
        )


# -- scripts ----------------------------------------------------------------------------------------------------------


def shell(line: str, **fields: Any) -> CheckSpec:
    return spec(type="script", args=("/bin/sh", "-c", line), **fields)


@pytest.mark.parametrize(("code", "status"), [(0, "passing"), (1, "warning"), (2, "critical"), (77, "critical")])
async def test_the_exit_status_decides_a_script_check(code: int, status: str) -> None:
    assert await script.run(shell(f"echo out; echo err >&2; exit {code}")) == (status, "out\nerr\n")


async def test_a_script_that_does_not_exist_is_critical_and_says_so() -> None:
    missing = await script.run(spec(type="script", args=("/nonexistent",)))
    not_found = await script.run(spec(type="script", args=("no-such-program-here",)))
    assert missing == ("critical", "fork/exec /nonexistent: no such file or directory")
    assert await script.run(spec(type="script", args=("",))) == ("critical", "fork/exec : no such file or directory")
    assert (await script.run(spec(type="script", args=("a\0b",)))).status == "critical"
    assert not_found == ("critical", 'exec: "no-such-program-here": executable file not found in $PATH')


async def test_the_end_of_long_script_output_is_kept() -> None:
    result = await script.run(shell("i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done"))
    assert result.output.startswith("Captured 4096 of 18890 bytes\n...\n")
    assert result.output.endswith("line 1999\n")


async def test_a_script_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    result = await script.run(shell(f"echo hi; sleep 100 & echo $$ $! > {pids}; wait", timeout_s=0.5))
    assert result == ("critical", "Timed out (0.5s) running check\n\nhi\n")
    await eventually(lambda: not any(map(alive, pids.read_text().split())))


async def test_what_a_script_leaves_behind_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    assert (await script.run(shell(f"sleep 100 & echo $! > {pids}"))).status == "passing"
    await eventually(lambda: not any(map(alive, pids.read_text().split())))


async def test_a_cancelled_script_check_kills_the_script(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(script.run(shell(f"echo $$ > {pids}; sleep 100")))
    await eventually(lambda: pids.exists() and pids.read_text())
    task.cancel()
    await eventually(lambda: not any(map(alive, pids.read_text().split())))
    assert task.done()


def test_a_script_dies_with_an_agent_that_was_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    agent = (
        "import socket, subprocess, sys, time\n"
        "ours, theirs = socket.socketpair()\n"
        "fd = theirs.fileno()\n"
        f"line = 'sleep 100 & echo $$ $! > {pids}; wait'\n"
        f"args = [sys.executable, '-I', '-S', {wrapper.__file__!r}, str(fd), '60', '4096', '/bin/sh', '-c', line]\n"
        "subprocess.Popen(args, pass_fds=(fd,))\n"
        "theirs.close()\n"
        "time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", agent])
    try:
        wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(map(alive, pids.read_text().split())))


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def alive(pid: str) -> bool:
    """Running, and not only waiting to be reaped by whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
