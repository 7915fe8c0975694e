"""What surrounds a process when it starts may be anything: it runs, or ends with one line that says why."""

from __future__ import annotations

import base64
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import ROSTRA, Agent, Processes, eventually, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]

SECRET = f"-encrypt={base64.b64encode(os.urandom(32)).decode()}"


def close_all() -> None:
    for fd in (0, 1, 2):
        os.close(fd)


def close_outputs() -> None:
    os.close(1)
    os.close(2)


def full_outputs() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


@pytest.mark.parametrize("surround", [close_all, close_outputs, full_outputs], ids=lambda f: f.__name__)
def test_an_agent_runs_whatever_its_standard_files_are(processes: Processes, surround: Callable[[], None]) -> None:
    agent = processes.agent("odd", "-dev", preexec_fn=surround)
    eventually("it answers", lambda: agent.api.write_key("a", "b"), 20)
    assert agent.process.stop() == 0


def test_paths_are_utf_8_in_every_locale(processes: Processes) -> None:
    processes.env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    directory = processes.directory / "dätä"
    agent = processes.agent("c", "-server", "-bootstrap", SECRET, data_dir=directory)
    eventually("it answers", lambda: agent.api.write_key("a", "b"), 20)
    assert (directory / "server" / "raft").is_dir()


def test_an_argument_that_is_not_utf_8_is_told_in_one_line() -> None:
    done = subprocess.run([*ROSTRA, "agent", "-dev", b"-node=a\xff"], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (1, "rostra: an argument is not UTF-8: '-node=a\\udcff'\n")


def test_a_home_that_is_not_there_is_no_matter_for_a_development_agent(processes: Processes) -> None:
    processes.env |= {"HOME": "/proc/nowhere", "XDG_STATE_HOME": ""}
    agent = processes.agent("homeless", "-dev")
    eventually("it answers", lambda: agent.api.write_key("a", "b"), 20)


def test_a_home_that_is_not_there_is_told_where_its_key_is_needed(processes: Processes) -> None:
    data_dir = processes.directory / "c1"
    done = processes.rostra(
        "agent", f"-data-dir={data_dir}", "-bind=127.0.0.1", HOME="/proc/nowhere", XDG_STATE_HOME=""
    )
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "local.key: the key of this user's clusters on loopback cannot be made" in done.err
    assert "set `encrypt`, or XDG_STATE_HOME" in done.err


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))


def test_too_few_descriptors_to_start_are_told_in_one_line(processes: Processes) -> None:
    agent = processes.agent("few", "-dev", preexec_fn=few_descriptors)
    assert agent.process.wait(60) == 1
    assert agent.process.log.startswith("rostra agent: 8 file descriptors are too few to start, 64 are the least")
    assert agent.process.log.count("\n") == 1


def refused(processes: Processes, agent: Agent) -> tuple[int, list[str]]:
    """How a start ended, and what it said."""
    done = run([*ROSTRA, *agent.argv], env=processes.env)
    return done.status, [line for line in done.err.splitlines() if "[INFO]" not in line and "[WARN]" not in line]


@pytest.fixture
def stopped(processes: Processes) -> Agent:
    """A server that has lived and was stopped."""
    agent = processes.server("s1", SECRET)
    assert agent.process.stop() == 0
    return agent


def test_what_stands_in_the_way_of_a_servers_socket_is_named(processes: Processes, stopped: Agent) -> None:
    assert stopped.data_dir is not None
    (stopped.data_dir / "server" / "core.sock").mkdir()
    status, lines = refused(processes, stopped)
    assert status == 1
    assert lines == [f"rostra agent: the core cannot start: {stopped.data_dir}/server/core.sock: Is a directory"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
@pytest.mark.parametrize("part", [".", "server/raft", "tls"])
def test_a_read_only_file_system_is_told_before_anything_is_started(
    processes: Processes, stopped: Agent, part: str
) -> None:
    assert stopped.data_dir is not None
    place: Path = stopped.data_dir / part
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    done = run(["unshare", "-m", "sh", "-c", script, place, *ROSTRA, *stopped.argv], env=processes.env)
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "read-only file system" in done.err.lower()
    assert str(stopped.data_dir) in done.err


def test_no_process_that_holds_keys_leaves_a_core_dump(processes: Processes) -> None:
    agent = processes.agent("secret", "-dev")
    eventually("it answers", agent.answers, 20)
    agent.api.done("/v1/agent/service/register", {"Name": "web", "Port": 80, "Connect": {"SidecarService": {}}})
    proxy = eventually("the proxy runs", lambda: next(iter(agent.proxy_pids()), 0))
    pids = [agent.process.pid, agent.core_pid(), proxy]

    def limits() -> list[str]:
        found = [Path(f"/proc/{pid}/limits").read_text().splitlines() for pid in pids]
        return [next(line.split()[4] for line in lines if line.startswith("Max core file size")) for lines in found]

    eventually("none may be written", lambda: set(limits()) <= {"0", "1"})
