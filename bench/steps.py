"""Does any step of a loop take longer than 2 ms while a large service changes under many watchers?

    python bench/steps.py [--instances 1000] [--watchers 300] [--seconds 15] [--at c1,s2]

Three servers and a client agent as processes; the service is registered through the catalog API; the watchers are
blocking queries for its passing instances over keep-alive connections, at the client agent and then at a server's; one
instance changes its health each second. Prints the histogram of the loop's steps of every agent and core after the
warm-up, and how long a change took to reach the first and the last watcher. "idle loop" is one that does nothing: what
it shows is the machine's, whose interrupts and stolen time count as a loop's own. Therefore a measure with a step over
2 ms is repeated, up to three times: what a program does, it does with each change, so a loop that is clean once is
clean. Exit status 1 for a loop that never is.

    python bench/steps.py --hostile KIND[,KIND…]|all [--eight] [--seconds 30]

measures the same loops, and what other clients wait, while one hostile connection of each kind floods c1 or the leader
(`bench/hostile.py`), and with `--eight` eight at once. Bars: no step over 5 ms at the victims, others' p99 at most 3
times the quiet one, no node failed, no election, memory back to within 10 %.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import select
import socket
import subprocess
import sys
import time
from typing import Any

import uvloop
from hostile import EIGHT, KINDS, Attackers, Others, resident_mb, sidecar
from processes import ENVIRONMENT, Fleet, Node, Verdicts, eventually, guarded, parser

from rostra.runtime.steps import BUCKETS_MS, LoopSteps

SERVICE = "big"
IDLE = "idle loop"
LIMIT_MS, TRIES = 2.0, 3
HOSTILE_STEP_MS = 5.0
changes = itertools.count()  # over all measurements: registering what is registered already is no change


# -- the watchers, a process of their own ---------------------------------------------------------------------------


class Watcher:
    """One blocking query after the other on one connection. Bodies are counted, not kept."""

    __slots__ = ("_head", "_left", "answers", "host", "index", "socket")

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.socket = socket.create_connection((host, port))
        self.socket.setblocking(False)
        self.index, self.answers = 0, 0
        self._head, self._left = b"", 0

    def ask(self) -> None:
        path = f"/v1/health/service/{SERVICE}?passing&index={self.index}&wait=120s"
        self.socket.send(f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())

    def read(self, buffer: bytearray) -> bool:
        """True when an answer is complete, and the next question has been asked."""
        if not self._left:
            try:
                self._head += self.socket.recv(65536)
            except BlockingIOError:
                return False
            head, mark, rest = self._head.partition(b"\r\n\r\n")
            if not mark:
                return False
            lines = head.split(b"\r\n")
            if b" 200 " not in lines[0]:
                raise RuntimeError(head.decode())
            fields = dict(line.lower().split(b": ", 1) for line in lines[1:])
            self.index = int(fields[b"x-consul-index"])
            self._left = int(fields[b"content-length"]) - len(rest)
            self._head = b""
        while self._left > 0:
            try:
                got = self.socket.recv_into(buffer)
            except BlockingIOError:
                return False
            if not got:
                raise RuntimeError("the agent closed a connection")
            self._left -= got
        self.answers += 1
        self.ask()
        return True


def watch(host: str, port: int, watchers: int) -> None:
    """Prints a line of JSON each time that all watchers were answered: when the first and when the last was."""
    all_of_them = {}
    poll = select.epoll()
    for _ in range(watchers):
        watcher = Watcher(host, port)
        all_of_them[watcher.socket.fileno()] = watcher
        poll.register(watcher.socket, select.EPOLLIN)
        watcher.ask()
    buffer = bytearray(1 << 20)
    answered, first = 0, 0.0
    while True:
        for fd, _ in poll.poll():
            if all_of_them[fd].read(buffer):
                answered += 1
                first = first or time.monotonic()
                if answered == watchers:
                    print(json.dumps({"first": first, "last": time.monotonic()}), flush=True)
                    answered, first = 0, 0.0


def idle() -> None:
    """A loop that only ticks, measured as the others are. Answers each line of input with its buckets."""

    async def run() -> None:
        steps = LoopSteps()
        steps.start()
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while await reader.readline():
            bounds = [*map(float, BUCKETS_MS), float("inf")]
            print(json.dumps(dict(zip(map(str, bounds), itertools.accumulate(steps.buckets)))), flush=True)

    uvloop.run(run())


# -- histograms -------------------------------------------------------------------------------------------------------

Buckets = dict[float, int]  # upper bound in ms → how many steps were not longer


def steps_of(node: Node) -> dict[str, Buckets]:
    """The loops that this node's agent knows of: its own, and its core's."""
    found: dict[str, Buckets] = {}
    for (name, labels), value in node.samples().items():
        bound = next((part[4:-1] for part in labels.split(",") if part.startswith('le="')), "")
        loop = {"consul_loop_step_bucket": "agent", "consul_server_steps_bucket": "core"}.get(name)
        if loop and bound:
            found.setdefault(f"{node.name} {loop}", {})[float(bound)] = int(value)
    return found


def all_steps(fleet: Fleet, control: subprocess.Popen[str]) -> dict[str, Buckets]:
    found = {loop: buckets for node in fleet.nodes.values() for loop, buckets in steps_of(node).items()}
    assert control.stdin is not None
    assert control.stdout is not None
    print(file=control.stdin, flush=True)
    found[IDLE] = {float(bound): n for bound, n in json.loads(control.stdout.readline()).items()}
    return found


def between(before: Buckets, after: Buckets) -> dict[float, int]:
    """Steps per bucket, not cumulative."""
    out, below = {}, 0
    for bound in sorted(after):
        upto = after[bound] - before.get(bound, 0)
        out[bound], below = upto - below, upto
    return out


def show(histograms: dict[str, dict[float, int]]) -> None:
    bounds = sorted({bound for histogram in histograms.values() for bound in histogram})
    used = [b for b in bounds if b <= 5 or any(h.get(b) for h in histograms.values())]
    print("  steps by length, ms  " + "".join(f"{'more' if b == float('inf') else f'≤{b:g}':>8}" for b in used))
    for loop, histogram in histograms.items():
        print(f"  {loop:<21}" + "".join(f"{histogram.get(b, 0) or '.':>8}" for b in used))


# -- the run ----------------------------------------------------------------------------------------------------------


def register(fleet: Fleet, instances: int) -> None:
    connection = fleet["s1"].socket(30)
    for i in range(instances):
        body = json.dumps(instance(i, "passing"))
        connection.sendall(
            f"PUT /v1/catalog/register HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        answer = connection.recv(4096)
        if b" 200 " not in answer[:20]:
            raise RuntimeError(answer.decode())
    connection.close()


def instance(i: int, status: str, output: str = "") -> dict[str, Any]:
    node = f"host-{i:04}"
    return {
        "Node": node,
        "Address": f"10.1.{i // 250}.{i % 250 + 1}",
        "Service": {
            "ID": f"{SERVICE}-{i}",
            "Service": SERVICE,
            "Port": 8000,
            "Tags": ["v1", "blue"],
            "Meta": {"n": str(i)},
        },
        "Checks": [
            {
                "CheckID": f"{SERVICE}-{i}",
                "Name": "http",
                "Status": status,
                "ServiceID": f"{SERVICE}-{i}",
                "Output": output,
            }
        ],
    }


def measure(fleet: Fleet, at: Node, options: argparse.Namespace) -> tuple[dict[str, int], list[tuple[float, float]]]:
    """Steps over the limit by loop, and when the first and the last watcher had each change."""
    control = subprocess.Popen(
        [sys.executable, __file__, "--be-idle"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    watchers = subprocess.Popen(
        [sys.executable, __file__, "--be-the-watchers", at.address, str(options.watchers)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert watchers.stdout is not None
        watchers.stdout.readline()  # the first answers
        writer = fleet["s1"] if at.name != "s1" else fleet["s2"]
        lags: list[tuple[float, float]] = []
        before: dict[str, Buckets] = {}
        warm_up = 2
        for n in range(warm_up + options.seconds):
            if n == warm_up:
                before = all_steps(fleet, control)
                time.sleep(0.2)
            began = time.monotonic()
            change = next(changes)
            status = "critical" if change % 2 == 0 else "passing"
            writer.put("/v1/catalog/register", instance(change * 37 % options.instances, status, f"change {change}"))
            seen = json.loads(watchers.stdout.readline())
            if n >= warm_up:
                lags.append((seen["first"] - began, seen["last"] - began))
            time.sleep(max(0.0, began + 1.0 - time.monotonic()))
        time.sleep(0.6)  # an agent asks its core at most twice a second
        after = all_steps(fleet, control)
    finally:
        for child in (watchers, control):
            child.kill()
            child.wait()
    histograms = {loop: between(before[loop], after[loop]) for loop in after}
    print(f"\n{options.watchers} watchers at {at.name}, {options.instances} instances, {len(lags)} changes")
    show(histograms)
    over = {loop: sum(n for bound, n in h.items() if bound > options.limit_ms) for loop, h in histograms.items()}
    return {loop: n for loop, n in over.items() if n and loop != IDLE}, lags


def judge(fleet: Fleet, at: Node, options: argparse.Namespace, verdicts: Verdicts) -> None:
    dirty, lags = measure(fleet, at, options)
    tries = 1
    while dirty and tries < TRIES:
        again, lags = measure(fleet, at, options)
        dirty = {loop: min(n, again[loop]) for loop, n in dirty.items() if loop in again}
        tries += 1
    text = ", ".join(f"{n} in {loop}" for loop, n in dirty.items()) or "0"
    verdicts.add(f"watchers at {at.name}: steps over {options.limit_ms:g} ms (measured {tries}x)", text, "0", not dirty)
    verdicts.add(
        f"watchers at {at.name}: change to first / last watcher",
        f"{max(a for a, _ in lags) * 1000:.0f} / {max(b for _, b in lags) * 1000:.0f} ms at most",
    )


def first_srv(at: Node, limit_ms: float) -> tuple[int, int]:
    """(answers, steps over the limit) of the first SRV question for the service at an agent."""
    before = steps_of(at)
    question = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + b"".join(
        bytes([len(label)]) + label for label in (SERVICE.encode(), b"service", b"consul", b"")
    )
    question += b"\x00\x21\x00\x01"
    with socket.create_connection((at.address, 8600), 5) as tcp:
        tcp.sendall(len(question).to_bytes(2, "big") + question)
        size = int.from_bytes(tcp.recv(2, socket.MSG_WAITALL), "big")
        reply = tcp.recv(size, socket.MSG_WAITALL)
    answers = int.from_bytes(reply[6:8], "big")
    time.sleep(0.1)
    after = steps_of(at)
    over = sum(sum(n for b, n in between(before[loop], after[loop]).items() if b > limit_ms) for loop in after)
    return answers, over


# -- hostile mode -----------------------------------------------------------------------------------------------------


def longest(before: dict[str, Buckets], after: dict[str, Buckets]) -> tuple[float, str, int]:
    """(upper bound of the longest step in ms, the loop that it was on, how many were over the bar) of the loops."""
    steps = {loop: between(before[loop], after[loop]) for loop in after}
    bound, where = max((bound, loop) for loop, histogram in steps.items() for bound, n in histogram.items() if n)
    over = sum(n for histogram in steps.values() for bound, n in histogram.items() if bound > HOSTILE_STEP_MS)
    return bound, where, over


def elections(fleet: Fleet) -> int:
    return sum(node.log.read_text(errors="replace").count("leadership:") for node in fleet.servers)


def under_attack(fleet: Fleet, kinds: list[str], seconds: int, verdicts: Verdicts) -> None:
    agent, leader = fleet["c1"], eventually("one leader", 20, fleet.leader)
    victims = [agent, leader]
    held, memory = elections(fleet), resident_mb(victims)
    with Others(victims) as quiet:
        time.sleep(min(seconds, 10))
    before = {**steps_of(agent), **steps_of(leader)}
    failed: set[str] = set()
    with Others(victims) as others, Attackers(kinds, agent, leader, fleet.directory):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for check in fleet["s2" if leader.name != "s2" else "s3"].get("/v1/health/state/critical", timeout_s=30):
                if check["CheckID"] == "serfHealth" and check["Node"] != "hostile":
                    failed.add(check["Node"])
            time.sleep(0.5)
        time.sleep(0.6)  # an agent asks its core at most twice a second
        after = {**steps_of(agent), **steps_of(leader)}
    time.sleep(5)
    name = "+".join(kinds) if len(kinds) < 3 else f"{len(kinds)} at once"
    bound, where, over = longest(before, after)
    moved = elections(fleet) - held
    grown = resident_mb(victims) / memory
    p99, quiet_p99 = others.percentile(99), quiet.percentile(99)
    ok = over == 0 and p99 <= 3 * quiet_p99 and not failed and not moved and grown <= 1.1 and not others.failed
    verdicts.add(
        name,
        f"step ≤ {bound:g} ms in {where} ({over} over); others p50/p99 {quiet.percentile(50):.1f}/{quiet_p99:.1f} →"
        f" {others.percentile(50):.1f}/{p99:.1f} ms; failed {len(failed)}, elections {moved},"
        f" errors {len(others.failed)}; memory x {grown:.2f}",
        f"≤ {HOSTILE_STEP_MS:g} ms, x 3, 0, 0, 0, x 1.1",
        ok,
    )


def hostile(options: argparse.Namespace) -> int:
    kinds = KINDS if options.hostile == "all" else [kind for kind in options.hostile.split(",") if kind]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise SystemExit(f"--hostile {unknown[0]}: one of {', '.join(KINDS)}, or all")
    runs = [[kind] for kind in kinds] + ([EIGHT] if options.eight else [])

    def run() -> int:
        verdicts = Verdicts("Under attack")
        with Fleet(keep=options.keep, prefix=options.network, log_level="info") as fleet:
            fleet["c1"].put("/v1/agent/service/register", sidecar())
            for each in runs:
                under_attack(fleet, each, options.seconds, verdicts)
        return verdicts.finish()

    return guarded(run, within_s=60 + len(runs) * (options.seconds + 40))


def main() -> int:
    if "--be-idle" in sys.argv:
        idle()
        return 0
    if "--be-the-watchers" in sys.argv:
        watch(sys.argv[-2], 8500, int(sys.argv[-1]))
        return 0
    arguments = parser(__doc__)
    arguments.add_argument("--instances", type=int, default=1000)
    arguments.add_argument("--watchers", type=int, default=300)
    arguments.add_argument("--seconds", type=int, default=15)
    arguments.add_argument(
        "--tick-ms", default="1", help="0: every turn of every loop, which keeps the processors busy"
    )
    arguments.add_argument("--limit-ms", type=float, default=LIMIT_MS, help="a step over this misses the bar")
    arguments.add_argument("--at", default="c1,s2", help="the agents that the watchers ask, one after the other")
    arguments.add_argument("--hostile", default="", metavar="KINDS", help="hostile mode: kinds of attack, or all")
    arguments.add_argument("--eight", action="store_true", help="hostile mode: eight at once as well")
    options = arguments.parse_args()
    ENVIRONMENT["ROSTRA_LOOP_TICK_MS"] = options.tick_ms

    if options.hostile or options.eight:
        return hostile(options)

    def run() -> int:
        verdicts = Verdicts("Loop steps")
        with Fleet(keep=options.keep, prefix=options.network, log_level="warn") as fleet:
            register(fleet, options.instances)
            for node in fleet.nodes.values():
                eventually(
                    f"all instances at {node.name}",
                    10,
                    lambda node=node: len(node.get(f"/v1/catalog/service/{SERVICE}")) == options.instances,
                )
            for name in options.at.split(","):
                judge(fleet, fleet[name], options, verdicts)
            firsts = [first_srv(fleet[name], options.limit_ms) for name in ("s3", "s1", "s2")]
        fewest = min(over for _, over in firsts)
        verdicts.add(
            f"first SRV question ({firsts[0][0]} answers): steps over {options.limit_ms:g} ms, "
            f"fewest of {len(firsts)} agents",
            str(fewest),
            "0",
            fewest == 0,
        )
        return verdicts.finish()

    return guarded(run, within_s=60 + 3 * (options.seconds + 15) * len(options.at.split(",")))


if __name__ == "__main__":
    sys.exit(main())
