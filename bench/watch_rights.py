"""What a change costs a server's watches, by how many different rights its watchers have.

    python bench/watch_rights.py [--watchers 300] [--rights 10] [--instances 200] [--changes 300]

In one process: processor time per change, with streams that count their bytes and throw them away.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass
from typing import Any

from rostra.acl.authorizer import Everything
from rostra.server.state.catalog import Register
from rostra.server.state.cluster import Bootstrap
from rostra.server.state.entry import encode_args
from rostra.server.state.health import ServiceInstances
from rostra.server.state.store import Store
from rostra.server.watches import Watches
from rostra.wire.codec import encode_value
from rostra.wire.rpc import ServedStream

TIMES_MAX = 1.5


@dataclass(frozen=True)
class Rights(Everything):
    """The rules of one token: equal to those of the same number."""

    number: int


class Sink:
    def __init__(self) -> None:
        self.connection = self
        self.streams: dict[int, ServedStream] = {}
        self.chunks_untaken = self.sent = 0

    def send(self, payload: bytes) -> None:
        self.sent += len(payload)


async def cost(options: argparse.Namespace, rights: int) -> float:
    """Microseconds of processor time for each change."""
    store, sink = Store(), Sink()
    tasks: set[asyncio.Task[None]] = set()

    def spawn(work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    watches = Watches(store, spawn)

    def do(command: Any) -> None:
        kind, fields = encode_value(command)
        entry = encode_args(kind, fields, cluster_id="c", client=("", 0, 0), at_ms=0, actor="", source="")
        _, touches, _ = store.apply_all((entry,))
        watches.applied(touches)

    def instance(n: int, port: int) -> Register:
        return Register(node=f"n{n}", address="10.0.0.1", service={"id": "w", "name": "web", "port": port})

    async def settled() -> None:
        for _ in range(8):
            await asyncio.sleep(0)

    do(Bootstrap("c", (), "dc1", "", ""))
    for n in range(options.instances):
        do(instance(n, 1))
    streams = [ServedStream(sink, n + 1) for n in range(options.watchers)]  # type: ignore[arg-type]
    for n, stream in enumerate(streams):
        watches.subscribe(ServiceInstances("web"), stream, Rights(n % rights))
    for _ in range(3 * options.watchers):
        await asyncio.sleep(0)
    began = time.process_time()
    for change in range(options.changes):
        for stream in streams:
            stream.credit = 8
        do(instance(change % options.instances, 2 + change))
        await settled()
    return (time.process_time() - began) / options.changes * 1e6


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("watchers", 300), ("rights", 10), ("instances", 200), ("changes", 300)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    options = arguments.parse_args()
    pairs = [(asyncio.run(cost(options, 1)), asyncio.run(cost(options, options.rights))) for _ in range(5)]
    one, many = min(a for a, _ in pairs), min(b for _, b in pairs)
    ok = many <= TIMES_MAX * one
    print(
        f"{options.watchers} watchers, one change: {one:.0f} µs with equal rights, {many:.0f} µs with {options.rights}"
        f" different ones: x {many / one:.2f}   ≤ x {TIMES_MAX}  {'ok' if ok else 'MISSED'}"
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
