"""`rostra operator`: output, texts and exit statuses as Consul's."""

from typing import Any

import pytest

RAFT = "/v1/operator/raft/configuration"
PEER = "/v1/operator/raft/peer"
TRANSFER = "/v1/operator/raft/transfer-leader"
AUTOPILOT = "/v1/operator/autopilot/configuration"
STATE = "/v1/operator/autopilot/state"

SERVERS: list[dict[str, Any]] = [
    {"ID": "893f7830-bdc4-c8cd-c389-5ac2c0521f39", "Node": "s1", "Address": "10.0.0.1:8300", "Leader": False,
     "ProtocolVersion": "3", "Voter": True},
    {"ID": "3e9921cb-2389-ec70-8b71-ab8b5a88b140", "Node": "s2", "Address": "10.0.0.2:8300", "Leader": True,
     "ProtocolVersion": "3", "Voter": True},
]  # fmt: skip
TABLE = """\
Node  ID                                    Address        State     Voter  RaftProtocol
s1    893f7830-bdc4-c8cd-c389-5ac2c0521f39  10.0.0.1:8300  follower  true   3
s2    3e9921cb-2389-ec70-8b71-ab8b5a88b140  10.0.0.2:8300  leader    true   3
"""
CONFIG = {
    "CleanupDeadServers": True,
    "LastContactThreshold": "200ms",
    "MaxTrailingLogs": 250,
    "MinQuorum": 0,
    "ServerStabilizationTime": "10s",
    "RedundancyZoneTag": "",
    "DisableUpgradeMigration": False,
    "UpgradeVersionTag": "",
    "CreateIndex": 4,
    "ModifyIndex": 9,
}


def test_servers_are_listed_as_consul_lists_them(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", RAFT, {"Servers": SERVERS, "Index": 0})
    assert rostra_cli("operator", "raft", "list-peers") == (0, TABLE, "")
    assert agent.asked[-1].query == {}
    assert rostra_cli("operator", "raft", "list-peers", "-stale").out == TABLE
    assert agent.asked[-1].query == {"stale": ""}


def test_what_has_no_vote_says_why_and_who_waits_is_named_beside_the_table(rostra_cli: Any, agent: Any) -> None:
    learner = SERVERS[0] | {"Voter": False, "Suffrage": "learner"}
    waiting = {"ID": "i4", "Node": "s4", "Address": "10.0.0.4:8300", "Suffrage": "learner", "Problem": ""}
    agent.on("GET", RAFT, {"Servers": [learner], "Waiting": [waiting]})
    done = rostra_cli("operator", "raft", "list-peers")
    assert done.out.splitlines()[1].split()[3:] == ["learner", "false", "3"]
    assert done.err == "s4 (10.0.0.4:8300, id i4) waits to be let in: rostra operator raft add-peer s4\n"
    agent.on("GET", RAFT, {"Servers": [learner], "Waiting": [waiting | {"Problem": "remove the old s4 first"}]})
    done = rostra_cli("operator", "raft", "list-peers")
    assert done.err == "s4 (10.0.0.4:8300, id i4) waits to be let in: remove the old s4 first\n"


def test_of_two_that_wait_under_one_name_each_is_named_by_its_id(rostra_cli: Any, agent: Any) -> None:
    waiting = [
        {"ID": i, "Node": "s4", "Address": f"10.0.0.{n}:8300", "Problem": "", "LastHeard": "400ms"}
        for n, i in ((4, "i4"), (5, "i5"))
    ]
    agent.on("GET", RAFT, {"Servers": SERVERS, "Waiting": waiting})
    first, second = rostra_cli("operator", "raft", "list-peers").err.splitlines()
    assert (
        first == "s4 (10.0.0.4:8300, id i4, heard 400ms ago) waits to be let in: rostra operator raft add-peer -id=i4"
    )
    assert second.endswith("rostra operator raft add-peer -id=i5")


def test_without_a_leader_the_list_names_the_flag_that_shows_it_all_the_same(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", RAFT, b"No cluster leader: ask with ?stale for what is known here", status=500)
    assert rostra_cli("operator", "raft", "list-peers").err.endswith("what is known here) (try -stale)\n")


def test_a_server_is_removed_by_its_name(rostra_cli: Any, agent: Any) -> None:
    agent.on("DELETE", PEER, b"")
    assert rostra_cli("operator", "raft", "remove-peer", "s2").status == 0
    assert agent.asked[-1].query == {"id": "s2"}
    assert "too many arguments" in rostra_cli("operator", "raft", "remove-peer", "s2", "s3").err


def test_a_refusal_that_no_token_would_lift_does_not_ask_for_one(rostra_cli: Any, agent: Any) -> None:
    agent.on("POST", PEER, b"a server is let in from the host of a server", status=403)
    assert "token" not in rostra_cli("operator", "raft", "add-peer", "s4").err
    agent.on("POST", PEER, b"Permission denied", status=403)
    assert "CONSUL_HTTP_TOKEN" in rostra_cli("operator", "raft", "add-peer", "s4").err


def test_a_server_is_removed_by_address_or_id(rostra_cli: Any, agent: Any) -> None:
    agent.on("DELETE", PEER, b"")
    done = rostra_cli("operator", "raft", "remove-peer", "-address=10.0.0.1:8300")
    assert done == (0, 'Removed peer with address "10.0.0.1:8300"\n', "")
    assert agent.asked[-1].query == {"address": "10.0.0.1:8300"}
    assert rostra_cli("operator", "raft", "remove-peer", "-id=x") == (0, 'Removed peer with id "x"\n', "")
    assert agent.asked[-1].query == {"id": "x"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "Error removing peer: an address or id is required for the peer to remove"),
        (["-address=", "-id="], "Error removing peer: an address or id is required for the peer to remove"),
        (["-address=a", "-id=b"], "Error removing peer: cannot give both an address and id"),
        (["-id=b", "s2"], "Error removing peer: give a name, an -id or an -address, and only one of them"),
    ],
)
def test_what_to_remove_must_be_said_in_one_way(rostra_cli: Any, agent: Any, flags: list[str], message: str) -> None:
    assert rostra_cli("operator", "raft", "remove-peer", *flags) == (1, "", f"{message}\n")
    assert agent.asked == []


