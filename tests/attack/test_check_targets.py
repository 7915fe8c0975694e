"""Targets of HTTP checks that send what never ends, in the smallest pieces: the agent goes on answering everybody else,
and what it keeps of them is bounded."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support import processes as support
from tests.support.processes import Agent, Ports, eventually, new_host

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
#: What is sent first, what is sent again and again, and what becomes of the check.
TARGETS = {
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n" * 10_000, "passing"),
    "a body without an end": (HEAD + b"\r\n", b"x" * 60_000, "passing"),
    "a head without an end": (HEAD, b"A: b\r\n" * 10_000, "critical"),
    "a line without an end": (HEAD, b"A" * 60_000, "critical"),
    "a chunk's line without an end": (CHUNKED, b"1" * 60_000, "passing"),
    "interim answers without an end": (b"", b"HTTP/1.1 103 E\r\n\r\n" * 3000, "critical"),
    "garbage": (b"", b"\x00\n\r" * 20_000, "critical"),
}
PATIENCE_S = 1.0


class Target:
    """Sends to whoever connects, as fast as it is taken."""

    def __init__(self, head: bytes, again: bytes) -> None:
        self._head, self._again = head, again
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.asked = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.asked += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            connection.recv(65536)
            connection.sendall(self._head)
            while True:
                connection.sendall(self._again)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with support.processes() as processes:
        host = new_host()
        agent = processes.agent("n1", "-dev", host=host, ports=Ports.free(host))
        eventually("n1 is registered", agent.is_registered, 30)
        yield agent
        assert "Traceback" not in agent.process.log


def check(agent: Agent, name: str) -> dict[str, str]:
    found: dict[str, str] = agent.api.get("/v1/agent/checks").json().get(name, {})
    return found


@pytest.mark.parametrize("what", TARGETS)
def test_a_target_that_never_ends_holds_nobody_up_and_its_status_line_decides(agent: Agent, what: str) -> None:
    head, again, status = TARGETS[what]
    targets = [Target(head, again) for _ in range(4)]
    slowest_s = 0.0
    try:
        for i, target in enumerate(targets):
            body = {
                "ID": f"c{i}",
                "Name": f"c{i}",
                "HTTP": f"http://127.0.0.1:{target.port}/",
                "Interval": "1s",
                "Timeout": "5s",
                "Status": "warning",
            }
            agent.api.done("/v1/agent/check/register", body)
        until = time.monotonic() + 20
        while any(check(agent, f"c{i}").get("Status") == "warning" for i in range(len(targets))):
            began = time.monotonic()
            assert began < until, "a check never came to an end"
            assert agent.api.get("/v1/status/leader").status == 200
            slowest_s = max(slowest_s, time.monotonic() - began)
        found = [check(agent, f"c{i}") for i in range(len(targets))]
        assert [c["Status"] for c in found] == [status] * len(targets)
        assert all(len(c["Output"]) < 4500 for c in found)
        assert slowest_s < PATIENCE_S
    finally:
        for i, target in enumerate(targets):
            agent.api.put(f"/v1/agent/check/deregister/c{i}")
            target.close()
