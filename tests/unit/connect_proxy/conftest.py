"""A mesh of real proxies on ephemeral loopback ports, each on a thread of its own, with real certificates."""

from __future__ import annotations

import dataclasses
import io
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "support"))

from mesh_certs import LeafPair, MeshCA, service_uri

from rostra.connect_proxy.log import Log
from rostra.connect_proxy.serve import Limits, Proxy
from rostra.connect_proxy.snapshot import Address, Endpoint, Leaf, ProxySnapshot, Upstream
from tests.support.waiting import PATIENCE


def eventually(condition: Callable[[], Any], within_s: float = 5.0) -> Any:
    """The first true value of `condition`; fails when there is none in time."""
    deadline = time.monotonic() + within_s * PATIENCE
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def as_leaf(pair: LeafPair) -> Leaf:
    return Leaf(pair.cert_pem, pair.key_pem, pair.serial, pair.valid_after_ms, pair.valid_before_ms)


class RunningProxy:
    """A proxy on its thread. `apply` waits until the snapshot is in force."""

    def __init__(self, limits: Limits) -> None:
        self.out = io.StringIO()
        self.proxy = Proxy(Log("debug", self.out), limits)
        self._thread = threading.Thread(target=self.proxy.run, daemon=True)
        self._thread.start()

    @property
    def log(self) -> str:
        return self.out.getvalue()

    @property
    def stats(self) -> dict[str, Any]:
        return self.on_loop(self.proxy.stats)

    @property
    def snapshot(self) -> ProxySnapshot:
        assert self.proxy.snapshot is not None
        return self.proxy.snapshot

    def on_loop(self, call: Callable[[], Any]) -> Any:
        done, result = threading.Event(), list[Any]()

        def answer() -> None:
            result.append(call())
            done.set()

        self.proxy.loop.post(answer)
        assert done.wait(5), "the loop hangs"
        return result[0]

    def apply(self, snapshot: ProxySnapshot) -> bool:
        return bool(self.on_loop(lambda: self.proxy.apply(snapshot)))

    def change(self, **fields: Any) -> bool:
        return self.apply(dataclasses.replace(self.snapshot, **fields))

    def address(self, listener: str = "public") -> tuple[str, int]:
        def bound() -> str:
            found = self.stats["listeners"]
            return next((a for name, a in found.items() if name.split("@")[0] == listener and a), "")

        host, _, port = eventually(bound).rpartition(":")
        return host, int(port)

    def connect(self, listener: str) -> socket.socket:
        return socket.create_connection(self.address(listener), 5)

    def stop(self) -> None:
        self.proxy.stop()
        self._thread.join(5)
        assert not self._thread.is_alive()
        assert "internal error" not in self.log, self.log


class App:
    """A TCP application: `serve(connection)` runs on a thread for each connection."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = self._listener.getsockname()
        self.open: list[socket.socket] = []
        self._serve = serve
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.settimeout(20)
            self.open.append(connection)
            threading.Thread(target=self._guarded, args=(connection,), daemon=True).start()

    def _guarded(self, connection: socket.socket) -> None:
        try:
            self._serve(connection)
        except OSError:
            pass

    def stop(self) -> None:
        self._listener.close()
        for connection in self.open:
            connection.close()


def echo(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


class Mesh:
    """Starts proxies and applications of one trust domain and stops them all."""

    def __init__(self) -> None:
        self.ca = MeshCA()
        self._proxies: list[RunningProxy] = []
        self._apps: list[App] = []

    def app(self, serve: Callable[[socket.socket], None] = echo) -> App:
        app = App(serve)
        self._apps.append(app)
        return app

    def proxy(self, service: str, *, limits: Limits | None = None, apply: bool = True, **fields: Any) -> RunningProxy:
        running = RunningProxy(limits or Limits())
        self._proxies.append(running)
        if apply:
            assert running.apply(self.snapshot(service, **fields)), running.log
        return running

    def snapshot(
        self, service: str, *, ca: MeshCA | None = None, leaf: LeafPair | None = None, **fields: Any
    ) -> ProxySnapshot:
        ca = ca or self.ca
        made: dict[str, Any] = {
            "proxy_id": f"{service}-sidecar-proxy",
            "service": service,
            "trust_domain": ca.trust_domain,
            "datacenter": "dc1",
            "leaf": as_leaf(leaf or ca.leaf(service)),
            "roots": (self.ca.cert_pem,),
            "default_allow": True,
        }
        return ProxySnapshot(**(made | fields))

    def upstream(self, name: str, *endpoints: tuple[str, int], identity: str = "", **fields: Any) -> Upstream:
        return Upstream(
            name,
            Address("127.0.0.1", 0),
            "dc1",
            identity or service_uri(name, self.ca.trust_domain),
            tuple(Endpoint(host, port) for host, port in endpoints),
            **fields,
        )

    def server(self, app: App, service: str = "web", **fields: Any) -> RunningProxy:
        return self.proxy(service, public=Address("127.0.0.1", 0), local=Address(*app.address), **fields)

    def client(self, server: RunningProxy, service: str = "caller", **fields: Any) -> RunningProxy:
        return self.proxy(service, upstreams=(self.upstream("web", server.address()),), **fields)

    def stop(self) -> None:
        for app in self._apps:
            app.stop()
        for running in self._proxies:
            running.stop()


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    made = Mesh()
    yield made
    made.stop()


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    return eventually


@pytest.fixture(name="as_leaf")
def _as_leaf() -> Callable[[LeafPair], Leaf]:
    return as_leaf
