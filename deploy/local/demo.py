"""The whole product on one machine: `make demo`.

Three servers, two client agents, two services over mutual TLS, an intention that cuts them off, and a leader killed
without loss. Each address 127.0.10.x plays a host. Every command is shown with what it truly answered, every step is
checked, and the first that fails is named (exit 1). `KEEP=1` leaves everything running until Ctrl-C. No process stays,
whatever happens: this one adopts all its descendants and ends them. Linux, standard library, and `dig`.
"""

from __future__ import annotations

import base64
import ctypes
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).resolve().parent
ROSTRA = Path(os.environ.get("ROSTRA_BIN") or Path(sys.executable).with_name("rostra"))
SERVERS = {"s1": "127.0.10.1", "s2": "127.0.10.2", "s3": "127.0.10.3"}
CLIENTS = {"c1": "127.0.10.4", "c2": "127.0.10.5"}
HOSTS = {**SERVERS, **CLIENTS}
#: name → (node, port)
APPLICATIONS = {"web": ("c1", 9090), "api-1": ("c1", 9001), "api-2": ("c2", 9001)}
UPSTREAM = ("127.0.10.4", 9191)  # where web's sidecar listens for what web sends to api
KEYS = 200

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
T = TypeVar("T")


class Failure(Exception):
    """A step did not do what it should."""


# -- telling ------------------------------------------------------------------------------------------------------

_IS_TERMINAL = sys.stdout.isatty()
_step = "start"


def paint(code: str, text: str) -> str:
    return f"\033[{code}m{text}\033[0m" if _IS_TERMINAL else text


def step(title: str) -> None:
    global _step
    _step = title
    print(f"\n{paint('1', title)}", flush=True)


def show(command: str) -> None:
    print(f"  {paint('36', '$ ' + command)}", flush=True)


def answer(text: str) -> None:
    for line in text.rstrip().splitlines():
        print(f"    {line}", flush=True)


def ok(text: str) -> None:
    print(f"  {paint('32', 'ok')} {text}", flush=True)


def check(condition: object, message: str) -> None:
    if not condition:
        raise Failure(message)


# -- processes ----------------------------------------------------------------------------------------------------


class Processes:
    """Everything started here, by name, each in a session of its own so that Ctrl-C reaches only this script."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def start(self, name: str, command: Sequence[str | Path]) -> None:
        with open(self._logs / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: self._libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
            )

    def check_alive(self) -> None:
        for name, process in self._running.items():
            if process.poll() is not None:
                raise Failure(f"{name} ended with status {process.returncode}; see {self._logs / name}.log")

    def stop(self, name: str) -> None:
        process = self._running.pop(name)
        process.terminate()
        process.wait(10)

    def kill_tree(self, name: str) -> int:
        """kill -9 of a process and all its descendants at once; their number."""
        process = self._running.pop(name)
        victims = [process.pid, *descendants(process.pid)]
        for pid in victims:
            send(pid, signal.SIGKILL)
        process.wait(10)
        return len(victims)

    def stop_all(self) -> tuple[float, int]:
        """Ends everything: (seconds that it took, how many had to be killed). Nothing is left afterwards."""
        began = time.monotonic()
        for process in self._running.values():
            send(process.pid, signal.SIGTERM)
        while reap() and time.monotonic() - began < 5:
            time.sleep(0.02)
        stubborn = len(descendants(os.getpid()))
        while left := descendants(os.getpid()):
            for pid in left:
                send(pid, signal.SIGKILL)
            reap()
            time.sleep(0.02)
        return time.monotonic() - began, stubborn


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


def reap() -> int:
    """Buries the dead that we adopted; the number of those still alive."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if pid == 0:
            return len(descendants(os.getpid()))


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


# -- asking -------------------------------------------------------------------------------------------------------


