"""Does a default read through any agent show every write that was acknowledged before the read began?

    python bench/stale_reads.py [--reads 100000]

Writers count keys up through the client agent; readers ask every agent (the client's, the leader's, the followers') for
the same keys. After a third of the reads the leader is killed with kill -9, after two thirds it is started again, and
its agent is asked while it catches up. Exit status 1 for one stale answer.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import sys
import time

from processes import HTTP, Failure, Fleet, Node, Verdicts, eventually, guarded, parser

READERS_PER_AGENT, WRITERS = 6, 3


class Client:
    """One keep-alive connection, opened again when it was lost."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", timeout_s: float = 15.0) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(self._node.address, HTTP)
                reader, writer = self._streams
                length = f"Content-Length: {len(body)}\r\n" if body else ""
                writer.write(f"{method} {path} HTTP/1.1\r\nHost: {self._node.address}\r\n{length}\r\n".encode() + body)
                head = await reader.readuntil(b"\r\n\r\n")
                at = head.lower().index(b"content-length:") + 15
                size = int(head[at : head.index(b"\r", at)])
                return int(head[9:12]), await reader.readexactly(size)
        except BaseException:
            if self._streams is not None:
                self._streams[1].close()
                self._streams = None
            raise


class Run:
    def __init__(self, fleet: Fleet, reads: int) -> None:
        self.fleet, self.wanted = fleet, reads
        self.latest: dict[str, int] = {}  # by key: the highest number whose write was acknowledged
        self.keys: list[str] = []
        self.writes = self.write_errors = self.read_errors = 0
        self.reads: dict[str, int] = dict.fromkeys(fleet.nodes, 0)
        self.stale: list[str] = []
        self.down: set[str] = set()

    @property
    def done(self) -> int:
        return sum(self.reads.values())

    async def write(self, writer: int) -> None:
        client, life = Client(self.fleet["c1"]), 0
        while self.done < self.wanted:
            key = f"stale/{writer}-{life}"
            for n in range(1, 1 << 30):
                if self.done >= self.wanted:
                    return
                try:
                    status, body = await client.ask("PUT", f"/v1/kv/{key}", b"%d" % n)
                except (OSError, TimeoutError, asyncio.IncompleteReadError):
                    status, body = 0, b""
                if (status, body) != (200, b"true"):
                    # It may still be done, after a later one even: this key says nothing any more.
                    self.write_errors += 1
                    if key in self.keys:
                        self.keys.remove(key)
                    break
                self.latest[key] = n
                self.writes += 1
                if n == 1:
                    self.keys.append(key)
                await asyncio.sleep(0.002)
            life += 1

    async def read(self, node: Node, raw: bool) -> None:
        client = Client(node)
        while self.done < self.wanted:
            if node.name in self.down or not self.keys:
                await asyncio.sleep(0.05)
                continue
            key = random.choice(self.keys)
            acknowledged = self.latest[key]
            try:
                status, body = await client.ask("GET", f"/v1/kv/{key}" + ("?raw" if raw else ""))
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                status, body = 0, b""
            if status not in (200, 404):
                if node.name not in self.down:
                    self.read_errors += 1
                    await asyncio.sleep(0.02)
                continue
            seen = 0 if status == 404 else int(body if raw else base64.b64decode(json.loads(body)[0]["Value"]))
            self.reads[node.name] += 1
            if seen < acknowledged:
                self.stale.append(f"{key} at {node.name}: {seen} after {acknowledged} was acknowledged")

    async def disturb(self) -> None:
        while self.done < self.wanted / 3:
            await asyncio.sleep(0.02)
        leader = await asyncio.to_thread(self.fleet.leader)
        if leader is None:
            raise Failure("no leader")
        self.down.add(leader.name)
        await asyncio.to_thread(leader.kill)
        print(f"  {self.done} reads: killed the leader, {leader.name}", flush=True)
        while self.done < self.wanted * 2 / 3:
            await asyncio.sleep(0.02)
        leader.start()
        await asyncio.to_thread(
            eventually, "HTTP of the returned server", 20, lambda: leader.ask("GET", "/v1/agent/self")
        )
        leader.tree()
        self.down.discard(leader.name)
        print(f"  {self.done} reads: {leader.name} is back", flush=True)

    async def run(self) -> float:
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for i in range(WRITERS):
                tasks.create_task(self.write(i))
            for node in self.fleet.nodes.values():
                for i in range(READERS_PER_AGENT):
                    tasks.create_task(self.read(node, raw=i % 2 == 0))
            tasks.create_task(self.disturb())
        return time.monotonic() - began


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--reads", type=int, default=100_000)
    options = arguments.parse_args()

    def run() -> int:
        verdicts = Verdicts("Stale reads")
        with Fleet(keep=options.keep, log_level="warn", prefix=options.network, first=11) as fleet:
            it = Run(fleet, options.reads)
            took_s = asyncio.run(it.run())
        verdicts.add(
            "default reads", f"{it.done} in {took_s:.0f} s: " + ", ".join(f"{k} {n}" for k, n in it.reads.items())
        )
        verdicts.add("acknowledged writes meanwhile", str(it.writes))
        verdicts.add("stale answers", str(len(it.stale)), "0", not it.stale)
        verdicts.add("reads / writes refused while the leader changed", f"{it.read_errors} / {it.write_errors}")
        for line in it.stale[:10]:
            print("  stale:", line)
        return verdicts.finish()

    return guarded(run, within_s=60 + options.reads / 250)


if __name__ == "__main__":
    sys.exit(main())
