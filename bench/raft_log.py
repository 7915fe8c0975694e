"""How many durable log entries a second three servers agree on: three processes on loopback, callers inside the leader.

    python bench/raft_log.py [--tls] [--inline] [--memory] [--callers 1,64,256] [--seconds 3] [--kill N]

Prints one line per number of callers: operations a second and latency. With --kill N: how long writes are interrupted
when the leader is killed, N times.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import logging
import os
import signal
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import structlog
import uvloop

from rostra.server.raft import Member, RaftLog
from rostra.wire.connection import FrameConnection
from rostra.wire.errors import RostraError

OPERATION_BYTES = 200


def make_certificate(directory: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    (directory / "tls.pem").write_bytes(pem)


def tls(directory: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    context = ssl.create_default_context(purpose, cafile=str(directory / "tls.pem"))
    context.load_cert_chain(directory / "tls.pem")
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


class Nothing:
    """A state machine that applies nothing."""

    def apply(self, entries: Sequence[bytes]) -> list[None]:
        return [None] * len(entries)

    def capture(self) -> Iterator[bytes | None]:
        yield b"nothing"

    def loader(self) -> Nothing:
        return self

    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> Callable[[], None]:
        return lambda: None


# -- one server -----------------------------------------------------------------------------------------------------


async def serve(options: argparse.Namespace) -> None:
    structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO if options.verbose else logging.WARNING),
    )
    loop = asyncio.get_running_loop()
    directory = Path(options.directory)
    raft: RaftLog | None = None

    def on_made(connection: FrameConnection) -> None:
        def hello(payload: bytes) -> None:
            if raft is None:
                connection.abort("not started")
            else:
                raft.accept(payload.decode(), connection)

        connection.on_frame = hello

    async def dial(member: Member) -> FrameConnection:
        context = tls(directory, ssl.Purpose.SERVER_AUTH) if options.tls else None
        _, connection = await loop.create_connection(FrameConnection, member.host, member.port, ssl=context)
        connection.send(options.node.encode())
        return connection

    context = tls(directory, ssl.Purpose.CLIENT_AUTH) if options.tls else None
    server = await loop.create_server(lambda: FrameConnection(on_made=on_made), "127.0.0.1", options.port, ssl=context)
    say({"port": server.sockets[0].getsockname()[1]})
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    ports = json.loads(await stdin.readline())
    members = tuple(Member(node, "127.0.0.1", port, node, node) for node, port in ports.items())

    def fail_stop(reason: str) -> None:
        print(options.node, "stops:", reason, file=sys.stderr)
        os._exit(70)

    raft = RaftLog(
        directory=None if options.memory else directory / options.node,
        node_id=options.node,
        cluster_id="bench",
        members=members,
        state=Nothing(),
        dial=dial,
        on_role_change=lambda is_leader, leader, term: say({"is_leader": is_leader, "term": term}),
        fail_stop=fail_stop,  # type: ignore[arg-type]
        sync_inline=options.inline,
    )
    await raft.start()
    while line := await stdin.readline():
        command = json.loads(line)
        if command["do"] == "load":
            say({"result": await load(raft, command["callers"], command["seconds"])})
        elif command["do"] == "write":  # until one is acknowledged, or this is not the leader
            try:
                await asyncio.wait_for(raft.propose(b"x" * OPERATION_BYTES), 5)
                say({"wrote": time.time()})
            except RostraError as e:
                say({"failed": e.code})
    await raft.stop()


async def load(raft: RaftLog, callers: int, seconds: float) -> dict[str, object]:
    took: list[float] = []
    entry = b"x" * OPERATION_BYTES
    await raft.read_index()
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while True:
            started = time.perf_counter()
            if started > until:
                return
            await raft.propose(entry)
            took.append(time.perf_counter() - started)

    async def reader() -> int:
        reads, end = 0, time.perf_counter() + 1.0
        while time.perf_counter() < end:
            await raft.read_index()
            reads += 1
        return reads

    cpu = time.process_time()
    await asyncio.gather(*(caller() for _ in range(callers)))
    cpu = (time.process_time() - cpu) / seconds
    writes = list(took)
    reads = sum(await asyncio.gather(*(reader() for _ in range(callers))))
    writes.sort()
    metrics = raft.metrics()
    return {
        "callers": callers,
        "ops_s": round(len(writes) / seconds),
        "p50_ms": round(writes[len(writes) // 2] * 1e3, 3),
        "p99_ms": round(writes[int(len(writes) * 0.99)] * 1e3, 3),
        "max_ms": round(writes[-1] * 1e3, 1),
        "leader_cpu": round(cpu, 2),
        "reads_s": reads,
        "turn_max_ms": round(metrics["turn"]["max_s"] * 1e3, 1),
        "turns_over_2ms": sum(n for bound, n in metrics["turn"]["buckets"].items() if float(bound) > 0.002),
        "sync_mean_ms": round(1e3 * metrics["sync"]["sum_s"] / max(1, metrics["sync"]["count"]), 3),
    }


def say(message: dict[str, object]) -> None:
    print(json.dumps(message), flush=True)


# -- the three of them ----------------------------------------------------------------------------------------------


class Server:
    def __init__(self, node: str, port: int, options: argparse.Namespace, directory: Path) -> None:
        self.node, self.port, self.options, self.directory = node, port, options, directory
        self.is_leader = False

    async def start(self) -> None:
        flags = [flag for flag in ("--tls", "--inline", "--memory", "--verbose") if getattr(self.options, flag[2:])]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            *flags,
            *("--node", self.node, "--directory", str(self.directory), "--port", str(self.port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self.answers: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self.port = (await self.read())["port"]  # type: ignore[assignment]

    async def read(self) -> dict[str, object]:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise EOFError(self.node)
        return json.loads(line)  # type: ignore[no-any-return]

    def tell(self, message: dict[str, object]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")

    async def follow(self) -> None:
        try:
            while True:
                message = await self.read()
                if "is_leader" in message:
                    self.is_leader = bool(message["is_leader"])
                else:
                    self.answers.put_nowait(message)
        except EOFError:
            self.is_leader = False


async def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.on) as name:
        directory = Path(name)
        make_certificate(directory)
        servers = [Server(node, 0, options, directory) for node in "abc"]
        for server in servers:
            await server.start()
        ports = {server.node: server.port for server in servers}
        followers = []
        for server in servers:
            server.tell(ports)  # type: ignore[arg-type]
            followers.append(asyncio.create_task(server.follow()))

        async def leader() -> Server:
            while True:
                for server in servers:
                    if server.is_leader and server.process.returncode is None:
                        return server
                await asyncio.sleep(0.002)

        await leader()
        await asyncio.sleep(1.0)
        for callers in map(int, filter(None, options.callers.split(","))):
            one = await leader()
            one.tell({"do": "load", "callers": callers, "seconds": options.seconds})
            print(json.dumps((await one.answers.get())["result"]), flush=True)

        gaps = []
        for _ in range(options.kill):
            victim = await leader()
            victim.process.send_signal(signal.SIGKILL)
            victim.is_leader = False
            killed = time.time()
            while True:
                one = await leader()
                one.tell({"do": "write"})
                answer = await one.answers.get()
                if "wrote" in answer:
                    gaps.append(float(answer["wrote"]) - killed)  # type: ignore[arg-type]
                    break
            await victim.process.wait()
            await victim.start()
            victim.tell(ports)  # type: ignore[arg-type]
            followers.append(asyncio.create_task(victim.follow()))
            await asyncio.sleep(1.0)
        if gaps:
            print(
                f"kill -9 of the leader to the next acknowledged write: median {statistics.median(gaps) * 1e3:.0f} ms"
            )
            print(f"all of them: {sorted(round(gap * 1e3) for gap in gaps)}")
        for server in servers:
            server.process.stdin.close()  # type: ignore[union-attr]
            await server.process.wait()
        await asyncio.gather(*followers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--inline", action="store_true", help="sync on the loop")
    parser.add_argument("--memory", action="store_true", help="no journal on disk")
    parser.add_argument("--callers", default="1,64")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--kill", type=int, default=0)
    parser.add_argument("--on", default=None, help="directory for the journals")
    parser.add_argument("--verbose", action="store_true", help="the servers' logs")
    for internal in ("--node", "--directory"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    uvloop.run(serve(options) if options.node else run(options))


if __name__ == "__main__":
    main()
