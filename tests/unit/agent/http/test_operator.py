"""Statuses, fields and types as a Consul 1.8.7 answered the same questions, and what is added to them here."""

from __future__ import annotations

import pytest

from rostra.server.state.catalog import Register
from rostra.wire.errors import Conflict, NoLeader, NotFound, Timeout

CONFIGURATION = "/v1/operator/autopilot/configuration"
DEFAULTS = {
    "CleanupDeadServers": True,
    "LastContactThreshold": "200ms",
    "MaxTrailingLogs": 250,
    "MinQuorum": 0,
    "ServerStabilizationTime": "10s",
    "AutoAdmitServers": False,
    "RedundancyZoneTag": "",
    "DisableUpgradeMigration": False,
    "UpgradeVersionTag": "",
}


def server(name, suffrage="voter", *, leader=False):
    row = {"id": f"id-{name}", "name": name, "address": "127.0.0.1:8300", "leader": leader, "suffrage": suffrage}
    return row | {"voter": suffrage == "voter", "version": "0.1.0"}


def condition(row, *, healthy=True, contact_ms=12):
    return row | {
        "serf_status": "alive" if healthy else "failed",
        "last_contact_ms": contact_ms,
        "last_term": 2,
        "last_index": 7,
        "healthy": healthy,
        "stable_since_ms": 1_790_000_000_123,
    }


# -- raft --------------------------------------------------------------------------------------------------------------


async def test_the_configuration_has_consuls_fields_and_ours(api):
    servers = [server("s1", leader=True), server("s2"), server("s3", "learner")]
    waiting = server("s4", "replica") | {"waiting_s": 61.5, "problem": "its name is taken"}
    api.servers.acts |= {
        "raft.configuration": {"index": 12, "members": servers},
        "raft.waiting": [waiting],
    }
    body = (await api.get("/v1/operator/raft/configuration")).json
    assert body["Index"] == 12
    assert body["Servers"][0] == {
        "ID": "id-s1",
        "Node": "s1",
        "Address": "127.0.0.1:8300",
        "Leader": True,
        "ProtocolVersion": "3",
        "Voter": True,
        "Suffrage": "voter",
    }
    assert [(s["Voter"], s["Suffrage"]) for s in body["Servers"][1:]] == [(True, "voter"), (False, "learner")]
    (row,) = body["Waiting"]
    assert (row["ID"], row["Node"], row["Address"], row["Suffrage"]) == ("id-s4", "s4", "127.0.0.1:8300", "replica")
    assert (row["WaitingFor"], row["Problem"]) == ("1m1.5s", "its name is taken")


async def test_a_stale_question_is_passed_on_as_one_and_asks_no_leader(api):
    api.servers.acts |= {"raft.configuration": {"index": 0, "members": []}, "raft.waiting": NoLeader()}
    reply = await api.get("/v1/operator/raft/configuration?stale")
    assert (reply.status, reply.json) == (200, {"Servers": [], "Index": 0, "Waiting": []})
    assert api.servers.asked == [("raft.configuration", {"stale": True})]
    for query in ("", "?consistent"):
        assert (await api.get(f"/v1/operator/raft/configuration{query}")).status == 500
    assert (await api.get("/v1/operator/raft/configuration?stale&consistent")).status == 400


@pytest.mark.parametrize("query", ["id=id-s2", "address=127.0.0.1:8300"])
async def test_a_server_is_removed_by_its_id_or_its_address(api, query):
    api.servers.acts |= {"raft.configuration": {"index": 1, "members": [server("s2")]}, "raft.remove-peer": ()}
    reply = await api.delete(f"/v1/operator/raft/peer?{query}")
    assert (reply.status, reply.body) == (200, b"")
    assert api.servers.asked[-1] == ("raft.remove-peer", dict([query.split("=")]))


@pytest.mark.parametrize(
    ("method", "query", "text"),
    [
        ("DELETE", "", "Must specify either ?id with the server's ID or ?address with IP:port of peer to remove"),
        ("DELETE", "?id=&address=", "Bad request: Must specify either ?id with the server's ID"),
        ("DELETE", "?id=a&address=b", "Bad request: Must specify only one of ?id or ?address"),
        ("POST", "", "either ?name= or ?id="),
        ("POST", "?id=a&name=b", "only one of ?name= or ?id="),
    ],
)
async def test_which_server_is_meant_must_be_said_in_one_way(api, method, query, text):
    reply = await api.call(method, f"/v1/operator/raft/peer{query}")
    assert (reply.status, text in reply.text) == (400, True)
    assert not api.servers.asked


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Conflict("the last voting server cannot be removed"), 409),
        (NoLeader(), 500),
        (Timeout("it may or may not have been done"), 500),
    ],
)
async def test_a_change_of_servers_that_fails_says_why(api, error, status):
    api.servers.acts["raft.configuration"] = {"index": 1, "members": [server("s1")]}
    api.servers.acts |= dict.fromkeys(("raft.remove-peer", "raft.add-peer", "raft.transfer-leader"), error)
    for method, path in (("DELETE", "peer?id=id-s1"), ("POST", "peer?name=s4"), ("PUT", "transfer-leader?id=id-s1")):
        reply = await api.call(method, f"/v1/operator/raft/{path}")
        assert (reply.status, reply.text) == (status, error.message)


