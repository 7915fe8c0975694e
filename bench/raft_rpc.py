"""Writes a second at the leader's local RPC socket: three real cores on loopback, mTLS between them, fdatasync on.

    python bench/raft_rpc.py [--callers 1,64,256] [--what set,noop] [--seconds 3] [--keys 10000] [--value 100-200]

The load generator speaks the agents' protocol: callers share one connection, and each waits for its answer before its
next write. `set` writes keys (values differ each time, so each write changes a row); `noop` deletes keys that are not
there: logged, replicated, synced, deduplicated and answered like any write, but no row changes. All four processes
share the machine. Printed beside it: raw pwrite+fdatasync on the same disk, the CPU time that each process took, and
what three members of etcd do under the same load (`--alone` leaves them out).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import random
import select
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import etcd

from rostra.runtime.lifeline import Child, spawn
from rostra.server.settings import CoreSettings
from rostra.wire.frames import FrameDecoder, frame, pack, unpack
from rostra.wire.rpc import check_hello, hello

#: (what, callers) -> the least operations a second; and the sequential median in ms.
BARS = {("set", 64): 30_000, ("set", 256): 40_000, ("noop", 256): 55_000}
SEQUENTIAL_MS = 0.9
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


# -- the cluster ------------------------------------------------------------------------------------------------------


class Servers:
    """Three cores. Use as `async with`."""

    def __init__(self, directory: Path, count: int = 3) -> None:
        secret = base64.b64encode(os.urandom(32)).decode()
        ports = _free_ports(count)
        self.directories = [directory / f"s{i + 1}" for i in range(count)]
        self.settings = [
            CoreSettings(
                node_name=where.name,
                data_dir=str(where),
                bind="127.0.0.1",
                advertise="127.0.0.1",
                rpc_port=port,
                bootstrap_expect=count,
                candidates=tuple(f"127.0.0.1:{p}" for p in ports),
                secrets=(secret,),
                retry_interval_s=1.0,
                log_level="warn",
                version="bench",
            )
            for where, port in zip(self.directories, ports)
        ]
        self.children: list[Child] = []
        self.sockets: list[str] = []

    async def __aenter__(self) -> Servers:
        for settings in self.settings:
            Path(settings.data_dir).mkdir(parents=True)
            self.children.append(spawn([sys.executable, "-P", "-m", "rostra.server"]))
        for child, settings in zip(self.children, self.settings):
            await child.send(settings.to_map())
        for child in self.children:
            self.sockets.append((await child.receive())["ready"]["socket"])
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(child.stop(3.0) for child in self.children))

    def leader(self, within_s: float = 20.0) -> int:
        """Which of them leads, once it has done its first duties."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            for i, path in enumerate(self.sockets):
                try:
                    with Line(path, self.settings[i].node_name) as line:
                        told = line.ask("act", "server.metrics", {}, "")
                        if told["is_leader"] and told["raft"]["lease_valid"] and told["raft"]["links_up"] > 1:
                            return i
                except (OSError, ValueError, KeyError, RuntimeError):
                    pass
            time.sleep(0.2)
        raise SystemExit("no leader")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


# -- the load ---------------------------------------------------------------------------------------------------------


