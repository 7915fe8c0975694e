"""What is wrong is told in one clear line, or in a plain-text body that begins with the reason; never by a traceback.

A port or a data directory that is in use, unwritable or of a newer format is in test_dev.py.
"""

from __future__ import annotations

import re
import resource
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Agent, Processes, descendants, eventually, new_host

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def agent(module_processes: Processes) -> Agent:
    return module_processes.dev("bad-node")


# -- configuration ---------------------------------------------------------------------------------------------------

_FILES = [
    ("unknown.hcl", 'bind_addr = "127.0.0.1"\ndatacentre = "x"\n',
     '2:1: datacentre: unknown configuration key; did you mean "datacenter"?'),
    ("unknown.json", '{\n  "ports": {"htpp": 1}\n}',
     '2:13: ports.htpp: unknown configuration key; did you mean "http"?'),
    ("comma.json", '{\n  "ports": {"http": 8500,}\n}\n', "2:25: a comma after the last entry is not JSON"),
    ("cut.json", '{\n  "node_name": "x"\n', "3:1: expected"),
    ("value.hcl", "ports {\n  http = \n}\n", "3:1: expected a value for 'http', found '}'"),
    ("open.hcl", 'node_name = "x"\nports {\n', "3:1: expected"),
    ("type.hcl", 'server = "yes"\n', "1:1: server: must be true or false, not a string"),
    ("range.hcl", "ports { http = 70000 }\n",
     "1:9: ports.http: invalid port 70000: 1 to 65535, or -1 to switch it off"),
    ("duration.hcl", 'retry_interval = "soon"\n',
     '1:1: retry_interval: invalid duration "soon": write it like "30s", "5m" or "1h30m"'),
    ("nameless.hcl", "\nservice {\n  port = 80\n}\n", "2:1: service: a service definition needs a name"),
    ("ttl.hcl", 'service { name = "w"\n  check { ttl = "10x" }\n}\n',
     '2:11: service.check.ttl: invalid duration "10x": write it like "30s", "5m" or "1h30m"'),
    ("interval.hcl", 'service { name = "w"\n  check { http = "http://x" interval = 10 }\n}\n',
     '2:29: service.check.interval: must be a duration in quotes, such as "10s", not the number 10'),
    ("zero.hcl", 'service { name = "w"\n  check { ttl = "0s" }\n}\n',
     "1:1: service: Invalid check: TTL must be > 0 for TTL checks"),
    ("missing.hcl", 'service { name = "w"\n  check { http = "http://x" }\n}\n',
     "1:1: service: Invalid check: Interval must be > 0 for Script, HTTP, or TCP checks"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), _FILES, ids=[name for name, _, _ in _FILES])
def test_a_wrong_configuration_file_is_told_by_file_line_and_column(
    processes: Processes, tmp_path: Path, name: str, text: str, message: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    agent = processes.agent("x", "-dev", "-log-level=error", f"-config-file={file}")
    assert agent.process.wait(10) == 1
    lines = agent.process.log.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"rostra agent: {file}:{message}")
    assert not processes.left()


def test_every_problem_of_a_configuration_is_told_at_once(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "many.hcl"
    file.write_text('datacentre = "x"\nserver = 1\nretry_interval = "soon"\n')
    done = processes.rostra("agent", "-dev", f"-config-file={file}", "-node=a b")
    assert done.status == 1
    assert [line.split(": ")[1:3] for line in done.err.splitlines()] == [
        [f"{file}:1:1", "datacentre"],
        [f"{file}:2:1", "server"],
        [f"{file}:3:1", "retry_interval"],
        ["-node", '"a b" is no name for a node'],
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-dev", "-http-prot=1"], 'flag provided but not defined: -http-prot; did you mean "-http-port"?'),
        (["-dev", "-http-port"], "flag needs an argument: -http-port"),
        (["-dev", "-http-port=many"], '-http-port: must be a port number, not "many"'),
        (["-dev", "-config-file=/does/not/exist.hcl"], "cannot read the configuration file /does/not/exist.hcl: "),
        (["-dev", "-encrypt=short"], "-encrypt: not a key: it must be 32 random bytes (or 16 or 24) in base64"),
        (["-server"], "data_dir cannot be empty: give -data-dir=PATH, or -dev to try things out"),
        (["-dev", "extra"], "unexpected extra arguments: extra"),
        (["-dev", "-bind=nowhere"], "-bind: invalid ip address: nowhere"),
        (["-dev", "-bind=192.0.2.1"], "-bind: 192.0.2.1 is no address of this host"),
    ],
)
def test_a_wrong_flag_is_one_line(processes: Processes, flags: list[str], message: str) -> None:
    done = processes.rostra("agent", *flags)
    assert done.status == 1
    assert len(done.err.splitlines()) == 1, done.err
    assert done.first_line.startswith(f"rostra agent: {message}")


