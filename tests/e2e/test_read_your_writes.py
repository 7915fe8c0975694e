"""What the agent API acknowledged is what the next read shows, through a server's agent and through a client's."""

from __future__ import annotations

import socket
import threading

import pytest

from tests.support.processes import Api, Cluster, Processes, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(90)]


@pytest.fixture(scope="module")
def cluster(module_processes: Processes) -> Cluster:
    cluster = Cluster(module_processes, ["s1", "s2", "s3"], ["c1"])
    cluster.start()
    cluster.wait_until_healthy()
    return cluster


def missed(api: Api, name: str) -> list[str]:
    """The writes that the read right after did not show."""
    found = []

    def look(what: str, is_there: bool) -> None:
        if not is_there:
            found.append(f"{name}: {what}")

    check = f"k{name}"
    api.done("/v1/agent/service/register", {"Name": name, "Port": 1, "Check": {"TTL": "1h", "CheckID": check}})
    look("register", len(api.get(f"/v1/catalog/service/{name}").json()) == 1)
    api.done(f"/v1/agent/check/pass/{check}")
    look("pass", len(api.get(f"/v1/health/service/{name}?passing").json()) == 1)
    api.done(f"/v1/agent/check/warn/{check}")
    look("warn", api.get(f"/v1/health/checks/{name}").json()[0]["Status"] == "warning")
    api.done(f"/v1/agent/check/fail/{check}")
    look("fail", api.get(f"/v1/health/service/{name}?passing").json() == [])
    api.done(f"/v1/agent/check/update/{check}", {"Status": "warning", "Output": "said"})
    look("update", api.get(f"/v1/health/checks/{name}").json()[0]["Output"] == "said")
    api.done("/v1/agent/check/register", {"Name": f"more{name}", "ServiceID": name, "TTL": "1h"})
    look("check", len(api.get(f"/v1/health/checks/{name}").json()) == 2)
    api.done(f"/v1/agent/check/deregister/more{name}")
    look("check gone", len(api.get(f"/v1/health/checks/{name}").json()) == 1)
    api.done(f"/v1/agent/service/maintenance/{name}?enable=true")
    look("maintenance", len(api.get(f"/v1/health/checks/{name}").json()) == 2)
    api.done(f"/v1/agent/service/maintenance/{name}?enable=false")
    look("maintenance ends", len(api.get(f"/v1/health/checks/{name}").json()) == 1)
    api.done(f"/v1/agent/service/deregister/{name}")
    look("deregister", api.get(f"/v1/catalog/service/{name}").json() == [])
    return found


@pytest.mark.parametrize("through", ["leader", "follower", "client"])
def test_a_read_after_an_acknowledged_change_of_the_agent_shows_it(cluster: Cluster, through: str) -> None:
    leader = cluster.leader()
    server = next(agent for agent in cluster.others(leader) if agent.name != "c1")
    agent = {"leader": leader, "follower": server, "client": cluster.agents["c1"]}[through]
    lost: list[str] = []

    def drive(k: int) -> None:
        for i in range(3):
            lost.extend(missed(agent.api, f"{through}{k}{i}"))

    threads = [threading.Thread(target=drive, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert lost == []
    node = agent.name
    agent.api.done("/v1/agent/maintenance?enable=true&reason=x")
    assert "_node_maintenance" in {c["CheckID"] for c in agent.api.get(f"/v1/health/node/{node}").json()}
    agent.api.done("/v1/agent/maintenance?enable=false")
    assert "_node_maintenance" not in {c["CheckID"] for c in agent.api.get(f"/v1/health/node/{node}").json()}


def test_a_change_whose_client_hangs_up_is_made_whole(cluster: Cluster) -> None:
    api = cluster.agents["c1"].api
    for i in range(10):
        body = b'{"Name": "gone%d", "Check": {"TTL": "1h"}}' % i
        with socket.create_connection((api.host, api.port)) as client:
            head = f"PUT /v1/agent/service/register HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
    names = {f"gone{i}" for i in range(10)}
    eventually("all are there", lambda: names <= set(api.get("/v1/agent/services").json()))
    eventually("in the catalog as well", lambda: names <= set(api.get("/v1/catalog/services").json()))


def test_without_a_leader_a_change_is_acknowledged_in_time_and_says_that_the_catalog_has_it_not(
    processes: Processes,
) -> None:
    cluster = Cluster(processes, ["a1", "a2", "a3"], ["c9"])
    cluster.start()
    cluster.wait_until_healthy()
    client = cluster.agents["c9"]
    for name in ("a1", "a2"):
        cluster.agents[name].process.kill_tree()
    answer = client.api.put("/v1/agent/service/register", {"Name": "late"}, timeout_s=8.0)
    assert (answer.status, answer.headers["X-Rostra-Synced"]) == (200, "false")
    assert answer.headers["X-Rostra-Sync-Error"]
    cluster.start("a1")

    def acknowledged() -> bool:
        return "X-Rostra-Synced" not in client.api.put("/v1/agent/service/register", {"Name": "late"}).headers

    eventually("it is acknowledged again", acknowledged, 25.0)
    assert len(client.api.get("/v1/catalog/service/late").json()) == 1
