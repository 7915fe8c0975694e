"""Autopilot's judgement and its plans: pure, on made-up servers and times."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rostra.server.autopilot import Health, Seen, failure_tolerance, follow, judge, plan, returns
from rostra.server.raft.members import LEARNER, REPLICA, VOTER, Member
from rostra.server.roster import Waiting, find, majority, removal_problem
from rostra.server.state.rows import AutopilotRow, MemberRow
from rostra.wire.errors import BadRequest, Conflict, NotFound

CONFIG = AutopilotRow()
NOW = 1000.0


def member(name: str, suffrage: str = VOTER) -> Member:
    return Member(f"id-{name}", "10.0.0.1", 8300, f"key-{name}", name, suffrage)


def seen(name: str, suffrage: str = VOTER, **changed: Any) -> Seen:
    facts: dict[str, Any] = {
        "status": "alive",
        "version": "1",
        "is_leader": False,
        "is_up": True,
        "last_contact_s": 0.05,
        "last_index": 100,
        "lag": 0,
    }
    return Seen(member(name, suffrage), **(facts | changed))


def well(name: str, suffrage: str = VOTER, *, for_s: float = 60.0, **changed: Any) -> Health:
    return Health(seen(name, suffrage, **changed), True, NOW - for_s)


def dead(name: str, suffrage: str = VOTER, *, for_s: float = 60.0) -> Health:
    return Health(seen(name, suffrage, status="failed", is_up=False), False, NOW - for_s, NOW - for_s)


def waiting(name: str, **changed: Any) -> Waiting:
    made = Waiting(f"id-{name}", name, f"key-{name}", "10.0.0.9", 8300, LEARNER, "1", NOW, NOW)
    return replace(made, **changed)


def row(name: str, **changed: Any) -> MemberRow:
    made = MemberRow(name, f"id-{name}", "server", "10.0.0.1", f"key-{name}", status="failed", voter=False)
    return made._replace(**changed)


def steps(
    servers: list[Health], waits: list[Waiting] | None = None, rows: Any = None, **config: Any
) -> list[tuple[str, str]]:
    planned = plan(servers, waits or [], rows or {}, CONFIG._replace(**config), NOW)
    return [(step.what, step.name) for step in planned]


# -- health ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "healthy"),
    [
        ({}, True),
        ({"last_contact_s": 0.2}, True),
        ({"last_contact_s": 0.21}, False),
        ({"lag": 250}, True),
        ({"lag": 251}, False),
        ({"is_up": False}, False),
        ({"status": "failed"}, False),
        ({"status": ""}, False),
        ({"is_leader": True, "is_up": False, "last_contact_s": 9.0}, True),
    ],
)
def test_a_server_is_healthy_while_it_answers_and_keeps_up(facts, healthy):
    assert judge(seen("s1", **facts), CONFIG, 0.05) is healthy


def test_slow_heartbeats_make_no_server_ill():
    assert judge(seen("s1", last_contact_s=0.9), CONFIG, 0.25)
    assert not judge(seen("s1", last_contact_s=1.1), CONFIG, 0.25)


def test_how_long_a_server_is_well_or_dead_is_remembered_until_it_changes():
    first = follow({}, [seen("s1")], CONFIG, 0.05, 1.0)
    assert (first["id-s1"].healthy, first["id-s1"].since) == (True, 1.0)
    second = follow(first, [seen("s1")], CONFIG, 0.05, 2.0)
    assert second["id-s1"].since == 1.0
    ill = follow(second, [seen("s1", status="failed", is_up=False)], CONFIG, 0.05, 3.0)
    assert (ill["id-s1"].healthy, ill["id-s1"].since, ill["id-s1"].dead_since) == (False, 3.0, 3.0)
    still = follow(ill, [seen("s1", status="failed", is_up=False)], CONFIG, 0.05, 4.0)
    assert still["id-s1"].dead_since == 3.0
    back = follow(still, [seen("s1")], CONFIG, 0.05, 5.0)
    assert (back["id-s1"].since, back["id-s1"].dead_since) == (5.0, None)


def test_a_server_that_the_leader_still_reaches_is_not_dead_whatever_its_agent_says():
    assert follow({}, [seen("s1", status="failed")], CONFIG, 0.05, 1.0)["id-s1"].dead_since is None


@pytest.mark.parametrize(
    ("healthy", "ill", "tolerance"), [(3, 0, 1), (2, 1, 0), (5, 0, 2), (4, 1, 1), (1, 0, 0), (1, 2, 0)]
)
def test_the_failure_tolerance_counts_the_voters_beyond_a_majority(healthy, ill, tolerance):
    servers = [well(f"s{i}") for i in range(healthy)] + [dead(f"d{i}") for i in range(ill)] + [well("r", REPLICA)]
    assert failure_tolerance(servers) == tolerance


# -- promotion ---------------------------------------------------------------------------------------------------------


def test_a_learner_votes_after_it_was_stable_for_long_enough():
    assert steps([well("s1"), well("s2", LEARNER, for_s=10.0)]) == [("promote", "s2")]
    assert steps([well("s1"), well("s2", LEARNER, for_s=9.9)]) == []
    assert steps([well("s1"), well("s2", LEARNER, for_s=1.0)], server_stabilization_time_ms=1000) == [("promote", "s2")]
    ill = replace(well("s2", LEARNER), healthy=False)
    assert steps([well("s1"), ill]) == []


def test_a_replica_is_never_promoted():
    assert steps([well("s1"), well("r1", REPLICA, for_s=1e6)]) == []


# -- removal -----------------------------------------------------------------------------------------------------------


def test_a_dead_server_goes_when_fewer_are_needed_afterwards():
    healthy = [well("s1"), well("s2"), well("s3")]
    assert steps([*healthy, dead("s4")]) == [("remove", "s4")]
    assert steps([*healthy, dead("s4", for_s=9.0)]) == []
    assert steps([*healthy, dead("s4")], cleanup_dead_servers=False) == []
    assert steps([*healthy, dead("s4", for_s=1.0)], server_stabilization_time_ms=1000) == [("remove", "s4")]


def test_a_dead_server_keeps_its_place_where_its_removal_gains_nothing():
    """Of two voters both are needed, of three two: if it only restarts, it can make up for another loss at once."""
    assert steps([well("s1"), well("s2"), dead("s3")]) == []
    assert steps([well("s1"), well("s2"), well("s3"), well("s4"), dead("s5")]) == []


def test_never_more_than_a_minority_is_removed():
    assert steps([well("s1"), dead("s2")]) == []
    assert steps([well("s1"), dead("s2"), dead("s3")]) == []
    assert steps([well("s1"), well("s2"), dead("s3"), dead("s4")]) == []
    assert steps([well("s1"), well("s2"), well("s3"), dead("s4"), dead("s5")]) == [("remove", "s4"), ("remove", "s5")]


def test_fewer_than_min_quorum_never_remain():
    servers = [well("s1"), well("s2"), well("s3"), dead("s4")]
    assert steps(servers, min_quorum=3) == [("remove", "s4")]
    assert steps(servers, min_quorum=4) == []


def test_of_many_dead_servers_only_as_many_go_as_gain_something():
    alive = [well(f"s{i}") for i in range(4)]
    gone = [dead("d1"), dead("d2"), dead("d3")]
    assert len(steps([*alive, *gone])) == 3
    assert len(steps([*alive, *gone[:2]])) == 2
    assert steps([*alive, *gone[:1]]) == []


def test_dead_servers_without_a_vote_go_at_once():
    servers = [well("s1"), dead("s2", LEARNER), dead("r1", REPLICA)]
    assert steps(servers) == [("remove", "s2"), ("remove", "r1")]


def test_a_new_server_is_promoted_before_the_dead_one_is_removed():
    assert steps([well("s1"), well("s2"), dead("s3"), well("s4", LEARNER)])[0] == ("promote", "s4")


def test_the_name_of_a_dead_server_is_cleared_for_one_that_waits_for_it_where_all_are_let_in():
    servers = [well("s1"), well("s2"), dead("s3")]
    new = waiting("s3", node_id="id-new", key_hash="key-new")
    assert steps(servers, [new], auto_admit_servers=True) == [("remove", "s3")]
    assert steps(servers, [new]) == []
    assert steps([well("s1"), dead("s3")], [new], auto_admit_servers=True) == []


# -- admission ---------------------------------------------------------------------------------------------------------


def test_who_waits_is_let_in_by_autopilot_only_where_that_is_set():
    assert steps([well("s1")], [waiting("s2")]) == []
    assert steps([well("s1")], [waiting("s2")], auto_admit_servers=True) == [("admit", "s2")]


def test_a_server_that_autopilot_removed_may_come_back_and_no_other():
    gone = row("s2")._replace(status="failed")
    assert steps([well("s1")], [waiting("s2")], {"s2": gone}) == [("admit", "s2")]
    for other in (
        gone._replace(status="alive"),  # it says so itself, while an operator removes it
        gone._replace(status="left"),  # an operator removed it
        gone._replace(key_hash="another"),
        gone._replace(node_id="another"),
        gone._replace(role="client"),
        gone._replace(voter=True),
        None,
    ):
        assert not returns(waiting("s2"), other)


# -- what operators ask for --------------------------------------------------------------------------------------------


def test_a_server_is_found_by_any_of_its_names():
    servers = [member("s1"), replace(member("s2"), port=8301), replace(member("s3"), port=8301)]
    assert find(servers, node_id="id-s2").name == "s2"
    assert find(servers, name="s3").name == "s3"
    assert find(servers, address="10.0.0.1:8300").name == "s1"
    assert find(servers, address="10.0.0.1:8301", name="s3").name == "s3"
    with pytest.raises(Conflict, match="more than one"):
        find(servers, address="10.0.0.1:8301")
    with pytest.raises(NotFound, match="its servers are s1"):
        find(servers, name="s9")
    with pytest.raises(BadRequest):
        find(servers)


def test_a_server_without_which_nothing_could_be_decided_is_not_removed():
    servers = [member("s1"), member("s2"), member("s3"), member("r1", REPLICA)]
    everyone = {m.id for m in servers}
    assert removal_problem(servers, everyone, servers[0]) == ""
    assert removal_problem(servers, {"id-s1", "id-s2"}, servers[2]) == ""
    assert "bring back s3" in removal_problem(servers, {"id-s1", "id-s2"}, servers[1])
    assert removal_problem(servers, {"id-s1"}, servers[3]) == ""
    assert "last voting server" in removal_problem(servers[:1], everyone, servers[0])


def test_a_majority_is_more_than_half():
    assert [majority(n) for n in range(1, 8)] == [1, 2, 2, 3, 3, 4, 4]
