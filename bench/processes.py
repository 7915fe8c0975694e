"""The processes that the benches measure: servers and client agents on loopback addresses, and how to ask them.

A `Fleet` starts real agents (127.0.2.x by default, each address a host), records the pids of all that it started and
of their children, and ends exactly those, whatever happens. `Verdicts` collects figures against their bars, prints
them and gives the exit status. Linux, standard library.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

ROSTRA = Path(os.environ.get("ROSTRA_BIN") or Path(sys.executable).with_name("rostra"))
HTTP, DNS = 8500, 8600
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNET = 0x40000000

#: What is installed has its bytecode; an environment that forbids to write it measures the compiler.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


class Failure(Exception):
    """The bench could not be run."""


# -- one agent ----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Node:
    """One agent, with the core that it spawns where it is a server. `namespace`: of the network, "" for ours."""

    name: str
    address: str
    is_server: bool
    directory: Path
    arguments: list[str]
    namespace: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    pids: set[int] = field(default_factory=set)

    @property
    def data_dir(self) -> Path:
        return self.directory / self.name

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def start(self) -> None:
        command = [str(ROSTRA), "agent", *self.arguments]
        if self.namespace:
            command = ["ip", "netns", "exec", self.namespace, *command]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**ENVIRONMENT, **self.environment},
            )
        self.pids.add(self.process.pid)

    def tree(self) -> list[int]:
        """The agent's pid and those of all its descendants, noted for the clean-up."""
        if self.process is None or self.process.poll() is not None:
            return []
        found = [self.process.pid, *descendants(self.process.pid)]
        self.pids.update(found)
        return found

    def core_pid(self) -> int:
        """The core that the agent spawned, 0 while there is none."""
        for pid in self.tree():
            try:
                if b"rostra.server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
            except OSError:
                continue
        return 0

    def kill(self) -> None:
        """kill -9 of the agent and everything below it, at one moment."""
        for pid in self.tree():
            send(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(10)
            self.process = None

    def socket(self, timeout_s: float = 10.0) -> socket.socket:
        """A connection to the agent's HTTP port, made in its namespace."""
        return connect(self.address, HTTP, timeout_s=timeout_s, namespace=self.namespace)

    def ask(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = 10.0
    ) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers) over a connection of its own. Raises OSError, HTTPException."""
        connection = http.client.HTTPConnection(self.address, HTTP, timeout=timeout_s)
        connection.sock = self.socket(timeout_s)
        try:
            sent = json.dumps(body).encode() if isinstance(body, dict | list) else body
            connection.request(method, path, sent)
            response = connection.getresponse()
            return response.status, response.read(), dict(response.getheaders())
        finally:
            connection.close()

    def get(self, path: str, *, timeout_s: float = 10.0) -> Any:
        status, body, _ = self.ask("GET", path, timeout_s=timeout_s)
        if status != 200:
            raise Failure(f"GET {path} at {self.name}: {status} {body.decode(errors='replace')[:200]}")
        return json.loads(body)

    def put(self, path: str, body: Any = b"", *, timeout_s: float = 15.0) -> bytes:
        status, answer, _ = self.ask("PUT", path, body, timeout_s=timeout_s)
        if status != 200:
            raise Failure(f"PUT {path} at {self.name}: {status} {answer.decode(errors='replace')[:200]}")
        return answer

    def samples(self) -> dict[tuple[str, str], float]:
        """The agent's Prometheus samples, by (name, labels as they stand)."""
        _, body, _ = self.ask("GET", "/v1/agent/metrics?format=prometheus")
        found: dict[tuple[str, str], float] = {}
        for line in body.decode().splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name, _, labels = series.partition("{")
                found[name, labels.rstrip("}")] = float(value)
        return found


# -- several ------------------------------------------------------------------------------------------------------


