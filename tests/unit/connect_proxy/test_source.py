"""Snapshots from an agent: a small HTTP server that blocks, forgets, restarts and misbehaves."""

from __future__ import annotations

import http.server
import io
import json
import socket
import threading
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from rostra.connect_proxy import source
from rostra.connect_proxy.log import Log
from rostra.connect_proxy.snapshot import Address, Endpoint
from rostra.connect_proxy.source import (
    AgentClient,
    AgentError,
    AgentSource,
    Unreachable,
    sidecars_of,
    with_addresses,
)


class FakeAgent:
    """Serves one snapshot by hash, blocking while it is unchanged; `set` changes it."""

    def __init__(self, port: int = 0, token: str = "") -> None:
        self.changed = threading.Condition()
        self.body, self.version, self.status = b"", 0, 404
        self.services: dict[str, Any] = {}
        self.token = token
        self.paths: list[str] = []
        self.is_stopped = False
        agent = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                agent.paths.append(self.path)
                url = urlsplit(self.path)
                if agent.token and self.headers.get("X-Consul-Token") != agent.token:
                    return self.answer(403, b"Permission denied: no agent:read")
                if url.path == "/v1/agent/services":
                    return self.answer(200, json.dumps(agent.services).encode())
                asked = parse_qs(url.query).get("hash", [""])[0]
                with agent.changed:
                    agent.changed.wait_for(lambda: str(agent.version) != asked or agent.status != 200, 5)
                    status, body, version = agent.status, agent.body, agent.version
                return self.answer(status, body, {"X-Consul-ContentHash": str(version)})

            def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Transfer-Encoding", "chunked")
                self.close_connection = agent.is_stopped
                self.end_headers()
                for piece in (body[:10], body[10:]):
                    if piece:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def set(self, body: bytes, status: int = 200) -> None:
        with self.changed:
            self.body, self.status = body, status
            self.version += 1
            self.changed.notify_all()

    def stop(self) -> None:
        self.is_stopped = True
        self.set(b"gone", 500)
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def agent():
    made = FakeAgent()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(source, "BACKOFF_FIRST_S", 0.02)
    monkeypatch.setattr(source, "BACKOFF_MAX_S", 0.05)
    monkeypatch.setattr(source, "UNKNOWN_GRACE_S", 0.3)


class Received:
    """What a source has handed over, its log and its failure."""

    def __init__(self, url: str, **options: Any) -> None:
        self.snapshots: list[Any] = []
        self.failures: list[str] = []
        self.out = io.StringIO()
        made = AgentSource(
            AgentClient(url, options.pop("token", "")), Log("debug", self.out), self.snapshots.append, **options
        )
        made.start(self.failures.append)


def test_each_new_snapshot_is_handed_over_once(mesh, agent, eventually):
    got = Received(agent.url, proxy_id="web-sidecar-proxy")
    first, second = mesh.snapshot("web"), mesh.snapshot("web", default_allow=False)
    agent.set(first.to_json())
    eventually(lambda: got.snapshots == [first])
    agent.set(second.to_json())
    eventually(lambda: got.snapshots == [first, second])
    eventually(lambda: agent.paths[-1] == "/v1/agent/connect/proxy/web-sidecar-proxy?hash=2&wait=60s")


def test_the_last_snapshot_stays_while_the_agent_is_gone(mesh, eventually):
    agent = FakeAgent()
    got = Received(agent.url, proxy_id="p")
    first, second = mesh.snapshot("web"), mesh.snapshot("web", default_allow=False)
    agent.set(first.to_json())
    eventually(lambda: got.snapshots == [first])
    agent.stop()
    eventually(lambda: 'going-on="with the last snapshot"' in got.out.getvalue())
    agent = FakeAgent(agent.port)
    agent.version = 7
    agent.set(second.to_json())
    eventually(lambda: got.snapshots == [first, second])
    assert "the agent answers again" in got.out.getvalue()
    agent.stop()


def test_a_proxy_that_is_about_to_be_stopped_does_not_complain_and_a_forgotten_one_does(mesh, agent, eventually):
    got = Received(agent.url, proxy_id="p")
    agent.set(mesh.snapshot("web").to_json())
    eventually(lambda: got.snapshots)
    agent.set(b"unknown service ID: p", 404)
    eventually(lambda: "no snapshot from the agent" in got.out.getvalue())
    assert sum("hash=" in path for path in agent.paths) >= 2  # the first refusal says nothing


