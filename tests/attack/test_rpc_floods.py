"""An enrolled agent that floods the RPC port with frames that cost it nothing: its connection gets its share of the
loop, or its end with one line. Meanwhile the server goes on leading and answers everybody else."""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgpack
import pytest

from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import parse_secrets
from rostra.wire.frames import RPC_FRAME_BYTES_MAX, frame, pack
from rostra.wire.rpc import check_hello, hello
from tests.support import processes as support
from tests.support.processes import Agent, Ports, eventually, new_host

FLOOD_S = 1.5
#: For a write and a read beside it, on a busy machine.
PATIENCE_S = 2.0
BLOB_BYTES = 1 << 20


@dataclass
class Victim:
    agent: Agent
    friend: NodeIdentity

    def connect(self, node: NodeIdentity | None = None) -> ssl.SSLSocket:
        """A session as an agent has it."""
        node = node or self.friend
        plain = socket.create_connection((self.agent.host, self.agent.ports.server), timeout=20)
        connection = node.client_context().wrap_socket(plain, server_hostname="x")
        connection.sendall(
            frame(hello("rpc", name=node.node_name, node_id=node.node_id, address=self.agent.host, version="0"))
        )
        length = int.from_bytes(connection.recv(4), "big")
        assert check_hello(connection.recv(length))["protocol"] == "ok"
        return connection

    def lines(self, *words: str) -> list[str]:
        return [line for line in self.agent.process.log.splitlines() if all(w in line for w in words)]


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with support.processes() as processes:
        secret = base64.b64encode(os.urandom(32)).decode()
        host = new_host()
        agent = processes.agent(
            "s1",
            "-server",
            "-bootstrap-expect=1",
            f"-encrypt={secret}",
            host=host,
            ports=Ports.free(host),
            data_dir=processes.directory / "s1",
        )
        eventually("s1 is registered", agent.is_registered, 30)
        victim = Victim(agent, NodeIdentity.open(processes.directory / "friend", "friend", parse_secrets(secret)))
        yield victim
        assert not victim.lines("Traceback")
        assert not victim.lines("[ERROR]")
        assert len(victim.lines("leadership:", "leads")) <= 1