def test_a_refusal_shows_the_agents_words(rostra_cli: Any, agent: Any) -> None:
    text = 'id "x" was not found in the Raft configuration'
    agent.on("DELETE", PEER, text.encode(), 500)
    done = rostra_cli("operator", "raft", "remove-peer", "-id=x")
    assert done == (1, "", f"Error removing peer: Unexpected response code: 500 ({text})\n")


def test_a_waiting_server_is_let_in(rostra_cli: Any, agent: Any) -> None:
    agent.on("POST", PEER, {"ID": "i4", "Node": "s4", "Address": "10.0.0.4:8300", "Suffrage": "learner"})
    done = rostra_cli("operator", "raft", "add-peer", "s4")
    assert (done.status, done.out) == (0, "Added s4 (10.0.0.4:8300) as learner\n")
    assert "It gets a vote once it has caught up" in done.err
    assert agent.asked[-1].query == {"name": "s4"}
    rostra_cli("operator", "raft", "add-peer", "-id=i4")
    assert agent.asked[-1].query == {"id": "i4"}
    for words in ([], ["s4", "s5"], ["-id=i4", "s4"]):
        assert rostra_cli("operator", "raft", "add-peer", *words).status == 1


def test_leadership_is_moved(rostra_cli: Any, agent: Any) -> None:
    agent.on("POST", TRANSFER, {"Success": True, "Leader": {"Node": "s1", "Address": "10.0.0.1:8300"}})
    done = rostra_cli("operator", "raft", "transfer-leader")
    assert done == (0, "Success\n", "The leader is s1 (10.0.0.1:8300) now.\n")
    assert agent.asked[-1].query == {}
    agent.on("POST", TRANSFER, {"Success": True})
    assert rostra_cli("operator", "raft", "transfer-leader", "-id=x") == (0, "Success\n", "")
    assert agent.asked[-1].query == {"id": "x"}
    agent.on("POST", TRANSFER, {"Success": False})
    assert rostra_cli("operator", "raft", "transfer-leader").status == 1


