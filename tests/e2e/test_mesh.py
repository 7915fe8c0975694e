"""Two services over mutual TLS: sidecars that the agent runs, one that the user runs, and intentions that cut them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest

from tests.support.processes import (
    ROSTRA,
    Agent,
    EchoServer,
    Processes,
    eventually,
    free_port,
    gone,
    is_alive,
    send,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@dataclass
class Mesh:
    """web → api on one agent. `upstream` is where web's sidecar listens for what web sends to api."""

    agent: Agent
    api: EchoServer
    upstream: tuple[str, int]
    public: tuple[str, int]

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.upstream, timeout=5)
        connection.settimeout(5)
        return connection

    def greeted(self) -> bool:
        """Whether a new connection reaches api."""
        with contextlib.suppress(OSError), self.connect() as connection:
            return connection.recv(16) == b"api"
        return False

    def intend(self, action: str) -> None:
        self.agent.said("intention", "create", "-replace", f"-{action}", "web", "api")


def _register(agent: Agent, api: EchoServer, *, supervise: bool = True) -> Mesh:
    """Register both. Their sidecars are checked each second, so that nobody waits ten for the first result."""
    host = agent.host
    public, upstream, web_port = free_port(host), free_port(host), free_port(host)
    config: dict[str, Any] = {} if supervise else {"supervise": False}

    def sidecar(port: int, **proxy: Any) -> dict[str, Any]:
        check = {"TCP": f"{host}:{port}", "Interval": "1s", "Name": "listening"}
        proxy = {"LocalServiceAddress": host, "Config": config, **proxy}
        return {"SidecarService": {"Port": port, "Checks": [check], "Proxy": proxy}}

    up = {"DestinationName": "api", "LocalBindAddress": host, "LocalBindPort": upstream}
    agent.api.done("/v1/agent/service/register", {"Name": "api", "Port": api.port, "Connect": sidecar(public)})
    web = {"Name": "web", "Port": 1, "Connect": sidecar(web_port, Upstreams=[up])}
    agent.api.done("/v1/agent/service/register", web)
    return Mesh(agent, api, (host, upstream), (host, public))


@pytest.fixture(scope="module")
def running(module_processes: Processes) -> Iterator[Mesh]:
    agent = module_processes.dev("mesh-node")
    api = EchoServer(agent.host, "api")
    yield _register(agent, api)
    api.close()


@pytest.fixture
def mesh(running: Mesh) -> Mesh:
    """The module's mesh with traffic allowed."""
    running.intend("allow")
    eventually("web reaches api", running.greeted, 20)
    return running


def test_traffic_flows_both_ways_and_half_closes(mesh: Mesh) -> None:
    data = os.urandom(1 << 20)
    with mesh.connect() as connection:
        received = bytearray(connection.recv(3))
        assert received == b"api"
        received.clear()
        sent = memoryview(data)
        while sent:
            sent = sent[connection.send(sent[:65536]) :]
            received += connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)  # api still owes us what is under way, then closes its side
        while chunk := connection.recv(65536):
            received += chunk
    assert bytes(received) == data


def test_the_agent_runs_both_sidecars_with_checks_that_pass(mesh: Mesh) -> None:
    assert len(mesh.agent.proxy_pids()) == 2
    for name in ("web-sidecar-proxy", "api-sidecar-proxy"):
        eventually(f"{name} passes", partial(mesh.agent.api.passing, name), 10)
    rows = mesh.agent.api.get("/v1/health/connect/api?passing").json()
    assert [(r["Service"]["ID"], r["Service"]["Port"]) for r in rows] == [("api-sidecar-proxy", mesh.public[1])]


def test_the_public_port_answers_nobody_without_a_certificate(mesh: Mesh) -> None:
    before = mesh.api.accepted
    with socket.create_connection(mesh.public, timeout=5) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"api" not in connection.recv(1024)
            assert connection.recv(1024) == b""
    assert mesh.api.accepted == before


def test_deny_closes_an_open_connection_at_once_and_allow_heals(mesh: Mesh) -> None:
    with mesh.connect() as connection:
        assert connection.recv(3) == b"api"
        connection.sendall(b"alive")
        assert connection.recv(5) == b"alive"
        mesh.intend("deny")
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
    before = mesh.api.accepted
    for _ in range(5):
        assert not mesh.greeted()
    assert mesh.api.accepted == before  # decided before api sees anything
    mesh.intend("allow")
    eventually("web reaches api again", mesh.greeted, 5)


