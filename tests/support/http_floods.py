"""Floods of HTTP, one a process: `python -m tests.support.http_floods KIND HOST PORT SECONDS`. Prints what it sent."""

from __future__ import annotations

import socket
import sys
import threading
import time

GET = b"GET /v1/kv/flood?raw HTTP/1.1\r\nHost: x\r\n\r\n"
PUT = b"PUT /v1/kv/flood HTTP/1.1\r\nHost: x\r\n"

#: What is sent again and again on one connection.
STREAMS = {
    "chunks": PUT + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 50_000 + b"0\r\n\r\n",
    "extensions": PUT
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + (b"1;" + b"a" * 60 + b"\r\nx\r\n") * 5000
    + b"0\r\n\r\n",
    "ends": PUT + b"Transfer-Encoding: chunked\r\n\r\n" + b"4\r\n\r\n\r\n\r\n" * 20_000 + b"0\r\n\r\n",
    "pipelined": GET * 1000,
    "headers": GET[:-2] + b"".join(b"X-%d: y\r\n" % i for i in range(1900)) + b"\r\n",
    "unknown": b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,
    "malformed": b"GET\r\n\r\n",
    "upgrades": (GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n") * 200,
    "blank": b"\r\n" * 10_000,
}
KINDS = [*STREAMS, "trickle"]


def stream(at: tuple[str, int], data: bytes, stop: float) -> int:
    sent = 0
    while time.monotonic() < stop:
        with socket.create_connection(at) as connection:
            connection.settimeout(1.0)
            threading.Thread(target=read, args=(connection,), daemon=True).start()
            try:
                while time.monotonic() < stop:
                    sent += connection.send(data)
            except OSError:  # also where it does not take more within a second
                pass
    return sent


def read(connection: socket.socket) -> None:
    try:
        while connection.recv(1 << 20):
            pass
    except OSError:
        pass


def trickle(at: tuple[str, int], stop: float) -> int:
    """A hundred heads, byte by byte."""
    connections = [socket.create_connection(at) for _ in range(100)]
    sent = 0
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = GET[:-4] + b"\r\nX: " + b"y" * 50_000
    while time.monotonic() < stop:
        for connection in connections:
            sent += connection.send(head[sent // 100 % len(head) :][:1])
    return sent


def main(kind: str, host: str, port: str, seconds: str) -> None:
    at, stop = (host, int(port)), time.monotonic() + float(seconds)
    print(trickle(at, stop) if kind == "trickle" else stream(at, STREAMS[kind], stop))


if __name__ == "__main__":
    main(*sys.argv[1:])
