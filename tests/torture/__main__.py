"""`make torture MINUTES=n`: real servers, clients that never pause, a fault every few seconds, and what came of it.

    python -m tests.torture [--minutes 10] [--seed N] [--servers 3,5] [--per-minute 12] [--loopback]

Where namespaces can be had (as root, or as a user where the kernel permits it) the whole run has its own: network,
mounts and processes end with it, however it ends. Elsewhere it runs on loopback with the faults that need none of that.
Prints one block of totals. Exit status 1 for any violation: an acknowledged write lost, a history of a key that is not
linearizable, a stale read in a mode that promises none, a write applied twice, servers that differ at the end, a victim
that does not come back. Histories and logs of a failed run are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.processes import NotYet, Processes, eventually
from tests.torture import checker
from tests.torture.clients import Load, final_reads
from tests.torture.faults import Faults
from tests.torture.history import CONSISTENT, DEFAULT, DONE, NOT_DONE, History, Op
from tests.torture.hosts import Cluster, Host

INSIDE = "ROSTRA_TORTURE_INSIDE"
UNSHARE = ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
SHOWN = 40
#: How long start, last faults, healing and checks may take beside the asked time.
BEYOND_S = 400.0
#: Fewer acknowledged writes a minute than this are no proof of anything.
LEAST_WRITES = 60
COUNTERS = {
    "leaderships": "leaderships",
    "snapshots_taken": "snapshots taken",
    "snapshots_sent": "sent",
    "snapshots_installed": "installed",
}


# -- namespaces ---------------------------------------------------------------------------------------------------


def enter_namespaces() -> bool:
    """Run this program again in namespaces of its own (then it does not return). False where there are none."""
    unshare = UNSHARE if os.geteuid() == 0 else [*UNSHARE, "--user", "--map-root-user"]
    for tool in ("unshare", "ip", "nft", "mount"):
        if shutil.which(tool) is None:
            print(f"no `{tool}`: on loopback, without partitions and full disks")
            return False
    tried = subprocess.run([*unshare, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, check=False)
    if tried.returncode:
        print(f"no namespaces ({tried.stderr.decode().strip()}): on loopback, without partitions and full disks")
        return False
    sys.stdout.flush()
    argv = [*unshare, sys.executable, "-m", "tests.torture", *sys.argv[1:]]
    os.execvpe(argv[0], argv, {**os.environ, INSIDE: "1"})
    return True


def prepare_namespace() -> None:
    """`ip netns` keeps its names in /run: a place of our own, so that nothing of ours is left outside."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    os.mkdir("/run/netns")


# -- one cluster's share of the time ----------------------------------------------------------------------------------