async def test_a_server_that_is_none_is_told_in_the_words_that_clients_know(api):
    api.servers.acts["raft.configuration"] = {"index": 1, "members": [server("s1")]}
    api.servers.acts["raft.transfer-leader"] = NotFound("no such server")
    for query, meant in (("address=1.2.3.4:8300", 'address "1.2.3.4:8300"'), ("id=x", 'id "x"')):
        reply = await api.delete(f"/v1/operator/raft/peer?{query}")
        assert (reply.status, reply.text.partition(";")[0]) == (500, f"{meant} was not found in the Raft configuration")
    reply = await api.put("/v1/operator/raft/transfer-leader?id=x")
    assert (reply.status, reply.text.partition(":")[0]) == (500, 'id "x" was not found in the Raft configuration')


async def test_a_name_is_taken_where_an_id_is_asked_for(api):
    members = [server("s1"), server("s2")]
    api.servers.acts |= {"raft.configuration": {"index": 1, "members": members}, "raft.remove-peer": ()}
    assert (await api.delete("/v1/operator/raft/peer?id=s2")).status == 200
    assert api.servers.asked[-1] == ("raft.remove-peer", {"id": "id-s2"})
    api.servers.acts["raft.transfer-leader"] = lambda args: server("s2") if "name" in args else NotFound("none")
    assert (await api.put("/v1/operator/raft/transfer-leader?id=s2")).json["Leader"]["ID"] == "id-s2"


async def test_who_looks_for_a_server_that_autopilot_removed_is_told_so(api):
    removed = [{"id": "id-s2", "name": "s2", "address": "127.0.0.2:8300", "ago_s": 10}]
    api.servers.acts["raft.configuration"] = {"index": 1, "members": [server("s1")], "removed": removed}
    for query in ("id=s2", "id=id-s2", "address=127.0.0.2:8300"):
        reply = await api.delete(f"/v1/operator/raft/peer?{query}")
        assert (reply.status, "autopilot removed s2 10 s ago, because it had failed" in reply.text) == (500, True)


@pytest.mark.parametrize("error", [NotFound("no such server"), Timeout("it may or may not have been done")])
async def test_where_the_answer_was_lost_the_list_tells_whether_it_was_done(api, error):
    acts = api.servers.acts
    before, after = [server("s1"), server("s2", leader=True)], [server("s1", leader=True), server("s4", "learner")]

    def lost(args):
        acts["raft.configuration"] = {"index": 2, "members": after}
        return error

    acts |= dict.fromkeys(("raft.remove-peer", "raft.add-peer", "raft.transfer-leader"), lost)
    for method, path in (("DELETE", "peer?id=id-s2"), ("POST", "peer?name=s4"), ("PUT", "transfer-leader?id=id-s1")):
        acts["raft.configuration"] = {"index": 1, "members": before}
        assert (await api.call(method, f"/v1/operator/raft/{path}")).status == 200
    assert (await api.put("/v1/operator/raft/transfer-leader")).status == 500  # who led before is not known


async def test_a_waiting_server_is_let_in_by_name(api):
    api.servers.acts["raft.add-peer"] = server("s4", "learner")
    reply = await api.call("POST", "/v1/operator/raft/peer?name=s4")
    assert (reply.status, api.servers.asked[-1]) == (200, ("raft.add-peer", {"name": "s4"}))
    expected = {"ID": "id-s4", "Node": "s4", "Address": "127.0.0.1:8300", "Voter": False, "Suffrage": "learner"}
    assert reply.json == expected
    api.servers.acts |= {"raft.add-peer": NotFound("no server named s5 waits"), "raft.configuration": NoLeader()}
    assert (await api.call("POST", "/v1/operator/raft/peer?name=s5")).status == 404


