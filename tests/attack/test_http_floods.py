"""Clients that flood an agent's HTTP port, stop in the middle, or only hold connections: others do not feel it.

A real agent. The short form asks for half a second of each kind, the long one for 30 s of each and of eight at once.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest

from tests.support.floods import Flood, long_steps, metric
from tests.support.http_floods import KINDS
from tests.support.processes import Agent, Processes, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

STEP_MS_MAX = 25  # the rule is 5 ms; a machine that others use adds what is not ours
IDLE = 300


@pytest.fixture(scope="module")
def agent(module_processes: Processes) -> Agent:
    agent = module_processes.dev("flooded", "-hcl=limits { http_max_conns_per_client = 10000 }")
    agent.api.put("/v1/kv/mine", b"mine")
    return agent


def _flood(agent: Agent, seconds: float, *kinds: str) -> Flood:
    return Flood("tests.support.http_floods", kinds, agent.host, str(agent.ports.http), str(seconds))


@pytest.fixture
def unhurt(agent: Agent) -> Iterator[None]:
    """What must be as before once a flood has ended."""
    long_before, lines_before = long_steps(agent, STEP_MS_MAX), agent.process.log.count("\n")
    yield
    assert long_steps(agent, STEP_MS_MAX) == long_before
    assert agent.api.check_status("flooded") == "passing"
    assert agent.process.log.count("\n") - lines_before < 10
    eventually("its connections are gone", lambda: metric(agent, "http.connections") < 5, 15)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flood_neither_holds_the_loop_nor_keeps_others_waiting(kind: str, agent: Agent, unhurt: None) -> None:
    answered = 0
    while answered <= 3:
        flood = _flood(agent, 0.5, kind)
        while flood.is_on:
            assert agent.api.get("/v1/kv/mine?raw").body == b"mine"
            answered += 1
        assert min(flood.done()) > 0


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kinds", [*([kind] for kind in KINDS), KINDS[:8], ["chunks"] * 8], ids="+".join)
def test_floods_of_30_s_leave_no_trace(kinds: list[str], agent: Agent, unhurt: None) -> None:
    before = metric(agent, "runtime.rss_bytes")
    flood = _flood(agent, 30.0, *kinds)
    while flood.is_on:
        assert agent.api.get("/v1/kv/mine?raw").body == b"mine"
        assert agent.api.check_status("flooded") == "passing"
    flood.done()
    eventually("memory is back", lambda: metric(agent, "runtime.rss_bytes") < before * 1.1 + (32 << 20), 15)


def _hold(agent: Agent, count: int) -> None:
    kept = [socket.create_connection((agent.host, agent.ports.http)) for _ in range(count)]
    try:
        for i, connection in enumerate(kept):
            if i % 3 == 1:
                connection.sendall(b"GET /v1/kv/mi")
            elif i % 3 == 2:
                connection.sendall(b"GET /v1/kv/mine?index=99999999&wait=60s HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually("all are there", lambda: metric(agent, "http.connections") > count, 30)
        for _ in range(20):
            assert agent.api.get("/v1/kv/mine?raw").body == b"mine"
    finally:
        for connection in kept:  # by a reset: who only closes may have closed its sending side only
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()


def test_connections_that_are_only_held_cost_others_nothing(agent: Agent, unhurt: None) -> None:
    _hold(agent, IDLE)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_five_thousand_connections_that_are_only_held_cost_others_nothing(agent: Agent, unhurt: None) -> None:
    _hold(agent, 5000)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_head_that_trickles_for_30_s_is_refused(agent: Agent) -> None:
    with socket.create_connection((agent.host, agent.ports.http), timeout=0.5) as connection:
        told = b""
        for _ in range(80):
            connection.sendall(b"G" if not told else b"")
            try:
                told = connection.recv(1000)
                break
            except TimeoutError:
                continue
    assert told.startswith(b"HTTP/1.1 408 ")
