"""Snapshots of a large state: do they hold up the loop, how soon has a new disk caught up, what stays in memory?

    python bench/raft_snapshot.py [--keys 100000] [--value 100] [--snapshots 3]

Three servers are filled through the leader's local RPC socket. Then writes go on until each server has taken a
snapshot, and the histograms of the cores' loops tell how long their steps were meanwhile; this is repeated, and the
best time counts: what the program does, it does each time, while the machine's interrupts count as a loop's steps too.
Then a follower loses its disk: it is killed, removed, started with an empty directory and let in; the time until it has
applied what the leader had. Bars: no step over 5 ms with 100,000 keys, 25 ms with more; caught up in 10 s with
100,000; the log in memory below its bound. Exit status 1 for a missed bar.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable

from processes import ENVIRONMENT, Failure, Fleet, Node, Verdicts, eventually, guarded, parser, rss_mb
from raft_rpc import Line
from steps import between, show, steps_of

from rostra.wire.frames import FrameDecoder, frame, pack, unpack

SMALL = 100_000
CAUGHT_UP_S = 10.0  # with so many keys
#: What is written so that snapshots become due: few keys, large values.
FILLER_BYTES, FILLERS = 16 << 10, 64
AT_ONCE = 256
RAFT = "consul_server_raft_"


class Writer:
    """Writes through a server's local socket, many at a time on one connection."""

    def __init__(self, node: Node) -> None:
        self._line = Line((node.data_dir / "server" / "socket").read_text().strip(), node.name)
        self._frames = FrameDecoder(1 << 20)
        self._client = f"bench-{os.getpid()}-{random.getrandbits(32)}"
        self._sequence = self._done = 0

    def write(self, items: Iterable[tuple[str, bytes]]) -> None:
        """Returns when all are done. Raises Failure for one that is not."""
        for key, value in items:
            self._sequence += 1
            numbers = (self._client, self._sequence, self._done + 1)
            request = (self._sequence, "write", numbers, "kv.set", {"key": key, "value": value}, "")
            self._line.socket.sendall(frame(pack(request)))
            if self._sequence - self._done >= AT_ONCE:
                self._receive()
        while self._done < self._sequence:
            self._receive()

    def _receive(self) -> None:
        data = self._line.socket.recv(1 << 16)
        if not data:
            raise Failure("the server closed the connection")
        for payload in self._frames.payloads(data):
            _, kind, *rest = unpack(payload)
            if kind != "ok" or rest[0] is not True:
                raise Failure(f"a write was not done: {rest}")
            self._done += 1

    def close(self) -> None:
        self._line.socket.close()


def number(node: Node, name: str) -> int:
    return int(node.samples()[RAFT + name, ""])


def fill(leader: Node, options: argparse.Namespace) -> float:
    writer, began = Writer(leader), time.monotonic()
    writer.write((f"bulk/{i % 100:02d}/{i:07d}", random.randbytes(options.value)) for i in range(options.keys))
    writer.close()
    return time.monotonic() - began


def snapshot_once(fleet: Fleet, leader: Node) -> tuple[dict[str, dict[float, int]], float]:
    """Write until every server has taken one more: the steps of the cores' loops meanwhile, and the seconds."""
    taken = {node.name: number(node, "snapshots_taken") for node in fleet.servers}
    before = {loop: steps for node in fleet.servers for loop, steps in steps_of(node).items() if "core" in loop}
    writer, began = Writer(leader), time.monotonic()
    while any(number(node, "snapshots_taken") == taken[node.name] for node in fleet.servers):
        writer.write((f"filler/{i}", random.randbytes(FILLER_BYTES)) for i in range(FILLERS))
        if time.monotonic() - began > 120:
            raise Failure("no snapshot was taken within 120 s of writes")
        time.sleep(0.02)
    took_s = time.monotonic() - began
    writer.close()
    time.sleep(0.6)  # an agent asks its core at most twice a second
    after = {loop: steps for node in fleet.servers for loop, steps in steps_of(node).items() if "core" in loop}
    return {loop: between(before[loop], after[loop]) for loop in after}, took_s


