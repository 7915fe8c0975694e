"""What one write costs, stage by stage: microseconds of processor time per write in each process that it goes through.

    ROSTRA_BIN=…/rostra python bench/write_path.py [--seconds 5] [--connections 1,64]

Three servers and a client's agent. Writes of a small key go to the agent on the leader's host, on a follower's and on
a client's. `agent` is the one that is asked: HTTP, RPC and the reply. `core` is its server's, where that is another one
than the leader: it forwards. `leader` is the leader's loop: RPC, proposal, apply and reply; `disk` its other threads:
the journal. `followers` is the mean of the other cores: journal and apply. A figure of two builds means something only
where both were measured one after the other on a quiet machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from processes import HTTP, Fleet, Node, eventually, guarded, parser

BODY = b"v" * 64


def cpu_us(pid: int) -> tuple[float, float]:
    """Microseconds of processor time that the main thread of a process and its other threads have used."""
    main = others = 0.0
    for task in Path(f"/proc/{pid}/task").iterdir():
        ran_ns = int((task / "schedstat").read_text().split()[0])
        if int(task.name) == pid:
            main += ran_ns / 1000
        else:
            others += ran_ns / 1000
    return main, others


async def load(node: Node, connections: int, seconds: float) -> list[float]:
    """Seconds that each write took."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(node.address, HTTP)
        request = b"PUT /v1/kv/path/%d HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (number, len(BODY), BODY)
        count = 0
        while time.perf_counter() < until:
            count += 1
            began = time.perf_counter()
            writer.write(request[: -len(BODY)] + b"%064d" % count)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200") or await reader.readexactly(4) != b"true":
                raise SystemExit(f"{node.name}: {head!r}")
            took.append(time.perf_counter() - began)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(connections)))
    return took


def measure(fleet: Fleet, node: Node, leader: Node, connections: int, seconds: float) -> str:
    cores = {server.name: server.core_pid() for server in fleet.servers}
    agent = node.process.pid if node.process is not None else 0
    asyncio.run(load(node, connections, 1))
    before = {name: cpu_us(pid) for name, pid in cores.items()}
    before_agent = cpu_us(agent)
    took = asyncio.run(load(node, connections, seconds))
    spent = {name: [now - then for now, then in zip(cpu_us(pid), before[name])] for name, pid in cores.items()}
    spent_agent = sum(cpu_us(agent)) - sum(before_agent)
    n = len(took)
    others = [sum(spent[server.name]) for server in fleet.servers if server not in (leader, node)]
    forwards = sum(spent[node.name]) / n if node.is_server and node is not leader else 0.0
    cuts = statistics.quantiles(took, n=100)
    return (
        f"{node.name:>4}{connections:>6}{n / seconds:>10.0f}{cuts[49] * 1000:>8.2f}{cuts[98] * 1000:>8.2f}"
        f"{spent_agent / n:>9.0f}{forwards:>8.0f}{spent[leader.name][0] / n:>8.0f}{spent[leader.name][1] / n:>8.0f}"
        f"{statistics.mean(others) / n:>11.0f}"
    )


def run(options: argparse.Namespace) -> int:
    with Fleet(prefix=options.network) as fleet:
        leader = eventually("a leader", 20, fleet.leader)
        assert leader is not None
        follower = next(server for server in fleet.servers if server is not leader)
        print("           writes/s  p50 ms  p99 ms   µs of: agent    core  leader    disk  followers")
        for node, where in ((leader, "leader"), (follower, "follower"), (fleet["c1"], "client")):
            for connections in options.connections:
                print(f"{where:>9}", measure(fleet, node, leader, connections, options.seconds), flush=True)
    return 0


if __name__ == "__main__":
    parse = parser(__doc__)
    parse.add_argument("--seconds", type=float, default=5.0)
    parse.add_argument("--connections", type=lambda s: [int(n) for n in s.split(",")], default=[1, 64])
    given = parse.parse_args()
    raise SystemExit(guarded(lambda: run(given), within_s=300))