class Fleet:
    """`servers` servers s1… and `clients` client agents c1… Use as `with Fleet(...) as fleet`."""

    def __init__(
        self,
        *,
        servers: int = 3,
        clients: int = 1,
        prefix: str = "127.0.2.",
        first: int = 1,
        extra: dict[str, Any] | None = None,
        namespaces: Callable[[str], str] = lambda name: "",
        environments: Callable[[str], dict[str, str]] = lambda name: {},
        keep: bool = False,
        log_level: str = "info",
    ) -> None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.directory = Path(tempfile.mkdtemp(prefix="rostra-bench-"))
        self._keep = keep
        names = [f"s{i + 1}" for i in range(servers)] + [f"c{i + 1}" for i in range(clients)]
        joins = [f"-retry-join={prefix}{first + i}" for i in range(servers)]
        config = self.directory / "agents.json"
        config.touch(0o600)
        config.write_text(
            json.dumps(
                {
                    "encrypt": base64.b64encode(os.urandom(32)).decode(),
                    "limits": {"http_max_conns_per_client": 10000},
                    "connect": {"enabled": True},
                    "leave_on_terminate": False,
                    **(extra or {}),
                }
            )
        )
        self.nodes: dict[str, Node] = {}
        for i, name in enumerate(names):
            address = f"{prefix}{first + i}"
            arguments = [f"-node={name}", f"-bind={address}", f"-client={address}", f"-config-file={config}"]
            arguments += [f"-data-dir={self.directory / name}", "-retry-interval=1s", f"-log-level={log_level}", *joins]
            is_server = name.startswith("s")
            if is_server:
                arguments += ["-server", f"-bootstrap-expect={servers}"]
            self.nodes[name] = Node(
                name, address, is_server, self.directory, arguments, namespaces(name), environments(name)
            )

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    @property
    def servers(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.is_server]

    @property
    def clients(self) -> list[Node]:
        return [n for n in self.nodes.values() if not n.is_server]

    def __enter__(self) -> Self:
        try:
            for node in self.nodes.values():
                node.start()
            self.settle()
        except BaseException:
            self.stop()
            raise
        return self

    def settle(self, within_s: float = 30.0) -> None:
        """All answer and know one leader, and all nodes are in the catalog with serfHealth passing."""
        eventually("one leader", within_s, self.leader)
        wanted = set(self.nodes)
        for node in self.nodes.values():
            eventually(
                f"all nodes passing at {node.name}",
                within_s,
                lambda node=node: (
                    wanted <= {c["Node"] for c in node.get("/v1/health/state/passing") if c["CheckID"] == "serfHealth"}
                ),
            )
            node.tree()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            for node in self.nodes.values():
                tail = node.log.read_text(errors="replace").splitlines()[-8:] if node.log.exists() else []
                print(f"-- {node.name}\n" + "\n".join(tail), file=sys.stderr)
        if not self._keep:
            shutil.rmtree(self.directory, ignore_errors=True)

    def stop(self) -> None:
        for node in self.nodes.values():
            node.tree()
            if node.process is not None:
                send(node.process.pid, signal.SIGTERM)
        deadline = time.monotonic() + 4
        for node in self.nodes.values():
            if node.process is not None:
                try:
                    node.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    pass
        for node in self.nodes.values():
            for pid in node.pids:
                if alive(pid):
                    send(pid, signal.SIGKILL)
            node.process = None
        reap()

    def leader(self, among: Iterable[Node] = ()) -> Node | None:
        """The server that every one of `among` (default: all that run) names as the leader; None where they differ."""
        named = set()
        for node in list(among) or [n for n in self.nodes.values() if n.process is not None]:
            try:
                named.add(node.get("/v1/status/leader", timeout_s=2.0))
            except (OSError, http.client.HTTPException, Failure):
                return None
        if len(named) != 1:
            return None
        host = named.pop().rpartition(":")[0]
        return next((n for n in self.servers if n.address == host), None)


# -- processes and sockets ----------------------------------------------------------------------------------------


def descendants(root: int) -> list[int]:
    """All live processes below `root`."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def reap() -> None:
    """Bury the dead that this process adopted."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def rss_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / (1 << 20)


def connect(host: str, port: int, *, timeout_s: float = 10.0, namespace: str = "") -> socket.socket:
    """A TCP connection, with Nagle off. A socket belongs to the namespace that its thread was in when it was made."""
    if not namespace:
        made = socket.create_connection((host, port), timeout_s)
    else:
        made = in_namespace(namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        made.settimeout(timeout_s)
        made.connect((host, port))
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def in_namespace(namespace: str, make: Callable[[], T]) -> T:
    """Run `make` on a thread of its own that has entered the network namespace."""
    result: list[Any] = []

    def run() -> None:
        try:
            with open(f"/run/netns/{namespace}", "rb") as file:
                if _libc.setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            result.append((make(), None))
        except BaseException as e:
            result.append((None, e))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    made, error = result[0]
    if error is not None:
        raise error
    return made  # type: ignore[no-any-return]


def eventually(what: str, within_s: float, look: Callable[[], T], *, every_s: float = 0.02) -> T:
    """The first true value of `look`. What it raises counts as not yet. Raises Failure."""
    deadline = time.monotonic() + within_s
    while True:
        last: object
        try:
            found = look()
            if found:
                return found
            last = found
        except (OSError, http.client.HTTPException, ValueError, Failure) as e:
            last = e
        if time.monotonic() > deadline:
            raise Failure(f"{what}: not within {within_s:g} s (last seen: {last!r})")
        time.sleep(every_s)


# -- figures ------------------------------------------------------------------------------------------------------


class Verdicts:
    """Figures against their bars; `finish` prints them and gives the exit status."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._rows: list[tuple[str, str, str, str]] = []
        self._missed = 0

    def add(self, what: str, figure: str, bar: str = "", ok: bool | None = None) -> None:
        self._missed += ok is False
        self._rows.append((what, figure, bar, "" if ok is None else "ok" if ok else "MISSED"))

    def most(self, what: str, value: float, bar: float, unit: str = "s", *, digits: int = 2) -> None:
        """A figure that must not exceed its bar."""
        self.add(what, f"{value:.{digits}f} {unit}", f"≤ {bar:g} {unit}", value <= bar)

    def finish(self) -> int:
        load = os.getloadavg()[0]
        print(f"\n{self._title} (load {load:.1f} on {os.cpu_count()} cores)")
        widths = [max(len(row[i]) for row in self._rows) for i in range(4)]
        for row in self._rows:
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        return 1 if self._missed else 0


def spread(values: Sequence[float]) -> str:
    return " ".join(f"{v:.2f}" for v in values)


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("inf")


def parser(doc: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    made.add_argument("--keep", action="store_true", help="leave logs and data behind")
    made.add_argument("--network", default="127.0.2.", help="the agents' addresses begin so (default 127.0.2.)")
    return made


def guarded(run: Callable[[], int], *, within_s: float) -> int:
    """`run`, ended by an alarm after `within_s`; SIGTERM ends it as Ctrl-C does, so that nothing stays behind."""

    def out_of_time(*_: Any) -> None:
        raise Failure(f"not done within {within_s:g} s")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    signal.alarm(int(within_s))
    try:
        return run()
    except Failure as e:
        print(f"failed: {e}", file=sys.stderr)
        return 1
    finally:
        signal.alarm(0)
