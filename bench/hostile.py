"""Hostile clients, one process each, and what others notice of them: `bench/steps.py --hostile` measures with it.

Each kind is one connection that sends as fast as it is taken, and opens the next one when it is ended. The attackers
run at the lowest priority, so that what is measured is what the victim gives them, not what the machine does.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from processes import DNS, ENVIRONMENT, HTTP, Node, rss_mb

from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import parse_secrets
from rostra.wire.frames import frame, pack
from rostra.wire.rpc import hello

RPC = 8300
SIDECAR = "attacked-sidecar-proxy"
TARGET_PORT = 18_181
PIECE = 64 << 10


# -- what is sent -----------------------------------------------------------------------------------------------------


def again(one: bytes) -> Iterator[bytes]:
    return itertools.repeat(one * (PIECE // len(one) or 1))


def watches() -> Iterator[bytes]:
    for i in itertools.count(1, 1000):
        yield b"".join(
            frame(pack((n, "watch", "kv.list", {"prefix": f"p{n}/"}, ""))) + frame(pack((n, "cancel")))
            for n in range(i, i + 1000)
        )


QUESTION = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x06consul\x07service\x06consul\x00\x00\x01\x00\x01"
CHUNKED = b"PUT /v1/kv/hostile HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

RPC_KINDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "rpc-credit": lambda: again(frame(pack((7, "credit", 1)))),
    "rpc-cancel": lambda: again(frame(pack((7, "cancel")))),
    "rpc-ping": lambda: again(frame(pack((7, "ping")))),
    "rpc-barrier": lambda: again(frame(pack((7, "barrier", "default", 0)))),
    "rpc-unknown": lambda: again(frame(pack((7, "sing")))),
    "rpc-watch": watches,
}
TCP_KINDS: dict[str, tuple[int, Callable[[], Iterator[bytes]]]] = {
    "dns-tcp": (DNS, lambda: again(len(QUESTION).to_bytes(2, "big") + QUESTION)),
    "http-pipeline": (HTTP, lambda: again(b"GET /v1/kv/honest?stale HTTP/1.1\r\nHost: x\r\n\r\n")),
    "http-chunks": (HTTP, lambda: itertools.chain([CHUNKED], again(b"1\r\nx\r\n"))),
    "proxy": (HTTP, lambda: again(f"GET /v1/agent/connect/proxy/{SIDECAR} HTTP/1.1\r\nHost: x\r\n\r\n".encode())),
}
KINDS = ["dns-tcp", "dns-udp", *RPC_KINDS, "http-pipeline", "http-chunks", "check", "proxy"]
EIGHT = ["dns-tcp", "dns-udp", "rpc-credit", "rpc-unknown", "rpc-watch", "http-pipeline", "http-chunks", "check"]


# -- the attacker, a process of its own -------------------------------------------------------------------------------


def identity(fleet: Path) -> NodeIdentity:
    """The attackers', enrolled as any node may be that has the secret."""
    secret = json.loads((fleet / "agents.json").read_text())["encrypt"]
    return NodeIdentity.open(fleet / "hostile", "hostile", parse_secrets(secret))


def attack(kind: str, host: str, directory: str) -> None:
    """For ever. `directory`: the fleet's."""
    os.nice(19)
    if kind == "check":
        be_target(host)
    elif kind == "dns-udp":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect((host, DNS))
            while True:
                with contextlib.suppress(OSError):
                    for _ in range(1000):
                        udp.send(QUESTION)
    while True:
        with contextlib.suppress(OSError):
            if kind in RPC_KINDS:
                node = identity(Path(directory))
                plain = socket.create_connection((host, RPC), 10)
                connection = node.client_context().wrap_socket(plain, server_hostname="x")
                about = {"name": node.node_name, "node_id": node.node_id, "address": host, "version": "0"}
                connection.sendall(frame(hello("rpc", **about)))
                connection.recv(4096)
                flood(connection, RPC_KINDS[kind]())
            else:
                port, blobs = TCP_KINDS[kind]
                flood(socket.create_connection((host, port), 10), blobs())
        time.sleep(0.01)


def flood(connection: Any, blobs: Iterator[bytes]) -> None:
    """Sends, and takes the answers away, until the other side ends it."""
    ended = threading.Event()

    def take() -> None:
        with contextlib.suppress(OSError):
            while connection.recv(1 << 18):
                pass
        ended.set()

    connection.settimeout(None)
    threading.Thread(target=take, daemon=True).start()
    with contextlib.suppress(OSError):
        for blob in blobs:
            if ended.is_set():
                break
            connection.sendall(blob)
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def be_target(host: str) -> None:
    listener = socket.create_server((host, TARGET_PORT))
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for blob in again(b"1\r\nx\r\n"):
                connection.sendall(blob)


class Attackers:
    """Use as `with Attackers(kinds, agent, server, directory)`."""

    def __init__(self, kinds: list[str], agent: Node, server: Node, directory: Path) -> None:
        self._agent = agent
        self._commands = [
            [sys.executable, __file__, kind, server.address if kind in RPC_KINDS else agent.address, str(directory)]
            for kind in kinds
        ]
        self._checks = "check" in kinds
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> None:
        self._running = [subprocess.Popen(c, env=ENVIRONMENT, stderr=subprocess.DEVNULL) for c in self._commands]
        if self._checks:
            url = f"http://{self._agent.address}:{TARGET_PORT}/"
            check = {"ID": "attacked", "Name": "attacked", "HTTP": url, "Interval": "1s", "Timeout": "10s"}
            self._agent.put("/v1/agent/check/register", check)

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            process.kill()
            process.wait()
        if self._checks:
            self._agent.put("/v1/agent/check/deregister/attacked")


# -- what others notice -----------------------------------------------------------------------------------------------


class Others:
    """A client that reads and writes at each of `nodes`, one request at a time; how long each took, in ms."""

    def __init__(self, nodes: list[Node]) -> None:
        self._nodes, self._stop = nodes, threading.Event()
        self.took_ms: list[float] = []
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(node,)) for node in nodes]

    def __enter__(self) -> Others:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, node: Node) -> None:
        connection = http.client.HTTPConnection(node.address, HTTP, timeout=30)
        for n in itertools.count():
            if self._stop.is_set():
                return
            began = time.perf_counter()
            try:
                if n % 10:
                    connection.request("GET", f"/v1/kv/honest?n={n % 7}")
                else:
                    connection.request("PUT", f"/v1/kv/honest-{node.name}", str(n))
                answer = connection.getresponse()
                answer.read()
                if answer.status not in (200, 404):
                    self.failed.append(f"{node.name}: {answer.status}")
            except (OSError, http.client.HTTPException) as e:
                self.failed.append(f"{node.name}: {e!r}")
                connection.close()
            self.took_ms.append((time.perf_counter() - began) * 1000)
            time.sleep(0.005)

    def percentile(self, percent: int) -> float:
        return statistics.quantiles(self.took_ms, n=100, method="inclusive")[percent - 1]


def resident_mb(nodes: list[Node]) -> float:
    return sum(rss_mb(pid) for node in nodes for pid in {node.process.pid, node.core_pid()} - {0} if node.process)


def sidecar() -> dict[str, Any]:
    """The registration of a proxy that nobody runs, so that its snapshot can be asked for."""
    return {
        "Kind": "connect-proxy",
        "ID": SIDECAR,
        "Name": SIDECAR,
        "Port": 21_999,
        "Proxy": {"DestinationServiceName": "attacked", "Config": {"supervise": False}},
    }


if __name__ == "__main__":
    attack(*sys.argv[1:])
