"""Clients that write and read all the time through the agents' HTTP, and note what they saw.

*Registers* are a few keys that many clients put, compare-and-set, delete and read at once; each lives for some hundred
operations or until too many writes on it had no answer, which keeps the check of its history cheap. *Ledgers* are keys
that are written once: what was acknowledged must be there at the end. *Bulk* are large values on a few keys, so that
segments, snapshots and slow followers come into play within minutes. A write's value names client and number, so that
a value tells which write it was.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable

from tests.torture.history import (
    CAS,
    CONSISTENT,
    DEFAULT,
    DELETE,
    DONE,
    NOT_DONE,
    PUT,
    READ,
    REFUSED,
    STALE,
    UNKNOWN,
    History,
    Op,
)
from tests.torture.hosts import HTTP, Answer, Host

KEYS, OPS_PER_KEY, UNKNOWN_PER_KEY = 6, 400, 4
PAUSE_TOLD_S = 5.0
BULK_BYTES, BULK_KEYS, BULK_EVERY_S = 200 << 10, 8, 0.15
NO_LEADER = "No cluster leader"
KINDS = {READ: 0.5, PUT: 0.22, CAS: 0.22, DELETE: 0.06}
MODES = {DEFAULT: 0.45, CONSISTENT: 0.3, STALE: 0.25}
MODE_QUERY = {DEFAULT: "", CONSISTENT: "?consistent", STALE: "?stale"}


class Lost(Exception):
    """No answer to what was sent."""


class NeverSent(Exception):
    """There was nobody to send it to."""


class Connection:
    """One keep-alive connection to a host's agent, opened again when it was lost."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", *, timeout_s: float) -> Answer:
        """Raises Lost, NeverSent."""
        try:
            async with asyncio.timeout(3.0):
                streams = self._streams or await self._open()
        except (OSError, TimeoutError) as e:
            raise NeverSent(str(e)) from None
        self._streams = None  # until it was answered
        try:
            async with asyncio.timeout(timeout_s):
                answer = await _exchange(*streams, method, path, self._host.address, body)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as e:
            streams[1].close()
            raise Lost(repr(e)) from None
        except BaseException:
            streams[1].close()
            raise
        self._streams = streams
        return answer

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        made = await asyncio.to_thread(self._host.socket)
        made.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(made, (self._host.address, HTTP))
            return await asyncio.open_connection(sock=made)
        except BaseException:
            made.close()
            raise

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, host: str, body: bytes
) -> Answer:
    length = f"Content-Length: {len(body)}\r\n" if body or method == "PUT" else ""
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{length}\r\n".encode() + body)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2])
    size, index = int(fields["content-length"]), int(fields.get("x-consul-index", 0))
    return Answer(int(head[9:12]), await reader.readexactly(size), index)


