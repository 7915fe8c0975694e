"""Operators and three servers: who they are and who leads, taking one out, putting one in; also by Consul's CLI."""

from __future__ import annotations

import json
import os
import re
import shutil
from typing import Any

import pytest

from tests.support.processes import Agent, Cluster, Done, Processes, eventually, run

CONSUL = os.environ.get("ROSTRA_CONSUL_BIN", "")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
RAFT = "/v1/operator/raft/configuration"


@pytest.fixture(scope="module")
def running(module_processes: Processes) -> Cluster:
    cluster = Cluster(module_processes, ["s1", "s2", "s3"], ["c1"])
    cluster.start()
    cluster.wait_until_healthy()
    return cluster


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """The module's cluster, whole: what an earlier test stopped is started again."""
    for name, agent in running.agents.items():
        if agent.process.popen.poll() is not None:
            running.start(name)
    running.wait_until_healthy()
    eventually("all servers are well", lambda: health(running).status == 200, 20)
    return running


def client(cluster: Cluster) -> Agent:
    return cluster.agents["c1"]


def servers(agent: Agent, query: str = "") -> dict[str, dict[str, Any]]:
    return {row["Node"]: row for row in agent.api.get(RAFT + query).json()["Servers"]}


def health(cluster: Cluster) -> Any:
    return client(cluster).api.get("/v1/operator/autopilot/health")


def waits(agent: Agent, name: str) -> bool:
    """Whether that server is listed as one that nothing hinders to be let in."""
    listed = agent.rostra("operator", "raft", "list-peers")
    return listed.status == 0 and f"waits to be let in: rostra operator raft add-peer {name}" in listed.err


def consul(agent: Agent, *words: str) -> Done:
    return run([CONSUL, *words], env={**agent.env, "CONSUL_HTTP_ADDR": agent.api.address})


def leads(cluster: Cluster, name: str) -> bool:
    return cluster.leader().name == name and servers(client(cluster))[name]["Leader"]


def test_every_agent_lists_the_same_servers(cluster: Cluster) -> None:
    leader = cluster.leader().name
    for agent in cluster.agents.values():
        for query in ("", "?stale", "?consistent"):
            found = servers(agent, query)
            assert set(found) == {"s1", "s2", "s3"}
            assert [name for name, row in found.items() if row["Leader"]] == [leader]
            assert all(row["Voter"] is True and row["ProtocolVersion"] == "3" for row in found.values())
            assert found["s1"]["Address"] == f"{cluster.hosts['s1']}:{cluster.ports.server}"
    lines = client(cluster).said("operator", "raft", "list-peers").splitlines()
    assert lines[0].split() == ["Node", "ID", "Address", "State", "Voter", "RaftProtocol"]
    assert sorted(line.split()[0] for line in lines[1:]) == ["s1", "s2", "s3"]


def test_the_lead_is_moved_to_the_server_that_is_named_and_away_from_the_one_that_has_it(cluster: Cluster) -> None:
    target = cluster.others(cluster.leader())[0].name
    server_id = servers(client(cluster))[target]["ID"]
    done = client(cluster).rostra("operator", "raft", "transfer-leader", f"-id={server_id}")
    assert (done.status, done.out) == (0, "Success\n"), done
    eventually("the named server leads", lambda: leads(cluster, target))
    client(cluster).api.write_key("moved", "1")
    assert client(cluster).rostra("operator", "raft", "transfer-leader").status == 0
    eventually("another one leads", lambda: not leads(cluster, target))
    refused = client(cluster).rostra("operator", "raft", "transfer-leader", "-id=nobody")
    assert (refused.status, "was not found in the Raft configuration" in refused.err) == (1, True)


def test_health_is_429_while_a_server_is_away_and_200_when_it_is_back(cluster: Cluster) -> None:
    well = health(cluster).json()
    assert (well["Healthy"], well["FailureTolerance"], len(well["Servers"])) == (True, 1, 3)
    for row in well["Servers"]:
        assert re.fullmatch(r"[0-9.]+(ns|µs|ms|s)", row["LastContact"]), row
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["StableSince"]), row
        assert (row["Voter"], row["SerfStatus"], row["Healthy"]) == (True, "alive", True)
    away = cluster.others(cluster.leader())[0]
    away.process.kill_tree()
    eventually("the loss is noticed", lambda: health(cluster).status == 429)
    assert [row["Name"] for row in json.loads(health(cluster).body)["Servers"] if not row["Healthy"]] == [away.name]
    said = client(cluster).said("operator", "autopilot", "state")
    assert re.search(r"Healthy: +false\n", said)
    cluster.start(away.name)
    eventually("it is well again", lambda: health(cluster).status == 200, 20)


def test_autopilots_configuration_is_one_for_all_and_changed_by_cas(cluster: Cluster) -> None:
    agent = client(cluster)
    assert agent.said("operator", "autopilot", "set-config", "-max-trailing-logs=300") == "Configuration updated!\n"
    for other in cluster.agents.values():
        assert "MaxTrailingLogs = 300\n" in other.said("operator", "autopilot", "get-config")
    path = "/v1/operator/autopilot/configuration"
    read = agent.api.get(path).json()
    assert agent.api.put(f"{path}?cas={read['ModifyIndex']}", {**read, "MaxTrailingLogs": 250}).json() is True
    assert agent.api.put(f"{path}?cas={read['ModifyIndex']}", read).json() is False
    assert agent.api.get(path).json()["MaxTrailingLogs"] == 250


