"""Whoever supervises, supervises for ever: what cannot be started now is tried again, is said once, and shows.

The core or a proxy is killed while nothing can be started (no file descriptors, the program's directory away), longer
than one attempt takes; then it can be started again.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.processes import Agent, Ports, Processes, command_line, descendants, eventually, new_host, send

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

ATTEMPTS_S = 20.0  # the pauses between attempts grow to 10 s


@contextlib.contextmanager
def no_descriptors(pid: int) -> Iterator[None]:
    """In here that process opens no file and no socket."""
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


class KeptConnection:
    """A connection from before the fault: while it lasts, nobody can make a new one."""

    def __init__(self, agent: Agent) -> None:
        self._connection = http.client.HTTPConnection(agent.host, agent.ports.http, timeout=10)
        self._connection.connect()

    def json(self, path: str) -> dict[str, object]:
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        found: dict[str, object] = json.loads(body)
        return found

    def core_up(self) -> float:
        gauges = self.json("/v1/agent/metrics")["Gauges"]
        assert isinstance(gauges, list)
        return float(next(g["Value"] for g in gauges if g["Name"] == "consul.core.up"))

    def core_state(self) -> str:
        stats = self.json("/v1/agent/self")["Stats"]
        assert isinstance(stats, dict)
        return str(stats["core"]["state"])


def failures_said(agent: Agent, reason: str) -> int:
    return sum("what=core" in line and reason in line for line in agent.process.log.splitlines())


def core_of(agent: Agent) -> int:
    return next((p for p in descendants(agent.process.pid) if "rostra.server" in command_line(p)), 0)


def came_back(agent: Agent, old_pid: int) -> bool:
    return core_of(agent) not in (0, old_pid) and agent.api.write_key("after", "it")


def test_a_core_that_was_killed_while_no_descriptor_was_free_comes_back(processes: Processes) -> None:
    agent = processes.dev()
    asking, pid = KeptConnection(agent), agent.core_pid()
    assert (asking.core_up(), asking.core_state()) == (1.0, "up")
    with no_descriptors(agent.process.pid):
        send(pid, signal.SIGKILL)
        eventually("the failed start is said", lambda: failures_said(agent, "Too many open files"))
        eventually("its absence shows", lambda: asking.core_up() == 0.0 and asking.core_state() == "away")
    eventually("the core is back", lambda: came_back(agent, pid), ATTEMPTS_S)
    assert failures_said(agent, "Too many open files") == 1
    assert (asking.core_up(), asking.core_state()) == (1.0, "up")


def _python_that_can_move(directory: Path) -> Path:
    """Another name for this Python with this environment's packages, in a directory that a test may move away."""
    here = Path(sys.executable)
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "python").symlink_to(os.path.realpath(here))
    (directory / "pyvenv.cfg").write_text((here.parent.parent / "pyvenv.cfg").read_text())
    (directory / "lib").symlink_to(here.parent.parent / "lib")
    return directory / "bin" / "python"


@contextlib.contextmanager
def moved_away(directory: Path) -> Iterator[None]:
    away = directory.with_name("away")
    directory.rename(away)
    try:
        yield
    finally:
        away.rename(directory)


def test_a_core_that_was_killed_while_its_program_was_moved_away_comes_back(processes: Processes) -> None:
    python, host = _python_that_can_move(processes.directory / "program"), new_host()
    ports = Ports.free(host)
    argv = ["agent", "-dev", "-node=moved", f"-bind={host}", f"-client={host}", *ports.flags]
    process = processes.start([python, "-P", "-m", "rostra.cli.main", *argv])
    agent = Agent("moved", host, ports, process, argv, None, processes.env)
    eventually("the agent is ready", agent.is_registered, 15)
    pid = agent.core_pid()
    with moved_away(python.parent):
        send(pid, signal.SIGKILL)
        eventually("the failed start is said", lambda: failures_said(agent, "No such file or directory"))
    eventually("the core is back", lambda: came_back(agent, pid), ATTEMPTS_S)
    assert failures_said(agent, "No such file or directory") == 1


def proxy_of(agent: Agent, unlike: int = 0) -> Callable[[], int]:
    return lambda: next((pid for pid in agent.proxy_pids() if pid != unlike), 0)


def test_a_proxy_that_was_killed_while_no_descriptor_was_free_comes_back(processes: Processes) -> None:
    agent = processes.dev()
    service = {"Name": "web", "Port": 80, "Connect": {"SidecarService": {}}}
    agent.api.done("/v1/agent/service/register", service)
    pid = eventually("the proxy runs", proxy_of(agent))
    with no_descriptors(agent.process.pid):
        send(pid, signal.SIGKILL)
        eventually("the failed start is said", lambda: "Too many open files" in agent.process.log)
    eventually("another proxy runs", proxy_of(agent, unlike=pid), ATTEMPTS_S)


@pytest.mark.long
def test_the_core_comes_back_from_a_fault_of_a_minute_that_is_said_once(processes: Processes) -> None:
    agent = processes.dev()
    pid = agent.core_pid()
    with no_descriptors(agent.process.pid):
        send(pid, signal.SIGKILL)
        with contextlib.suppress(AssertionError):
            eventually("a minute is over", lambda: False, 60)
    eventually("the core is back", lambda: came_back(agent, pid), ATTEMPTS_S)
    assert failures_said(agent, "Too many open files") == 1
