"""What do 10,000 connections of strangers and impostors cost a server?

    python bench/rpc_attack.py [--tries 10000] [--at-once 8]

Three servers; each attack is tried in turn on the RPC port of one of them, at its own leader's: no certificate, one of
another CA, an expired one, the certificate of a node that is no server, a server's name with another key, a server's
certificate in another's name, frames that are too long, msgpack that wants to become large (depth, count, length),
pickles. Every connection must be closed by the server in bounded time and counted; the log has few lines, nobody is
elected, and the server's memory grows by at most 5 MB, from after the first 500 tries on (what the first ones need
stays). Exit status 1 for a missed bar.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import Failure, Fleet, Verdicts, eventually, guarded, parser, rss_mb

sys.path.append(str(Path(__file__).resolve().parents[1]))

from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import parse_secrets
from tests.support import rpc_attack
from tests.support.rpc_attack import Outcome, Target

GROWTH_MB, BOUND_S, WARM_UP = 5.0, 6.0, 500
#: They wait for the server's patience, which is another test's matter.
SLOW = ("no bytes", "half a TLS hello", "a TLS hello and silence", "no hello", "half a hello", "a Raft message on")

Attack = Callable[[Target], Outcome]


def attacks(mark: Path) -> dict[str, Attack]:
    every = {**rpc_attack.strangers(mark), **rpc_attack.insiders(), **rpc_attack.impostors()}
    every |= rpc_attack.bombers(pause_s=0.02)
    return {name: attack for name, attack in every.items() if not name.startswith(SLOW)}


class Tries:
    """Runs attacks in turn, several at once."""

    def __init__(self, target: Target, kinds: dict[str, Attack]) -> None:
        self._target, self._kinds = target, itertools.cycle(kinds.items())
        self._lock = threading.Lock()
        self.count: Counter[str] = Counter()
        self.longest_s = 0.0
        self.open: list[str] = []

    def run(self, tries: int, at_once: int) -> None:
        with ThreadPoolExecutor(at_once) as pool:
            for future in [pool.submit(self._one) for _ in range(tries)]:
                future.result()

    def _one(self) -> None:
        with self._lock:
            name, attack = next(self._kinds)
        try:
            outcome = attack(self._target)
        except AssertionError as e:
            self.open.append(f"{name}: {e}")
            return
        with self._lock:
            self.count[name] += 1
            self.longest_s = max(self.longest_s, outcome.closed_after_s)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--tries", type=int, default=10_000)
    arguments.add_argument("--at-once", type=int, default=8)
    arguments.add_argument("--only", default="", help="attacks whose name contains this word")
    options = arguments.parse_args()

    def run() -> int:
        with Fleet(clients=0, keep=options.keep, prefix=options.network, first=41) as fleet:
            secret = json.loads((fleet.directory / "agents.json").read_text())["encrypt"]
            leader = eventually("one leader", 20, fleet.leader)
            other = next(s for s in fleet.servers if s is not leader)
            member = NodeIdentity.open(other.data_dir, other.name, parse_secrets(secret))
            target = Target.of(leader.address, 8300, fleet.directory, secret, member)
            mark = fleet.directory / "mark"
            kinds = {name: attack for name, attack in attacks(mark).items() if options.only in name}
            # Everyone has its certificate, so that nothing of its own is under way when the attacks begin.
            eventually("certificates", 30, lambda: has_certificates(fleet))
            tries = Tries(target, kinds)
            pid = leader.core_pid()
            tries.run(WARM_UP, options.at_once)
            time.sleep(1.0)
            before, rss, began = figures(fleet), rss_mb(pid), time.monotonic()
            lines = len(rejections(leader.log))
            tries.run(options.tries, options.at_once)
            took_s = time.monotonic() - began
            time.sleep(2.0)
            after, rss_after = figures(fleet), rss_mb(pid)
            new_lines = len(rejections(leader.log)) - lines
            log = leader.log.read_text(errors="replace")
            if fleet.leader() is not leader or leader.core_pid() != pid:
                raise Failure("the leader is another one")
        verdicts = Verdicts(f"Attacks on the RPC port: {len(kinds)} kinds")
        verdicts.add("tries", f"{options.tries} in {took_s:.0f} s, {options.at_once} at once")
        verdicts.add("not closed by the server", str(len(tries.open)), "0", not tries.open)
        verdicts.most("longest until closed", tries.longest_s, BOUND_S)
        counted = after["closed"] - before["closed"]
        verdicts.add("counted as rejected or dropped", str(counted), f"≥ {options.tries}", counted >= options.tries)
        allowed = int(len(KEYS) * (2 + took_s / 10))
        verdicts.add("lines about it in the log", str(new_lines), f"≤ {allowed}", new_lines <= allowed)
        for what in ("term", "elections"):
            grown = after[what] - before[what]
            verdicts.add(f"{what}: growth", str(grown), "0", grown == 0)
        verdicts.most("memory of the core: growth", rss_after - rss, GROWTH_MB, "MB", digits=1)
        verdicts.add("memory of the core", f"{rss_after:.0f} MB")
        in_log, entries = (after[what] - before[what] for what in ("log_bytes", "entries"))
        verdicts.add("  of the growth in the log", f"{in_log / 1e6:.1f} MB of {entries} entries")
        clean = "Traceback" not in log and not mark.exists()
        verdicts.add("tracebacks, pickles loaded", "none" if clean else "SOME", "none", clean)
        for line in tries.open[:10]:
            print("  open:", line)
        return verdicts.finish()

    return guarded(run, within_s=120 + options.tries / 20)


#: One line in 10 s each.
KEYS = ("rejected a connection", "dropped a connection")


def rejections(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if any(key in line for key in KEYS)]


def has_certificates(fleet: Fleet) -> bool:
    return all((node.data_dir / "tls" / "issued.pem").exists() for node in fleet.servers)


def figures(fleet: Fleet) -> dict[str, int]:
    found: Counter[str] = Counter()
    for node in fleet.servers:
        samples = node.samples()
        found["term"] = max(found["term"], int(samples["consul_server_raft_term", ""]))
        found["elections"] += int(samples["consul_server_raft_elections", ""])
        if samples["consul_server_is_leader", ""]:
            found["log_bytes"] = int(samples["consul_server_raft_log_bytes", ""])
            found["entries"] = int(samples["consul_server_raft_last_index", ""])
        for name in ("rejected", "dropped"):
            found["closed"] += int(samples[f"consul_server_counts_connections_{name}", ""])
    return dict(found)


if __name__ == "__main__":
    sys.exit(main())