async def test_leadership_is_moved_by_put_and_by_post(api):
    api.servers.acts["raft.transfer-leader"] = server("s2", leader=True)
    for method, query, args in (("PUT", "", {}), ("POST", "?id=", {}), ("POST", "?id=id-s2", {"id": "id-s2"})):
        reply = await api.call(method, f"/v1/operator/raft/transfer-leader{query}")
        assert (reply.status, reply.json["Success"], reply.json["Leader"]["Node"]) == (200, True, "s2")
        assert api.servers.asked[-1] == ("raft.transfer-leader", args)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("HEAD", "raft/configuration", "OPTIONS,GET"),
        ("GET", "raft/peer", "OPTIONS,DELETE,POST"),
        ("POST", "autopilot/configuration", "OPTIONS,GET,PUT"),
        ("PUT", "autopilot/health", "OPTIONS,GET"),
    ],
)
async def test_other_methods_are_refused(api, method, path, allow):
    reply = await api.call(method, f"/v1/operator/{path}")
    assert (reply.status, reply.headers["Allow"]) == (405, allow)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "raft/configuration?"),
        ("DELETE", "raft/peer?id=x&"),
        ("POST", "raft/peer?id=x&"),
        ("PUT", "raft/transfer-leader?"),
        ("GET", "autopilot/configuration?"),
        ("PUT", "autopilot/configuration?"),
        ("GET", "autopilot/health?"),
        ("GET", "autopilot/state?"),
    ],
)
async def test_another_datacenter_is_not_asked(api, method, path):
    reply = await api.call(method, f"/v1/operator/{path}dc=nope", b"{}")
    assert (reply.status, reply.text) == (500, "No path to datacenter")
    assert not api.servers.asked


# -- autopilot ---------------------------------------------------------------------------------------------------------


async def test_the_configuration_has_the_defaults_until_it_is_set(api):
    reply = await api.get(CONFIGURATION)
    assert reply.json == {**DEFAULTS, "CreateIndex": 0, "ModifyIndex": 0}
    assert (await api.put(CONFIGURATION, {"MinQuorum": 3})).text == "true"
    body = (await api.get(CONFIGURATION)).json
    assert body.pop("CreateIndex") == body.pop("ModifyIndex") > 1
    assert body == {**DEFAULTS, "MinQuorum": 3}


async def test_field_names_are_taken_in_any_case_and_durations_as_text_or_nanoseconds(api):
    given = {"cleanupDEADservers": False, "LASTcontactthreshold": "1m30s", "serverstabilizationtime": 1_500_000_000}
    assert (await api.put(CONFIGURATION, {**given, "maxtrailinglogs": 9})).status == 200
    body = (await api.get(CONFIGURATION)).json
    assert (body["CleanupDeadServers"], body["LastContactThreshold"]) == (False, "1m30s")
    assert (body["ServerStabilizationTime"], body["MaxTrailingLogs"]) == ("1.5s", 9)


async def test_what_was_read_can_be_written_back(api):
    await api.put(CONFIGURATION, {"AutoAdmitServers": True})
    read = (await api.get(CONFIGURATION)).json
    assert (await api.put(CONFIGURATION, read)).text == "true"
    assert (await api.get(CONFIGURATION)).json == read


async def test_a_client_of_consul_that_writes_back_what_it_knows_does_not_switch_admission(api):
    await api.put(CONFIGURATION, {"AutoAdmitServers": True})
    await api.put(CONFIGURATION, {"MinQuorum": 5})
    body = (await api.get(CONFIGURATION)).json
    assert (body["AutoAdmitServers"], body["MinQuorum"]) == (True, 5)
    await api.put(CONFIGURATION, {"AutoAdmitServers": False})
    assert (await api.get(CONFIGURATION)).json["AutoAdmitServers"] is False


async def test_cas_writes_only_over_the_version_that_was_read(api):
    assert (await api.put(f"{CONFIGURATION}?cas=7", {})).text == "false"
    assert (await api.put(f"{CONFIGURATION}?cas=0", {"MinQuorum": 3})).text == "true"
    assert (await api.put(f"{CONFIGURATION}?cas=0", {"MinQuorum": 5})).text == "false"
    index = (await api.get(CONFIGURATION)).json["ModifyIndex"]
    assert (await api.put(f"{CONFIGURATION}?cas={index}", {"MinQuorum": 7})).text == "true"
    assert (await api.get(CONFIGURATION)).json["MinQuorum"] == 7


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "EOF"),
        (b"x", "line 1"),
        (b"[]", "object"),
        ({"Bogus": 1}, 'unknown field "Bogus"'),
        ({"cleanup_dead_servers": True}, 'unknown field "cleanup_dead_servers"'),
        ({"CleanupDeadServers": "true"}, "CleanupDeadServers must be true or false"),
        ({"MaxTrailingLogs": -1}, "MaxTrailingLogs must be a number from 0"),
        ({"MaxTrailingLogs": "5"}, "MaxTrailingLogs must be an integer"),
        ({"MaxTrailingLogs": 1.5}, "MaxTrailingLogs must be an integer"),
        ({"MinQuorum": 2**64}, "MinQuorum must be"),
        ({"LastContactThreshold": "soon"}, 'invalid duration "soon"'),
        ({"LastContactThreshold": "5"}, 'missing unit in duration "5"'),
        ({"LastContactThreshold": "-5s"}, "LastContactThreshold must be a duration from 0s"),
        ({"ServerStabilizationTime": "9999h"}, "to 24h0m0s"),
        ({"ServerStabilizationTime": True}, "ServerStabilizationTime must be a duration"),
        ({"RedundancyZoneTag": "zone"}, "RedundancyZoneTag is a setting of Consul Enterprise"),
        ({"DisableUpgradeMigration": True}, "DisableUpgradeMigration is a setting of Consul Enterprise"),
    ],
)
async def test_a_configuration_that_cannot_be_meant_is_refused_and_changes_nothing(api, body, text):
    reply = await api.put(CONFIGURATION, body)
    assert (reply.status, text in reply.text) == (400, True), reply.text
    assert (await api.get(CONFIGURATION)).json["ModifyIndex"] == 0


