"""How fast `rostra agent -dev` is there, how large it is, and how surely it goes.

    python bench/startup.py [--runs 5]

Warm (one start before), worst of the runs: HTTP answers, the node is in the catalog with serfHealth passing and an
index of at least 2; the resident memory of each process; `rostra version`; SIGINT and SIGTERM end everything with exit
status 0; kill -9 of the agent ends its children. Every start is at fresh ports. Exit status 1 for a missed bar.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time

from processes import ENVIRONMENT, ROSTRA, Failure, Verdicts, alive, descendants, guarded, parser, rss_mb, send, spread


def free_ports(host: str, n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind((host, 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


class Dev:
    """One `agent -dev`, from exec on."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.http, dns, server, serf = free_ports(host, 4)
        ports = f"ports {{ http = {self.http} dns = {dns} server = {server} serf_lan = {serf} }}"
        command = [str(ROSTRA), "agent", "-dev", f"-bind={host}", f"-client={host}", "-log-level=warn", "-hcl", ports]
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=ENVIRONMENT)
        self.pids = {self.process.pid}

    def ask(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(self.host, self.http, timeout=2)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        finally:
            connection.close()

    def until(self, path: str, good: object) -> float:
        """Seconds from exec until `good(status, body, headers)`."""
        while time.monotonic() - self.began < 15:
            try:
                if good(*self.ask(path)):  # type: ignore[operator]
                    return time.monotonic() - self.began
            except (OSError, http.client.HTTPException):
                pass
            if self.process.poll() is not None:
                raise Failure(f"the agent ended with status {self.process.returncode}")
            time.sleep(0.005)
        raise Failure(f"{path} is not as expected after 15 s")

    def up(self) -> tuple[float, float]:
        """(seconds to HTTP, seconds to a healthy node)."""
        first = self.until("/v1/agent/self", lambda status, body, headers: status == 200)

        def healthy(status: int, body: bytes, headers: dict[str, str]) -> bool:
            return (
                status == 200
                and headers.get("X-Consul-KnownLeader") == "true"
                and int(headers["X-Consul-Index"]) >= 2
                and any(c["CheckID"] == "serfHealth" and c["Status"] == "passing" for c in json.loads(body))
            )

        second = self.until("/v1/health/state/passing", healthy)
        self.pids.update(descendants(self.process.pid))
        return first, second

    def gone(self, within_s: float = 10) -> float:
        """Seconds from now until no process is left."""
        began = time.monotonic()
        while time.monotonic() - began < within_s:
            self.process.poll()
            if not any(map(alive, self.pids)):
                return time.monotonic() - began
            time.sleep(0.005)
        return float("inf")

    def clean(self) -> None:
        for pid in self.pids:
            if alive(pid):
                send(pid, signal.SIGKILL)
        self.process.wait(5)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--runs", type=int, default=5)
    options = arguments.parse_args()

    def run() -> int:
        verdicts = Verdicts(f"Start and end, worst of {options.runs}")
        firsts, healths, sizes = [], [], []
        ends: dict[str, list[float]] = {"SIGINT": [], "SIGTERM": [], "SIGKILL": []}
        statuses: set[int] = set()
        for i in range(1 + max(options.runs, 3)):
            dev = Dev(options.network + "40")
            try:
                first, health = dev.up()
                names = ["agent" if pid == dev.process.pid else "core" for pid in sorted(dev.pids)]
                if i:  # the one before warms the file cache
                    firsts.append(first)
                    healths.append(health)
                    sizes = [f"{name} {rss_mb(pid):.0f} MB" for name, pid in zip(names, sorted(dev.pids))]
                how = list(ends)[i % 3]
                send(dev.process.pid, getattr(signal, how))
                ends[how].append(dev.gone())
                if how != "SIGKILL":
                    statuses.add(dev.process.wait(5))
            finally:
                dev.clean()
        versions = []
        for _ in range(1 + options.runs):
            began = time.monotonic()
            subprocess.run([str(ROSTRA), "version"], check=True, capture_output=True, timeout=10, env=ENVIRONMENT)
            versions.append(time.monotonic() - began)
        verdicts.most(f"agent -dev: HTTP answers (of {spread(firsts)})", max(firsts), 1.0)
        verdicts.most("agent -dev: its node is healthy, index ≥ 2", max(healths), 2.0)
        verdicts.add("resident memory", ", ".join(sizes))
        verdicts.most("rostra version", max(versions[1:]), 0.1, digits=3)
        verdicts.most("SIGINT: everything gone", max(ends["SIGINT"]), 2.0)
        verdicts.most("SIGTERM: everything gone", max(ends["SIGTERM"]), 2.0)
        verdicts.add("exit statuses of both", str(sorted(statuses)), "[0]", statuses == {0})
        verdicts.most("kill -9 of the agent: children gone", max(ends["SIGKILL"]), 1.0)
        return verdicts.finish()

    return guarded(run, within_s=60 + 15 * options.runs)


if __name__ == "__main__":
    sys.exit(main())
