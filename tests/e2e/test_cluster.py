"""Three servers and a client agent as processes: what survives when they are killed, frozen, and come back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.processes import (
    ROSTRA,
    Agent,
    Cluster,
    Ports,
    Processes,
    eventually,
    gone,
    is_alive,
    new_host,
    send,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def running(module_processes: Processes) -> Cluster:
    cluster = Cluster(module_processes, ["s1", "s2", "s3"], ["c1"])
    cluster.start()
    return cluster


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The module's cluster, whole: what an earlier test killed is started again."""
    for name, agent in running.agents.items():
        if agent.process.popen.poll() is not None:
            running.start(name)
    running.wait_until_healthy()
    return running


class Writer:
    """Threads that write keys through `agents` until stopped; `acknowledged` is what was promised to be kept."""

    def __init__(self, prefix: str, agents: list[Agent]) -> None:
        self.prefix, self.refused = prefix, 0
        self.acknowledged: dict[str, str] = {}
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(i, a)) for i, a in enumerate(agents)]

    def _write(self, i: int, agent: Agent) -> None:
        n = 0
        while not self._stop.is_set():
            key, value = f"{self.prefix}/{i}/{n}", f"{i}-{n}"
            try:
                agent.api.write_key(key, value)
                self.acknowledged[key] = value
            except (OSError, AssertionError):
                self.refused += 1
                self._stop.wait(0.02)
            n += 1

    @contextmanager
    def writing(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(20)

    def more(self, count: int = 50, within_s: float = 15.0) -> None:
        """Until `count` more were acknowledged."""
        wanted = len(self.acknowledged) + count
        eventually("more writes are acknowledged", lambda: len(self.acknowledged) >= wanted, within_s)

    def lost(self, agent: Agent, mode: str = "") -> list[str]:
        found = agent.api.keys(f"{self.prefix}/", mode)
        return [key for key, value in self.acknowledged.items() if found.get(key) != value]


def test_every_agent_sees_the_same_members_leader_and_data(cluster: Cluster) -> None:
    leader = cluster.leader()
    assert leader.name in cluster.server_names
    for n, (name, agent) in enumerate(cluster.agents.items()):
        assert agent.api.write_key(f"same/{name}", name)
        for other in cluster.agents.values():  # a default read that starts after the acknowledgement shows the write
            assert len(other.api.keys("same/")) == n + 1
        members = {m["Name"]: (m["Addr"], m["Status"]) for m in agent.api.get("/v1/agent/members").json()}
        assert members == {name: (host, 1) for name, host in cluster.hosts.items()}
        roles = {m["Name"]: m["Tags"]["role"] for m in agent.api.get("/v1/agent/members").json()}
        assert roles == {"s1": "consul", "s2": "consul", "s3": "consul", "c1": "node"}
        peers = agent.api.get("/v1/status/peers").json()
        assert sorted(peers) == sorted(f"{cluster.hosts[s]}:{cluster.ports.server}" for s in cluster.server_names)
    indexes = {a.api.get("/v1/kv/same/?recurse").headers["X-Consul-Index"] for a in cluster.agents.values()}
    assert len(indexes) == 1


def test_no_acknowledged_write_is_invisible_to_a_default_read_elsewhere(cluster: Cluster) -> None:
    agents = list(cluster.agents.values())
    for n in range(60):
        agents[n % 4].api.write_key("latest", str(n))
        assert agents[(n + 1 + n // 4 % 3) % 4].api.keys("latest") == {"latest": str(n)}


def test_a_killed_leader_is_replaced_and_nothing_acknowledged_is_lost(cluster: Cluster) -> None:
    leader = cluster.leader()
    client = cluster.agents["c1"]
    writer = Writer("killed", [client, client, *cluster.others(leader)])
    with writer.writing():
        writer.more()
        leader.process.kill_tree()
        client.api.write_key("after-the-kill", "1")
        writer.more()
    assert eventually("a new leader", cluster.leader, 10).name != leader.name
    for agent in (client, *cluster.others(leader)):
        assert not writer.lost(agent)
    cluster.start(leader.name)
    back = cluster.agents[leader.name]
    eventually("it returns and catches up", lambda: not writer.lost(back, "&stale"), 20)
    cluster.wait_until_healthy()


def test_a_frozen_leader_is_replaced_and_steps_down_when_it_thaws(cluster: Cluster) -> None:
    leader = cluster.leader()
    client = cluster.agents["c1"]
    client.api.write_key("frozen/before", "1")
    tree = leader.process.tree()
    for pid in tree:
        os.kill(pid, signal.SIGSTOP)  # its connections stay open: only silence tells
    try:
        eventually("a write is acknowledged", lambda: client.api.write_key("frozen/meanwhile", "2"), 20)
        follower = cluster.others(leader)[0]
        frozen = f"{leader.host}:{leader.ports.server}"
        eventually(
            "another leader is known",
            lambda: follower.api.get("/v1/status/leader", timeout_s=2).json() not in ("", frozen),
            10,
        )
    finally:
        for pid in tree:
            send(pid, signal.SIGCONT)
    # It must not answer a default read from the past, whatever it thought it was.
    keys = eventually("it answers again", lambda: leader.api.keys("frozen/"), 15)
    assert keys == {"frozen/before": "1", "frozen/meanwhile": "2"}
    cluster.wait_until_healthy()


def test_killing_all_servers_at_once_loses_nothing_acknowledged(cluster: Cluster) -> None:
    client = cluster.agents["c1"]
    writer = Writer("all", [client, client, client])
    with writer.writing():
        writer.more(100)
        trees = [pid for s in cluster.server_names for pid in cluster.agents[s].process.tree()]
        for pid in trees:
            send(pid, signal.SIGKILL)
        eventually("all are dead", lambda: gone(trees), 5)
        for s in cluster.server_names:
            cluster.agents[s].process.wait(5)
        cluster.start(*cluster.server_names)
        writer.more(20, 30)
    cluster.wait_until_healthy()
    for agent in cluster.agents.values():
        assert not writer.lost(agent)


def test_killed_nodes_turn_critical_and_pass_when_they_are_back(cluster: Cluster) -> None:
    client, server = cluster.agents["c1"], cluster.leader()
    follower = cluster.others(server)[0]
    client.api.done("/v1/agent/service/register", {"Name": "on-c1", "Port": 80})
    eventually("its service passes", lambda: server.api.passing("on-c1") == ["on-c1"], 5)
    client.process.kill_tree()
    follower.process.kill_tree()
    eventually("its node is critical", lambda: server.api.check_status("c1") == "critical", 30)
    eventually("the server's too", lambda: server.api.check_status(follower.name) == "critical", 30)
    assert server.api.passing("on-c1") == []
    assert server.dig("on-c1.service.consul") == []
    members = {m["Name"]: m["Status"] for m in server.api.get("/v1/agent/members").json()}
    assert (members["c1"], members[follower.name], members[server.name]) == (4, 4, 1)  # failed, failed, alive
    cluster.start("c1", follower.name)
    eventually("its node passes again", lambda: server.api.check_status("c1") == "passing", 20)
    eventually("the server's too", lambda: server.api.check_status(follower.name) == "passing", 20)
    eventually("its service too", lambda: server.api.passing("on-c1") == ["on-c1"], 10)
    cluster.agents["c1"].api.done("/v1/agent/service/deregister/on-c1")


def test_a_minority_answers_stale_reads_and_refuses_the_rest(cluster: Cluster) -> None:
    leader = cluster.leader()
    survivor, second = cluster.others(leader)
    survivor.api.write_key("minority", "kept")
    eventually("the survivor has it", lambda: survivor.api.keys("minority", "&stale") == {"minority": "kept"}, 5)
    leader.process.kill_tree()
    second.process.kill_tree()

    def refuses() -> bool:
        answer = survivor.api.put("/v1/kv/minority", b"x", timeout_s=20)
        return answer.status == 500 and answer.text.startswith("No cluster leader")

    eventually("writes are refused", refuses, 30)
    stale = survivor.api.get("/v1/kv/minority?stale")
    assert stale.status == 200
    assert stale.headers["X-Consul-KnownLeader"] == "false"
    cluster.start(leader.name, second.name)
    eventually("writes work again", lambda: survivor.api.write_key("minority", "again"), 20)


# -- service mode ----------------------------------------------------------------------------------------------------


def _term(agent: Agent) -> int:
    return int(agent.api.get("/v1/agent/self").json()["Stats"]["raft"]["term"])


def test_an_agent_attaches_to_a_server_of_its_own_unit_and_leaves_it_running(processes: Processes) -> None:
    host, data = new_host(), processes.directory / "s1"
    ports = Ports.free(host)
    flags = ["-node=s1", f"-bind={host}", f"-client={host}", *ports.flags, f"-data-dir={data}", "-bootstrap-expect=1"]
    server = processes.start([*ROSTRA, "server", *flags])
    eventually("its socket is there", (data / "server" / "core.sock").exists, 15)
    agent = Agent("s1", host, ports, processes.start([*ROSTRA, "agent", "-server", *flags]), [], data, processes.env)
    agent.argv = ["agent", "-server", *flags]
    eventually("the agent is ready", agent.is_registered, 15)
    assert agent.process.tree() == [agent.process.pid]  # no core of its own
    agent.api.write_key("k", "v")
    term = _term(agent)
    assert agent.process.stop() == 0
    assert is_alive(server.pid)
    processes.restart(agent)
    eventually("the agent is back", agent.is_registered, 15)
    assert (agent.api.keys("k"), _term(agent)) == ({"k": "v"}, term)
    send(agent.process.pid, signal.SIGKILL)
    agent.process.wait(5)
    assert server.popen.poll() is None
    processes.restart(agent)
    eventually("the agent is back", agent.is_registered, 15)
    assert _term(agent) == term
    # The server's turn: its agent stays, goes on to answer for itself, and attaches to the next one.
    assert server.stop() == 0
    assert agent.api.get("/v1/agent/services").json() == {}
    server = processes.start([*ROSTRA, "server", *flags])
    eventually("the agent found it again", lambda: agent.api.keys("k") == {"k": "v"}, 20)
    assert agent.process.tree() == [agent.process.pid]


def test_a_second_server_on_a_data_directory_in_use_is_refused(processes: Processes) -> None:
    agent = processes.server()
    second = processes.start([*ROSTRA, "server", *[f for f in agent.argv[1:] if f != "-server"]])
    assert second.wait(10) != 0
    [line] = second.log.splitlines()
    assert line == f"rostra server: data directory {agent.data_dir}/server is in use by process {agent.core_pid()}"
    assert agent.api.write_key("still", "here")
