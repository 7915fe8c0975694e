"""The HTTP client: addresses, tokens, and what it says when things fail."""

import os
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("CONSUL_", "ROSTRA_")) and name != "ROSTRA_CONSUL_BIN":
            monkeypatch.delenv(name)


@pytest.fixture
def datacenters(agent: Any) -> Any:
    agent.on("GET", "/v1/catalog/datacenters", ["dc1"])
    return agent


@pytest.mark.parametrize("form", ["{}", "http://{}", "http://{}/"])
def test_the_address_may_have_a_scheme(rostra_cli: Any, datacenters: Any, form: str) -> None:
    assert rostra_cli("catalog", "datacenters", f"-http-addr={form.format(datacenters.address)}").out == "dc1\n"


def test_rostras_environment_wins_over_consuls_and_the_flag_over_both(
    rostra_cli: Any, datacenters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSUL_HTTP_ADDR", "127.0.0.1:1")
    assert rostra_cli("catalog", "datacenters").status == 1
    monkeypatch.setenv("ROSTRA_HTTP_ADDR", datacenters.address)
    assert rostra_cli("catalog", "datacenters").status == 0
    assert rostra_cli("catalog", "datacenters", "-http-addr=127.0.0.1:1").status == 1


def test_a_unix_socket_can_be_the_address(rostra_cli: Any, tmp_path: Path) -> Any:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'["over-unix"]')

        def address_string(self) -> Any:
            return "unix"

        def log_message(self, *_args: str) -> None:
            pass

    path = f"{tmp_path}/a.sock"
    with ThreadingUnixStreamServer(path, Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        done = rostra_cli("catalog", "datacenters", f"-http-addr=unix://{path}")
        server.shutdown()
        thread.join()
    assert done == (0, "over-unix\n", "")


def test_a_missing_unix_socket_is_one_line(rostra_cli: Any) -> None:
    done = rostra_cli("catalog", "datacenters", "-http-addr=unix:///nonexistent/a.sock")
    assert done.status == 1
    assert "cannot reach the agent at unix:///nonexistent/a.sock: no such file or directory" in done.err


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://x:1", "the address of an agent is host:port, http://…, https://… or unix://PATH"),
        ("127.0.0.1:http", "'http' is no port"),
        ("host.invalid:8500", "unknown host name"),
    ],
)
def test_an_address_that_is_none_is_one_line(rostra_cli: Any, address: str, words: Any) -> None:
    done = rostra_cli("members", f"-http-addr={address}")
    assert done.status == 1
    assert words in done.err
    assert done.err.count("\n") == 1


def test_http_spoken_to_a_tls_client_is_one_line(rostra_cli: Any, datacenters: Any) -> None:
    done = rostra_cli("members", f"-http-addr=https://{datacenters.address}")
    assert "no TLS with the agent at https://" in done.err
    assert done.err.count("\n") == 1


def test_tokens_come_from_flag_file_or_environment(
    rostra_cli: Any, datacenters: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Any:
    def token_sent(*flags: str) -> Any:
        rostra_cli("catalog", "datacenters", f"-http-addr={datacenters.address}", *flags)
        return datacenters.asked[-1].headers.get("X-Consul-Token")

    (tmp_path / "token").write_text("from-file\n")
    assert token_sent() is None
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", "from-environment")
    assert token_sent() == "from-environment"
    assert token_sent(f"-token-file={tmp_path}/token") == "from-file"
    assert token_sent("-token=from-flag") == "from-flag"
    monkeypatch.delenv("CONSUL_HTTP_TOKEN")
    monkeypatch.setenv("CONSUL_HTTP_TOKEN_FILE", f"{tmp_path}/token")
    assert token_sent() == "from-file"


def test_a_missing_token_file_is_one_line(rostra_cli: Any, datacenters: Any) -> None:
    done = rostra_cli("members", "-token-file=/nonexistent")
    assert done.err == (
        "Error retrieving members: cannot read the token file /nonexistent: no such file or directory\n"
    )


def test_datacenter_and_stale_go_into_the_query(rostra_cli: Any, datacenters: Any) -> None:
    rostra_cli("catalog", "datacenters", f"-http-addr={datacenters.address}", "-datacenter=dc2", "-stale")
    assert datacenters.asked[-1].query == {"dc": "dc2", "stale": ""}


def test_a_refusal_shows_the_agents_reason(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/agent/self", b"Permission denied: token lacks agent:read on n1", 403)
    assert rostra_cli("info", f"-http-addr={agent.address}").err == (
        "Error querying agent: Unexpected response code: 403 (Permission denied: token lacks agent:read on n1); "
        "give a token with -token or CONSUL_HTTP_TOKEN\n"
    )
    agent.on("GET", "/v1/agent/self", b"No cluster leader", 500)
    assert rostra_cli("info", f"-http-addr={agent.address}").err == (
        "Error querying agent: Unexpected response code: 500 (No cluster leader)\n"
    )


def test_something_that_is_no_agent_is_recognised(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/agent/self", b"<html>hello</html>")
    assert "does not answer like an agent: no JSON" in rostra_cli("info", f"-http-addr={agent.address}").err


def test_an_address_without_a_port_is_told_which_port_agents_use(rostra_cli: Any) -> None:
    done = rostra_cli("members", "-http-addr=127.0.23.11")
    assert "127.0.23.11, port 80: connection refused; agents use 8500" in done.err