def test_the_secret_is_never_printed(processes: Processes) -> None:
    done = processes.rostra("agent", "-dev", "-encrypt=my-very-secret-words")
    assert done.status == 1
    assert "very" not in done.err + done.out


def test_keys_of_consuls_without_effect_are_one_warning(processes: Processes, tmp_path: Path) -> None:
    file = tmp_path / "consul.hcl"
    file.write_text("raft_protocol = 3\nsegments = []\ndisable_update_check = true\nports { serf_wan = 1 }\n")
    agent = processes.dev("consul", "-log-level=warn", f"-config-file={file}")
    [line] = agent.process.log.splitlines()
    assert "[WARN]" in line
    assert all(key in line for key in ("raft_protocol", "segments", "disable_update_check", "ports.serf_wan"))


def test_no_secret_on_an_address_that_others_reach_is_refused(processes: Processes) -> None:
    agent = processes.agent("x", "-retry-join=10.1.2.3", data_dir=processes.directory / "x")
    assert agent.process.wait(10) == 1
    [line] = agent.process.log.splitlines()
    assert line.startswith("rostra agent: no cluster secret, and 10.1.2.3 can be reached from other machines: run")


# -- joining ---------------------------------------------------------------------------------------------------------


def _warnings(agent: Agent, part: str) -> list[str]:
    return [line for line in agent.process.log.splitlines() if part in line and "[WARN]" in line]


def test_an_unreachable_join_address_is_told_once_per_interval_and_tried_again(processes: Processes) -> None:
    nobody = new_host()
    flags = [f"-retry-join={nobody}:8301", "-retry-interval=1s", "-log-level=warn"]
    agent = processes.agent("x", *flags, data_dir=processes.directory / "x")
    began = time.monotonic()
    eventually("it is told again", lambda: len(_warnings(agent, f"address={nobody}")) >= 3, 15)
    elapsed = time.monotonic() - began
    lines = _warnings(agent, f"address={nobody}")
    assert len(lines) <= elapsed + 2, lines
    assert "connection refused" in lines[0]
    assert "trying again" in lines[0]
    tries = sum(int(m[1]) for line in lines for m in re.finditer(r"held_back=(\d+)", line))
    assert tries <= 6 * elapsed + 10, "it must not hammer an address that does not answer"
    assert len(agent.process.log.splitlines()) == len(lines), agent.process.log
    assert agent.process.stop() == 0


