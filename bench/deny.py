"""How long from an intention that denies to the end of an open connection, and from a failing check to DNS?

    python bench/deny.py [--rounds 10]

Three servers and two client agents; `web` on one reaches `api` on the other through the sidecars that the agents
supervise. Each round opens a connection through them, denies it at a server, and notes when its end arrives and that a
new one is refused; then allows it again. Afterwards the answer of api's HTTP check is turned over and DNS is asked at a
server's and at the other client's agent until it follows. Exit status 1 for a missed bar.
"""

from __future__ import annotations

import random
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from processes import DNS, Failure, Fleet, Node, Verdicts, eventually, guarded, median, parser, spread

UPSTREAM, BACKEND, HEALTH = 9191, 9001, 9002
INTERVAL_S = 1.0


class Backend:
    """What stands behind `api`: a TCP port that says everything back, and a page that its check asks."""

    def __init__(self, host: str) -> None:
        self.healthy = True
        backend = self

        class Page(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if backend.healthy else 503)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._page = ThreadingHTTPServer((host, HEALTH), Page)
        self._page.daemon_threads = True
        self._listener = socket.create_server((host, BACKEND))
        for work in (self._page.serve_forever, self._accept):
            threading.Thread(target=work, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(4096):
                    connection.sendall(data)
            except OSError:
                pass


def reach(host: str) -> socket.socket:
    """A connection to `api` through web's sidecar, proved by an echo. Raises OSError."""
    connection = socket.create_connection((host, UPSTREAM), 2.0)
    try:
        connection.sendall(b"hello")
        if connection.recv(5, socket.MSG_WAITALL) != b"hello":
            raise OSError("no echo")
        return connection
    except OSError:
        connection.close()
        raise


def set_intention(node: Node, action: str) -> None:
    node.put("/v1/connect/intentions/exact?source=web&destination=api", {"Action": action})


def deny_once(at: Node, host: str) -> float:
    """Seconds from sending the intention to the end of the open connection."""
    set_intention(at, "allow")
    with eventually("api through the sidecars", 15, lambda: reach(host)) as connection:
        time.sleep(0.3 + random.random() / 5)  # nothing else that is still on its way ends it
        connection.sendall(b"again")
        if connection.recv(5, socket.MSG_WAITALL) != b"again":
            raise Failure("an allowed connection ended by itself")
        connection.settimeout(10)
        began = time.monotonic()
        set_intention(at, "deny")
        try:
            ended = connection.recv(1) == b""
        except TimeoutError:
            return float("inf")
        except OSError:
            ended = True  # a reset
        took = time.monotonic() - began
    if not ended:
        raise Failure("the backend said something that nobody asked for")
    try:
        reach(host).close()
    except OSError:
        return took
    raise Failure("a new connection was let through after the deny")


def is_in_dns(node: Node) -> bool:
    question = b"\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03api\x07service\x06consul\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(1.0)
        udp.sendto(question, (node.address, DNS))
        return int.from_bytes(udp.recv(4096)[6:8], "big") > 0


def follow(nodes: list[Node], backend: Backend, healthy: bool) -> float:
    """Turn the check's answer over; seconds until DNS at the last of `nodes` follows."""
    time.sleep(random.random() * INTERVAL_S)
    backend.healthy = healthy
    began = time.monotonic()
    for node in nodes:
        eventually(f"DNS at {node.name}", 10, lambda node=node: is_in_dns(node) == healthy, every_s=0.005)
    return time.monotonic() - began


def register(web: Node, api: Node) -> None:
    def sidecar(at: Node, **proxy: object) -> dict[str, object]:
        return {"SidecarService": {"Proxy": {"LocalServiceAddress": at.address, **proxy}}}

    api.put(
        "/v1/agent/service/register",
        {
            "Name": "api",
            "Port": BACKEND,
            "Check": {"HTTP": f"http://{api.address}:{HEALTH}/", "Interval": f"{INTERVAL_S:g}s", "Timeout": "1s"},
            "Connect": sidecar(api),
        },
    )
    upstream = {"DestinationName": "api", "LocalBindAddress": web.address, "LocalBindPort": UPSTREAM}
    web.put("/v1/agent/service/register", {"Name": "web", "Port": 9090, "Connect": sidecar(web, Upstreams=[upstream])})


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=10)
    options = arguments.parse_args()

    def run() -> int:
        verdicts = Verdicts("Intentions and health")
        with Fleet(clients=2, keep=options.keep, prefix=options.network, first=31, log_level="warn") as fleet:
            web, api = fleet["c1"], fleet["c2"]
            backend = Backend(api.address)
            register(web, api)
            denials = [deny_once(fleet.servers[i % 3], web.address) for i in range(options.rounds)]
            nodes = [fleet["s2"], web]
            eventually("api in DNS", 10, lambda: all(map(is_in_dns, nodes)))
            changes = [follow(nodes, backend, healthy=i % 2 == 1) for i in range(options.rounds)]
            for node in fleet.nodes.values():
                node.tree()
        verdicts.add("deny to closed connection, each", spread(denials))
        verdicts.most("deny to closed connection, median", median(denials), 1.0)
        verdicts.most("deny to closed connection, longest", max(denials), 1.0)
        verdicts.add("health to DNS, each", spread(changes))
        verdicts.most(f"health to DNS, longest (check every {INTERVAL_S:g} s)", max(changes), INTERVAL_S + 0.5)
        return verdicts.finish()

    return guarded(run, within_s=60 + 10 * options.rounds)


if __name__ == "__main__":
    sys.exit(main())
