"""`rostra catalog`, `rostra members` and `rostra info`: columns as Consul prints them."""

import re
from typing import Any

import pytest

MEMBERS: list[dict[str, Any]] = [
    {"Name": "s2", "Addr": "10.0.0.2", "Port": 8301, "Status": 4, "ProtocolCur": 2,
     "Tags": {"role": "consul", "build": "1.8.7:abc", "dc": "dc1"}},
    {"Name": "c1", "Addr": "fd00::1", "Port": 8301, "Status": 1, "ProtocolCur": 2,
     "Tags": {"role": "node", "build": "1.8.7:", "dc": "dc1"}},
]  # fmt: skip
NODES: list[dict[str, Any]] = [
    {"ID": "54503a33-0a3e-b627-d6bf-b25b4e7bfd82", "Node": "n1", "Address": "10.0.0.1", "Datacenter": "dc1",
     "TaggedAddresses": {"wan": "1.2.3.4", "lan": "10.0.0.1"}, "Meta": {"k": "v"}},
    {"ID": "", "Node": "external", "Address": "10.0.0.99", "Datacenter": "dc1", "TaggedAddresses": None, "Meta": None},
]  # fmt: skip


def test_members(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/agent/members", MEMBERS)
    assert rostra_cli("members").out == (
        "Node  Address         Status  Type    Build  Protocol  DC   Segment\n"
        "c1    [fd00::1]:8301  alive   client  1.8.7  2         dc1  <default>\n"
        "s2    10.0.0.2:8301   failed  server  1.8.7  2         dc1  <all>\n"
    )
    assert agent.asked[-1].query == {"segment": "_all"}
    rostra_cli("members", "-wan")
    assert agent.asked[-1].query == {"wan": "1"}


def test_members_without_a_leader_say_of_when_they_are(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/agent/members", MEMBERS)
    agent.headers = {"X-Consul-KnownLeader": "false", "X-Consul-LastContact": "4000"}
    done = rostra_cli("members")
    assert re.fullmatch(r"No cluster leader: this is as of \d\d:\d\d:\d\d\n", done.err)
    assert done.status == 0
    agent.headers = {"X-Consul-KnownLeader": "false"}
    assert rostra_cli("members").err == "No cluster leader: this is what was known last\n"
    agent.headers = {"X-Consul-KnownLeader": "true", "X-Consul-LastContact": "0"}
    assert rostra_cli("members").err == ""


def test_members_detailed_and_by_status(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/agent/members", MEMBERS)
    assert rostra_cli("members", "-detailed", "-status=ali").out == (
        "Node  Address         Status  Tags\n"
        "c1    [fd00::1]:8301  alive   build=1.8.7:,dc=dc1,role=node,segment=<default>\n"
    )
    assert rostra_cli("members", "-status=left") == (2, "", "")
    assert "is not a regular expression" in rostra_cli("members", "-status=(").err


def test_force_leave_names_one_node_and_may_prune_it(rostra_cli: Any, agent: Any) -> None:
    agent.on("PUT", "/v1/agent/force-leave/a/b", b"")
    assert rostra_cli("force-leave", "a/b") == (0, "", "")
    assert agent.asked[-1].query == {}
    assert agent.asked[-1].target.endswith("/a%2Fb")
    assert rostra_cli("force-leave", "-prune", "a/b") == (0, "", "")
    assert agent.asked[-1].query == {"prune": "1"}
    agent.on("PUT", "/v1/agent/force-leave/c1", b"node 'c1' (10.0.0.1) is alive: stop its agent first", status=409)
    assert rostra_cli("force-leave", "c1") == (
        1, "", "Error force leaving: Unexpected response code: 409 (node 'c1' (10.0.0.1) is alive: "
        "stop its agent first)\n",
    )  # fmt: skip
    for words in ((), ("a", "b")):
        done = rostra_cli("force-leave", *words)
        assert (done.status, done.err) == (1, "A single node name must be specified to force-leave\n")


def test_nodes(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/catalog/nodes", NODES)
    assert rostra_cli("catalog", "nodes").out == (
        "Node      ID        Address    DC\n"
        "n1        54503a33  10.0.0.1   dc1\n"
        "external            10.0.0.99  dc1\n"
    )  # fmt: skip
    assert "lan=10.0.0.1, wan=1.2.3.4  k=v" in rostra_cli("catalog", "nodes", "-detailed").out
    rostra_cli("catalog", "nodes", "-node-meta=a=b", "-near=_agent", "-filter=Node==n1")
    assert agent.asked[-1].query == {"near": "_agent", "filter": "Node==n1", "node-meta": "a:b"}


def test_nodes_of_a_service_are_listed_once(rostra_cli: Any, agent: Any) -> None:
    rows = [{**NODES[0], "NodeMeta": {}, "ServiceID": s} for s in ("w1", "w2")]
    agent.on("GET", "/v1/catalog/service/web", rows)
    assert len(rostra_cli("catalog", "nodes", "-service=web").out.splitlines()) == 2
    agent.on("GET", "/v1/catalog/service/none", [])
    assert rostra_cli("catalog", "nodes", "-service=none") == (
        0, "", "No nodes match the given query - try expanding your search.\n",
    )  # fmt: skip


def test_services(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/catalog/services", {"web": ["b", "a"], "consul": []})
    assert rostra_cli("catalog", "services").out == "consul\nweb\n"
    assert rostra_cli("catalog", "services", "-tags").out == "consul      \nweb         a,b\n"


def test_services_of_a_node_are_listed_once_with_all_their_tags(rostra_cli: Any, agent: Any) -> None:
    services = {"w1": {"Service": "web", "Tags": ["a"]}, "w2": {"Service": "web", "Tags": ["b"]}}
    agent.on("GET", "/v1/catalog/node/n1", {"Node": {}, "Services": services})
    assert rostra_cli("catalog", "services", "-node=n1", "-tags").out == "web      a,b\n"
    agent.on("GET", "/v1/catalog/node/nope", None)
    assert rostra_cli("catalog", "services", "-node=nope").err == (
        "No services match the given query - try expanding your search.\n"
    )


@pytest.mark.parametrize("command", ["datacenters", "nodes", "services"])
def test_catalog_takes_no_arguments_and_shows_the_servers_refusal(rostra_cli: Any, agent: Any, command: str) -> None:
    assert "unexpected argument 'x'" in rostra_cli("catalog", command, "x").err
    agent.on("GET", f"/v1/catalog/{command}", b"No path to datacenter", 500)
    assert rostra_cli("catalog", command) == (
        1, "", f"Error listing {command}: Unexpected response code: 500 (No path to datacenter)\n",
    )  # fmt: skip


def test_info_prints_groups_and_figures_sorted(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", "/v1/agent/self", {"Stats": {"raft": {"term": "2", "state": "Leader"}, "agent": {"checks": "0"}}})
    assert rostra_cli("info").out == "agent:\n\tchecks = 0\nraft:\n\tstate = Leader\n\tterm = 2\n"
