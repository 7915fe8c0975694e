"""The demo's applications: small HTTP programs that know nothing of Rostra.

    demo_services.py NAME HOST:PORT [UPSTREAM_HOST:PORT]

`/health` says ok, `/whoami` says NAME, `/stream` says NAME again and again until the client goes away, and `/call` asks
`/whoami` of the upstream. The sidecar of this program listens there for it. Standard library only.
"""

from __future__ import annotations

import http.client
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CALL_TIMEOUT_S = 5.0


class Application(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, name: str, address: tuple[str, int], upstream: tuple[str, int] | None) -> None:
        super().__init__(address, Handler)
        self.name = name
        self.upstream = upstream


class Handler(BaseHTTPRequestHandler):
    server: Application

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, "ok\n")
        elif self.path == "/whoami":
            self._reply(200, self.server.name + "\n")
        elif self.path == "/call" and self.server.upstream:
            self._call(*self.server.upstream)
        elif self.path == "/stream":
            self._stream()
        else:
            self._reply(404, "no such page\n")

    def _call(self, host: str, port: int) -> None:
        connection = http.client.HTTPConnection(host, port, timeout=CALL_TIMEOUT_S)
        try:
            connection.request("GET", "/whoami")
            said = connection.getresponse().read().decode()
            self._reply(200, f"{self.server.name} asked and was answered by {said}")
        except (OSError, http.client.HTTPException) as e:
            self._reply(502, f"{self.server.name} could not reach its upstream: {type(e).__name__}: {e}\n")
        finally:
            connection.close()

    def _stream(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(f"{self.server.name}\n".encode())
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            pass  # the client went away, or was cut off

    def _reply(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            pass

    def log_message(self, format: str, *args: object) -> None:
        pass  # a health check a second is no news


def parse_address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def main(argv: list[str]) -> int:
    if len(argv) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    upstream = parse_address(argv[2]) if len(argv) == 3 else None
    try:
        Application(argv[0], parse_address(argv[1]), upstream).serve_forever()
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