def test_an_unusable_snapshot_is_told_once_and_not_handed_over(mesh, agent, eventually):
    got = Received(agent.url, proxy_id="p")
    agent.set(b'{"ProxyID": ""}')
    eventually(lambda: "cannot be used: Leaf is missing" in got.out.getvalue())
    good = mesh.snapshot("web")
    agent.set(good.to_json())
    eventually(lambda: got.snapshots == [good])
    assert got.out.getvalue().count("cannot be used") == 1


def test_the_token_is_sent_and_read_again_after_a_refusal(mesh, eventually):
    agent = FakeAgent(token="new")
    agent.set(mesh.snapshot("web").to_json())
    got = Received(agent.url, proxy_id="p", token="old", read_token=lambda: "new")
    eventually(lambda: len(got.snapshots) == 1)
    assert "the agent answered 403: Permission denied: no agent:read" in got.out.getvalue()
    agent.stop()


SIDECAR = {"Kind": "connect-proxy", "ID": "web1-sidecar-proxy", "Proxy": {"DestinationServiceID": "web1"}}


def test_the_sidecar_of_a_service_is_found(mesh, agent, eventually):
    agent.services = {"web1": {"Kind": "", "ID": "web1"}, "web1-sidecar-proxy": SIDECAR}
    agent.set(mesh.snapshot("web").to_json())
    got = Received(agent.url, sidecar_for="web1")
    eventually(lambda: len(got.snapshots) == 1)
    assert "/v1/agent/connect/proxy/web1-sidecar-proxy" in agent.paths


def test_a_service_without_sidecar_is_an_error_after_a_moment(agent, eventually):
    got = Received(agent.url, sidecar_for="web1")
    eventually(lambda: got.failures)
    assert "no sidecar proxy of the service with ID 'web1'" in got.failures[0]


def test_a_service_with_several_sidecars_is_an_error_at_once(agent, eventually):
    agent.services = {"a": {**SIDECAR, "ID": "a"}, "b": {**SIDECAR, "ID": "b"}}
    got = Received(agent.url, sidecar_for="web1")
    eventually(lambda: got.failures)
    assert "(a, b): choose with -proxy-id" in got.failures[0]


def test_an_agent_that_is_not_up_yet_is_waited_for(mesh, eventually):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    got = Received(f"http://127.0.0.1:{port}", sidecar_for="web1")
    eventually(lambda: "no answer from the agent" in got.out.getvalue())
    agent = FakeAgent(port)
    agent.services = {"s": SIDECAR}
    agent.set(mesh.snapshot("web").to_json())
    eventually(lambda: len(got.snapshots) == 1)
    assert got.failures == []
    agent.stop()


def test_services_that_are_no_proxies_are_not_sidecars():
    services = {
        "x": {"Kind": "", "Proxy": {"DestinationServiceID": "web1"}},
        "y": {"Kind": "connect-proxy", "Proxy": None},
        "z": SIDECAR,
    }
    assert sidecars_of(services, "web1") == ["web1-sidecar-proxy"]


def answers(reply: bytes) -> AgentClient:
    """A client of a server that gives this reply to anything, then hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(reply)

    threading.Thread(target=serve, daemon=True).start()
    return AgentClient(f"127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"SSH-2.0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
        b"x" * 100_000,
    ],
)
def test_a_broken_answer_is_an_error(reply):
    with pytest.raises(Unreachable):
        answers(reply).get("/", 2)


def test_an_answer_without_length_ends_with_the_connection():
    assert answers(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 200 OK\r\n\r\nbody").get("/", 2).body == b"body"


def test_an_agent_behind_a_unix_socket_is_asked(tmp_path):
    path = str(tmp_path / "http.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    threading.Thread(target=serve, daemon=True).start()
    assert AgentClient(f"unix://{path}").get("/", 2).body == b"ok"
    listener.close()


def test_an_address_that_makes_no_sense_is_refused():
    with pytest.raises(AgentError, match="scheme"):
        AgentClient("ftp://x")
    with pytest.raises(AgentError, match="port"):
        AgentClient("http://x:port")


def test_host_names_become_addresses(mesh):
    upstream = mesh.upstream("web", ("proxy.example", 1), ("10.0.0.1", 2))
    snapshot = mesh.snapshot("caller", local=Address("localhost", 80), upstreams=(upstream,))
    found = with_addresses(snapshot, {"proxy.example": "192.0.2.7"}.__getitem__)
    assert found.local == Address("127.0.0.1", 80)
    assert found.upstreams[0].endpoints == (Endpoint("192.0.2.7", 1), Endpoint("10.0.0.1", 2))
