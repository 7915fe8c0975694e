"""One real Consul agent to compare with, where ROSTRA_CONSUL_BIN names its program."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

CONSUL = os.environ.get("ROSTRA_CONSUL_BIN", "")
needs_consul = pytest.mark.skipif(not CONSUL, reason="ROSTRA_CONSUL_BIN names no consul binary to compare with")
START_S = 30.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Asked:
    """An HTTP API, asked over one connection that is kept."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=20)

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, the decoded JSON or the text)."""
        data = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
        self._connection.request(method, path, data, headers)
        with self._connection.getresponse() as answer:
            got = answer.read()
            status = answer.status
        try:
            return status, json.loads(got)
        except ValueError:
            return status, got.decode().strip()

    def close(self) -> None:
        self._connection.close()


@contextlib.contextmanager
def running_consul() -> Iterator[tuple[str, int]]:
    """Where a fresh one listens, once it has a leader and knows itself."""
    http_port, server, lan = free_ports(3)
    ports = f"-http-port={http_port} -server-port={server} -serf-lan-port={lan} -serf-wan-port=-1 -dns-port=-1"
    process = subprocess.Popen(
        [CONSUL, "agent", "-dev", "-node=o", "-bind=127.0.0.1", "-grpc-port=-1", *ports.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_leader(http_port)
        yield "127.0.0.1", http_port
    finally:
        process.kill()
        process.wait()


def _wait_for_leader(port: int) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        ask = Asked("127.0.0.1", port)
        with contextlib.suppress(OSError, http.client.HTTPException):
            if (ask("GET", "/v1/health/node/o")[1] or [{}])[0].get("Status") == "passing":
                return
        ask.close()
        time.sleep(0.05)
    pytest.fail(f"consul has no leader after {START_S:g} s")