class Load:
    """All clients of a run, and what they saw."""

    def __init__(self, hosts: list[Host], rng: random.Random, name: str, note: Callable[[str], None]) -> None:
        self._hosts, self._rng, self._name, self._note_pause = hosts, rng, name, note
        self.history = History()
        self.ledger: dict[str, str] = {}  # key → outcome of its only write
        self.texts: Counter[str] = Counter()  # what errors said
        self.ending = False
        self.last_done_ns = time.monotonic_ns()
        self.longest_pause_s = 0.0
        self._keys: list[str] = []
        self._used: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._made = 0
        self._began_ns = time.monotonic_ns()

    def now(self) -> int:
        return time.monotonic_ns() - self._began_ns

    async def run(self, per_host: int) -> None:
        """Until `ending` is set."""
        async with asyncio.TaskGroup() as tasks:
            for host in self._hosts:
                for i in range(per_host):
                    rng = random.Random(self._rng.random())
                    tasks.create_task(self._register_client(host, f"{host.name}.{i}", rng))
                tasks.create_task(self._ledger_client(host, random.Random(self._rng.random())))
            tasks.create_task(self._bulk_client(random.Random(self._rng.random())))

    # -- registers

    def _key(self, rng: random.Random) -> str:
        self._keys = [k for k in self._keys if self._used[k] < OPS_PER_KEY and self._unknown[k] < UNKNOWN_PER_KEY]
        while len(self._keys) < KEYS:
            self._made += 1
            self._keys.append(f"{self._name}/{self._made}")
        key = rng.choice(self._keys)
        self._used[key] += 1
        return key

    async def _register_client(self, host: Host, name: str, rng: random.Random) -> None:
        connection, n = Connection(host), 0
        while not self.ending:
            await asyncio.sleep(rng.uniform(0, 0.03))
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            n += 1
            op = Op(kind, self._key(rng), 0, client=name, value=None if kind in (READ, DELETE) else f"{name}.{n}")
            if kind == READ:
                op.mode = rng.choices(list(MODES), list(MODES.values()))[0]
            path = f"/v1/kv/{op.key}"
            if kind == CAS:
                seen = await self.read(connection, op.key, DEFAULT, name, rng)
                if seen is None:
                    continue
                op.expected = seen.value
                path += f"?cas={seen.version}"
            if not await (self._read(connection, op, rng) if kind == READ else self._write(connection, op, path, rng)):
                await asyncio.sleep(rng.uniform(0.05, 0.2))
        connection.close()

    async def read(self, connection: Connection, key: str, mode: str, name: str, rng: random.Random) -> Op | None:
        """A read that is noted; None when it was not answered."""
        op = Op(READ, key, 0, mode=mode, client=name)
        return op if await self._read(connection, op, rng) else None

    async def _read(self, connection: Connection, op: Op, rng: random.Random) -> bool:
        op.call = self.now()
        self.history.begin(op)
        try:
            answer = await connection.ask("GET", f"/v1/kv/{op.key}{MODE_QUERY[op.mode]}", timeout_s=rng.uniform(2, 10))
        except (Lost, NeverSent):
            self.history.end(op, UNKNOWN)
            return False
        if answer.status == 200:
            row = json.loads(answer.body)[0]
            op.value, op.version = base64.b64decode(row["Value"]).decode(), row["ModifyIndex"]
        elif answer.status != 404:
            self.texts[f"read: {answer.status} {answer.text[:100]}"] += 1
            self.history.end(op, NOT_DONE, self.now())
            return False
        self.history.end(op, DONE, self.now())
        return True

    async def _write(self, connection: Connection, op: Op, path: str, rng: random.Random) -> bool:
        body = (op.value or "").encode()
        op.call = self.now()
        self.history.begin(op)
        try:
            answer = await connection.ask(
                "DELETE" if op.kind == DELETE else "PUT", path, body, timeout_s=rng.uniform(1.5, 11)
            )
        except NeverSent:
            op.outcome = NOT_DONE
            return False
        except Lost:
            self._unanswered(op)
            return False
        if answer.status == 200 and answer.text in ("true", "false"):
            self.history.end(op, DONE if answer.text == "true" else REFUSED, self.now())
            self._done()
            return True
        self.texts[f"write: {answer.status} {answer.text[:100]}"] += 1
        if answer.text.startswith(NO_LEADER):  # the product's word that it was not done, and never will be
            self.history.end(op, NOT_DONE, self.now())
        else:
            self._unanswered(op)
        return False

    def _unanswered(self, op: Op) -> None:
        self._unknown[op.key] += 1
        self.history.end(op, UNKNOWN)

    def _done(self) -> None:
        now = time.monotonic_ns()
        pause_s = (now - self.last_done_ns) / 1e9
        self.longest_pause_s = max(self.longest_pause_s, pause_s)
        self.last_done_ns = now
        if pause_s > PAUSE_TOLD_S:
            self._note_pause(f"no write was acknowledged for {pause_s:.1f} s")

    # -- ledgers

    async def _ledger_client(self, host: Host, rng: random.Random) -> None:
        connection, n = Connection(host), 0
        while not self.ending:
            await asyncio.sleep(rng.uniform(0, 0.04))
            n += 1
            key = f"{self._name}-ledger/{host.name}/{n}"
            self.ledger[key] = UNKNOWN
            try:
                answer = await connection.ask("PUT", f"/v1/kv/{key}", b"x", timeout_s=rng.uniform(1.5, 11))
            except NeverSent:
                del self.ledger[key]
                await asyncio.sleep(0.1)
                continue
            except Lost:
                continue
            if (answer.status, answer.text) == (200, "true"):
                self.ledger[key] = DONE
                self._done()
                continue
            self.texts[f"write: {answer.status} {answer.text[:100]}"] += 1
            self.ledger[key] = NOT_DONE if answer.text.startswith(NO_LEADER) else UNKNOWN
            await asyncio.sleep(rng.uniform(0.05, 0.2))
        connection.close()

    async def _bulk_client(self, rng: random.Random) -> None:
        connections = [Connection(host) for host in self._hosts]
        while not self.ending:
            await asyncio.sleep(BULK_EVERY_S)
            body = rng.randbytes(BULK_BYTES)
            path = f"/v1/kv/{self._name}-bulk/{rng.randrange(BULK_KEYS)}"
            with contextlib.suppress(Lost, NeverSent):
                await rng.choice(connections).ask("PUT", path, body, timeout_s=3.0)
        for connection in connections:
            connection.close()


async def final_reads(load: Load, hosts: list[Host], progress: Callable[[str], None]) -> None:
    """Read every register in both fresh modes at every host: these reads end each history."""
    load.ending = True
    rng = random.Random(0)
    connections = [(host, Connection(host)) for host in hosts]
    keys = list(load.history.keys)
    progress(f"reading {len(keys)} registers at {len(hosts)} hosts")

    async def read_all(host: Host, connection: Connection) -> None:
        for key in keys:
            for mode in (DEFAULT, CONSISTENT):
                await load.read(connection, key, mode, f"{host.name}.end", rng)

    await asyncio.gather(*(read_all(host, connection) for host, connection in connections))
    for _, connection in connections:
        connection.close()