def repeated(one: bytes) -> Callable[[], Iterator[bytes]]:
    blob = one * (BLOB_BYTES // len(one) or 1)
    return lambda: itertools.repeat(blob)


def numbered(make: Callable[[int], bytes]) -> Callable[[], Iterator[bytes]]:
    """Blobs of requests whose ids count up."""

    def blobs() -> Iterator[bytes]:
        ids = itertools.count(1)
        while True:
            yield b"".join(make(next(ids)) for _ in range(2000))

    return blobs


def watch_and_cancel(i: int) -> bytes:
    query = {"prefix": f"p{i}/"}
    return frame(pack((i, "watch", "kv.list", query, ""))) + frame(pack((i, "cancel")))


#: Names that are arrays of -1 and -2, whose hashes are equal: to read it took 0.1 s.
ONE_HASH = msgpack.Packer().pack_map_pairs(
    [(name, 0) for name in itertools.islice(itertools.product((-1, -2), repeat=11), 1100)]
)
#: What no honest agent sends: its connection ends.
VIOLATIONS = {
    "credit for nothing": (repeated(frame(pack((7, "credit", 1)))), "malformed credit"),
    "credit below zero": (repeated(frame(pack((7, "credit", -1)))), "malformed credit"),
    "cancel of nothing": (repeated(frame(pack((7, "cancel")))), "malformed cancel"),
    "pings that wait for no answer": (repeated(frame(pack((7, "ping")))), "too many pings"),
    "barriers that wait for no answer": (repeated(frame(pack((7, "barrier", "default", 0)))), "too many pings"),
    "consistent barriers": (repeated(frame(pack((7, "barrier", "consistent", 0)))), "too many pings"),
    "a request of 400,000 short texts": (
        repeated(frame(pack((7, "act", "x", {"a": ["é"] * (RPC_FRAME_BYTES_MAX // 3 - 20)}, "")))),
        "malformed request",
    ),
    "a map whose names all have one hash": (repeated(frame(b"\x93\x07" + pack("act") + ONE_HASH)), "malformed request"),
}
#: What one may: it gets its share.
FLOODS = {
    "unknown verbs": repeated(frame(pack((7, "sing")))),
    "requests without arguments": repeated(frame(pack((7, "read")))),
    "watches opened and cancelled": numbered(watch_and_cancel),
    "reads that are not waited for": numbered(lambda i: frame(pack((i, "read", "kv.get", {"key": "a"}, 0, "")))),
    "acts of no kind": repeated(frame(pack((7, "act", "sing", {}, "")))),
    "empty frames' worth of length": repeated(b"\x00\x00\x00\x03" + pack((7, "x"))),
}


def flood(connection: ssl.SSLSocket, blobs: Iterator[bytes], until: float) -> bool:
    """Send and take what is answered. True: the other side ended it."""
    connection.settimeout(0.2)
    ended = threading.Event()

    def take() -> None:
        while time.monotonic() < until:
            try:
                if not connection.recv(1 << 18):
                    break
            except TimeoutError:
                continue
            except (OSError, ValueError):
                break
        else:
            return
        ended.set()

    taker = threading.Thread(target=take)
    taker.start()
    try:
        for blob in blobs:
            at = 0
            while at < len(blob) and time.monotonic() < until and not ended.is_set():
                try:
                    at += connection.send(blob[at : at + (64 << 10)])
                except TimeoutError:
                    continue
            if time.monotonic() >= until or ended.is_set():
                break
    except (OSError, ssl.SSLError):
        ended.wait(5)
    taker.join()
    return ended.is_set()


class Honest:
    """Somebody else who writes and reads all the while."""

    def __init__(self, victim: Victim) -> None:
        self._api, self._stop = victim.agent.api, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.slowest_s, self.done = 0.0, 0
        self.failed: list[str] = []

    def __enter__(self) -> Honest:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                if not self._api.write_key("honest", str(self.done)):
                    raise OSError("not written")
                if self._api.keys("honest") != {"honest": str(self.done)}:
                    raise OSError("something else was read")
            except (OSError, AssertionError) as e:
                self.failed.append(repr(e))
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
            self.done += 1


@pytest.mark.parametrize("what", VIOLATIONS)
def test_who_sends_what_no_agent_sends_is_dropped_with_one_line_and_nobody_else_waits(
    victim: Victim, what: str
) -> None:
    blobs, reason = VIOLATIONS[what]
    before = victim.lines("dropped a connection")
    with Honest(victim) as honest, victim.connect() as connection:
        assert flood(connection, blobs(), time.monotonic() + 5.0), "the connection was not ended"
        eventually("others go on", lambda: honest.done > 3)
    assert not honest.failed
    assert honest.slowest_s < PATIENCE_S
    # One line in ten seconds, and it says whose connection it was and why.
    told = victim.lines("dropped a connection")
    assert len(told) - len(before) <= 1
    if what == next(iter(VIOLATIONS)):
        assert "node=friend" in told[0]
        assert reason in told[0]


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_of_requests_gets_its_share_and_nobody_else_waits(victim: Victim, what: str) -> None:
    with Honest(victim) as honest, victim.connect() as connection:
        flood(connection, FLOODS[what](), time.monotonic() + FLOOD_S)
        eventually("others go on", lambda: honest.done > 3)
    assert not honest.failed
    assert honest.slowest_s < PATIENCE_S


def test_eight_floods_of_one_node_together_hold_nobody_up(victim: Victim) -> None:
    until = time.monotonic() + FLOOD_S
    with Honest(victim) as honest, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(victim.connect()) for _ in range(8)]
        floods = [
            threading.Thread(target=flood, args=(connection, FLOODS["unknown verbs"](), until))
            for connection in connections
        ]
        for thread in floods:
            thread.start()
        for thread in floods:
            thread.join()
    assert not honest.failed
    assert honest.slowest_s < PATIENCE_S