def run(command: Sequence[str | Path], shown: str, *, expect: int | None = 0, quiet: bool = False) -> str:
    if not quiet:
        show(shown)
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL
    )
    output = (done.stdout + done.stderr).strip()
    if not quiet:
        answer(output)
    if expect is not None and done.returncode != expect:
        raise Failure(f"`{shown}` ended with status {done.returncode}, expected {expect}: {output}")
    return output


def rostra(*arguments: str, at: str, expect: int | None = 0, quiet: bool = False) -> str:
    """The CLI, speaking to the agent of host `at`; flags stand behind the command's words, as with Consul."""
    words = list(arguments)
    flags_at = next((i for i, word in enumerate(words) if word.startswith("-")), min(2, len(words)))
    words.insert(flags_at, f"-http-addr={HOSTS[at]}:8500")
    return run([ROSTRA, *words], shlex.join(["rostra", *words]), expect=expect, quiet=quiet)


def dig(*arguments: str, at: str, quiet: bool = False) -> list[str]:
    words = ["dig", f"@{HOSTS[at]}", "-p", "8600", "+short", "+time=2", "+tries=1", *arguments]
    output = run(words, shlex.join(words), expect=None, quiet=quiet)
    return sorted(line for line in output.splitlines() if not line.startswith(";"))