def test_a_join_address_that_starts_to_answer_is_joined(processes: Processes) -> None:
    first = processes.server("s1")
    flags = [f"-retry-join={first.host}:{first.ports.serf}", "-retry-interval=1s", "-log-level=warn"]
    first.process.stop()
    agent = processes.agent("late", *flags, data_dir=processes.directory / "late")
    eventually("it is told", lambda: _warnings(agent, f"address={first.host}"), 10)
    processes.restart(first)
    eventually("it joined", agent.is_registered, 20)
    assert first.api.check_status("late") == "passing"


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_wrong_secret_is_told_as_such_and_joins_nothing(processes: Processes, role: str) -> None:
    keys = [processes.rostra("keygen").out.strip() for _ in range(2)]
    first = processes.server("s1", f"-encrypt={keys[0]}", "-log-level=warn")
    flags = [f"-retry-join={first.host}:{first.ports.serf}", "-retry-interval=1s", "-log-level=warn"]
    if role == "server":
        flags += ["-server", "-bootstrap-expect=3"]
    # Servers of one cluster have the same ports.
    stranger = processes.agent(
        "x", f"-encrypt={keys[1]}", *flags, ports=first.ports, data_dir=processes.directory / "x"
    )
    [line, *_] = eventually("it is told", lambda: _warnings(stranger, f"address={first.host}"), 10)
    assert "is `encrypt` the same on both nodes?" in line
    eventually("the other side says so too", lambda: "[WARN]" in first.process.log, 10)
    assert all(key not in stranger.process.log + first.process.log for key in keys)
    assert "Traceback" not in stranger.process.log + first.process.log
    assert [m["Name"] for m in first.api.get("/v1/agent/members").json()] == ["s1"]


# -- HTTP ------------------------------------------------------------------------------------------------------------

_BODIES: list[tuple[str, Any, int, str]] = [
    ("/v1/agent/service/register", {"Port": 80}, 400, "Missing service name"),
    ("/v1/agent/service/register", {"Name": "a", "Check": {"TTL": "10x"}}, 400,
     'Request decode failed: time: unknown unit "x" in duration "10x"'),
    ("/v1/agent/service/register", {"Name": "a", "Check": {"HTTP": "http://x", "Interval": "soon"}}, 400,
     'Request decode failed: time: invalid duration "soon"'),
    ("/v1/agent/service/register", {"Name": "a", "Check": {"HTTP": "http://x"}}, 400,
     "Invalid check: Interval must be > 0 for Script, HTTP, or TCP checks"),
    ("/v1/agent/service/register", {"Name": "a", "Nmae": 1}, 400, 'Request decode failed: json: unknown field "Nmae"'),
    ("/v1/agent/service/register", {"Name": "a", "Port": "80"}, 400, "Request decode failed: "),
    ("/v1/agent/service/register", {"Name": "a", "Check": {"Args": ["true"], "Interval": "1s"}}, 500,
     "Scripts are disabled on this agent"),
    ("/v1/agent/service/register", b'{"Name":', 400,
     "Request decode failed: unexpected end of data at line 1 column 9"),
    ("/v1/agent/service/register", b"", 400, "Request decode failed: EOF"),
    ("/v1/agent/service/register", b"\xff\xfe", 400, "Request decode failed: "),
    ("/v1/agent/check/register", {"TTL": "1s"}, 400, "Missing check name"),
    ("/v1/agent/check/pass/nope", b"", 500, 'CheckID "nope" does not have associated TTL'),
    ("/v1/agent/service/maintenance/nope?enable=true", b"", 404, ""),
    ("/v1/agent/maintenance", b"", 400, "Missing value for enable"),
    ("/v1/catalog/register", {"Node": "x"}, 500, "Must provide address if SkipNodeUpdate is not set"),
    ("/v1/session/create", {"TTL": "1s"}, 500, "Invalid Session TTL '1000000000', must be between [10s=24h0m0s]"),
    ("/v1/session/create", {"TTL": "never"}, 500, "Session TTL 'never' invalid: time: invalid duration"),
    ("/v1/session/create", {"LockDelay": "x"}, 400, 'Request decode failed: time: invalid duration "x"'),
    ("/v1/kv/", b"1", 400, "Missing key name"),
    ("/v1/kv/a?cas=x", b"1", 500, 'strconv.ParseUint: parsing "x": invalid syntax'),
    ("/v1/kv/a?acquire=x", b"1", 500, "failed session lookup: index error: UUID must be 36 characters"),
    ("/v1/connect/intentions/exact?source=a&destination=b", {"Action": "maybe"}, 500,
     "1 error occurred:\n\t* Action must be set to 'allow' or 'deny'"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "reason"), _BODIES)
