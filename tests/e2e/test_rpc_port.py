"""The ports that other hosts reach (8300 RPC, 8301 joins) against strangers and against agents that want to be servers:
every connection ends in bounded time with one line in a while, and nothing else happens."""

from __future__ import annotations

import base64
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from rostra.runtime.identity import NodeIdentity
from rostra.runtime.secret import parse_secrets
from tests.support import rpc_attack
from tests.support.processes import Agent, Ports, Processes, eventually, new_host
from tests.support.rpc_attack import Outcome, Target

pytestmark = pytest.mark.e2e

#: A stranger has 3 s; on busy machines a little more.
BOUND_S = 6.0
#: An enrolled node has 15 s between two requests.
SILENT_S = 18.0
SERVERS = ("s1", "s2", "s3")


@dataclass
class House:
    """Three servers and a client agent, and two who are not of them."""

    agents: dict[str, Agent]
    attackers: Target
    mark: Path

    def target(self, port: str, name: str = "s2") -> Target:
        agent = self.agents[name]
        number = {"rpc": agent.ports.server, "join": agent.ports.serf}[port]
        return dataclasses.replace(self.attackers, host=agent.host, port=number)

    def leadership(self) -> tuple[str, int]:
        """(the leader's address, the term), when all servers agree."""
        leaders = {self.agents[n].api.get("/v1/status/leader").body for n in SERVERS}
        assert len(leaders) == 1
        return leaders.pop().decode(), self.elections()

    def elections(self) -> int:
        """Every election on any server is a line."""
        return sum(self.agents[n].process.log.count("leadership:") for n in SERVERS)

    def files(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self._pids())

    def rss_mib(self) -> float:
        return sum(rss_mib(pid) for pid in self._pids())

    def _pids(self) -> list[int]:
        agent = self.agents["s2"]
        return [agent.core_pid(), agent.process.pid]

    def lines(self, *words: str) -> list[str]:
        return [
            line
            for agent in self.agents.values()
            for line in agent.process.log.splitlines()
            if all(w in line for w in words)
        ]


def rss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@pytest.fixture(scope="module")
def house(module_processes: Processes) -> House:
    secret = base64.b64encode(os.urandom(32)).decode()
    hosts = {name: new_host() for name in (*SERVERS, "c1")}
    ports = Ports.free(hosts["s1"])
    joins = [f"-retry-join={hosts[n]}:{ports.serf}" for n in SERVERS]
    agents = {}
    for name, host in hosts.items():
        role = ["-server", "-bootstrap-expect=3"] if name in SERVERS else []
        agents[name] = module_processes.agent(
            name,
            *role,
            *joins,
            f"-encrypt={secret}",
            "-retry-interval=1s",
            host=host,
            ports=ports,
            data_dir=module_processes.directory / name,
        )
    for agent in agents.values():
        eventually(f"{agent.name} is registered", agent.is_registered, 30)
    directory = module_processes.directory
    house = House(
        agents,
        Target.of("", 0, directory, secret, NodeIdentity.open(directory / "s3", "s3", parse_secrets(secret))),
        directory / "mark",
    )
    # Everyone has its certificate, so that nothing of its own is under way when the attacks begin.
    eventually("certificates", lambda: len(house.lines("has a new certificate of the cluster CA")) >= 4, 20)
    return house


@pytest.fixture
def unmoved(house: House) -> Iterator[House]:
    """After the test the house is as it was before."""
    before, files, rss, began = house.leadership(), house.files(), house.rss_mib(), time.monotonic()
    rejected = len(house.lines("[WARN]", "reject"))
    yield house
    assert house.leadership() == before
    eventually("no file is left open", lambda: house.files() <= files + 2, BOUND_S)
    assert house.rss_mib() < rss + 25
    assert not house.mark.exists()
    assert not house.lines("Traceback")
    assert not house.lines("[ERROR]")
    # One line in ten seconds for each of the two ports.
    allowed = 2 * (1 + (time.monotonic() - began) / 10)
    assert len(house.lines("[WARN]", "reject")) - rejected <= allowed
    assert house.agents["s2"].api.write_key("after", "attack")