@pytest.mark.parametrize("cas", ["=", "", "=-1", "=x", f"={2**64}"])
async def test_a_cas_that_is_no_index_is_refused(api, cas):
    reply = await api.put(f"{CONFIGURATION}?cas{cas}", {})
    assert (reply.status, "?cas" in reply.text) == (400, True)


async def test_a_stale_configuration_is_read_without_asking_the_leader(api):
    assert (await api.get(f"{CONFIGURATION}?stale")).json["MaxTrailingLogs"] == 250


async def test_health_is_200_while_all_servers_are_well(api):
    row = condition(server("s1", leader=True), contact_ms=0)
    api.servers.acts["autopilot.health"] = {
        "healthy": True,
        "failure_tolerance": 0,
        "leader": "id-s1",
        "servers": [row, condition(server("s2"))],
    }
    reply = await api.get("/v1/operator/autopilot/health")
    assert (reply.status, reply.json["Healthy"], reply.json["FailureTolerance"]) == (200, True, 0)
    assert reply.json["Servers"][0] == {
        "ID": "id-s1",
        "Name": "s1",
        "Address": "127.0.0.1:8300",
        "SerfStatus": "alive",
        "Version": "0.1.0",
        "Leader": True,
        "LastContact": "0s",
        "LastTerm": 2,
        "LastIndex": 7,
        "Healthy": True,
        "Voter": True,
        "StableSince": "2026-09-21T14:13:20Z",
        "Suffrage": "voter",
    }
    assert reply.json["Servers"][1]["LastContact"] == "12ms"


async def test_health_is_429_with_the_same_body_where_one_is_not(api):
    lost = condition(server("s3"), healthy=False, contact_ms=None)
    api.servers.acts["autopilot.health"] = {
        "healthy": False,
        "failure_tolerance": 0,
        "leader": "id-s1",
        "servers": [condition(server("s1", leader=True)), lost],
    }
    reply = await api.get("/v1/operator/autopilot/health")
    assert (reply.status, reply.json["Healthy"]) == (429, False)
    row = reply.json["Servers"][1]
    assert (row["SerfStatus"], row["LastContact"], row["StableSince"]) == ("failed", "-1ns", "0001-01-01T00:00:00Z")


async def test_the_state_lists_servers_by_id_and_is_200_either_way(api):
    api.servers.apply(Register("s1", "127.0.0.1", node_meta={"rack": "a"}))
    rows = [condition(server("s1", leader=True)), condition(server("s2")), condition(server("s3", "learner"))]
    api.servers.acts["autopilot.health"] = {
        "healthy": False,
        "failure_tolerance": 0,
        "leader": "id-s1",
        "servers": [*rows, condition(server("s4", "replica"))],
    }
    reply = await api.get("/v1/operator/autopilot/state")
    assert (reply.status, reply.json["Leader"], reply.json["Voters"]) == (200, "id-s1", ["id-s1", "id-s2"])
    shown = {s["Name"]: (s["Status"], s["NodeType"], s["ReadReplica"]) for s in reply.json["Servers"].values()}
    assert shown == {
        "s1": ("leader", "voter", False),
        "s2": ("voter", "voter", False),
        "s3": ("non-voter", "voter", False),
        "s4": ("non-voter", "read-replica", True),
    }
    assert reply.json["ReadReplicas"] == ["id-s4"]
    assert reply.json["Servers"]["id-s1"]["Meta"] == {"rack": "a"}


async def test_without_a_leader_nothing_is_said_of_health(api):
    api.servers.acts["autopilot.health"] = NoLeader()
    reply = await api.get("/v1/operator/autopilot/health")
    assert (reply.status, reply.text) == (500, "No cluster leader")
