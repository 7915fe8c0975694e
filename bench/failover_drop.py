"""How long until writes are acknowledged again when the leader is killed, and when its packets are dropped?

    python bench/failover_drop.py [--rounds 5] [--only kill|drop|link]

`kill`: kill -9 of the leader's agent and core. `drop`: the servers and a client agent each in a network namespace of
its own, and nft drops all that the leader sends and gets, so that no connection is closed. `link`: its cable is pulled.
Each round asks a follower's agent and the client agent at once, over new connections; a writer goes on meanwhile.
Afterwards: every acknowledged key is there, the ex-leader follows the new one, and no further election was held.
Needs root for all but `kill`. Exit status 1 for a missed bar.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from processes import Failure, Fleet, Node, Verdicts, eventually, guarded, median, parser, spread

KILL_BAR_S, DROP_BAR_S = 0.6, 1.0
#: Through an agent whose server was the one that went: it takes up to 1.25 s to leave a server that is silent.
CLIENT_BAR_S = 1.5
PREFIX = "rsb-"
SWITCH = PREFIX + "sw"
DROP = "table inet rsb { chain in { type filter hook input priority -10; policy accept; iif != lo drop; }; "
DROP += "chain out { type filter hook output priority -10; policy accept; oif != lo drop; }; }"


# -- the network ------------------------------------------------------------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=10)


class Network:
    """One namespace per host on a bridge, which has its own. Everything is deleted at the end."""

    def __init__(self, hosts: list[str], first: int) -> None:
        self.hosts, self._first = hosts, first

    def __enter__(self) -> Network:
        self.delete()
        try:
            ip("netns", "add", SWITCH)
            ip("-n", SWITCH, "link", "add", "br0", "type", "bridge")
            ip("-n", SWITCH, "link", "set", "br0", "up")
            for i, host in enumerate(self.hosts):
                name, port = PREFIX + host, f"p-{host}"
                ip("netns", "add", name)
                ip("-n", SWITCH, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("-n", SWITCH, "link", "set", port, "master", "br0", "up")
                ip("-n", name, "addr", "add", f"10.78.0.{self._first + i}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.delete()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.delete()

    def delete(self) -> None:
        for name in [SWITCH, *(PREFIX + host for host in self.hosts)]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10, check=False)

    def drop(self, host: str) -> None:
        self._nft(host, DROP)

    def heal(self, host: str) -> None:
        self._nft(host, "delete table inet rsb")

    def unplug(self, host: str) -> None:
        ip("-n", SWITCH, "link", "set", f"p-{host}", "down")

    def plug(self, host: str) -> None:
        ip("-n", SWITCH, "link", "set", f"p-{host}", "up")

    def _nft(self, host: str, text: str) -> None:
        subprocess.run(
            ["ip", "netns", "exec", PREFIX + host, "nft", "-f", "-"],
            input=text + "\n", text=True, check=True, capture_output=True, timeout=10,
        )  # fmt: skip


# -- one kind of failure --------------------------------------------------------------------------------------------


class Writer(threading.Thread):
    """Writes one key after the other through an agent; remembers those that were acknowledged."""

    def __init__(self, node: Node, name: str) -> None:
        super().__init__(daemon=True)
        self._node, self._name = node, name
        self.acknowledged: list[str] = []
        self.ending = False

    def run(self) -> None:
        n = 0
        while not self.ending:
            n += 1
            key = f"lost/{self._name}/{n}"
            try:
                if put(self._node, key):
                    self.acknowledged.append(key)
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)
            time.sleep(0.005)


def put(node: Node, key: str, timeout_s: float = 12.0) -> bool:
    status, body, _ = node.ask("PUT", f"/v1/kv/{key}", b"x", timeout_s=timeout_s)
    return (status, body) == (200, b"true")


def time_of(nodes: list[Node], ask: Callable[[Node], bool]) -> dict[str, float]:
    """Ask all at once, each until it succeeds: the seconds that it took."""
    began = time.monotonic()
    took: dict[str, float] = {}

    def run(node: Node) -> None:
        while time.monotonic() - began < 15:
            try:
                if ask(node):
                    took[node.name] = time.monotonic() - began
                    return
            except (OSError, http.client.HTTPException):
                pass
            time.sleep(0.005)

    threads = [threading.Thread(target=run, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {node.name: took.get(node.name, float("inf")) for node in nodes}


def read(node: Node) -> bool:
    return node.ask("GET", "/v1/catalog/nodes")[0] == 200


def raft(node: Node) -> tuple[int, int]:
    """(term, elections that this server began) as its agent shows them."""
    samples = node.samples()
    return int(samples["consul_server_raft_term", ""]), int(samples["consul_server_raft_elections", ""])


def rounds(
    fleet: Fleet,
    kind: str,
    n: int,
    verdicts: Verdicts,
    bar_s: float,
    fail: Callable[[Node], None],
    heal: Callable[[Node], None],
) -> None:
    writes: dict[str, list[float]] = {"server": [], "client": []}
    reads: list[float] = []
    keys: list[str] = []
    storms = 0
    for i in range(n):
        leader = eventually("one leader", 20, fleet.leader)
        others = [s for s in fleet.servers if s is not leader]
        client = fleet.clients[0]
        writer = Writer(others[1], f"{kind}-{i}")
        writer.start()
        time.sleep(1.0)
        reading: dict[str, float] = {}
        fail(leader)
        began = time.monotonic()
        reader = threading.Thread(target=lambda a=others[1], into=reading: into.update(time_of([a], read)))
        reader.start()
        took = time_of([others[0], client], lambda node, i=i: put(node, f"probe/{kind}/{i}/{node.name}"))
        reader.join()
        writes["server"].append(took[others[0].name])
        writes["client"].append(took[client.name])
        reads.append(reading[others[1].name])
        time.sleep(max(0.0, began + 3.0 - time.monotonic()))
        term = raft(others[0])[0]
        heal(leader)
        eventually("the ex-leader follows", 20, fleet.leader)
        time.sleep(2.0)
        writer.ending = True
        writer.join(15)
        keys += writer.acknowledged + [f"probe/{kind}/{i}/{name}" for name, s in took.items() if s < 15]
        after = max(raft(s)[0] for s in fleet.servers)
        storms += after > term
        print(
            f"  {kind} {i + 1}: {leader.name} led; a follower's agent {took[others[0].name]:.2f} s, the client's "
            f"{took[client.name]:.2f} s; a default read {reads[-1]:.2f} s; term {term}, after healing {after}",
            flush=True,
        )
    there = set(fleet.clients[0].get("/v1/kv/?keys"))
    missing = [key for key in keys if key not in there]
    for who, values in writes.items():
        verdicts.most(
            f"{kind}: to the next write, through a {who}'s agent (median of {spread(values)})",
            median(values),
            bar_s if who == "server" else CLIENT_BAR_S,
        )
    verdicts.add(
        f"{kind}: to the next default read, follower's agent (median of {spread(reads)})", f"{median(reads):.2f} s"
    )
    verdicts.add(f"{kind}: acknowledged keys lost of {len(keys)}", str(len(missing)), "0", not missing)
    verdicts.add(f"{kind}: rounds with an election after the ex-leader came back", str(storms), "0", storms == 0)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--only", choices=("kill", "drop", "link"), action="append")
    options = arguments.parse_args()
    kinds = options.only or ["kill", "drop", "link"]

    def restart(node: Node) -> None:
        node.start()
        eventually(f"HTTP of {node.name}", 20, lambda: node.ask("GET", "/v1/agent/self")[0] == 200)
        node.tree()

    def run() -> int:
        verdicts = Verdicts("Failover")
        if "kill" in kinds:
            with Fleet(keep=options.keep, prefix=options.network, first=21) as fleet:
                rounds(fleet, "kill", options.rounds, verdicts, KILL_BAR_S, lambda node: node.kill(), restart)
        if "drop" in kinds or "link" in kinds:
            hosts = ["s1", "s2", "s3", "c1"]
            with (
                Network(hosts, 11) as network,
                Fleet(keep=options.keep, prefix="10.78.0.", first=11, namespaces=lambda name: PREFIX + name) as fleet,
            ):
                if "drop" in kinds:
                    rounds(
                        fleet, "drop", options.rounds, verdicts, DROP_BAR_S,
                        lambda node: network.drop(node.name), lambda node: network.heal(node.name),
                    )  # fmt: skip
                if "link" in kinds:
                    rounds(
                        fleet, "link", options.rounds, verdicts, DROP_BAR_S,
                        lambda node: network.unplug(node.name), lambda node: network.plug(node.name),
                    )  # fmt: skip
        return verdicts.finish()

    return guarded(run, within_s=90 + 15 * options.rounds * len(kinds))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as e:
        sys.exit(str(e))
