"""`rostra agent -dev` and `-server` as processes: start, stop, death, restart, and what each of them leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from functools import partial
from pathlib import Path

import pytest

from rostra.runtime.secret import generate_secret
from tests.support.processes import (
    ROSTRA,
    Agent,
    Ports,
    Processes,
    command_line,
    eventually,
    gone,
    is_alive,
    new_host,
    send,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_a_dev_agent_answers_and_lists_its_node_as_passing(processes: Processes) -> None:
    agent = processes.agent("laptop", "-dev")
    eventually("HTTP answers", lambda: agent.api.get("/v1/agent/self").status == 200)
    eventually("the node passes", agent.is_registered)
    answer = agent.api.get("/v1/catalog/nodes")
    assert [(n["Node"], n["Address"]) for n in answer.json()] == [("laptop", agent.host)]
    assert answer.headers["X-Consul-KnownLeader"] == "true"
    assert int(answer.headers["X-Consul-Index"]) >= 2
    health = agent.api.get("/v1/health/node/laptop")
    assert [(c["CheckID"], c["Status"]) for c in health.json()] == [("serfHealth", "passing")]
    assert int(health.headers["X-Consul-Index"]) >= 2


def test_a_dev_agent_takes_any_free_port_for_http_and_dns_and_says_which(processes: Processes) -> None:
    host = new_host()
    flags = [f"-bind={host}", f"-client={host}", "-http-port=0", "-dns-port=0", *Ports.free(host).flags[2:]]
    process = processes.start([*ROSTRA, "agent", "-dev", "-node=any", *flags])
    said = re.compile(r"http=http://[\d.]+:(\d+) dns=(\d+)")
    found = eventually("it says where", lambda: said.findall(process.log), 15)[0]
    agent = Agent("any", host, Ports(int(found[0]), int(found[1]), 0, 0), process, [], None)
    eventually("it answers there", agent.is_registered, 10)
    assert agent.dig("any.node.consul") == [host]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_agent_and_children_in_two_seconds_with_status_0(processes: Processes, number: int) -> None:
    agent = processes.dev()
    tree = agent.process.tree()
    assert len(tree) >= 2
    assert agent.process.stop(number, within_s=2.0) == 0
    assert gone(tree)
    assert processes.left() == []
    assert "Traceback" not in agent.process.log
    assert list((processes.directory / "tmp").iterdir()) == []  # its state in memory left no file behind


def test_a_signal_with_waiting_clients_still_ends_it_in_two_seconds(processes: Processes) -> None:
    agent = processes.dev()
    index = int(agent.api.get("/v1/catalog/services").headers["X-Consul-Index"])
    waiting = [socket.create_connection((agent.host, agent.ports.http)) for _ in range(20)]
    for connection in waiting:
        connection.sendall(f"GET /v1/catalog/services?index={index}&wait=5m HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    idle = [socket.create_connection((agent.host, agent.ports.http)) for _ in range(5)]
    assert agent.process.stop(signal.SIGTERM, within_s=2.0) == 0
    for connection in (*waiting, *idle):
        connection.close()


def test_lists_are_whole_and_in_order_whatever_was_watched_while_they_changed(processes: Processes) -> None:
    agent = processes.dev()
    names = [f"k/{n:02}" for n in range(80)]

    def listed(token: str, index: int = 0, wait: str = "10s") -> tuple[list[str], int]:
        answer = agent.api.get(f"/v1/kv/k/?recurse&token={token}" + (f"&index={index}&wait={wait}" if index else ""))
        return [row["Key"] for row in answer.json()], int(answer.headers["X-Consul-Index"])

    agent.api.done(f"/v1/kv/{names[40]}", "x")
    listed("first", listed("first")[1], wait="10ms")  # from here on a server keeps the list
    for name in reversed(names):
        agent.api.done(f"/v1/kv/{name}", "x")
    seen, index = listed("second")
    assert seen == names
    assert listed("third", index, wait="10ms")[0] == names
    for name in names[::2]:
        assert agent.api.request("DELETE", f"/v1/kv/{name}").status == 200
    while len(seen) > len(names) / 2:
        seen, index = listed("third", index)
    assert seen == names[1::2]
    assert "Traceback" not in agent.process.log


def test_ctrl_c_to_the_whole_group_ends_everything_in_order(processes: Processes) -> None:
    agent = processes.dev()
    tree = agent.process.tree()
    os.killpg(agent.process.pid, signal.SIGINT)  # what a terminal does: children get it too
    assert agent.process.wait(2.0) == 0
    eventually("all gone", lambda: gone(tree), 1.0)
    assert "Traceback" not in agent.process.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_it_starts_leaves_nothing(processes: Processes, number: int) -> None:
    for delay_s in (0.0, 0.08, 0.16, 0.3):
        agent = processes.agent("early", "-dev")
        # Before that, Ctrl-C is Python's: it prints where it was, or even loses the signal and goes on.
        eventually("our program runs", partial(_has_loaded_a_library, agent.process.pid))
        with pytest.raises(subprocess.TimeoutExpired):
            agent.process.popen.wait(delay_s)
        agent.process.stop(number, within_s=3.0)
        eventually("no process is left", lambda: not processes.left(), 2.0)
        assert "Traceback" not in agent.process.log, f"after {delay_s} s: {agent.process.log}"


def _has_loaded_a_library(pid: int) -> bool:
    """The first library of the environment is loaded within `main()`."""
    return "/site-packages/" in Path(f"/proc/{pid}/maps").read_text()


def test_kill_9_of_the_agent_takes_its_children_with_it(processes: Processes) -> None:
    agent = processes.dev()
    children = agent.process.tree()[1:]
    assert children
    send(agent.process.pid, signal.SIGKILL)
    assert agent.process.wait(1.0) == -signal.SIGKILL
    eventually("its children are gone", lambda: gone(children), 1.0)
    assert processes.left() == []
    assert list((processes.directory / "tmp").iterdir()) == []


def test_a_killed_core_is_started_again_and_nothing_is_lost(processes: Processes) -> None:
    agent = processes.server()
    agent.api.write_key("before", "1")
    core = agent.core_pid()
    send(core, signal.SIGKILL)
    eventually("the core is gone", lambda: gone([core]), 2)
    eventually("it answers again", lambda: agent.api.write_key("after", "2"), 10)
    assert agent.core_pid() != core
    assert is_alive(agent.process.pid)
    assert agent.api.keys("") == {"before": "1", "after": "2"}
    eventually("its node passes again", agent.is_registered, 10)


def test_a_dev_core_that_was_killed_is_started_again(processes: Processes) -> None:
    agent = processes.dev()
    agent.api.done("/v1/agent/service/register", {"Name": "web", "Port": 80})
    core = agent.core_pid()
    send(core, signal.SIGKILL)
    eventually("the core is gone", lambda: gone([core]), 2)
    eventually("it answers again", lambda: agent.api.write_key("after", "2"), 10)
    eventually("what the agent knows is in the catalog again", lambda: agent.api.passing("web") == ["web"], 15)


def test_a_server_keeps_its_data_over_a_restart(processes: Processes) -> None:
    agent = processes.server()
    agent.api.write_key("k", "v")
    agent.api.done("/v1/agent/service/register", {"Name": "web", "Port": 80, "Check": {"TTL": "10m"}})
    agent.api.done("/v1/agent/check/pass/service:web")
    before = agent.api.get("/v1/catalog/nodes").json()[0]["ID"]
    index = int(agent.api.get("/v1/kv/k").headers["X-Consul-Index"])
    assert agent.process.stop() == 0
    processes.restart(agent)
    eventually("it is back", agent.is_registered, 15)
    assert agent.api.keys("") == {"k": "v"}
    assert agent.api.get("/v1/catalog/nodes").json()[0]["ID"] == before
    assert int(agent.api.get("/v1/kv/k").headers["X-Consul-Index"]) == index
    eventually("the service is still registered", lambda: agent.api.passing("web") == ["web"], 5)


def test_every_acknowledged_key_survives_kill_9_of_both_processes_under_load(processes: Processes) -> None:
    agent = processes.server()
    acknowledged: dict[str, str] = {}
    stop = threading.Event()

    def write(worker: int) -> None:
        n = 0
        while not stop.is_set():
            key, value = f"load/{worker}/{n}", f"{worker}-{n}"
            try:
                agent.api.write_key(key, value)
            except (OSError, AssertionError):
                return
            acknowledged[key] = value
            n += 1

    for _round in range(2):
        already = len(acknowledged)
        writers = [threading.Thread(target=write, args=(4 * _round + w,)) for w in range(4)]
        for writer in writers:
            writer.start()
        eventually("writes are under way", partial(_has_grown, acknowledged, already + 150), 15)
        agent.process.kill_tree()
        stop.set()
        for writer in writers:
            writer.join(15)
        stop.clear()
        processes.restart(agent)
        eventually("it is back", agent.answers, 15)
        found = eventually("its keys are readable", lambda: agent.api.keys("load/"), 10)
        lost = {k for k, v in acknowledged.items() if found.get(k) != v}
        assert not lost, f"{len(lost)} of {len(acknowledged)} lost"


def _has_grown(found: dict[str, str], wanted: int) -> bool:
    return len(found) >= wanted


# -- what is in the way ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "flag", "key"),
    [
        ("http", "-http-port", "ports.http"),
        ("dns", "-dns-port", "ports.dns"),
        ("server", "-server-port", "ports.server"),
    ],
)
def test_a_port_in_use_is_named_with_the_flag_that_changes_it(
    processes: Processes, which: str, flag: str, key: str
) -> None:
    host = new_host()
    ports = Ports.free(host)
    port = getattr(ports, which)
    with socket.create_server((host, port)):
        agent = processes.agent("blocked", "-dev", "-log-level=warn", host=host, ports=ports)
        assert agent.process.wait(10) == 1
    lines = agent.process.log.splitlines()
    assert len(lines) == 1, agent.process.log
    assert lines[0].startswith("rostra agent: "), agent.process.log
    assert "cannot listen" in lines[0]
    assert lines[0].lower().count("address already in use") == 1
    assert f"{host}:{port}" in lines[0]
    assert flag in lines[0]
    assert key in lines[0]
    eventually("no process is left", lambda: not processes.left(), 2)


def test_a_join_port_in_use_ends_the_agent(processes: Processes) -> None:
    host = new_host()
    ports = Ports.free(host)
    with socket.create_server((host, ports.serf)):
        agent = processes.agent(
            "blocked", "-log-level=warn", host=host, ports=ports, data_dir=processes.directory / "d"
        )
        assert agent.process.wait(10) == 1
    assert agent.process.log.splitlines() == [
        f"rostra agent: cannot listen for joins and probes on {host}:{ports.serf}: Address already in use; "
        "change it with -serf-lan-port or ports.serf_lan"
    ]


def test_a_pid_file_that_cannot_be_written_is_one_line(processes: Processes) -> None:
    done = processes.rostra("agent", "-dev", "-pid-file=/does/not/exist.pid")
    assert (done.status, done.err) == (
        1,
        "rostra agent: cannot write the pid file /does/not/exist.pid: No such file or directory; "
        "change it with -pid-file\n",
    )


def test_an_address_that_this_host_does_not_have_is_named_with_its_flag(processes: Processes) -> None:
    host = new_host()
    for flag, said in (("-bind", "192.0.2.1 is no address of this host"), ("-client", "change it with -client")):
        flags = [*Ports.free(host).flags, f"-bind={host}", f"-client={host}", f"-encrypt={generate_secret()}"]
        done = processes.rostra("agent", "-dev", "-log-level=error", *flags, f"{flag}=192.0.2.1")
        assert done.status == 1
        assert said in done.err.splitlines()[-1]
        assert flag in done.err.splitlines()[-1]


def test_a_second_agent_on_the_same_data_directory_is_refused_and_the_first_goes_on(processes: Processes) -> None:
    first = processes.server()
    assert first.data_dir is not None
    second = processes.agent("s2", "-server", "-bootstrap-expect=1", data_dir=first.data_dir)
    assert second.process.wait(10) == 1
    assert second.process.log.splitlines() == [
        f"rostra agent: data directory {first.data_dir} is in use by process {first.process.pid}"
    ]
    assert first.api.write_key("still", "here")


def test_a_data_directory_that_cannot_be_made_or_written_is_one_line(processes: Processes) -> None:
    in_the_way = processes.directory / "file"
    in_the_way.write_text("not a directory")
    agent = processes.agent("s1", "-server", "-bootstrap-expect=1", data_dir=in_the_way / "below")
    assert agent.process.wait(10) == 1
    [line] = agent.process.log.splitlines()
    assert line.startswith(f"rostra agent: data directory {in_the_way / 'below'}: ")
    agent = processes.agent("s1", "-server", "-bootstrap-expect=1", data_dir=in_the_way)
    assert agent.process.wait(10) == 1
    assert agent.process.log.splitlines() == [f"rostra agent: -data-dir: {in_the_way} is not a directory"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody may write")
def test_an_unwritable_data_directory_is_one_line(processes: Processes) -> None:
    # Not even root may make files in /proc, so this holds in containers too.
    agent = processes.agent("s1", "-server", "-bootstrap-expect=1", data_dir=Path("/proc/self/task"))
    assert agent.process.wait(10) == 1
    [line] = agent.process.log.splitlines()
    assert line.startswith("rostra agent: data directory /proc/")
    assert "Traceback" not in agent.process.log


def test_a_newer_data_directory_is_refused_and_not_touched(processes: Processes) -> None:
    agent = processes.server()
    assert agent.data_dir is not None
    agent.api.write_key("k", "v")
    agent.process.stop()
    (agent.data_dir / "format").write_text(json.dumps({"format": 99}))
    before = _contents(agent.data_dir)
    processes.restart(agent)
    assert agent.process.wait(10) == 78
    [line] = agent.process.log.splitlines()
    assert line == (
        f"rostra agent: data directory {agent.data_dir} has format 99 of a newer Rostra; this one knows up to 1."
        " Nothing was changed"
    )
    assert _contents(agent.data_dir) == before
    (agent.data_dir / "format").write_text(json.dumps({"format": 1}))
    processes.restart(agent)
    eventually("it starts again", agent.answers, 15)
    assert agent.api.keys("") == {"k": "v"}


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_long_data_directory_works_and_leaves_no_socket_behind(processes: Processes) -> None:
    deep = processes.directory / ("d" * 60) / ("e" * 60)
    agent = processes.server(data_dir=deep)
    agent.api.write_key("k", "v")
    assert agent.process.stop() == 0
    assert list((processes.directory / "tmp").iterdir()) == []


def test_the_agent_makes_no_session_or_group_and_children_hang_on_its_lifeline(processes: Processes) -> None:
    agent = processes.dev()
    for pid in agent.process.tree():
        assert os.getpgid(pid) == agent.process.pid  # the group that the test made for it
    assert "-lifeline-fd" in command_line(agent.core_pid())