class Line:
    """A session with a core at its local socket, blocking."""

    def __init__(self, path: str, node: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(20.0)
        self.socket.connect(path)
        self._frames = FrameDecoder(16 << 20)
        self.socket.sendall(frame(hello("rpc", name=node, node_id="", role="client", address="127.0.0.1")))
        check_hello(self._receive()[0])
        self._id = 0

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def _receive(self) -> list[bytes]:
        while True:
            data = self.socket.recv(1 << 18)
            if not data:
                raise ConnectionError("the server closed the connection")
            if payloads := self._frames.payloads(data):
                return payloads

    def ask(self, *request: Any) -> Any:
        self._id += 1
        self.socket.sendall(frame(pack((self._id, *request))))
        answer = unpack(self._receive()[0])
        if answer[1] != "ok":
            raise RuntimeError(str(answer[2:]))
        return answer[2]


#: The answer to a write that was done: length of the frame, array of 3 and uint32, the id, "ok" and true.
_DONE = struct.Struct(">IHI4s")
_DONE_IS = (10, 0x93CE, b"\xa2ok\xc3")


class Load:
    """Callers on one connection. `kinds` of writes are encoded beforehand, all but their numbers."""

    def __init__(self, line: Line, *, keys: int, value: tuple[int, int], seed: int) -> None:
        self._line = line
        self._client = f"bench-{os.getpid()}-{seed}"
        chance = random.Random(seed)
        names = [f"bench/{i % 100:02d}/{chance.getrandbits(32):08x}" for i in range(keys)]
        self._tails = {
            "set": [
                _tail("kv.set", {"key": name, "value": chance.randbytes(chance.randint(*value))})
                for _ in range(2)  # so that a key never gets the value that it has
                for name in names
            ],
            "noop": [_tail("kv.delete", {"key": f"absent/{name}"}) for name in names],
        }
        self._at = 0
        self._sequence = 0
        self._id = max(line._id, 1 << 16)  # from here on, ids are packed in 5 bytes, see _DONE

    def run(self, what: str, callers: int, seconds: float) -> list[float]:
        """Seconds that each write took."""
        sock, tails = self._line.socket, self._tails[what]
        sock.setblocking(False)
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        origin = b"\xa5write\x93" + pack(self._client)
        # Length of the frame, array of 6, uint32: the id; origin; uint32, uint32: sequence and first outstanding.
        head = struct.Struct(f">IBBI{len(origin)}sBIBI").pack
        fixed = struct.calcsize(f">BBI{len(origin)}sBIBI")
        outstanding: dict[int, float] = {}  # id -> when it was sent
        ahead = self._sequence - self._id  # a write's sequence minus its id
        took: list[float] = []
        clock = time.perf_counter
        rest = b""
        until = clock() + seconds
        due = callers
        count = len(tails)
        while True:
            now = clock()
            out = []
            if now < until:
                first = next(iter(outstanding), self._id + 1) + ahead
                for number in range(self._id + 1, self._id + 1 + due):
                    outstanding[number] = now
                    tail = tails[self._at % count]
                    self._at += 1
                    out.append(head(fixed + len(tail), 0x96, 0xCE, number, origin, 0xCE, number + ahead, 0xCE, first))
                    out.append(tail)
                self._id += due
                due = 0
            elif not outstanding:
                break
            data = memoryview(b"".join(out))
            while data:
                try:
                    data = data[sock.send(data) :]
                except BlockingIOError:
                    select.select([], [sock], [])
            if not poll.poll(10_000):
                raise SystemExit("no answer within 10 s")
            received = rest + sock.recv(1 << 18)
            if len(received) == len(rest):
                raise SystemExit("the server closed the connection")
            now = clock()
            whole = len(received) // _DONE.size * _DONE.size
            for length, kind, number, answer in _DONE.iter_unpack(received[:whole]):
                if (length, kind, answer) != _DONE_IS:
                    raise SystemExit(f"a write was refused: {received!r}")
                took.append(now - outstanding.pop(number))
            due += whole // _DONE.size
            rest = received[whole:]
        self._sequence = self._id + ahead
        return took


def _tail(kind: str, args: dict[str, Any]) -> bytes:
    return pack(kind) + pack(args) + pack("")


# -- beside it --------------------------------------------------------------------------------------------------------


def raw_sync(directory: Path, seconds: float = 0.5, size: int = 256) -> tuple[float, float]:
    """(operations a second, median in ms) of pwrite + fdatasync into a file that was written before."""
    fd, name = tempfile.mkstemp(dir=directory)
    try:
        os.pwrite(fd, bytes(4 << 20), 0)
        os.fsync(fd)
        data, took, at = os.urandom(size), [], 0
        until = time.perf_counter() + seconds
        while (started := time.perf_counter()) < until:
            os.pwrite(fd, data, at)
            os.fdatasync(fd)
            took.append(time.perf_counter() - started)
            at = (at + size) % (4 << 20)
        return len(took) / seconds, statistics.median(took) * 1e3
    finally:
        os.close(fd)
        os.unlink(name)


def cpu_s(pid: int) -> float:
    """CPU time of a process so far."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def _batches(servers: Servers, leader: int) -> int:
    """How many entries of Raft the leader has made of proposals."""
    with Line(servers.sockets[leader], servers.settings[leader].node_name) as line:
        return int(line.ask("act", "server.metrics", {}, "")["raft"]["batches"])


#: Other stores that the same load is put on. Each runs as long as its context, with its data in that directory; what
#: it gives measures: (what, callers, seconds) -> (ops/s, p50 ms, p99 ms). None: it is not to be had here.
RIVALS: dict[str, Callable[[Path], AbstractContextManager[etcd.Measure | None]]] = {"etcd": etcd.rival}


async def run(options: argparse.Namespace) -> int:
    low, _, high = options.value.partition("-")
    missed = 0
    with tempfile.TemporaryDirectory(dir=options.on) as name, ExitStack() as stack:
        directory = Path(name)
        async with Servers(directory) as servers:
            rivals = {}
            if not options.alone:
                rivals = {rival: stack.enter_context(make(directory)) for rival, make in RIVALS.items()}
            leader = servers.leader()
            pids = [child.pid for child in servers.children]
            pids.insert(0, pids.pop(leader))
            if options.pids:
                print("leader", pids[0], "followers", *pids[1:], "directory", name, flush=True)
            line = Line(servers.sockets[leader], servers.settings[leader].node_name)
            load = Load(line, keys=options.keys, value=(int(low), int(high or low)), seed=options.seed)
            load.run("set", 64, 0.5)
            title = f"{'':6}{'callers':>8}{'ops/s':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'a batch':>9}   CPU µs/op"
            print(f"{title} {'leader':>7}{'others':>8}{'load':>7}   raw fdatasync/s, p50 ms")
            for what in options.what.split(","):
                for callers in map(int, options.callers.split(",")):
                    raw_s, raw_ms = raw_sync(directory)
                    batches = _batches(servers, leader)
                    before = [*map(cpu_s, pids), time.process_time()]
                    began = time.perf_counter()
                    took = sorted(load.run(what, callers, options.seconds))
                    lasted = time.perf_counter() - began
                    after = [*map(cpu_s, pids), time.process_time()]
                    ops = len(took)
                    batches = _batches(servers, leader) - batches
                    used = [(b - a) / ops * 1e6 for a, b in zip(before, after)]
                    rate, p50, p99 = ops / lasted, took[ops // 2] * 1e3, took[int(ops * 0.99)] * 1e3
                    bar = BARS.get((what, callers), 0)
                    ok = rate >= bar and (callers > 1 or p50 <= SEQUENTIAL_MS)
                    missed += not ok
                    print(
                        f"{what:6}{callers:8}{rate:9.0f}{p50:9.3f}{p99:9.2f}{took[-1] * 1e3:9.1f}{ops / batches:9.1f}"
                        f"   {sum(used):9.1f}"
                        f" {used[0]:7.1f}{sum(used[1:-1]) / 2:8.1f}{used[-1]:7.1f}   {raw_s:8.0f}, {raw_ms:.3f}"
                        f"{'' if ok else '   MISSED'}",
                        flush=True,
                    )
                    for rival, measure in rivals.items():
                        if measure is not None:
                            rate, p50, p99 = measure(what, callers, options.seconds)
                            print(f"  {rival:4}{callers:8}{rate:9.0f}{p50:9.3f}{p99:9.2f}", flush=True)
            line.socket.close()
    return min(missed, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", default="1,64,256")
    parser.add_argument("--what", default="set,noop")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--value", default="100-200", help="bytes of a value, from-to")
    parser.add_argument("--on", default=None, help="directory for the data")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="without etcd beside it")
    parser.add_argument("--pids", action="store_true", help="print the servers' pids, for a profiler")
    sys.exit(asyncio.run(run(parser.parse_args())))


if __name__ == "__main__":
    main()