def test_an_intention_about_others_leaves_open_connections_alone(mesh: Mesh) -> None:
    with mesh.connect() as connection:
        assert connection.recv(3) == b"api"
        mesh.agent.said("intention", "create", "-replace", "-deny", "other", "api")
        mesh.agent.said("intention", "create", "-replace", "-deny", "*", "api")  # the exact one wins
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
        mesh.agent.said("intention", "delete", "web", "api")  # now `*` decides
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
    mesh.agent.said("intention", "delete", "*", "api")
    mesh.agent.said("intention", "delete", "other", "api")
    eventually("the default is to allow", mesh.greeted, 5)


def test_a_killed_sidecar_is_started_again(mesh: Mesh) -> None:
    before = mesh.agent.proxy_pids()
    for pid in before:
        send(pid, signal.SIGKILL)
    eventually("both are dead", lambda: gone(before), 2)
    eventually("web reaches api again", mesh.greeted, 15)
    assert set(mesh.agent.proxy_pids()).isdisjoint(before)


def test_an_api_that_is_critical_gets_no_traffic(mesh: Mesh) -> None:
    check = {"Name": "broken", "CheckID": "broken", "ServiceID": "api-sidecar-proxy", "TTL": "10m", "Status": "passing"}
    mesh.agent.api.done("/v1/agent/check/register", check)
    assert mesh.greeted()
    mesh.agent.api.done("/v1/agent/check/fail/broken")
    eventually("nobody is there", lambda: not mesh.greeted(), 5)
    mesh.agent.api.done("/v1/agent/check/deregister/broken")
    eventually("it is back", mesh.greeted, 5)


def test_a_deregistered_service_takes_its_sidecar_along(processes: Processes) -> None:
    agent = processes.dev()
    agent.api.done("/v1/agent/service/register", {"Name": "gone", "Port": 1, "Connect": {"SidecarService": {}}})
    [pid] = eventually("its sidecar runs", agent.proxy_pids, 5)
    agent.api.done("/v1/agent/service/deregister/gone")
    eventually("its sidecar ended", lambda: not is_alive(pid), 3)
    assert list(agent.api.get("/v1/agent/services").json()) == []


@pytest.mark.parametrize(("number", "within_s"), [(signal.SIGKILL, 1.0), (signal.SIGTERM, 2.0)])
def test_proxies_end_with_the_agent(processes: Processes, number: int, within_s: float) -> None:
    agent = processes.dev()
    api = EchoServer(agent.host, "api")
    mesh = _register(agent, api)
    eventually("web reaches api", mesh.greeted, 15)
    tree = agent.process.tree()
    assert len(tree) == 4
    with mesh.connect() as connection:
        assert connection.recv(3) == b"api"
        agent.process.send(number)
        assert agent.process.wait(within_s) == (0 if number == signal.SIGTERM else -number)
        eventually("all are gone", lambda: gone(tree), within_s)
    assert processes.left() == []
    api.close()


def test_a_sidecar_that_is_not_supervised_is_the_users_and_outlives_the_agent(processes: Processes) -> None:
    agent = processes.dev()
    api = EchoServer(agent.host, "api")
    mesh = _register(agent, api, supervise=False)
    proxies = [
        processes.start([*ROSTRA, "connect", "proxy", "-sidecar-for", name, f"-http-addr={agent.api.address}"])
        for name in ("web", "api")
    ]
    eventually("web reaches api", mesh.greeted, 15)
    assert agent.proxy_pids() == []
    assert len(agent.process.tree()) == 2
    agent.process.kill_tree()
    assert mesh.greeted()  # with its last snapshot
    assert all(p.popen.poll() is None for p in proxies)
    # A dev agent forgets everything, so what comes back is another cluster; the user's proxies end by their own signal.
    for proxy, number in zip(proxies, (signal.SIGTERM, signal.SIGINT), strict=True):
        assert proxy.stop(number, within_s=2.0) == 0
        assert "Traceback" not in proxy.log
    api.close()


def test_a_proxy_for_a_service_that_is_not_there_says_so(processes: Processes) -> None:
    agent = processes.dev()
    proxy = processes.start([*ROSTRA, "connect", "proxy", "-sidecar-for=nobody", f"-http-addr={agent.api.address}"])
    eventually("it says what is wrong", lambda: "nobody" in proxy.log, 5)
    assert "Traceback" not in proxy.log
