"""A cluster of three etcd members under the same load as `raft_rpc.py`'s: gRPC puts, callers sharing one connection.

Speaks just enough HTTP/2 for that: constant headers, one message each way, flow control by the book. Members talk to
each other without TLS, which is in etcd's favour. `rival` is what `raft_rpc.py` takes; where no etcd is installed
(Debian: `etcd-server`; ETCD_BIN names another) it says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ETCD = os.environ.get("ETCD_BIN") or shutil.which("etcd") or ""
DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_HEAD = struct.Struct(">BHBBI")  # length in three bytes, type, flags, stream
#: What an HTTP/2 connection begins with: the preface, no settings, and a window that no run uses up.
_BEGIN = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

Measure = Callable[[str, int, float], tuple[float, float, float]]


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def _text(value: bytes) -> bytes:
    assert len(value) < 127
    return bytes([len(value)]) + value


def _headers(path: str, authority: str) -> bytes:
    """POST and http from the static table, the rest as literals that are not indexed (RFC 7541)."""
    return (
        b"\x83\x86\x04" + _text(path.encode()) + b"\x01" + _text(authority.encode())
        + b"\x0f\x10" + _text(b"application/grpc") + b"\x00" + _text(b"te") + _text(b"trailers")
    )  # fmt: skip


def _message(*fields: bytes) -> bytes:
    """A gRPC message of byte fields 1, 2, …"""
    body = b""
    for number, value in enumerate(fields, 1):
        length = len(value)
        size = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
        body += bytes([number << 3 | 2]) + size + value
    return b"\0" + len(body).to_bytes(4, "big") + body


class Load:
    """Callers on one connection to one member."""

    def __init__(self, host: str, port: int, *, keys: int = 10_000, value: tuple[int, int] = (100, 200)) -> None:
        self._socket = socket.create_connection((host, port), 5)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(_BEGIN + _frame(SETTINGS, 0, 0) + _frame(WINDOW, 0, 0, struct.pack(">I", 1 << 30)))
        chance = random.Random(1)
        names = [f"bench/{i % 100:02d}/{chance.getrandbits(32):08x}".encode() for i in range(keys)]
        self._messages = {
            "set": [_message(name, chance.randbytes(chance.randint(*value))) for name in names],
            "noop": [_message(b"absent/" + name) for name in names],
        }
        authority = f"{host}:{port}"
        self._headers = {
            "set": _headers("/etcdserverpb.KV/Put", authority),
            "noop": _headers("/etcdserverpb.KV/DeleteRange", authority),
        }
        self._stream, self._window, self._at = 1, 65_535, 0

    def close(self) -> None:
        self._socket.close()

    def run(self, what: str, callers: int, seconds: float) -> list[float]:
        """Seconds that each request took."""
        sock, messages, headers = self._socket, self._messages[what], self._headers[what]
        sock.setblocking(False)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        clock = time.perf_counter
        outstanding: dict[int, float] = {}
        answered: set[int] = set()  # streams whose message has come
        took: list[float] = []
        rest, due, until = b"", callers, clock() + seconds
        while True:
            now, out = clock(), []
            while due and now < until:
                message = messages[self._at % len(messages)]
                if len(message) > self._window:
                    break  # until the member takes more
                self._at += 1
                self._window -= len(message)
                outstanding[self._stream] = now
                out.append(_frame(HEADERS, END_HEADERS, self._stream, headers))
                out.append(_frame(DATA, END_STREAM, self._stream, message))
                self._stream += 2
                due -= 1
            if now >= until and not outstanding:
                return took
            self._send(b"".join(out))
            if not poll.poll(10_000):
                raise SystemExit("etcd: no answer within 10 s")
            received = rest + sock.recv(1 << 18)
            now, at = clock(), 0
            while len(received) - at >= _HEAD.size:
                high, low, kind, flags, stream = _HEAD.unpack_from(received, at)
                end = at + _HEAD.size + (high << 16 | low)
                if end > len(received):
                    break
                payload = received[at + _HEAD.size : end]
                at = end
                if kind == DATA:
                    answered.add(stream)
                elif kind == HEADERS and flags & END_STREAM:
                    if stream not in answered:
                        raise SystemExit("etcd: a write was refused")
                    answered.discard(stream)
                    took.append(now - outstanding.pop(stream))
                    due += 1
                else:
                    self._control(kind, flags, stream, payload)
            rest = received[at:]

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == WINDOW and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags & ACK:
            self._send(_frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self._send(_frame(PING, ACK, 0, payload))
        elif kind in (RESET, GOAWAY):
            raise SystemExit(f"etcd: the member ended a stream or the connection: {payload!r}")

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                select.select([], [self._socket], [])


def _ask(url: str) -> Any:
    request = urllib.request.Request(url + "/v3/maintenance/status", b"{}")
    with urllib.request.urlopen(request, timeout=2) as answer:
        return json.loads(answer.read())


def _ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


@contextlib.contextmanager
def rival(directory: Path) -> Iterator[Measure | None]:
    """Three members on loopback with their data in `directory`; None where there is no etcd."""
    if not ETCD:
        print("no etcd here (Debian: etcd-server; or ETCD_BIN)")
        yield None
        return
    ports = _ports(6)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    members = list(zip(("e0", "e1", "e2"), urls[:3], urls[3:]))
    cluster = ",".join(f"{name}={peers}" for name, _, peers in members)
    started = []
    try:
        for name, clients, peers in members:
            argv = [ETCD, "--name", name, "--data-dir", str(directory / name), "--log-level", "error"]
            argv += ["--listen-client-urls", clients, "--advertise-client-urls", clients]
            argv += ["--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers]
            argv += ["--initial-cluster", cluster, "--initial-cluster-state", "new"]
            started.append(
                subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
        load = Load("127.0.0.1", _leader(urls[:3], ports))
        load.run("set", 64, 0.5)

        def measure(what: str, callers: int, seconds: float) -> tuple[float, float, float]:
            began = time.perf_counter()
            took = sorted(load.run(what, callers, seconds))
            rate = len(took) / (time.perf_counter() - began)
            return rate, took[len(took) // 2] * 1e3, took[int(len(took) * 0.99)] * 1e3

        yield measure
        load.close()
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()


def _leader(urls: list[str], ports: list[int]) -> int:
    """The client port of the member that leads."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for url, port in zip(urls, ports):
            try:
                status = _ask(url)
            except OSError:
                continue
            if status.get("leader") and status["leader"] == status["header"]["member_id"]:
                return port
        time.sleep(0.1)
    raise SystemExit("etcd: no leader")