def judge_steps(fleet: Fleet, leader: Node, options: argparse.Namespace, verdicts: Verdicts) -> None:
    bar = 5.0 if options.keys <= SMALL else 25.0
    fewest: dict[str, int] = {}
    for n in range(options.snapshots):
        steps, took_s = snapshot_once(fleet, leader)
        print(f"\nsnapshot {n + 1}: all servers took one within {took_s:.1f} s")
        show(steps)
        for loop, histogram in steps.items():
            over = sum(count for bound, count in histogram.items() if bound > bar)
            fewest[loop] = min(over, fewest.get(loop, over))
        if not any(fewest.values()):
            break
    text = ", ".join(f"{n} in {loop}" for loop, n in fewest.items() if n) or "0"
    ok = not any(fewest.values())
    verdicts.add(f"steps over {bar:g} ms while a snapshot is taken (best of {n + 1})", text, "0", ok)
    sizes = [number(node, "snapshot_bytes") for node in fleet.servers]
    verdicts.add("size of a snapshot", f"{max(sizes) / 2**20:.1f} MiB")


def judge_new_disk(fleet: Fleet, leader: Node, keys: int, verdicts: Verdicts) -> None:
    follower = next(s for s in fleet.servers if s is not leader)
    node_id = (follower.data_dir / "node-id").read_text().strip()
    follower.kill()
    eventually("it is removed", 20, lambda: done(leader, "DELETE", f"peer?id={node_id}"))
    shutil.rmtree(follower.data_dir)
    wanted = int(leader.samples()["consul_server_index", ""])
    began = time.monotonic()
    follower.start()
    eventually("it is let in", 30, lambda: done(leader, "POST", f"peer?name={follower.name}"), every_s=0.05)
    admitted = time.monotonic()
    eventually(
        "it has caught up", 120, lambda: follower.samples().get(("consul_server_index", ""), 0) >= wanted, every_s=0.05
    )
    caught_up = time.monotonic()
    follower.tree()
    what, took_s = "a follower with a new disk: from its start until it has all", caught_up - began
    if keys <= SMALL:
        verdicts.most(what, took_s, CAUGHT_UP_S)
    else:
        verdicts.add(what, f"{took_s:.2f} s")
    verdicts.add("  of which after it was let in", f"{caught_up - admitted:.2f} s")
    verdicts.add("  snapshots that it installed", str(number(follower, "snapshots_installed")))


def done(at: Node, method: str, what: str) -> bool:
    status, body, _ = at.ask(method, f"/v1/operator/raft/{what}", b"" if method == "POST" else None)
    if status != 200:
        raise Failure(f"{status} {body.decode(errors='replace')[:200]}")
    return True


def judge_memory(fleet: Fleet, verdicts: Verdicts) -> None:
    for node in fleet.servers:
        peak, bound = number(node, "log_bytes_peak"), number(node, "log_bytes_max")
        verdicts.add(
            f"{node.name}: the log in memory, peak",
            f"{peak / 2**20:.1f} MiB (core's RSS {rss_mb(node.core_pid()):.0f} MB)",
            f"≤ {bound / 2**20:.0f} MiB",
            peak <= bound,
        )


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--keys", type=int, default=100_000)
    arguments.add_argument("--value", type=int, default=100, help="bytes")
    arguments.add_argument("--snapshots", type=int, default=3, help="how often it is measured at most")
    options = arguments.parse_args()
    ENVIRONMENT["ROSTRA_LOOP_TICK_MS"] = "1"

    def run() -> int:
        verdicts = Verdicts(f"Snapshots of {options.keys} keys")
        with Fleet(clients=0, keep=options.keep, prefix=options.network, first=51, log_level="info") as fleet:
            leader = eventually("one leader", 20, fleet.leader)
            took_s = fill(leader, options)
            print(f"{options.keys} keys written in {took_s:.1f} s", flush=True)
            for node in fleet.servers:
                index = int(leader.samples()["consul_server_index", ""])
                eventually(
                    f"{node.name} has them", 60, lambda n=node, i=index: n.samples()["consul_server_index", ""] >= i
                )
            if fleet.leader() is not leader:
                raise Failure("another server leads now")
            judge_steps(fleet, leader, options, verdicts)
            judge_new_disk(fleet, leader, options.keys, verdicts)
            judge_memory(fleet, verdicts)
        return verdicts.finish()

    return guarded(run, within_s=300 + options.keys / 2000)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (http.client.HTTPException, json.JSONDecodeError) as e:
        sys.exit(f"failed: {e!r}")
