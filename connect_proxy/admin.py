"""A tiny HTTP server for the operator, on loopback only and only if asked for: /stats and /ready.

One thread, one request at a time, each with a deadline: it cannot disturb the proxy's loop, of which it only reads
counters.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

_REQUEST_BYTES_MAX: Final = 8192
_REQUEST_TIMEOUT_S: Final = 2.0


def serve_admin(address: str, stats: Callable[[], dict[str, Any]]) -> str:
    """Starts it and returns the bound address. Raises ValueError or OSError if it cannot listen there."""
    host, _, port = address.rpartition(":")
    host = (host or "127.0.0.1").strip("[]")
    if host == "localhost":
        host = "127.0.0.1"
    if host != "::1" and not host.startswith("127."):
        raise ValueError("only loopback addresses are allowed: the answers are not protected")
    listener = socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET)

    def run() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                try:
                    sock.settimeout(_REQUEST_TIMEOUT_S)
                    sock.sendall(_answer(_request_path(sock), stats))
                except (OSError, RuntimeError):  # RuntimeError: a dict changed while we were counting; ask again
                    pass

    threading.Thread(target=run, name="admin", daemon=True).start()
    bound = listener.getsockname()
    return f"{bound[0]}:{bound[1]}"


def _request_path(sock: socket.socket) -> str:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(4096)
        if not piece or len(data) > _REQUEST_BYTES_MAX:
            return ""
        data += piece
    words = data.split(b"\r\n", 1)[0].split(b" ")
    return words[1].decode("latin-1") if len(words) == 3 and words[0] == b"GET" else ""


def _answer(path: str, stats: Callable[[], dict[str, Any]]) -> bytes:
    if path == "/stats":
        return _response("200 OK", "application/json", json.dumps(stats(), indent=1).encode() + b"\n")
    if path == "/ready":
        is_ready = bool(stats()["proxy_id"])
        return _response("200 OK" if is_ready else "503 Service Unavailable", "text/plain", b"%d\n" % is_ready)
    return _response("404 Not Found", "text/plain", b"there are /stats and /ready\n")


def _response(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body
