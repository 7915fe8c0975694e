"""Real Rostra processes for tests: agents started through the console script, asked over HTTP, DNS and the CLI.

`Processes` adopts every descendant (PR_SET_CHILD_SUBREAPER), ends what it started and says what stayed, so a test that
leaves a process behind fails. Each host of a test is a loopback address of its own with free ports; data lies in one
short temporary directory. Nothing here sleeps blindly: `eventually` waits on a condition with a deadline.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from tests.support.waiting import PATIENCE

T = TypeVar("T")

REPO = Path(__file__).resolve().parents[2]
PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.01
STOP_S = 5.0

_script = Path(sys.executable).with_name("rostra")
#: How this machine runs the program: the console script where it is installed.
ROSTRA = [str(_script)] if _script.exists() else [sys.executable, "-P", "-m", "rostra.cli.main"]

_hosts = itertools.count(1)


# -- waiting ---------------------------------------------------------------------------------------------------------


class NotYet(AssertionError):
    """What was waited for did not happen in time."""


def eventually(what: str, look: Callable[[], T], within_s: float = 10.0) -> T:
    """The first true value of `look`. What it raises (also by `assert`) counts as not yet; see `waiting.py`."""
    deadline = time.monotonic() + within_s * PATIENCE
    while True:
        last: object
        try:
            found = look()
            if found:
                return found
            last = found
        except (AssertionError, OSError, http.client.HTTPException, ValueError, KeyError, IndexError) as e:
            last = e
        if time.monotonic() > deadline:
            raise NotYet(f"{what}: not within {within_s:g} s, last seen: {last!r}")
        time.sleep(POLL_S)


class Timed:
    """`with Timed() as t: …` then `t.s`."""

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self.s = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.s = time.monotonic() - self._began


# -- addresses -------------------------------------------------------------------------------------------------------


def new_host() -> str:
    """A loopback address that nobody else uses: each test process has a block of its own, each call another one."""
    n = next(_hosts)
    pid = os.getpid()
    return f"127.{64 + pid // 256 % 128}.{pid % 256}.{1 + n % 250}"


def free_port(host: str) -> int:
    """A port of `host` that is free for TCP and UDP."""
    while True:
        with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            tcp.bind((host, 0))
            port: int = tcp.getsockname()[1]
            try:
                udp.bind((host, port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class Ports:
    """The four ports of an agent."""

    http: int
    dns: int
    server: int
    serf: int

    @classmethod
    def free(cls, host: str) -> Ports:
        found: set[int] = set()
        while len(found) < 4:
            found.add(free_port(host))
        return cls(*found)

    @property
    def flags(self) -> list[str]:
        return [
            f"-http-port={self.http}",
            f"-dns-port={self.dns}",
            f"-server-port={self.server}",
            f"-serf-lan-port={self.serf}",
        ]


# -- asking ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        assert self.status == 200, f"{self.status} {self.body!r}"
        return json.loads(self.body)


class Api:
    """HTTP of one agent, a connection for each request."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def request(self, method: str, path: str, body: Any = None, *, timeout_s: float = 10.0) -> Answer:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def get(self, path: str, *, timeout_s: float = 10.0) -> Answer:
        return self.request("GET", path, timeout_s=timeout_s)

    def put(self, path: str, body: Any = None, *, timeout_s: float = 10.0) -> Answer:
        return self.request("PUT", path, body, timeout_s=timeout_s)

    def done(self, path: str, body: Any = None) -> None:
        """A PUT that must succeed."""
        answer = self.put(path, body)
        assert answer.status == 200, f"PUT {path}: {answer.status} {answer.body!r}"

    def write_key(self, key: str, value: str) -> bool:
        answer = self.put(f"/v1/kv/{key}", value.encode())
        assert (answer.status, answer.body.strip()) == (200, b"true"), f"{answer.status} {answer.body!r}"
        return True

    def keys(self, prefix: str, mode: str = "") -> dict[str, str]:
        rows = self.get(f"/v1/kv/{prefix}?recurse{mode}", timeout_s=20).json()
        return {row["Key"]: base64.b64decode(row["Value"] or "").decode() for row in rows}

    def check_status(self, node: str, check_id: str = "serfHealth") -> str:
        rows = self.get(f"/v1/health/node/{node}").json()
        return next((row["Status"] for row in rows if row["CheckID"] == check_id), "")

    def passing(self, service: str) -> list[str]:
        """The ids of the instances of `service` whose checks pass."""
        rows = self.get(f"/v1/health/service/{service}?passing").json()
        return sorted(row["Service"]["ID"] for row in rows)