@pytest.mark.skipif(not CONSUL, reason="ROSTRA_CONSUL_BIN names no consul binary")
def test_consuls_own_cli_is_understood(cluster: Cluster) -> None:
    agent = client(cluster)
    theirs, ours = (f("operator", "raft", "list-peers") for f in (lambda *w: consul(agent, *w), agent.rostra))
    assert (theirs.status, theirs.out) == (ours.status, ours.out) == (0, ours.out)
    assert consul(agent, "operator", "raft", "list-peers", "-stale").status == 0
    done = consul(agent, "operator", "autopilot", "set-config", "-min-quorum=3", "-last-contact-threshold=300ms")
    assert (done.status, done.out) == (0, "Configuration updated!\n"), done
    theirs = consul(agent, "operator", "autopilot", "get-config")
    assert theirs.out + "AutoAdmitServers = false\n" == agent.said("operator", "autopilot", "get-config")
    assert "LastContactThreshold = 300ms\nMaxTrailingLogs = 250\nMinQuorum = 3\n" in theirs.out
    assert consul(agent, "operator", "autopilot", "set-config", "-min-quorum=0").status == 0
    done = consul(agent, "operator", "raft", "remove-peer", "-address=1.2.3.4:8300")
    assert (done.status, 'address "1.2.3.4:8300" was not found in the Raft configuration' in done.err) == (1, True)


def test_a_leader_that_is_removed_hands_over_first_and_may_be_let_in_again(cluster: Cluster) -> None:
    agent, removed = client(cluster), cluster.leader()
    agent.said("operator", "autopilot", "set-config", "-server-stabilization-time=1s")
    server_id = servers(agent)[removed.name]["ID"]
    agent.said("operator", "raft", "remove-peer", f"-id={server_id}")
    others = {"s1", "s2", "s3"} - {removed.name}
    # The agent may have been connected to the very server that went.
    eventually("it is out of the list", lambda: set(servers(agent)) == others)
    eventually("writes go on", lambda: agent.api.write_key("after-the-removal", "1"))
    eventually("it waits", lambda: waits(agent, removed.name), 20)
    admitted = cluster.agents[others.pop()].rostra("operator", "raft", "add-peer", f"-id={server_id}")
    assert (admitted.status, admitted.out.endswith("as learner\n")) == (0, True), admitted
    eventually("it votes again", lambda: servers(agent)[removed.name]["Voter"], 30)
    eventually("it has what was written without it", lambda: removed.api.keys("after-the-removal", "&stale"), 10)


def test_a_server_that_lost_its_disk_is_taken_out_and_let_in_as_a_new_one(cluster: Cluster) -> None:
    agent = client(cluster)
    agent.said("operator", "autopilot", "set-config", "-server-stabilization-time=1s")
    agent.api.write_key("kept", "1")
    leader = cluster.leader()
    lost = cluster.others(leader)[0]
    old = servers(agent)[lost.name]
    lost.process.kill_tree()
    assert lost.data_dir is not None
    shutil.rmtree(lost.data_dir)
    assert agent.said("operator", "raft", "remove-peer", f"-id={old['ID']}") == f'Removed peer with id "{old["ID"]}"\n'
    eventually("it is out of the list", lambda: set(servers(agent)) == {"s1", "s2", "s3"} - {lost.name})
    gone = agent.rostra("operator", "raft", "remove-peer", f"-address={old['Address']}")
    assert (gone.status, "was not found in the Raft configuration" in gone.err) == (1, True)

    cluster.start(lost.name)
    eventually("it waits", lambda: waits(agent, lost.name), 20)
    assert lost.name not in servers(agent)
    refused = agent.rostra("operator", "raft", "add-peer", lost.name)  # the agent of a client makes no servers
    assert (refused.status, "403" in refused.err) == (1, True)
    admitted = leader.rostra("operator", "raft", "add-peer", lost.name)
    assert (admitted.status, admitted.out.endswith("as learner\n")) == (0, True), admitted

    new = eventually("it votes", lambda: (row := servers(agent)[lost.name])["Voter"] and row, 30)
    assert new["ID"] != old["ID"]
    cluster.wait_until_healthy()
    assert cluster.agents[lost.name].api.keys("kept", "&stale") == {"kept": "1"}
    agent.said("operator", "autopilot", "set-config", "-server-stabilization-time=10s")


def test_without_a_majority_only_a_stale_question_is_answered(cluster: Cluster) -> None:
    left = cluster.leader()
    for other in cluster.others(left):
        other.process.kill_tree()

    def leaderless() -> bool:
        return left.api.get(RAFT + "?stale").json()["Servers"] and not any(
            row["Leader"] for row in servers(left, "?stale").values()
        )

    eventually("the lead is given up", leaderless)
    assert (set(servers(left, "?stale")), left.api.get(RAFT).status) == ({"s1", "s2", "s3"}, 500)
    done = left.rostra("operator", "raft", "list-peers")
    assert (done.status, "No cluster leader" in done.err) == (1, True)
    assert left.rostra("operator", "raft", "list-peers", "-stale").status == 0
    removal = left.api.request("DELETE", "/v1/operator/raft/peer?id=nobody", timeout_s=40)
    assert (removal.status, removal.headers["X-Rostra-Outcome"]) == (500, "not-done")
