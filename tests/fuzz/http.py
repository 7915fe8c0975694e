"""Clients that speak HTTP in every odd but lawful way at once, and know what each must be told.

    make fuzz-http N=20000 [SEED=…]                          in-process servers on asyncio and on uvloop
    python -m tests.fuzz.http --agent HOST:PORT[,HOST:PORT…]   agents that run already

Values name their key and version; a key has one writer. An answer is wrong if it is another's, and stale if it is older
than a write that was acknowledged before the first byte of its request was sent. `Chance` decides all else: which
requests, how they are written, where they are cut, how long each piece waits, and how the connection ends.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

KEYS_PER_CLIENT = 3
GET, PUT, MISSING = "get", "put", "missing"
BIG = 150_000


class Wrong(AssertionError):
    """A client was told what it must not be told."""


class Ledger:
    """What was sent and what was acknowledged, by key; the version is a number that only grows."""

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.acked: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()


@dataclass
class Ask:
    kind: str
    key: str
    data: bytes
    version: int = 0  # PUT: what it writes
    floor: int = 0  # GET: no older version may be answered
    last: bool = False  # the server closes after it


@dataclass
class Style:
    """How a run behaves. `writes`: the share of PUTs."""

    writes: float = 0.2
    slow: float = 0.2
    odd: float = 0.15  # of requests in unusual forms
    pipelined_max: int = 6
    large: float = 0.02
    ends: float = 0.15  # of batches after which the connection ends
    innocent: float = 0.3  # of clients that send plain GETs only, one by one
    pauses: tuple[float, ...] = (0, 0, 0, 0.001, 0.003)
    until: float = math.inf  # on the monotonic clock: no more requests then


# -- how a request is written ------------------------------------------------------------------------------------------


def hot_get(key: str) -> bytes:
    return f"GET /v1/kv/{key}?raw HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def with_a_request_in_its_body(key: str) -> bytes:
    """Its length is written in a way that not everybody can read."""
    body = hot_get("k1-0" if key != "k1-0" else "k0-0")
    return f"GET /v1/kv/{key}?raw HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body):013}\r\n\r\n".encode() + body


def chunked(chance: random.Random, body: bytes) -> bytes:
    out, at = b"", 0
    while at < len(body):
        n = min(len(body) - at, chance.choice((1, 2, 3, 50, 5000)) if len(body) < 2000 else 5000)
        out += b"%X%s\r\n%s\r\n" % (n, chance.choice((b"", b";a=b")), body[at : at + n])
        at += n
    return out + b"0" * chance.choice((1, 1, 3)) + b"\r\n" + chance.choice((b"", b"X-Trailer: 1\r\n")) + b"\r\n"


_PLAIN_HEADERS = (
    b"Host: x\r\n",
    b"Host: x\r\nAccept: */*\r\n",
    b"Host: x\r\nConnection: keep-alive\r\n",
)
_ODD_HEADERS = (
    b"host:x\r\n",
    b"Host:  x \t\r\n",
    b"HOST: x\r\nX-A: 1\r\nx-a: 2\r\nX-A:\t1\r\n",
    b"Host: x\r\nX-Empty:\r\nConnection: Keep-Alive\r\n",
    b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    b"Host: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Host: x\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(150)),
)


def get(chance: random.Random, style: Style, key: str, other: str, n: int) -> bytes:
    target = f"/v1/kv/{key}?raw"
    if chance.random() < style.slow:
        target += f"&index=99999999&wait={chance.choice((1, 5, 20))}ms"
    elif chance.random() < 0.3:
        target += f"&n={n}"
    if chance.random() >= style.odd:
        return f"GET {target} HTTP/1.1\r\n".encode() + chance.choice(_PLAIN_HEADERS) + b"\r\n"
    head = f"GET {target} HTTP/1.1\r\n".encode() + chance.choice(_PLAIN_HEADERS + _ODD_HEADERS)
    body = hot_get(other)
    match chance.randrange(5):
        case 0:
            return head + b"Content-Length: %0*d\r\n\r\n" % (chance.choice((1, 12, 13, 20)), len(body)) + body
        case 1:
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(chance, body)
        case 2:
            return head + b"Content-Length: 0\r\n\r\n"
    return head + b"\r\n"


def put(chance: random.Random, style: Style, key: str, version: int) -> bytes:
    plain = chance.random() >= style.odd
    value = f"{key}={version};".encode()
    value += b"x" * BIG if chance.random() < style.large else hot_get(key) * chance.randrange(3)
    head = f"PUT /v1/kv/{key} HTTP/1.1\r\n".encode()
    if plain:
        return head + b"Host: x\r\nContent-Length: %d\r\n\r\n" % len(value) + value
    head += chance.choice(_PLAIN_HEADERS + _ODD_HEADERS)
    if chance.random() < 0.3:
        head += b"Expect: 100-continue\r\n"
    if chance.random() < 0.5:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(chance, value)
    return head + b"Content-Length: %0*d\r\n\r\n" % (chance.choice((1, 1, 16)), len(value)) + value


# -- a client ----------------------------------------------------------------------------------------------------------


@dataclass
class Client:
    """One client: connections one after the other, and what it must be told on them."""

    name: int
    clients: int
    address: tuple[str, int]
    chance: random.Random
    ledger: Ledger
    style: Style
    plain: bool
    written: dict[str, int] = field(default_factory=dict)  # on this connection, in this order
    n: int = 0  # requests sent
    asked: int = 0
    neat: bool = False  # on this connection each request comes in a piece of its own
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None

    async def run(self, requests: int) -> None:
        try:
            while self.n < requests and time.monotonic() < self.style.until:
                await self.batch()
        finally:
            self.hang_up()

    async def begin(self) -> None:
        """Give each of our keys its first version."""
        for i in range(KEYS_PER_CLIENT):
            await self.send([self.put(f"k{self.name}-{i}")], ends=False, whole=True)
        self.hang_up()

    async def batch(self) -> None:
        if self.plain:
            await self.send([Ask(GET, key, hot_get(key)) for key in [self.any_key()]], ends=False, whole=True)
            return
        asks = [self.ask() for _ in range(self.chance.randint(1, self.style.pipelined_max))]
        if self.neat and self.chance.random() < self.style.odd / 2:
            key = self.any_key()
            asks = [Ask(GET, key, with_a_request_in_its_body(key))]
        ends = self.chance.random() < self.style.ends
        if ends and self.chance.random() < 0.7:
            request = asks[-1].data
            head, end, body = request.partition(b"\r\n\r\n")
            if b"Upgrade" not in head:
                head = head.replace(b"\r\nConnection: keep-alive", b"").replace(b"\r\nConnection: Keep-Alive", b"")
                if self.chance.random() < 0.5 and b"chunked" not in head and b"Expect" not in head:
                    head = head.replace(b" HTTP/1.1", b" HTTP/1.0", 1)
                else:
                    head += b"\r\nConnection: close"
                asks[-1].data, asks[-1].last = head + end + body, True
        await self.send(asks, ends=ends, whole=self.neat)

    def any_key(self) -> str:
        if self.chance.random() < 0.7:
            return f"k{self.chance.randrange(min(3, self.clients))}-0"  # asked often and written rarely, so hot
        return f"k{self.chance.randrange(self.clients)}-{self.chance.randrange(KEYS_PER_CLIENT)}"

    def own_key(self) -> str:
        return f"k{self.name}-{0 if self.chance.random() < 0.1 else self.chance.randrange(1, KEYS_PER_CLIENT)}"

    def ask(self) -> Ask:
        self.asked += 1
        if self.chance.random() < self.style.writes:
            return self.put(self.own_key())
        if self.chance.random() < 0.05:
            key = f"missing-{self.chance.randrange(20)}"
            return Ask(MISSING, key, hot_get(key))
        key = self.any_key()
        if self.neat and self.chance.random() < 0.6:
            return Ask(GET, key, hot_get(key))
        return Ask(GET, key, get(self.chance, self.style, key, self.any_key(), self.asked * self.clients + self.name))

    def put(self, key: str) -> Ask:
        self.ledger.sent[key] += 1
        version = self.ledger.sent[key]
        return Ask(PUT, key, put(self.chance, self.style, key, version), version)

    async def send(self, asks: list[Ask], *, ends: bool, whole: bool) -> None:
        """Send the requests as chance cuts them while reading the answers. `ends`: the connection ends after them."""
        if not asks:
            return
        self.n += len(asks)
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(*self.address)
            self.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.written = {}
            self.neat = whole or self.chance.random() < 0.5
        async with asyncio.timeout(60):
            reading = asyncio.create_task(self.read(asks))
            try:
                await self.write(asks)
                if ends and not asks[-1].last and self.writer is not None:
                    self.writer.write_eof()
                await reading
            finally:
                reading.cancel()
        if ends:
            assert self.reader is not None
            async with asyncio.timeout(30):
                rest = await self.reader.read()
            if rest:
                raise Wrong(f"more than was asked for: {rest[:200]!r}")
            self.hang_up()

    async def write(self, asks: list[Ask]) -> None:
        data = b"".join(a.data for a in asks)
        starts, at = [], 0
        for ask in asks:
            starts.append(at)
            at += len(ask.data)
        cuts = set(starts[1:]) if self.neat or self.chance.random() < 0.5 else set()
        if self.chance.random() < 0.5:  # behind the head
            cuts |= {at + a.data.index(b"\r\n\r\n") + 4 for at, a in zip(starts, asks)} - {len(data)}
        if not self.neat:
            cuts |= {self.chance.randrange(len(data)) for _ in range(self.chance.randrange(6))}
            if len(data) < 3000 and self.chance.random() < 0.03:
                cuts = set(range(len(data)))  # byte by byte
        at, unsent = 0, list(zip(starts, asks))
        assert self.writer is not None
        for end in (*sorted(cuts - {0}), len(data)):
            while unsent and unsent[0][0] < end:
                _, ask = unsent.pop(0)
                ask.floor = max(self.ledger.acked[ask.key], self.written.get(ask.key, 0))
                if ask.kind == PUT:
                    self.written[ask.key] = ask.version
            self.writer.write(data[at:end])
            at = end
            pause = self.chance.choice(self.style.pauses)
            if pause or self.chance.random() < 0.5:
                await asyncio.sleep(pause)
        await self.writer.drain()

    async def read(self, asks: list[Ask]) -> None:
        for i, ask in enumerate(asks):
            head, body = await self.answer()
            try:
                self.check(ask, head, body)
            except Wrong as e:
                before = [(a.kind, a.key, a.version, a.data[:300]) for a in asks[: i + 1]]
                raise Wrong(f"client {self.name}: {e}; after {before}") from None

    async def answer(self) -> tuple[bytes, bytes]:
        assert self.reader is not None
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 1"):
                break
        length = next(int(h[15:]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length:"))
        return head, await self.reader.readexactly(length)

    def check(self, ask: Ask, head: bytes, body: bytes) -> None:
        self.ledger.counts[ask.kind] += 1
        status = head[9:12]
        if ask.kind == MISSING:
            if status != b"404" or body:
                raise Wrong(f"no such key as {ask.key}, but {status!r} {body[:80]!r}")
            return
        if status != b"200":
            raise Wrong(f"{ask.kind} {ask.key}: {status!r} {body[:200]!r}")
        if ask.kind == PUT:
            if body.strip() != b"true":
                raise Wrong(f"PUT {ask.key} was told {body[:80]!r}")
            self.ledger.acked[ask.key] = max(self.ledger.acked[ask.key], ask.version)
            return
        key, _, rest = body.partition(b"=")
        version = rest.partition(b";")[0]
        if key.decode("latin-1") != ask.key or not version.isdigit():
            raise Wrong(f"asked for {ask.key}, was told {body[:80]!r}")
        if int(version) < ask.floor:
            raise Wrong(f"stale: {ask.key} is {ask.floor} or newer, was told {int(version)}")
        if int(version) > self.ledger.sent[ask.key]:
            raise Wrong(f"{ask.key} was never {int(version)}")

    def hang_up(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def run_clients(
    addresses: Iterable[tuple[str, int]], chance: random.Random, *, clients: int, requests: int, style: Style
) -> Counter[str]:
    """`requests` in all, by `clients` at once. Raises Wrong."""
    ledger, where = Ledger(), list(addresses)
    everyone = [
        Client(
            i,
            clients,
            where[i % len(where)],
            random.Random(chance.randrange(2**32)),
            ledger,
            style,
            plain=chance.random() < style.innocent,
        )
        for i in range(clients)
    ]
    try:
        for client in everyone:
            await client.begin()
        async with asyncio.TaskGroup() as group:
            for client in everyone:
                group.create_task(client.run(requests // clients))
    except* Wrong as found:
        raise found.exceptions[0] from None
    finally:
        for client in everyone:
            client.hang_up()
    return ledger.counts


# -- by hand -----------------------------------------------------------------------------------------------------------


async def in_process(seed: int, requests: int) -> Counter[str]:
    from tests.unit.agent.http.conftest import make_api

    api = await make_api()
    assert api.server.hot.enabled
    try:
        style = Style()
        counts = await run_clients(
            [(api.host, api.port)],
            random.Random(seed),
            clients=16,
            requests=requests,
            style=style,
        )
        counts["hot"] = int(api.agent.metrics.counter("http.hot"))
        return counts
    finally:
        await api.server.close(1.0)
        await api.agent.results.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.http", description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=20_000, help="requests")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--agent", default="", help="HOST:PORT,… of agents that run already")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--writes", type=float, default=0.2)
    parser.add_argument("--minutes", type=float, default=math.inf, help="with --agent: at most")
    args = parser.parse_args()
    import uvloop

    seed = args.seed if args.seed is not None else time.time_ns() % 2**32
    print(f"seed {seed}", flush=True)
    if args.agent:
        agents = [(host, int(port)) for host, _, port in (a.rpartition(":") for a in args.agent.split(","))]
        began = time.monotonic()
        style = Style(writes=args.writes, until=began + args.minutes * 60)
        run = run_clients(
            agents,
            random.Random(seed),
            clients=args.clients,
            requests=args.n,
            style=style,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            counts = runner.run(run)
        print(f"{sum(counts.values())} answers in {time.monotonic() - began:.0f} s, 0 wrong: {dict(counts)}")
        return 0
    for name, factory in (("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop)):
        left = args.n // 2
        while left > 0:
            n = min(left, 2000)
            with asyncio.Runner(loop_factory=factory) as runner:
                counts = runner.run(in_process(seed, n))
            print(f"{name}: seed {seed}: 0 wrong of {dict(counts)}", flush=True)
            left -= n
            seed += 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