@dataclass(frozen=True)
class Done:
    """What a command that ended left behind."""

    status: int
    out: str
    err: str

    @property
    def first_line(self) -> str:
        """The first line of what it had to say on stderr."""
        return self.err.splitlines()[0] if self.err else ""


def run(
    argv: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout_s: float = 20.0, stdin: bytes = b""
) -> Done:
    """Run a command to its end."""
    done = subprocess.run(
        [str(a) for a in argv], input=stdin, capture_output=True, timeout=timeout_s * PATIENCE, env=env
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def dig(host: str, port: int, *question: str, tcp: bool = False) -> str:
    """What dig prints: the whole answer, or only its records with "+short"."""
    argv = ["dig", f"@{host}", "-p", str(port), "+time=2", "+tries=1", "+tcp" if tcp else "+notcp", *question]
    return run(argv).out


def dig_short(host: str, port: int, *question: str, tcp: bool = False) -> list[str]:
    lines = dig(host, port, "+short", *question, tcp=tcp).splitlines()
    return sorted(line for line in lines if not line.startswith(";"))


# -- processes -------------------------------------------------------------------------------------------------------


def live_processes() -> dict[int, tuple[int, str]]:
    """Every live process: pid → (its parent, its state letter). Zombies are included."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            found[int(entry)] = (int(fields[1]), fields[0])
    return found


def descendants(root: int) -> list[int]:
    """All live processes below `root`, nearest first."""
    children: dict[int, list[int]] = {}
    for pid, (parent, state) in live_processes().items():
        if state != "Z":
            children.setdefault(parent, []).append(pid)
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(0), [])
        found += below
        todo += below
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Process:
    """One process that a test started; what it prints goes to a file."""

    def __init__(self, popen: subprocess.Popen[bytes], log_path: Path) -> None:
        self.popen, self.log_path = popen, log_path

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def tree(self) -> list[int]:
        """This process and all below it."""
        return [self.pid, *descendants(self.pid)]

    def send(self, number: int) -> None:
        if self.popen.poll() is None:
            send(self.pid, number)

    def wait(self, timeout_s: float) -> int:
        return self.popen.wait(timeout_s * PATIENCE)

    def stop(self, number: int = signal.SIGTERM, within_s: float = STOP_S) -> int:
        """Signal it and wait for it and everything below it; its exit status. Fails when one of them stays."""
        tree = self.tree()
        self.send(number)
        status = self.wait(within_s)
        eventually("the end of its children", lambda: gone(tree), within_s)
        return status

    def kill_tree(self) -> None:
        """kill -9 of it and all below it at once, as a power cut would."""
        tree = self.tree()
        for pid in tree:
            send(pid, signal.SIGKILL)
        self.wait(STOP_S)
        eventually("all of them dead", lambda: gone(tree), STOP_S)


def gone(pids: Sequence[int]) -> bool:
    """Whether none of them runs any more."""
    return not any(is_alive(pid) for pid in pids)


@dataclass
class Agent:
    """A `rostra agent` of a test and the ways to ask it."""

    name: str
    host: str
    ports: Ports
    process: Process
    argv: list[str]
    data_dir: Path | None
    env: dict[str, str] = field(repr=False, default_factory=dict)

    @property
    def api(self) -> Api:
        return Api(self.host, self.ports.http)

    def core_pid(self) -> int:
        """The core that is this agent's child."""
        return next(p for p in descendants(self.process.pid) if "rostra.server" in command_line(p))

    def proxy_pids(self) -> list[int]:
        return [p for p in descendants(self.process.pid) if "rostra.connect_proxy" in command_line(p)]

    def rostra(self, *words: str, stdin: bytes = b"") -> Done:
        """The CLI, told by the environment whom to ask."""
        env = {**self.env, "CONSUL_HTTP_ADDR": self.api.address}
        return run([*ROSTRA, *words], env=env, stdin=stdin)

    def said(self, *words: str, stdin: bytes = b"") -> str:
        """What a command of the CLI that must succeed printed."""
        done = self.rostra(*words, stdin=stdin)
        assert done.status == 0, f"rostra {' '.join(words)}: {done.status} {done.err}"
        return done.out

    def dig(self, *question: str, tcp: bool = False) -> list[str]:
        return dig_short(self.host, self.ports.dns, *question, tcp=tcp)

    def answers(self) -> bool:
        """Whether it knows a leader. Raises AssertionError when the process has ended."""
        assert self.process.popen.poll() is None, f"{self.name} ended: {self.process.log}"
        return self.api.get("/v1/status/leader", timeout_s=2).body.strip() not in (b'""', b"")

    def is_registered(self) -> bool:
        return self.answers() and self.api.check_status(self.name) == "passing"


class Processes:
    """Starts processes, adopts what they leave behind, and at the end stops all and tells what stayed."""

    def __init__(self) -> None:
        # Short, because a unix socket's path is: pytest's own directories are not.
        self.directory = Path(tempfile.mkdtemp(prefix="rostra-e2e-"))
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("CONSUL_", "ROSTRA_"))},
            "XDG_STATE_HOME": str(self.directory / "state"),
            "TMPDIR": str(self.directory / "tmp"),
            "PYTHONUNBUFFERED": "1",
        }
        (self.directory / "tmp").mkdir()
        self._started: list[Process] = []
        self._logs = itertools.count(1)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._before = set(descendants(os.getpid()))
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    # -- starting

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        preexec_fn: Callable[[], None] | None = None,
    ) -> Process:
        """A process in a session of its own, its output in a log file."""
        log_path = self.directory / f"{next(self._logs)}.log"
        with log_path.open("wb") as log:
            popen = subprocess.Popen(
                [str(a) for a in argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.env, **(env or {})},
                cwd=cwd,
                start_new_session=True,
                preexec_fn=preexec_fn,
            )
        process = Process(popen, log_path)
        self._started.append(process)
        return process

    def agent(
        self,
        name: str,
        *flags: str,
        host: str = "",
        ports: Ports | None = None,
        data_dir: Path | None = None,
        preexec_fn: Callable[[], None] | None = None,
    ) -> Agent:
        """Start `rostra agent FLAGS` on an address and ports of its own; it need not answer yet."""
        host = host or new_host()
        ports = ports or Ports.free(host)
        argv = ["agent", *flags, f"-node={name}", f"-bind={host}", f"-client={host}", *ports.flags]
        if data_dir is not None:
            argv.append(f"-data-dir={data_dir}")
        process = self.start([*ROSTRA, *argv], preexec_fn=preexec_fn)
        return Agent(name, host, ports, process, argv, data_dir, self.env)

    def dev(self, name: str = "dev", *flags: str, host: str = "", ports: Ports | None = None) -> Agent:
        """A `-dev` agent whose node is registered and passing."""
        agent = self.agent(name, "-dev", *flags, host=host, ports=ports)
        eventually("the dev agent is ready", agent.is_registered, 15)
        return agent

    def server(self, name: str = "s1", *flags: str, data_dir: Path | None = None, wait: bool = True) -> Agent:
        """A single `-server -bootstrap` agent with a data directory."""
        data_dir = data_dir or self.directory / name
        agent = self.agent(name, "-server", "-bootstrap-expect=1", *flags, data_dir=data_dir)
        if wait:
            eventually("the server is ready", agent.is_registered, 15)
        return agent

    def restart(self, agent: Agent) -> Agent:
        """The same agent again, with the same flags."""
        agent.process = self.start([*ROSTRA, *agent.argv])
        return agent

    def rostra(self, *words: str, timeout_s: float = 20.0, **env: str) -> Done:
        """A command that ends by itself."""
        return run([*ROSTRA, *words], env={**self.env, **env}, timeout_s=timeout_s)

    # -- ending

    def left(self) -> list[int]:
        """Live descendants of this process that were not there before, the adopted ones too. Buries the dead."""
        mine = {p.pid for p in self._started}
        me = os.getpid()
        for pid, (parent, state) in live_processes().items():
            if parent == me and state == "Z" and pid not in mine and pid not in self._before:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        before = self._before | {d for pid in self._before for d in descendants(pid)}
        return [pid for pid in descendants(me) if pid not in before]

    def close(self) -> list[str]:
        """Stop everything in reverse order; the command lines of what had to be killed."""
        for process in reversed(self._started):
            process.send(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for process in reversed(self._started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.01, deadline - time.monotonic()))
        with contextlib.suppress(NotYet):
            eventually("no process is left", lambda: not self.left(), max(1.0, deadline - time.monotonic()))
        stayed = [f"{pid} {command_line(pid)}" for pid in self.left()]
        while left := self.left():
            for pid in left:
                send(pid, signal.SIGKILL)
            for process in self._started:
                process.popen.poll()
            time.sleep(POLL_S)
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        shutil.rmtree(self.directory, ignore_errors=True)
        return stayed

    def logs(self) -> str:
        """What everything printed, for the report of a failed test."""
        parts = []
        for process in self._started:
            argv = " ".join(str(a) for a in process.popen.args) if isinstance(process.popen.args, list) else ""
            parts.append(f"--- {argv}\n{process.log[-6000:]}")
        return "\n".join(parts)


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """`Processes` for a test or a module of tests. Fails when a process stayed."""
    found = Processes()
    try:
        yield found
    except BaseException:
        print(found.logs())
        found.close()
        raise
    logs = found.logs()
    stayed = found.close()
    if stayed:
        print(logs)
    assert not stayed, f"processes were left: {stayed}"