class Run:
    def __init__(self, processes: Processes, servers: int, options: argparse.Namespace, rng: random.Random) -> None:
        self.servers, self._options, self._rng = servers, options, rng
        self._began = time.monotonic()
        self.cluster = Cluster(processes, servers=servers, clients=1, with_network=INSIDE in os.environ)
        self.load: Load
        self.faults: Faults
        self.violations: list[str] = []
        self.bad: list[tuple[Op, list[Op]]] = []  # what cannot be explained, and the history of its key
        self.stale: Counter[str] = Counter()
        self.facts: dict[str, Any] = {}
        self.sums: Counter[str] = Counter()  # of the servers' counters, over all their lives
        self.log_bytes = (0.0, 0.0)  # memory of a log: the largest seen, the bound

    def note(self, text: str) -> None:
        print(f"  {self.servers} servers, {time.monotonic() - self._began:6.1f} s: {text}", flush=True)

    async def go(self, minutes: float) -> None:
        await asyncio.to_thread(self.cluster.start)
        hosts = list(self.cluster.hosts.values())
        self.load = Load(hosts, random.Random(self._rng.random()), f"of-{self.servers}", self.note)
        self.faults = Faults(self.cluster, self._rng, self.note)
        if self._options.only:
            self.faults.keep_only(self._options.only)
        for kind, reason in self.faults.missing.items():
            self.note(f"not tried: {kind} ({reason})")
        self.note("working; faults begin")
        until = time.monotonic() + minutes * 60
        load = asyncio.create_task(self.load.run(self._options.clients))
        watch = asyncio.create_task(self._watch())
        try:
            await self.faults.run(until, self._options.per_minute)
            self.note("all faults are over")
            healed = time.monotonic()
            with self._violation("after the last fault"):
                await asyncio.to_thread(self.cluster.wait_settled, 60.0)
                self.facts["healed_s"] = time.monotonic() - healed
                await asyncio.sleep(1.0)
        finally:
            self.load.ending = True
            watch.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(load, 20)
        with self._violation("at the end"):
            await final_reads(self.load, hosts, self.note)
            await asyncio.to_thread(self._compare_servers)
            await asyncio.to_thread(self._check_ledgers)
        self._check_histories()
        self.violations += self.faults.violations
        done = sum(n for outcome, n in Counter(self.load.ledger.values()).items() if outcome == DONE)
        if done < LEAST_WRITES * minutes:
            self.violations.append(f"only {done} once-written keys were acknowledged: that shows nothing")

    async def _watch(self) -> None:
        """Add up counters that begin anew whenever a core does."""
        last: dict[tuple[str, str], float] = {}
        while True:
            for host in self.cluster.servers:
                try:
                    gauges = await asyncio.to_thread(host.gauges)
                except (OSError, http.client.HTTPException, AssertionError, ValueError):
                    continue
                for name in COUNTERS:
                    value, before = gauges.get(name, 0.0), last.get((host.name, name), 0.0)
                    self.sums[name] += int(value - before if value >= before else value)
                    last[host.name, name] = value
                peak, bound = gauges.get("log_bytes_peak", 0.0), gauges.get("log_bytes_max", 0.0)
                self.log_bytes = (max(self.log_bytes[0], peak), max(self.log_bytes[1], bound))
            await asyncio.sleep(1.0)

    def print_logs(self) -> None:
        for host in self.cluster.hosts.values():
            print(f"-- {host.name}", *host.said().splitlines()[-10:], sep="\n")

    @contextlib.contextmanager
    def _violation(self, when: str) -> Any:
        try:
            yield
        except (NotYet, AssertionError, OSError) as e:
            self.violations.append(f"{when}: {e}")

    def _compare_servers(self) -> None:
        """Each server's own state, row by row, once all have applied the same."""

        def state(host: Host, what: str) -> tuple[int, bytes]:
            answer = host.ask("GET", f"/v1/{what}?stale&recurse", timeout_s=30)
            return answer.index, answer.body

        def equal() -> bool:
            for what in ("kv/", "session/list", "catalog/nodes"):
                states = {host.name: state(host, what) for host in self.cluster.servers}
                assert len(set(states.values())) == 1, f"{what} differs: " + ", ".join(
                    f"{name} {index} {len(body)} bytes" for name, (index, body) in states.items()
                )
            self.facts["rows"] = len(json.loads(state(self.cluster.servers[0], "kv/")[1]))
            return True

        eventually("all servers have the same state", equal, 30)

    def _check_ledgers(self) -> None:
        there = set(self.cluster.servers[0].get(f"/v1/kv/of-{self.servers}-ledger?keys&consistent", timeout_s=30))
        lost = [k for k, outcome in self.load.ledger.items() if outcome == DONE and k not in there]
        undone = [k for k, outcome in self.load.ledger.items() if outcome == NOT_DONE and k in there]
        self.facts.update(lost=len(lost), undone=len(undone), ledger=Counter(self.load.ledger.values()))
        if lost:
            self.violations.append(f"{len(lost)} acknowledged writes lost: {', '.join(lost[:SHOWN])}")
        if undone:
            self.violations.append(f"{len(undone)} writes done although `not done` was said: {', '.join(undone[:5])}")

    def _check_histories(self) -> None:
        history: History = self.load.history
        self.note(f"checking {len(history.keys)} registers")
        began, not_linearizable, gave_up, twice = time.monotonic(), 0, 0, 0
        for key, ops in history.keys.items():
            problems: list[checker.Violation] = []
            try:
                if (found := checker.check(ops)) is not None:
                    not_linearizable += 1
                    problems.append(found)
            except checker.GaveUp as e:
                gave_up += 1
                self.violations.append(f"{key}: not decided: {e}")
            if (found := checker.versions(ops)) is not None:
                twice += 1
                problems.append(found)
            stale = checker.stale_reads(ops)
            self.stale.update(op.mode for op in stale)
            problems += [checker.Violation(op, "stale") for op in stale[:1]]
            for problem in problems:
                self.violations.append(f"{key}: {problem.reason}\n    {problem.op}")
                self.bad.append((problem.op, sorted(ops, key=lambda op: op.call)))
        self.facts.update(
            keys=len(history.keys), not_linearizable=not_linearizable, gave_up=gave_up, twice=twice,
            check_s=time.monotonic() - began,
        )  # fmt: skip


# -- all of them, and the block of totals ---------------------------------------------------------------------------