def test_a_wrong_body_is_refused_with_the_reason_first(
    agent: Agent, path: str, body: Any, status: int, reason: str
) -> None:
    answer = agent.api.put(path, body)
    assert answer.status == status, answer.text
    assert answer.text.startswith(reason), answer.text
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("index=1&wait=never", "Invalid wait time"),
        ("index=x", "Invalid index"),
        ("stale&consistent", "Cannot specify ?stale with ?consistent, conflicting semantics."),
    ],
)
def test_a_wrong_query_is_refused_with_the_reason_first(agent: Agent, query: str, reason: str) -> None:
    answer = agent.api.get(f"/v1/kv/a?{query}")
    assert (answer.status, answer.text) == (400, reason)


@pytest.mark.parametrize("path", ["/v1/kv/big", "/v1/agent/service/register", "/v1/session/create"])
def test_an_oversized_body_is_413_and_nothing_is_kept(agent: Agent, path: str) -> None:
    answer = agent.api.put(path, b"x" * (512 * 1024 + 1))
    assert answer.status == 413
    assert answer.text.startswith("Request body(524289 bytes) too large, max size: 524288 bytes.")
    assert agent.api.get("/v1/kv/big").status == 404


def test_the_largest_value_is_taken(agent: Agent) -> None:
    agent.api.done("/v1/kv/largest", b"x" * (512 * 1024))
    assert len(agent.api.get("/v1/kv/largest?raw").body) == 512 * 1024
    assert agent.api.request("DELETE", "/v1/kv/largest").status == 200


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/v1/kv/a", "OPTIONS,GET,PUT,DELETE"),
        ("DELETE", "/v1/catalog/nodes", "OPTIONS,GET"),
        ("GET", "/v1/agent/service/register", "OPTIONS,PUT"),
        ("PATCH", "/v1/health/service/x", "OPTIONS,GET"),
    ],
)
def test_a_wrong_method_is_405_with_allow(agent: Agent, method: str, path: str, allow: str) -> None:
    answer = agent.api.request(method, path)
    assert (answer.status, answer.headers["Allow"]) == (405, allow)
    assert answer.text == f"method {method} not allowed"


def test_an_unknown_path_is_404(agent: Agent) -> None:
    assert agent.api.get("/v1/no/such/thing").status == 404


def test_garbage_on_the_http_port_is_a_400_and_hurts_nobody(agent: Agent) -> None:
    for garbage in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), b"hello\r\n\r\n", bytes(5000)):
        with socket.create_connection((agent.host, agent.ports.http), timeout=5) as connection:
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
            try:
                said = connection.recv(4096)
            except ConnectionResetError:
                said = b""
            assert said == b"" or said.startswith(b"HTTP/1.1 400 "), said
    assert agent.answers()
    assert "Traceback" not in agent.process.log


# -- limits ----------------------------------------------------------------------------------------------------------


def _open_files(pid: int) -> tuple[int, int]:
    [line] = [x for x in Path(f"/proc/{pid}/limits").read_text().splitlines() if x.startswith("Max open files")]
    soft, hard = line.split()[3:5]
    return int(soft), int(hard)


def _has_limit(pid: int, limit: int) -> bool:
    return _open_files(pid) == (limit, limit)


def test_too_few_file_descriptors_are_raised_to_what_is_allowed(processes: Processes) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    agent = processes.agent("x", "-dev", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)))
    eventually("it is ready", agent.is_registered, 15)
    agent.api.done("/v1/agent/service/register", {"Name": "w", "Port": 1, "Connect": {"SidecarService": {}}})
    eventually("its sidecar runs", agent.proxy_pids, 5)
    for pid in (agent.process.pid, *descendants(agent.process.pid)):
        eventually(f"{pid} raised its limit", partial(_has_limit, pid, hard), 5)
    assert "few file descriptors" not in agent.process.log


def test_too_few_file_descriptors_that_cannot_be_raised_are_one_warning(processes: Processes) -> None:
    agent = processes.agent(
        "x", "-dev", "-log-level=warn", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    )
    eventually("it is ready", agent.is_registered, 15)
    [line] = agent.process.log.splitlines()
    assert "[WARN]  agent: few file descriptors" in line
    assert "limit=256" in line
    assert "ulimit -n" in line