def all_at_once(attacks: dict[str, Callable[[Target], Outcome]], target: Target) -> dict[str, Outcome]:
    with ThreadPoolExecutor(len(attacks)) as pool:
        return {name: f.result() for name, f in [(n, pool.submit(a, target)) for n, a in attacks.items()]}


@pytest.mark.parametrize("port", ["rpc", "join"])
def test_strangers_are_closed_in_time_and_get_no_answer(unmoved: House, port: str) -> None:
    outcomes = all_at_once(rpc_attack.strangers(unmoved.mark), unmoved.target(port))
    for name, outcome in outcomes.items():
        assert outcome.closed_after_s < BOUND_S, name
        assert not [r for r in outcome.received if isinstance(r, dict)], name
    assert unmoved.lines("[WARN]", "reject")
    api = unmoved.agents["s2"].api
    assert {"friend", "stranger"}.isdisjoint(m["Name"] for m in api.get("/v1/agent/members").json())


def test_agents_that_misbehave_are_told_or_closed_and_are_no_servers(unmoved: House) -> None:
    target = unmoved.target("rpc")
    outcomes = all_at_once(rpc_attack.insiders(), target)
    (_, answer) = outcomes["a Raft message on an agent's connection"].received
    assert answer[1:3] == ("err", "bad_request")  # to an agent's connection it is a request like any other
    for name, outcome in outcomes.items():
        assert outcome.closed_after_s < (SILENT_S if "Raft message" in name else BOUND_S), name
    for name in ("an agent in a Raft handshake", "an agent that says it is a server"):
        (answer,) = outcomes[name].received
        assert answer["error"][0] == "denied", name
        assert "is not a server of this cluster" in answer["error"][1]
    peers = unmoved.agents["s2"].api.get("/v1/status/peers").json()
    assert len(peers) == 3


def test_who_says_that_he_is_another_server_is_refused(unmoved: House) -> None:
    for name, outcome in all_at_once(rpc_attack.impostors(), unmoved.target("rpc")).items():
        assert outcome.closed_after_s < BOUND_S, name
        (answer,) = outcome.received
        assert answer["error"][0] in ("denied", "conflict"), (name, answer)


def test_bombs_and_pickles_are_closed_and_leave_nothing(unmoved: House) -> None:
    target = unmoved.target("rpc")
    for name, attack in rpc_attack.bombers().items():  # few connections of one node are served at a time
        outcome = attack(target)
        assert outcome.closed_after_s < BOUND_S, name
        assert len(outcome.received) <= 1, name  # the answer to the hello


def test_refused_connections_are_counted_and_leave_no_memory_behind(unmoved: House) -> None:
    target, server = unmoved.target("rpc"), unmoved.agents["s2"]
    pid = server.core_pid()

    def closed() -> int:
        gauges = {g["Name"]: g["Value"] for g in server.api.get("/v1/agent/metrics").json()["Gauges"]}
        return sum(int(v) for name, v in gauges.items() if ".counts.connections_" in name)

    def attack(n: int) -> None:
        kinds = [rpc_attack.insiders()["an unknown protocol"], *rpc_attack.impostors().values()]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: kinds[i % len(kinds)](target), range(n)))

    attack(50)
    counted, rss = closed(), rss_mib(pid)
    attack(300)
    assert rss_mib(pid) < rss + 5  # each left 30 to 50 KiB, where the end of a connection was a cycle
    eventually("all are counted", lambda: closed() >= counted + 300, 3)


@pytest.mark.parametrize("port", ["rpc", "join"])
@pytest.mark.parametrize("part", ["nothing", "half a TLS hello", "a TLS hello"])
def test_five_hundred_idle_connections_are_closed_and_keep_nobody_out(unmoved: House, port: str, part: str) -> None:
    data = {
        "nothing": b"",
        "half a TLS hello": rpc_attack.client_hello()[:100],
        "a TLS hello": rpc_attack.client_hello(),
    }
    target = unmoved.target(port)
    with rpc_attack.idle(target, 500, data[part]) as held:
        began = time.monotonic()
        request = rpc_attack.greeting(target, "telnet") if port == "rpc" else b"\x00\x00\x00\x01\xc0"
        context = target.friend.client_context()
        answered = rpc_attack.over_tls(target, context, request) if port == "rpc" else None
        if answered is not None:
            assert "unknown protocol" in answered.received[0]["error"][1]
            assert answered.closed_after_s < BOUND_S
        for sock in held:
            assert rpc_attack.until_closed(sock, began).closed_after_s < BOUND_S


