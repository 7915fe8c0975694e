"""The cluster that is tortured: real `rostra agent` processes, each on a host of its own, and how to hurt one of them.

With a network (`network.py`) a host is a namespace, and its clients sit on it: what cuts the host off does not cut off
its clients. Without one, hosts are loopback addresses. The last server's data lies on a small filesystem of its own
where one can be mounted. Methods block; `Host.busy` says that a fault has it.
"""

from __future__ import annotations

import base64
import ctypes
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import ROSTRA, Process, Processes, command_line, descendants, eventually, new_host, send
from tests.support.slow_sync import SlowSync, compiled
from tests.torture.network import Network, enter

HTTP = 8500
SMALL_DISK_MB = 640
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    index: int  # X-Consul-Index, 0 if there is none

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace").strip()


class Host:
    """One agent, with its core where it is a server."""

    def __init__(self, cluster: Cluster, name: str, address: str, is_server: bool, disk: SlowSync | None) -> None:
        self._cluster = cluster
        self.name, self.address, self.is_server, self.disk = name, address, is_server, disk
        self.data_dir = cluster.directory / name
        self.process: Process | None = None
        self.logs: list[Path] = []
        self.busy = False
        self.has_small_disk = False

    # -- its processes

    def start(self) -> None:
        network, env = self._cluster.network, self.disk.env if self.disk is not None else {}

        def before_exec() -> None:
            if network is not None:
                enter(network.fd(self.name))
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

        argv = [*ROSTRA, "agent", *self._cluster.flags(self)]
        self.process = self._cluster.processes.start(argv, env=env, preexec_fn=before_exec)
        self.logs.append(self.process.log_path)

    def tree(self) -> list[int]:
        return self.process.tree() if self.process is not None and self.process.popen.poll() is None else []

    def core_pid(self) -> int:
        """The core's pid, 0 while there is none."""
        below = descendants(self.process.pid) if self.process is not None else []
        return next((p for p in below if "rostra.server" in command_line(p)), 0)

    def kill(self) -> None:
        """kill -9 of agent and core at one moment."""
        if self.process is not None:
            self.process.kill_tree()
            self.process = None

    def stop(self) -> None:
        for pid in self.tree():
            send(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        for pid in self.tree():
            send(pid, signal.SIGCONT)

    def is_up(self) -> bool:
        """Whether the agent answers, and for a server its own core as well. Raises AssertionError when it ended."""
        assert self.process is not None
        assert self.process.popen.poll() is None, f"{self.name} ended with {self.process.popen.returncode}"
        if self.ask("GET", "/v1/agent/self", timeout_s=3).status != 200:
            return False
        return not self.is_server or (
            self.core_pid() > 0 and self.ask("GET", "/v1/kv/up?stale", timeout_s=3).status in (200, 404)
        )

    def wait_up(self, within_s: float = 40.0) -> None:
        eventually(f"{self.name} is up", self.is_up, within_s)

    def said(self, since: int = 0) -> str:
        """What it printed, from the log number `since` on."""
        return "".join(path.read_text(errors="replace") for path in self.logs[since:])

    # -- asking it

    def socket(self) -> socket.socket:
        """Not connected yet, for its HTTP port."""
        if self._cluster.network is not None:
            return self._cluster.network.socket_of(self.name)
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    def ask(self, method: str, path: str, body: bytes | None = None, *, timeout_s: float = 10.0) -> Answer:
        """Over a connection of its own. Raises OSError, HTTPException."""
        connection = http.client.HTTPConnection(self.address, HTTP, timeout=timeout_s)
        connection.sock = self.socket()
        connection.sock.settimeout(timeout_s)
        try:
            connection.sock.connect((self.address, HTTP))
            connection.request(method, path, body)
            response = connection.getresponse()
            return Answer(response.status, response.read(), int(response.headers.get("X-Consul-Index") or 0))
        finally:
            connection.close()

    def get(self, path: str, *, timeout_s: float = 10.0) -> Any:
        answer = self.ask("GET", path, timeout_s=timeout_s)
        assert answer.status == 200, f"GET {path} at {self.name}: {answer.status} {answer.text[:200]}"
        return json.loads(answer.body)

    def gauges(self) -> dict[str, float]:
        """The core's numbers about Raft, by their last names."""
        rows = self.get("/v1/agent/metrics", timeout_s=3.0)["Gauges"]
        return {row["Name"].rpartition(".")[2]: row["Value"] for row in rows if ".server.raft." in row["Name"]}

    # -- its disk

    def fill_disk(self) -> None:
        """Not one page more than what is used."""
        assert self.has_small_disk
        at = os.statvfs(self.data_dir)
        used_kb = (at.f_blocks - at.f_bfree) * at.f_frsize // 1024
        _mount("-o", f"remount,size={used_kb}k", str(self.data_dir))

    def wipe(self) -> None:
        """As if it got a new disk."""
        for path in self.data_dir.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def free_disk(self) -> None:
        _mount("-o", f"remount,size={SMALL_DISK_MB}m", str(self.data_dir))


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True, timeout=10)