class Cluster:
    """Servers and clients of one cluster, each on an address of its own, all with the same ports and secret."""

    def __init__(self, processes: Processes, servers: Sequence[str], clients: Sequence[str] = (), *flags: str) -> None:
        self._processes = processes
        self.server_names, self.client_names = list(servers), list(clients)
        self.hosts = {name: new_host() for name in (*servers, *clients)}
        self.ports = Ports.free(self.hosts[servers[0]])
        self.secret = base64.b64encode(os.urandom(32)).decode()
        self._flags = [*flags, "-retry-interval=1s", f"-encrypt={self.secret}"]
        self._flags += [f"-retry-join={self.hosts[name]}:{self.ports.serf}" for name in servers]
        self.agents: dict[str, Agent] = {}

    def start(self, *names: str) -> None:
        """Start (again) all or these; they need not answer yet."""
        for name in names or self.hosts:
            role = ["-server", f"-bootstrap-expect={len(self.server_names)}"] if name in self.server_names else []
            self.agents[name] = self._processes.agent(
                name,
                *role,
                *self._flags,
                host=self.hosts[name],
                ports=self.ports,
                data_dir=self._processes.directory / name,
            )

    def wait_until_healthy(self, within_s: float = 25.0) -> None:
        """Until every agent answers and sees everyone alive and passing."""

        def healthy() -> bool:
            for agent in self.agents.values():
                assert agent.answers(), agent.name
                nodes = agent.api.get("/v1/health/state/passing").json()
                passing = {row["Node"] for row in nodes if row["CheckID"] == "serfHealth"}
                assert passing == set(self.hosts), f"{agent.name} sees {passing}"
            return True

        eventually("the cluster is healthy", healthy, within_s)

    def leader(self) -> Agent:
        """Whom the servers that run agree upon. Raises AssertionError while they do not."""
        said = set()
        for name in self.server_names:
            if self.agents[name].process.popen.poll() is None:
                said.add(self.agents[name].api.get("/v1/status/leader", timeout_s=2).json())
        assert len(said) == 1, said
        host = said.pop().rpartition(":")[0]
        return self.agents[next(name for name, h in self.hosts.items() if h == host)]

    def others(self, agent: Agent) -> list[Agent]:
        """The other servers."""
        return [self.agents[n] for n in self.server_names if n != agent.name]


# -- things to talk to -----------------------------------------------------------------------------------------------


class EchoServer:
    """A TCP server in this process that sends back what it gets, after its name; counts its connections."""

    def __init__(self, host: str, name: str = "") -> None:
        self._listener = socket.create_server((host, 0))
        self.host, self.port = host, int(self._listener.getsockname()[1])
        self._greeting = name.encode()
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(self._greeting)
            while data := connection.recv(65536):
                connection.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class HealthPage:
    """An HTTP server in this process whose only page has the status that `status` says."""

    def __init__(self, host: str) -> None:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page.asked += 1
                self.send_response(page.status)
                self.send_header("Content-Length", "3")
                self.end_headers()
                self.wfile.write(b"ok\n")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.status, self.asked = 200, 0
        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        self.host, self.port = host, self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