def test_autopilots_configuration_is_shown_as_consul_shows_it(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", AUTOPILOT, CONFIG)
    expected = (
        "CleanupDeadServers = true\nLastContactThreshold = 200ms\nMaxTrailingLogs = 250\nMinQuorum = 0\n"
        'ServerStabilizationTime = 10s\nRedundancyZoneTag = ""\nDisableUpgradeMigration = false\n'
        'UpgradeVersionTag = ""\n'
    )
    assert rostra_cli("operator", "autopilot", "get-config") == (0, expected, "")
    agent.on("GET", AUTOPILOT, CONFIG | {"AutoAdmitServers": False})
    assert rostra_cli("operator", "autopilot", "get-config").out == f"{expected}AutoAdmitServers = false\n"


def test_a_setting_is_changed_over_the_version_that_was_read(rostra_cli: Any, agent: Any) -> None:
    agent.on("GET", AUTOPILOT, CONFIG | {"AutoAdmitServers": True})
    agent.on("PUT", AUTOPILOT, True)
    done = rostra_cli("operator", "autopilot", "set-config", "-cleanup-dead-servers=false", "-min-quorum=3")
    assert done == (0, "Configuration updated!\n", "")
    assert agent.asked[-1].query == {"cas": "9"}
    assert agent.asked[-1].json() == CONFIG | {"CleanupDeadServers": False, "MinQuorum": 3}
    shown = rostra_cli("operator", "autopilot", "set-config", "-CleanupDeadServers=false", "-MinQuorum", "3")
    assert shown == done
    assert agent.asked[-1].json() == CONFIG | {"CleanupDeadServers": False, "MinQuorum": 3}
    agent.on("PUT", AUTOPILOT, False)
    done = rostra_cli("operator", "autopilot", "set-config", "-auto-admit-servers")
    assert done == (1, "", "Configuration could not be atomically updated, please try again\n")
    assert agent.asked[-1].json()["AutoAdmitServers"] is True


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-max-trailing-logs=-1"], 'invalid value "-1" for flag -max-trailing-logs'),
        (["-cleanup-dead-servers=maybe"], 'invalid boolean value "maybe" for -cleanup-dead-servers'),
        (["-cleanup-dead-servers", "false"], "unexpected argument 'false'"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_not_sent(
    rostra_cli: Any, agent: Any, flags: list[str], message: str
) -> None:
    done = rostra_cli("operator", "autopilot", "set-config", *flags)
    assert (done.status, done.out, message in done.err) == (1, "", True)
    assert agent.asked == []


def test_autopilots_state_is_shown_for_people_and_for_programs(rostra_cli: Any, agent: Any) -> None:
    server: dict[str, Any] = {
        "ID": "i1",
        "Name": "s1",
        "Address": "10.0.0.1:8300",
        "NodeStatus": "alive",
        "Version": "0.1.0",
    }
    server |= {"LastContact": "0s", "LastTerm": 2, "LastIndex": 42, "Healthy": True, "Status": "leader"}
    server |= {"Meta": {"rack": "a"}, "NodeType": "voter"}
    state: dict[str, Any] = {"Healthy": True, "FailureTolerance": 1, "OptimisticFailureTolerance": 1, "Leader": "i1"}
    agent.on("GET", STATE, state | {"Servers": {"i1": server}, "Voters": ["i1"]})
    done = rostra_cli("operator", "autopilot", "state")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["Healthy:", "true"]
    assert "      Node Type:       voter" in lines
    assert lines[-2:] == ["      Meta", '         "rack": "a"']
    assert '\t"FailureTolerance": 1' in rostra_cli("operator", "autopilot", "state", "-format=json").out
    assert rostra_cli("operator", "autopilot", "state", "-format=x").status == 1


def test_an_agent_of_consul_1_8_has_no_state_to_show(rostra_cli: Any, agent: Any) -> None:
    done = rostra_cli("operator", "autopilot", "state")
    assert (done.status, "Consul has it from 1.9 on" in done.err) == (1, True)