def summary(runs: list[Run], options: argparse.Namespace, took_s: float) -> str:
    kinds: Counter[str] = Counter()
    outcomes: Counter[tuple[str, str]] = Counter()
    ledger: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for run in runs:
        kinds += run.faults.counts
        outcomes += run.load.history.outcomes
        ledger += run.facts.get("ledger", Counter())
        for name in ("lost", "undone", "keys", "not_linearizable", "gave_up", "twice"):
            total[name] += run.facts.get(name, 0)
    stale = sum((run.stale for run in runs), Counter())
    sums = sum((run.sums for run in runs), Counter())
    log_bytes = max(run.log_bytes for run in runs)
    where = "network namespaces" if INSIDE in os.environ else "loopback"
    missing = {kind: reason for run in runs for kind, reason in run.faults.missing.items()}
    lines = [
        f"torture: {took_s / 60:.1f} minutes on {where}, seed {options.seed}, "
        f"clusters of {' and '.join(str(run.servers) for run in runs)} servers, load {os.getloadavg()[0]:.1f}",
        f"  faults         {kinds.total()}: " + ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())),
    ]
    if missing:
        lines.append("  not tried      " + ", ".join(f"{kind} ({reason})" for kind, reason in missing.items()))
    for kind in sorted({kind for kind, _ in outcomes}):
        of = {outcome: n for (k, outcome), n in sorted(outcomes.items()) if k == kind}
        lines.append(f"  {kind:<14} {sum(of.values())}: " + ", ".join(f"{outcome} {n}" for outcome, n in of.items()))
    lines += [
        f"  once-written   {ledger.total()}: " + ", ".join(f"{o} {n}" for o, n in sorted(ledger.items())),
        f"  acknowledged writes lost {total['lost']}; done although said to be not done {total['undone']}; "
        f"applied twice {total['twice']}",
        f"  stale reads in default mode {stale[DEFAULT]}, in consistent mode {stale[CONSISTENT]}",
        f"  histories      {total['keys']} keys: not linearizable {total['not_linearizable']}, "
        f"not decided {total['gave_up']}",
        "  final state    "
        + "; ".join(
            f"{run.servers} servers " + (f"equal, {run.facts['rows']} keys" if "rows" in run.facts else "NOT compared")
            for run in runs
        ),
        "  servers        "
        + ", ".join(f"{text} {sums[name]}" for name, text in COUNTERS.items())
        + f"; memory of the log at most {log_bytes[0] / 2**20:.1f} MiB, bound {log_bytes[1] / 2**20:.0f} MiB",
        "  longest time without an acknowledged write "
        + ", ".join(f"{run.load.longest_pause_s:.1f} s" for run in runs),
        f"  violations     {sum(len(run.violations) for run in runs)}",
    ]
    return "\n".join(lines)


def keep(run: Run, directory: Path) -> None:
    """Histories and logs of what went wrong."""
    directory.mkdir(parents=True, exist_ok=True)
    for op, ops in run.bad:
        (directory / (op.key.replace("/", "-") + ".history")).write_text("".join(f"{o}\n" for o in ops))
    for host in run.cluster.hosts.values():
        (directory / f"of-{run.servers}-{host.name}.log").write_text(host.said())
    for text, n in run.load.texts.most_common(20):
        print(f"  {n:6} times: {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--servers", default="3,5", help="sizes of the clusters, which share the time")
    parser.add_argument("--per-minute", type=float, default=13.0, help="faults")
    parser.add_argument("--clients", type=int, default=3, help="at each agent; one more writes ledgers")
    parser.add_argument("--loopback", action="store_true", help="without namespaces, even where there are some")
    parser.add_argument("--only", action="append", help="only this kind of fault (may be given several times)")
    options = parser.parse_args()
    if INSIDE in os.environ:
        prepare_namespace()
    elif not options.loopback:
        if "--seed" not in " ".join(sys.argv):
            sys.argv.append(f"--seed={options.seed}")
        enter_namespaces()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return torture(options)
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind")
        return 130


def torture(options: argparse.Namespace) -> int:
    rng = random.Random(options.seed)
    print(f"torture: seed {options.seed}", flush=True)
    sizes = [int(size) for size in options.servers.split(",")]
    runs: list[Run] = []
    began = time.monotonic()
    minutes = options.minutes / len(sizes)
    for size in sizes:
        processes = Processes()
        try:
            run = Run(processes, size, options, random.Random(rng.random()))
            try:
                asyncio.run(asyncio.wait_for(run.go(minutes), minutes * 60 + BEYOND_S))
                runs.append(run)
                if run.violations:
                    kept = Path(tempfile.gettempdir()) / f"rostra-torture-{options.seed}"
                    keep(run, kept)
                    print(f"  kept in {kept}")
            except Exception:
                run.print_logs()
                raise
            finally:
                run.cluster.close()
        finally:
            stayed = processes.close()
            if stayed:
                print("  had to be killed:", *stayed, sep="\n    ")
    for run in runs:
        for violation in run.violations:
            print(f"VIOLATION ({run.servers} servers): {violation}")
        for op, ops in run.bad[:3]:
            print(f"history of {op.key}, the operation in question marked:")
            at = ops.index(op)
            for other in ops[max(0, at - SHOWN) : at + SHOWN // 4]:
                print(f"  {'>' if other is op else ' '} {other}")
    print(summary(runs, options, time.monotonic() - began))
    return 1 if any(run.violations for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
