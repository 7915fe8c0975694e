"""Floods of DNS queries, one a process: `python -m tests.support.dns_floods KIND HOST PORT SERVICE SECONDS`.

Prints how many queries (UDP), bytes of answers (TCP) or connections there were.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

A, TXT, AAAA, SRV, ANY = 1, 16, 28, 33, 255
BATCH = 200


def encode_name(name: str) -> bytes:
    return b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"


def query(name: str, qtype: int = A, *, qid: int = 0x1234, flags: int = 0x100, edns: int = 0) -> bytes:
    head = struct.pack(">HHHHHH", qid, flags, 1, 0, 0, 1 if edns else 0)
    opt = b"\0" + struct.pack(">HHIH", 41, edns, 0, 0) if edns else b""
    return head + encode_name(name) + struct.pack(">HH", qtype, 1) + opt


def framed(packet: bytes) -> bytes:
    return struct.pack(">H", len(packet)) + packet


def same(service: str) -> list[bytes]:
    return [query(f"{service}.service.consul")] * BATCH


def records(service: str) -> list[bytes]:
    return [query(f"{service}.service.consul", SRV)] * BATCH


def unknown(_service: str) -> list[bytes]:
    """Names that nobody registered, each another one."""
    return [query(f"r{random.getrandbits(60)}.service.consul") for _ in range(BATCH)]


def tags(service: str) -> list[bytes]:
    return [query(f"t{random.getrandbits(60)}.{service}.service.consul", random.choice((A, SRV))) for _ in range(BATCH)]


def variants(service: str) -> list[bytes]:
    """One name in packets of which no two are alike: nothing that is remembered by its bytes helps."""
    return [
        query(
            f"{service}.service.consul",
            random.choice((A, TXT, AAAA, SRV, ANY)),
            flags=random.getrandbits(11) & ~0x7800,
            edns=random.randrange(512, 65536),
        )
        for _ in range(BATCH)
    ]


def send_tcp(at: tuple[str, int], batch: Callable[[], Sequence[bytes]], stop: float) -> int:
    """Pipeline, and read the answers as fast as they come."""
    connection = socket.create_connection(at)
    got = 0

    def read() -> None:
        nonlocal got
        try:
            while data := connection.recv(1 << 20):
                got += len(data)
        except OSError:
            pass

    threading.Thread(target=read, daemon=True).start()
    while time.monotonic() < stop:
        connection.sendall(b"".join(map(framed, batch())) * 8)
    connection.close()
    return got


def send_udp(at: tuple[str, int], batch: Callable[[], Sequence[bytes]], stop: float) -> int:
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(at)
        while time.monotonic() < stop:
            for packet in batch():
                s.send(packet)
                sent += 1
    return sent


def connect(at: tuple[str, int], batch: Callable[[], Sequence[bytes]], stop: float) -> int:
    """One connection after the other, each with one query and then forgotten, open; at most 400 at a time."""
    kept: list[socket.socket] = []
    opened = 0
    while time.monotonic() < stop:
        kept.append(socket.create_connection(at))
        kept[-1].send(framed(batch()[0]))
        opened += 1
        if len(kept) == 400:
            kept.pop(0).close()
    return opened


_HOW = {"tcp": send_tcp, "udp": send_udp, "connects": connect}
_WHAT = {"same": same, "records": records, "unknown": unknown, "tags": tags, "variants": variants}
KINDS = [f"{how}-{what}" for how in ("tcp", "udp") for what in _WHAT] + ["connects-same"]


def main(kind: str, host: str, port: str, service: str, seconds: str) -> None:
    how, what = kind.split("-")
    made = [_WHAT[what](service) for _ in range(25)]  # ahead: the flood shall not wait for Python
    print(_HOW[how]((host, int(port)), lambda: random.choice(made), time.monotonic() + float(seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])
