"""Does an idle cluster of three servers with the default timing keep its leader?

    python bench/raft_idle.py [--minutes 30] [--stall [--stall-ms 250] [--every-s 10] [--at leader|follower|both]]

Counts the elections that servers began, changes of the leader and of the term. With `--stall` one server stands still
for 250 ms every 10 s: in turn its loop (SIGSTOP, SIGCONT of the core) and its disk (each fdatasync takes that much
longer while one key is written, so that there is something to sync). `both`: the leader for the first half of the time,
a follower for the second. Exit status 1 for any election.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from processes import Failure, Fleet, Node, Verdicts, eventually, guarded, parser, send

sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.support.slow_sync import SlowSync, compiled

LOOK_EVERY_S = 5.0


def standing(fleet: Fleet) -> dict[str, tuple[int, int]]:
    """(term, elections that it began) of each server."""
    found = {}
    for node in fleet.servers:
        samples = node.samples()
        found[node.name] = (
            int(samples["consul_server_raft_term", ""]),
            int(samples["consul_server_raft_elections", ""]),
        )
    return found


def stall(node: Node, disk: SlowSync, what: str, ms: int) -> None:
    if what == "loop":
        pid = node.core_pid()
        send(pid, signal.SIGSTOP)
        time.sleep(ms / 1000)
        send(pid, signal.SIGCONT)
        return
    disk.slow(ms)
    node.put("/v1/kv/idle", str(time.monotonic()).encode())
    time.sleep(ms / 1000)  # the others make the majority, and the answer does not wait for this disk
    disk.normal()


def watch(fleet: Fleet, options: argparse.Namespace, disks: dict[str, SlowSync]) -> Verdicts:
    time.sleep(5)  # what follows a start is no idling
    leader = eventually("one leader", 20, fleet.leader)
    first = last = standing(fleet)
    leaders, stalls = [leader.name], {"loop": 0, "disk": 0}
    began = time.monotonic()
    until = began + options.minutes * 60
    next_stall = began + options.every_s
    while (now := time.monotonic()) < until:
        time.sleep(max(0.0, min(LOOK_EVERY_S, next_stall - now if options.stall else LOOK_EVERY_S, until - now)))
        if options.stall and time.monotonic() >= next_stall:
            next_stall += options.every_s
            late = time.monotonic() - began > options.minutes * 30
            at_leader = options.at == "leader" or (options.at == "both" and not late)
            node = leader if at_leader else next(s for s in fleet.servers if s is not leader)
            what = "loop" if sum(stalls.values()) % 2 == 0 else "disk"
            stall(node, disks[node.name], what, options.stall_ms)
            stalls[what] += 1
            if options.verbose:
                time.sleep(1.0)
                print(f"  {time.monotonic() - began:.0f} s: {what} of {node.name}, leader {leader.name}", flush=True)
        led = fleet.leader(fleet.servers)
        if led is not None and led.name != leaders[-1]:
            print(f"  {time.monotonic() - began:.0f} s: {led.name} leads after {leaders[-1]}", flush=True)
            leaders.append(led.name)
            leader = led
        if (now_standing := standing(fleet)) != last:
            print(f"  {time.monotonic() - began:.0f} s: terms and elections {now_standing}", flush=True)
            last = now_standing
    stalled = f", {options.stall_ms} ms stalls every {options.every_s:g} s" if options.stall else ""
    verdicts = Verdicts(f"Idle{stalled}")
    verdicts.add("time", f"{(time.monotonic() - began) / 60:.1f} min")
    if options.stall:
        verdicts.add("stalls of the loop / of the disk", f"{stalls['loop']} / {stalls['disk']} (at: {options.at})")
        longest = max(node.samples()["consul_server_raft_sync_max_s", ""] for node in fleet.servers)
        verdicts.add("longest sync", f"{longest * 1000:.0f} ms")
    elections = sum(last[name][1] - first[name][1] for name in first)
    terms = max(term for term, _ in last.values()) - max(term for term, _ in first.values())
    for what, count in (("elections", elections), ("new terms", terms), ("changes of the leader", len(leaders) - 1)):
        verdicts.add(what, str(count), "0", count == 0)
    return verdicts


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=30.0)
    arguments.add_argument("--stall", action="store_true")
    arguments.add_argument("--stall-ms", type=int, default=250)
    arguments.add_argument("--every-s", type=float, default=10.0)
    arguments.add_argument("--at", choices=("leader", "follower", "both"), default="both")
    arguments.add_argument("--verbose", action="store_true", help="a line for each stall")
    options = arguments.parse_args()

    def run() -> int:
        with tempfile.TemporaryDirectory(prefix="rostra-idle-") as name:
            directory, disks = Path(name), {}
            if options.stall:
                library = compiled(directory)
                if library is None:
                    raise Failure("a slow disk needs a C compiler")
                disks = {f"s{i}": SlowSync(library, directory / f"s{i}.disk") for i in (1, 2, 3)}
            with Fleet(
                clients=0, keep=options.keep, prefix=options.network, first=31, log_level="warn",
                environments=lambda node: disks[node].env if options.stall else {},
            ) as fleet:  # fmt: skip
                return watch(fleet, options, disks).finish()

    return guarded(run, within_s=120 + options.minutes * 60)


if __name__ == "__main__":
    sys.exit(main())