def test_a_server_whose_founding_was_lost_says_so_and_does_not_start(processes: Processes) -> None:
    data_dir = processes.directory / "s1"
    agent = processes.server("s1")
    agent.process.stop()
    (data_dir / "server" / "bootstrap.json").unlink()
    flags = [f"-data-dir={data_dir}", f"-bind={agent.host}", "-node=s1", "-bootstrap-expect=1", *agent.ports.flags]
    done = processes.rostra("server", *flags)
    assert done.status == 78
    assert "bootstrap.json: gone" in done.err
    again = processes.restart(agent)
    assert again.process.wait(15) != 0
    assert "bootstrap.json: gone" in again.process.log
    assert "Traceback" not in again.process.log


def test_a_name_of_another_node_is_one_line_and_the_agent_stays_calm(processes: Processes) -> None:
    secret = base64.b64encode(os.urandom(32)).decode()
    server = processes.server("s1", f"-encrypt={secret}")
    join = [f"-encrypt={secret}", f"-retry-join={server.host}:{server.ports.serf}", "-retry-interval=1s"]
    owner = processes.agent("c1", *join, data_dir=processes.directory / "c1")
    eventually("the owner is registered", owner.is_registered, 15)
    thief = processes.agent("c1", *join, data_dir=processes.directory / "thief")
    eventually("the refusal", lambda: "refuse this node" in thief.process.log, 15)
    # A request waits some seconds for a server; meanwhile the agent goes on trying.
    answer = thief.api.get("/v1/catalog/nodes", timeout_s=20)
    assert (answer.status, answer.text) == (500, "No cluster leader")
    lines = [x for x in thief.process.log.splitlines() if "[ERROR]" in x or "[WARN]" in x]
    assert len(lines) <= 2, lines
    assert "belongs to another node key" in lines[0] + lines[-1]
    me = thief.api.get("/v1/agent/self").json()
    assert me["Config"]["NodeName"] == "c1"
    assert me["Config"]["NodeID"] != owner.api.get("/v1/agent/self").json()["Config"]["NodeID"]
    assert owner.api.check_status("c1") == "passing"


def test_a_client_restarts_without_the_secret(processes: Processes) -> None:
    secret = base64.b64encode(os.urandom(32)).decode()
    server = processes.server("s1", f"-encrypt={secret}")
    join = [f"-retry-join={server.host}:{server.ports.serf}", "-retry-interval=1s"]
    client = processes.agent("c1", f"-encrypt={secret}", *join, data_dir=processes.directory / "c1")
    eventually("a certificate", (processes.directory / "c1" / "tls" / "issued.pem").exists, 15)
    client.process.stop()
    again = processes.agent("c1", *join, data_dir=processes.directory / "c1")
    eventually("it is back", again.is_registered, 15)
    assert again.api.write_key("k", "v")
    assert not (processes.directory / "state").exists()  # no other key was made for want of the secret


def test_a_client_has_the_node_id_that_it_was_given(processes: Processes) -> None:
    node_id = "11111111-2222-3333-4444-555555555555"
    secret = base64.b64encode(os.urandom(32)).decode()
    server = processes.server("s1", f"-encrypt={secret}", "-node-id=21111111-2222-3333-4444-555555555555")
    assert server.api.get("/v1/agent/self").json()["Config"]["NodeID"].startswith("2111")
    join = [f"-encrypt={secret}", f"-retry-join={server.host}:{server.ports.serf}", "-retry-interval=1s"]
    client = processes.agent("c1", *join, f"-node-id={node_id}", data_dir=processes.directory / "c1")
    eventually("the client is registered", client.is_registered, 15)
    assert client.api.get("/v1/catalog/node/c1").json()["Node"]["ID"] == node_id
    twin = processes.agent("c2", *join, f"-node-id={node_id}", data_dir=processes.directory / "c2")
    eventually("the refusal", lambda: f"has the node id {node_id} of node c1" in twin.process.log, 15)