class Cluster:
    """`servers` servers s1… and `clients` client agents c1…"""

    def __init__(self, processes: Processes, *, servers: int, clients: int, with_network: bool) -> None:
        self.processes, self.expect = processes, servers
        self.directory = Path(processes.directory) / f"of-{servers}"
        self.directory.mkdir()
        names = [f"s{i + 1}" for i in range(servers)] + [f"c{i + 1}" for i in range(clients)]
        self.network = Network(names) if with_network else None
        self._secret = base64.b64encode(os.urandom(32)).decode()
        library = compiled(self.directory)
        self.hosts: dict[str, Host] = {}
        for name in names:
            address = self.network.addresses[name] if self.network is not None else new_host()
            disk = SlowSync(library, self.directory / f"{name}.disk") if library is not None else None
            self.hosts[name] = Host(self, name, address, name.startswith("s"), disk)
        if with_network:
            small = self.servers[-1]
            small.data_dir.mkdir()
            _mount("-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m,mode=0700", "tmpfs", str(small.data_dir))
            small.has_small_disk = True

    def flags(self, host: Host) -> list[str]:
        flags = [f"-node={host.name}", f"-bind={host.address}", f"-client={host.address}", f"-encrypt={self._secret}"]
        flags += [f"-data-dir={host.data_dir}", "-retry-interval=1s"]
        flags += [f"-retry-join={server.address}" for server in self.servers]
        return [*flags, "-server", f"-bootstrap-expect={self.expect}"] if host.is_server else flags

    @property
    def servers(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.is_server]

    @property
    def clients(self) -> list[Host]:
        return [host for host in self.hosts.values() if not host.is_server]

    def start(self) -> None:
        for host in self.hosts.values():
            host.start()
        for host in self.hosts.values():
            host.wait_up()
        self.wait_settled(30)

    def wait_settled(self, within_s: float) -> None:
        """All know the same leader, and a write through every agent succeeds."""

        def settled() -> bool:
            assert self.leader() is not None
            for host in self.hosts.values():
                answer = host.ask("PUT", f"/v1/kv/settled/{host.name}", os.urandom(8).hex().encode())
                assert (answer.status, answer.text) == (200, "true"), f"{host.name}: {answer.status} {answer.text}"
            return True

        eventually("the cluster works", settled, within_s)

    def leader(self, among: Sequence[Host] = ()) -> Host | None:
        """Whom all of these servers that answer name; None where there is nobody or they differ."""
        named = set()
        for host in among or self.servers:
            try:
                named.add(json.loads(host.ask("GET", "/v1/status/leader", timeout_s=1.0).body))
            except (OSError, http.client.HTTPException, ValueError):
                continue
        named.discard("")
        if len(named) != 1:
            return None
        address = named.pop().rpartition(":")[0]
        return next((host for host in self.servers if host.address == address), None)

    def some_leader(self, rng: random.Random) -> Host | None:
        """The leader as a server chosen at random has it: it may know better, or no longer."""
        servers = [host for host in self.servers if not host.busy]
        return self.leader([rng.choice(servers)]) if servers else None

    def close(self) -> None:
        for host in self.hosts.values():
            host.go_on()
            if host.process is not None:
                host.kill()
        for host in self.servers:
            if host.has_small_disk:
                subprocess.run(["umount", "-l", str(host.data_dir)], check=False, timeout=10)
        if self.network is not None:
            self.network.close()