def http_request(
    method: str, host: str, port: int, path: str, body: bytes | None = None, timeout_s: float = 5.0
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def get(url: str) -> tuple[int, str]:
    """What a web address answers; (0, the reason) where nothing does."""
    host, _, rest = url.removeprefix("http://").partition(":")
    port, _, path = rest.partition("/")
    try:
        status, body = http_request("GET", host, int(port), "/" + path)
        return status, body.decode().strip()
    except (OSError, http.client.HTTPException) as e:
        return 0, f"{type(e).__name__}: {e}"


def api(at: str, path: str) -> Any:
    status, body = http_request("GET", HOSTS[at], 8500, "/v1" + path)
    if status != 200:
        raise Failure(f"GET /v1{path} at {at}: {status} {body.decode(errors='replace').strip()}")
    return json.loads(body)


def eventually(what: str, within_s: float, look: Callable[[], T]) -> tuple[T, float]:
    """The first true value of `look` and the seconds that it took. What it raises counts as not yet."""
    began = time.monotonic()
    last: object = None
    while True:
        try:
            found = look()
            if found:
                return found, time.monotonic() - began
            last = found
        except (OSError, http.client.HTTPException, ValueError, Failure) as e:
            last = e
        if time.monotonic() - began > within_s:
            raise Failure(f"{what}: not within {within_s:g} s (last seen: {last!r})")
        time.sleep(0.02)


# -- the story ----------------------------------------------------------------------------------------------------


class Demo:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.logs = directory / "logs"
        self.logs.mkdir()
        self.processes = Processes(self.logs)
        self.commands: dict[str, list[str]] = {}
        self.acknowledged: dict[str, str] = {}

    def play(self) -> None:
        self.servers_elect_a_leader()
        self.applications_start()
        self.clients_join()
        self.services_are_registered()
        self.dns_finds_them()
        self.web_reaches_api()
        self.a_stopped_instance_leaves()
        self.an_intention_denies()
        self.an_intention_allows()
        self.the_leader_is_killed()
        self.the_killed_server_returns()

    def servers_elect_a_leader(self) -> None:
        step("1. Three servers elect a leader")
        secret = run([ROSTRA, "keygen"], "rostra keygen", quiet=True)
        show("rostra keygen > cluster.hcl   # the secret that lets a node enrol")
        config = self.directory / "cluster.hcl"
        config.touch(0o600)
        config.write_text(f'encrypt = "{secret}"\nconnect {{ enabled = true }}\n')
        for name in SERVERS:
            self.start_agent(name, "-server", "-bootstrap-expect=3")
        leader, took = eventually("one leader, known to all three servers", 20, self.leader)
        show(f"GET http://{SERVERS['s1']}:8500/v1/status/leader")
        answer(f'"{leader}"')
        ok(f"{self.name_of(leader)} leads, {took:.1f} s after the start")
        eventually("three members alive", 10, lambda: self.alive("s1") == set(SERVERS))
        rostra("members", at="s1")

    def applications_start(self) -> None:
        step("2. Three ordinary programs, which know nothing of all this")
        for name, (node, port) in APPLICATIONS.items():
            self.start_application(name)
            self.wait_for_application(name, f"http://{HOSTS[node]}:{port}/whoami")
        ok("web, api-1 and api-2 answer on their own ports")

    def clients_join(self) -> None:
        step("3. Two client agents join, with service definitions in their -config-dir")
        for node in CLIENTS:
            services = self.directory / f"{node}.d"
            services.mkdir()
            for name, text in definitions(node).items():
                (services / f"{name}.hcl").write_text(text)
        show("cat c1.d/web.hcl")
        answer((self.directory / "c1.d/web.hcl").read_text())
        for name in CLIENTS:
            self.start_agent(name, f"-config-dir={self.directory / name}.d")
        _, took = eventually("five members alive", 20, lambda: self.alive("c2") == set(HOSTS))
        rostra("members", at="c1")
        ok(f"both are members, {took:.1f} s after their start")

    def services_are_registered(self) -> None:
        step("4. Their services are in the catalog, and their checks pass")
        wanted = {"web": 1, "api": 2, "web-sidecar-proxy": 1, "api-sidecar-proxy": 2}

        def passing() -> bool:
            counts = {name: len(api("s2", f"/health/service/{name}?passing")) for name in wanted}
            check(counts == wanted, f"passing instances: {counts}")
            return True

        _, took = eventually("all instances and sidecars passing", 30, passing)
        rostra("catalog", "services", "-tags", at="s2")
        ok(f"web, two api and their sidecars are healthy (waited {took:.1f} s)")

    def dns_finds_them(self) -> None:
        step("5. DNS finds them on every host")
        found = dig("api.service.consul", at="c2")
        check(found == ["127.0.10.4", "127.0.10.5"], f"A records of api: {found}")
        found = dig("_api._tcp.service.consul", "SRV", at="s3")
        expected = ["1 1 9001 c1.node.dc1.consul.", "1 1 9001 c2.node.dc1.consul."]
        check(found == expected, f"SRV records of api: {found}")
        found = dig("v2.api.service.consul", at="c1")
        check(found == ["127.0.10.5"], f"A records of api with the tag v2: {found}")
        ok("two addresses, two ports, one by tag")

    def web_reaches_api(self) -> None:
        step("6. web reaches api through its local port; between the hosts it is mutual TLS")
        seen, _ = eventually("answers of both api instances", 10, self.both_seen)
        for name in sorted(seen):
            show(f"GET http://{HOSTS['c1']}:9090/call")
            answer(f"web asked and was answered by {name}")
        mesh_port = api("c2", "/agent/service/api-sidecar-proxy")["Port"]
        url = f"http://{HOSTS['c2']}:{mesh_port}/whoami"
        show(f"GET {url}   # the mesh port, without a certificate")
        status, text = get(url)
        answer(text)
        check("refused" not in text, f"nothing listens on the mesh port: {text}")
        check(status == 0, f"the sidecar answered a client without a certificate: {status} {text}")
        ok("both instances answer web, and the mesh port answers nobody without a certificate")

    def a_stopped_instance_leaves(self) -> None:
        step("7. One api is stopped and leaves DNS")
        show("kill api-2")
        self.processes.stop("api-2")
        _, took = eventually(
            "api-2 gone from DNS", 10, lambda: dig("api.service.consul", at="s1", quiet=True) == ["127.0.10.4"]
        )
        dig("api.service.consul", at="s1")
        ok(f"gone {took:.1f} s after its death; its check runs every second")
        eventually("web is answered by api-1 only", 5, lambda: {self.call() for _ in range(5)} == {"api-1"})
        ok("web goes on with api-1")
        self.start_application("api-2")
        _, took = eventually("api-2 back", 15, lambda: len(dig("api.service.consul", at="s1", quiet=True)) == 2)
        eventually("answers of both api instances", 10, self.both_seen)
        ok(f"started again, it is back after {took:.1f} s")

    def an_intention_denies(self) -> None:
        step("8. An intention cuts web off from api, open connections too")
        stream = Stream(UPSTREAM)
        show(f"GET http://{UPSTREAM[0]}:{UPSTREAM[1]}/stream   # kept open")
        answer(f"{stream.first()} ... (and so on, 20 times a second)")
        try:
            check(stream.ended_at(within_s=0.5) is None, "the open connection ended before anything was denied")
            began = time.monotonic()
            rostra("intention", "create", "-deny", "web", "api", at="s3")
            ended_at = stream.ended_at(within_s=1.0)
        finally:
            stream.close()
        if ended_at is None:
            raise Failure("the open connection was still alive 1 s after the command had returned")
        ok(f"the open connection ended {(ended_at - began) * 1000:.0f} ms after the command was typed")
        show(f"GET http://{HOSTS['c1']}:9090/call")
        status, text = get(f"http://{HOSTS['c1']}:9090/call")
        answer(f"{status} {text}")
        refused = [get(f"http://{HOSTS['c1']}:9090/call")[0] for _ in range(10)]
        check(status == 502 and set(refused) == {502}, f"new connections were not all refused: {[status, *refused]}")
        said = rostra("intention", "check", "web", "api", at="c1", expect=1)
        check("Denied" in said, said)
        ok("new connections are refused")

    def an_intention_allows(self) -> None:
        step("9. The opposite intention heals it")
        rostra("intention", "create", "-replace", "-allow", "web", "api", at="s1")
        _, took = eventually("both api instances answer web again", 5, self.both_seen)
        show(f"GET http://{HOSTS['c1']}:9090/call")
        answer(get(f"http://{HOSTS['c1']}:9090/call")[1])
        ok(f"both answer again, {took * 1000:.0f} ms after the command")

    def the_leader_is_killed(self) -> None:
        step("10. The leader is killed with kill -9")
        self.victim = self.name_of(self.leader())
        for n in range(KEYS):
            self.write(f"demo/{n:04}", f"value {n}")
        rostra("kv", "put", "demo/last-words", "written before the kill", at="c1")
        self.acknowledged["demo/last-words"] = "written before the kill"
        show(f"kill -9 {self.victim}   # agent, server and all")
        began = time.monotonic()
        count = self.processes.kill_tree(self.victim)
        eventually("a write is acknowledged", 15, lambda: self.write("demo/after", "written after the kill"))
        took = time.monotonic() - began
        ok(f"{count} processes killed; the next write was acknowledged after {took:.2f} s")
        rostra("kv", "get", "demo/after", at="c2")
        at = next(n for n in SERVERS if n != self.victim)
        leader, _ = eventually("another leader", 5, lambda: self.leader())
        check(self.name_of(leader) != self.victim, f"{self.victim} cannot lead")
        self.check_keys("c1", "")
        self.check_keys(at, "&stale")
        found = dig("api.service.consul", at="c2")
        check(len(found) == 2, f"A records of api: {found}")
        check(self.both_seen(), "web does not reach both api instances")
        kept = len(self.acknowledged)
        ok(f"{self.name_of(leader)} leads now; all {kept} acknowledged keys are there; DNS and mesh go on")

    def the_killed_server_returns(self) -> None:
        step("11. The killed server returns and catches up")
        self.start_agent(self.victim, "-server", "-bootstrap-expect=3")
        _, took = eventually(
            "its own copy holds every key", 20, lambda: self.check_keys(self.victim, "&stale", quiet=True)
        )
        eventually("five members alive", 20, lambda: self.alive(self.victim) == set(HOSTS))
        rostra("kv", "get", "-stale", "demo/after", at=self.victim)
        rostra("members", at=self.victim)
        ok(f"{self.victim} holds all {len(self.acknowledged)} keys, {took:.1f} s after its start")
        self.processes.check_alive()

    # -- parts of the story ---------------------------------------------------------------------------------------

    def start_agent(self, name: str, *flags: str) -> None:
        joins = [f"-retry-join={address}" for address in SERVERS.values()]
        address = HOSTS[name]
        command = [
            *("agent", *flags, f"-node={name}", f"-bind={address}", f"-client={address}"),
            *(f"-data-dir={self.directory / name}", f"-config-file={self.directory / 'cluster.hcl'}", *joins),
        ]
        self.commands[name] = command
        show(shlex.join(["rostra", *command]).replace(str(self.directory) + "/", ""))
        self.processes.start(name, [ROSTRA, *command])

    def start_application(self, name: str) -> None:
        node, port = APPLICATIONS[name]
        command = ["demo_services.py", name, f"{HOSTS[node]}:{port}"]
        if name == "web":
            command.append(f"{UPSTREAM[0]}:{UPSTREAM[1]}")
        show("python " + shlex.join(command))
        self.processes.start(name, [sys.executable, HERE / command[0], *command[1:]])

    def wait_for_application(self, name: str, url: str) -> None:
        eventually(f"{name} answers", 10, lambda: get(url) == (200, name))

    def leader(self) -> str:
        """The leader's address if all servers that run agree on one, else nothing."""
        self.processes.check_alive()
        running = [name for name in SERVERS if name in self.processes._running]
        said = {api(name, "/status/leader") for name in running}
        return said.pop() if len(said) == 1 else ""

    def name_of(self, leader: str) -> str:
        host = leader.rpartition(":")[0]
        return next((name for name, address in HOSTS.items() if address == host), leader)

    def alive(self, at: str) -> set[str]:
        self.processes.check_alive()
        return {m["Name"] for m in api(at, "/agent/members") if m["Status"] == 1}

    def call(self) -> str:
        """Which api instance answered web; raises Failure if none."""
        status, text = get(f"http://{HOSTS['c1']}:9090/call")
        check(status == 200, f"{status} {text}")
        return text.rpartition(" ")[2]

    def both_seen(self) -> set[str]:
        seen = {self.call() for _ in range(12)}
        return seen if seen == {"api-1", "api-2"} else set()

    def write(self, key: str, value: str) -> bool:
        status, body = http_request("PUT", HOSTS["c1"], 8500, f"/v1/kv/{key}", value.encode(), timeout_s=10)
        check(status == 200 and body.strip() == b"true", f"PUT {key}: {status} {body!r}")
        self.acknowledged[key] = value
        return True

    def check_keys(self, at: str, mode: str, *, quiet: bool = False) -> bool:
        path = f"/kv/demo/?recurse{mode}"
        rows = api(at, path)
        if not quiet:
            show(f"GET http://{HOSTS[at]}:8500/v1{path}")
            answer(f"{len(rows)} keys")
        found = {row["Key"]: base64.b64decode(row["Value"]).decode() for row in rows}
        lost = [key for key, value in self.acknowledged.items() if found.get(key) != value]
        check(not lost, f"{at} lost {len(lost)} acknowledged keys: {lost[:5]}")
        return True

    def tell_how_to_look_around(self) -> None:
        step("Everything runs. Look around from another terminal; Ctrl-C here ends it")
        rostra_ = shlex.quote(str(ROSTRA))
        for line in (
            f"export CONSUL_HTTP_ADDR={HOSTS['c1']}:8500",
            f"{rostra_} members",
            f"{rostra_} catalog services",
            f"{rostra_} kv get -recurse demo/",
            f"{rostra_} intention create -replace -deny web api",
            f"curl http://{HOSTS['c1']}:9090/call",
            f"dig @{HOSTS['c1']} -p 8600 api.service.consul SRV",
            f"ls {self.logs}",
        ):
            answer(line)


def definitions(node: str) -> dict[str, str]:
    """The service definition files of one client. Its address is named because all hosts here are one machine;
    on real ones 127.0.0.1, the default, is right for both local addresses."""
    found = {}
    for name, (at, port) in APPLICATIONS.items():
        if at != node:
            continue
        service = name.partition("-")[0]
        tags = f'  tags = ["v{name[-1]}"]\n' if service == "api" else ""
        upstream = (
            f"""        upstreams = [
          {{ destination_name = "api", local_bind_address = "{UPSTREAM[0]}", local_bind_port = {UPSTREAM[1]} }}
        ]
"""
            if service == "web"
            else ""
        )
        found[name] = f"""service {{
  name = "{service}"
{tags}  port = {port}
  check {{
    http = "http://{HOSTS[node]}:{port}/health"
    interval = "1s"
    timeout = "1s"
  }}
  connect {{
    sidecar_service {{
      proxy {{
        local_service_address = "{HOSTS[node]}"
{upstream}      }}
    }}
  }}
}}
"""
    return found


class Stream:
    """A connection that is kept open; a thread notes when it ends."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = socket.create_connection(address, timeout=10)
        self._socket.sendall(b"GET /stream HTTP/1.0\r\n\r\n")
        self._file = self._socket.makefile("rb")
        self._ended = threading.Event()
        self._ended_at = 0.0

    def first(self) -> str:
        line = b""
        try:
            while not line.startswith(b"api"):
                line = self._file.readline()
                check(line, "the stream ended before it began")
        except OSError as e:
            raise Failure(f"the stream did not begin: {e}") from e
        threading.Thread(target=self._drain, daemon=True).start()
        return line.decode().strip()

    def _drain(self) -> None:
        try:
            while self._file.readline():
                pass
        except (OSError, ValueError):
            pass
        self._ended_at = time.monotonic()
        self._ended.set()

    def ended_at(self, *, within_s: float) -> float | None:
        """When it ended, by the monotonic clock; None if it lives on after `within_s` from now."""
        return self._ended_at if self._ended.wait(within_s) else None

    def close(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


def check_prerequisites() -> None:
    if not sys.platform.startswith("linux"):
        raise Failure("the demo plays five hosts on 127.0.10.1 to .5, which needs Linux")
    if not ROSTRA.exists():
        raise Failure(f"{ROSTRA} is not there: run `make demo`, which installs it, or set ROSTRA_BIN")
    if shutil.which("dig") is None:
        raise Failure("`dig` is missing: install bind9-dnsutils (Debian) or bind-utils (Fedora)")
    wanted = [(host, port) for host in HOSTS.values() for port in (8300, 8301, 8500, 8600)]
    wanted += [(HOSTS[node], port) for node, port in APPLICATIONS.values()] + [UPSTREAM]
    for host, port in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as e:
                raise Failure(f"{host}:{port} is needed: {e.strerror}. Does another demo run?") from e


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    began = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="rostra-demo-"))
    demo: Demo | None = None
    status = 1
    try:
        check_prerequisites()
        demo = Demo(directory)
        demo.play()
        status = 0
        if os.environ.get("KEEP"):
            demo.tell_how_to_look_around()
            while True:
                signal.pause()
    except Failure as e:
        print(f"\n{paint('31', 'FAILED')} at “{_step}”: {e}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\ninterrupted", flush=True)
        status = 0 if status == 0 else 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # what follows takes seconds and must be finished
        if demo is not None:
            took, stubborn = demo.processes.stop_all()
            print(f"\nall processes ended within {took:.1f} s", flush=True)
            if stubborn:
                print(f"{paint('31', 'FAILED')}: {stubborn} of them only by kill -9", file=sys.stderr)
                status = 1
    if status == 1 and demo is not None:
        print(f"logs and data: {directory}", file=sys.stderr)
    else:
        shutil.rmtree(directory, ignore_errors=True)
    if status == 0:
        print(f"{paint('32', 'The demo is complete')}: {time.monotonic() - began:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
