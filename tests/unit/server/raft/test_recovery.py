"""Which data directory is safe to keep, and what each choice loses: shapes of logs, and what the plan says of them.

A log is written as the terms of its entries, "0112" = four entries of terms 0, 1, 1, 2. Two logs agree where their
terms agree, as in Raft.
"""

from __future__ import annotations

import json
from typing import Any

import msgpack
import pytest

from rostra.server.raft.members import LEARNER, REPLICA, VOTER, Member
from rostra.server.raft.recovery import (
    Found,
    RecoveryPlan,
    SnapshotFound,
    choose,
    compare,
    contents_of,
    effective,
    members_by_name,
    members_by_peers_json,
    newest_command_ms,
    plan_recovery,
    standing,
)
from rostra.server.state.catalog import Register
from rostra.server.state.entry import encode_entry
from rostra.server.state.kv import DeleteTree, SetKey
from rostra.wire.errors import BadRequest, Conflict

CLUSTER = "6b1e1c5e-0000-4000-8000-000000000000"


def member(name: str, suffrage: str = VOTER) -> Member:
    return Member(f"id-{name}", f"10.0.0.{name[1:]}", 8300, f"key-{name}", name, suffrage)


def members(count: int) -> tuple[Member, ...]:
    return tuple(member(f"s{i + 1}") for i in range(count))


def command(index: int, term: int) -> bytes:
    """A write of key `k<index>`, differing by term as two leaders' entries do."""
    entry = encode_entry(SetKey(f"k{index}", b"secret %d" % term), cluster_id=CLUSTER, at_ms=1000 * index)
    return b"\x00" + msgpack.packb([entry])


def log(terms: str, first: int = 1) -> tuple[tuple[bytes, int, int], ...]:
    numbered = enumerate(map(int, terms), first)
    return tuple((command(i, t) if t else b"\x01", i, t) for i, t in numbered)


def directory(
    name: str,
    terms: str,
    *,
    of: tuple[Member, ...] | int = 3,
    commit: int = 0,
    snapshot: tuple[int, int] | None = None,
    first: int = 1,
    term: int = 0,
    logged: tuple[int, tuple[Member, ...]] | None = None,
    **more: Any,
) -> Found:
    """The directory of server `name`; `snapshot` is (index, term), `first` the log's first index."""
    founding = members(of) if isinstance(of, int) else of
    found = SnapshotFound(*snapshot, 1000, founding, 0) if snapshot else None
    fields = effective(log(terms, first), commit, found, logged, founding)
    fields["problems"] += more.pop("problems", ())
    return Found(
        path=more.pop("path", f"/data/{name}"),
        node_id=f"id-{name}",
        cluster_id=more.pop("cluster_id", CLUSTER),
        term=term or max(map(int, terms), default=0),
        **fields,
        **more,
    )


def plan(*found: Found) -> RecoveryPlan:
    plans = plan_recovery(found)
    assert len(plans) == 1
    return plans[0]


def kept(plan: RecoveryPlan) -> str:
    return plan.best.keep.path if plan.best else ""


def losses(plan: RecoveryPlan, path: str) -> dict[str, tuple[int, int, int, int]]:
    """{path: (committed, possible, overtaken, never)} of what keeping `path` gives up."""
    choice = next(c for c in plan.choices if c.keep.path == path)
    return {x.of.path: (x.committed, x.possible, x.overtaken, x.never) for x in choice.losses}


# -- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "up_to", "unknown_to"),
    [
        ("0111", "0111", 4, 4),
        ("0111", "01", 2, 2),
        ("0112", "0113", 3, 3),
        ("0222", "0111", 1, 1),
        ("", "0111", 0, 0),
    ],
)
def test_two_logs_are_equal_up_to_their_first_difference(a, b, up_to, unknown_to):
    one, two = directory("s1", a), directory("s2", b)
    assert (compare(one, two).up_to, compare(one, two).unknown_to) == (up_to, unknown_to)
    assert compare(two, one) == compare(one, two)


def test_a_log_that_begins_under_a_snapshot_is_compared_from_there_on():
    one = directory("s1", "0111222", commit=4)
    two = directory("s2", "1222", first=4, snapshot=(5, 2))
    assert compare(one, two).up_to == 7


def test_a_log_that_ends_before_the_other_begins_agrees_in_what_both_know_to_be_committed():
    behind = directory("s1", "01112", commit=3)
    ahead = directory("s2", "33", first=8, snapshot=(9, 3))
    shared = compare(behind, ahead)
    assert (shared.up_to, shared.unknown_to) == (3, 5)


def test_the_place_holder_of_an_installed_snapshot_is_the_entry_that_it_stands_for():
    whole = directory("s1", "011122")
    installed = directory("s2", "", snapshot=(5, 2))
    assert compare(whole, installed).up_to == 5


def test_an_entry_with_another_content_in_the_same_term_is_a_contradiction():
    one, two = directory("s1", "011"), directory("s2", "011")
    entries = (*two.entries[:2], (b"\x00other", 3, 1))
    two = Found("/data/s2", "id-s2", CLUSTER, 1, entries, members=members(3))
    assert compare(one, two).contradiction == 3
    found = plan(one, two)
    assert found.best is None
    assert "entry 3 of /data/s1 and /data/s2 has the same term and not the same content" in found.contradictions


def test_a_snapshot_that_is_ahead_of_its_log_takes_its_place_as_it_would_at_a_start():
    found = directory("s1", "0112", commit=3, snapshot=(9, 3))
    assert (found.last_index, found.last_term, found.committed, found.is_sound) == (9, 3, 9, True)


def test_a_snapshot_of_another_leader_than_the_log_s_takes_its_place():
    found = directory("s1", "01112", snapshot=(4, 3))
    assert (found.last_index, found.last_term) == (4, 3)


def test_a_log_without_the_snapshot_under_it_cannot_be_kept():
    found = directory("s1", "22", first=7)
    assert found.problems == ("the log begins at entry 7 and no whole snapshot holds what was before",)
    assert not found.is_sound


# -- whether recovery is needed --------------------------------------------------------------------------------------


def test_a_majority_needs_no_recovery():
    found = plan(directory("s1", "0112"), directory("s3", "011"))
    assert [f.path for f in found.startable] == ["/data/s1", "/data/s3"]
    assert found.best is None
    with pytest.raises(Conflict, match="no recovery is needed: start s1, s3"):
        choose(found, found.found[0], members(1), [])


def test_two_copies_of_one_server_are_one_voter():
    found = plan(directory("s1", "0112"), directory("s1", "011", path="/backup/s1"))
    assert found.startable == ()
    assert [f.path for f in found.older_copies] == ["/backup/s1"]
    assert kept(found) == "/data/s1"


def test_a_damaged_directory_is_no_voter():
    found = plan(directory("s1", "0112"), directory("s2", "0112", problems=("journal-00000001: byte 700",)))
    assert found.startable == ()
    assert [m.name for m in found.missing] == ["s2", "s3"]


def test_a_learner_and_a_replica_are_no_voters():
    listed = (member("s1"), member("s2"), member("s3"), member("s4", LEARNER), member("s5", REPLICA))
    found = plan(
        directory("s1", "011", of=listed), directory("s4", "0111", of=listed), directory("s5", "01", of=listed)
    )
    assert found.startable == ()
    assert kept(found) == "/data/s4"


def test_a_majority_that_would_not_elect_anyone_is_none():
    """s1 alone has the list with s4 in it; s2 would need s3, and s1 does not vote for it."""
    grown = (*members(3), member("s4"))
    found = plan(directory("s1", "0112", logged=(4, grown)), directory("s2", "011"))
    assert found.startable == ()
    assert kept(found) == "/data/s1"


def test_after_a_recovery_the_kept_server_needs_nobody():
    found = plan(directory("s1", "01123", commit=5, logged=(5, members(1))), directory("s2", "011"))
    assert [f.path for f in found.startable] == ["/data/s1"]


# -- which one to keep -----------------------------------------------------------------------------------------------


def test_the_longer_of_two_logs_of_one_term_is_kept_and_loses_nothing():
    found = plan(directory("s1", "0111", of=5, commit=2), directory("s2", "011111", of=5, commit=4))
    assert kept(found) == "/data/s2"
    assert losses(found, "/data/s2") == {}
    assert losses(found, "/data/s1") == {"/data/s2": (0, 2, 0, 0)}
    assert [f.path for f in found.choices[0].followers] == ["/data/s1"]


def test_entries_that_some_directory_knows_to_be_committed_count_as_acknowledged():
    found = plan(directory("s1", "011", of=5, commit=2), directory("s2", "011111", of=5, commit=5))
    assert losses(found, "/data/s1") == {"/data/s2": (2, 1, 0, 0)}


def test_of_two_divergent_logs_the_one_of_the_later_term_is_kept():
    found = plan(directory("s1", "0111111", of=5, commit=3), directory("s2", "011122", of=5, commit=3))
    assert kept(found) == "/data/s2"
    assert losses(found, "/data/s2") == {"/data/s1": (0, 0, 3, 0)}


def test_what_conflicts_with_something_committed_was_never_acknowledged():
    found = plan(directory("s1", "0111111", of=5, commit=3), directory("s2", "011122", of=5, commit=5))
    assert losses(found, "/data/s2") == {"/data/s1": (0, 0, 0, 3)}


def test_known_commitment_counts_more_than_a_later_term():
    """s5 led term 3 alone and its entry is void: another leader completed entry 2 of term 2 later, as s2 was told."""
    found = plan(directory("s2", "02", of=5, commit=2), directory("s5", "03", of=5, commit=1))
    assert found.contradictions == ()
    assert kept(found) == "/data/s2"
    assert losses(found, "/data/s2") == {"/data/s5": (0, 0, 0, 1)}
    assert losses(found, "/data/s5") == {"/data/s2": (1, 0, 0, 0)}


def test_an_even_number_of_voters_can_lose_half_without_losing_anything_unseen():
    found = plan(directory("s1", "0111", of=4), directory("s2", "011", of=4))
    assert not found.unseen
    assert losses(found, "/data/s2") == {"/data/s1": (0, 1, 0, 0)}


def test_what_a_later_leader_overtook_was_never_acknowledged_where_the_missing_are_no_majority():
    found = plan(directory("s1", "01111", of=4), directory("s2", "0112", of=4))
    assert losses(found, "/data/s2") == {"/data/s1": (0, 0, 0, 2)}


def test_a_missing_majority_may_have_acknowledged_what_nobody_here_has():
    assert plan(directory("s1", "011")).unseen
    assert [m.name for m in plan(directory("s1", "011")).missing] == ["s2", "s3"]


def test_a_snapshot_ahead_of_the_other_s_log_loses_nothing():
    ahead = directory("s1", "44", of=5, first=8, snapshot=(9, 4))
    behind = directory("s2", "0111", of=5, commit=3)
    found = plan(ahead, behind)
    assert kept(found) == "/data/s1"
    assert losses(found, "/data/s1") == {}
    assert losses(found, "/data/s2") == {"/data/s1": (6, 0, 0, 0)}


def test_what_lies_in_the_other_s_snapshot_is_lost_although_it_cannot_be_listed():
    found = plan(directory("s1", "44", of=5, first=8, snapshot=(9, 4)), directory("s2", "0111", of=5, commit=4))
    choice = next(c for c in found.choices if c.keep.path == "/data/s2")
    assert (choice.losses[0].first, choice.losses[0].last, choice.losses[0].committed) == (5, 9, 5)


def test_an_end_that_cannot_be_compared_with_a_snapshot_does_not_count_as_a_part_of_it():
    ahead = directory("s1", "44", of=5, first=8, snapshot=(9, 4))
    found = plan(ahead, directory("s2", "01112", of=5, commit=3))
    choice = next(c for c in found.choices if c.keep.path == "/data/s2")
    assert (choice.losses[0].first, choice.losses[0].committed) == (4, 6)


def test_what_cannot_be_compared_is_neither_called_committed_nor_void():
    ahead = directory("s3", "33", of=7, first=6, snapshot=(7, 3))
    found = plan(directory("s1", "011", of=7), directory("s2", "0111122", of=7, commit=3), ahead)
    assert losses(found, "/data/s1")["/data/s2"] == (0, 2, 0, 2)
    ahead = directory("s3", "33", of=7, first=8, snapshot=(9, 3))
    found = plan(directory("s1", "01", of=7), directory("s2", "01112", of=7, commit=3), ahead)
    assert losses(found, "/data/s1")["/data/s2"] == (1, 2, 0, 0)


def test_a_damaged_directory_that_knows_more_leaves_no_safe_choice():
    broken = directory("s1", "011111", of=5, commit=6, problems=("journal-00000001: byte 700",))
    found = plan(broken, directory("s2", "011", of=5, commit=3))
    assert found.best is None
    assert losses(found, "/data/s2") == {"/data/s1": (3, 0, 0, 0)}


def test_a_damaged_directory_that_knows_no_more_does_not_matter():
    broken = directory("s1", "0111", of=5, commit=3, problems=("journal-00000001: byte 700",))
    assert kept(plan(broken, directory("s2", "01111", of=5, commit=3))) == "/data/s2"


def test_directories_that_went_separate_ways_leave_no_safe_choice():
    found = plan(directory("s1", "01122", of=5, commit=5), directory("s2", "01133", of=5, commit=5))
    assert found.best is None
    assert "/data/s1 and /data/s2 differ after entry 3" in found.contradictions[0]
    assert losses(found, "/data/s1")["/data/s2"][0] == 2


def test_where_histories_contradict_each_other_nothing_is_called_void():
    found = plan(directory("s1", "011222", of=5, commit=5), directory("s2", "011333", of=5, commit=5))
    assert losses(found, "/data/s2") == {"/data/s1": (2, 1, 0, 0)}


def test_each_cluster_has_a_plan_of_its_own():
    plans = plan_recovery([directory("s1", "011"), directory("s2", "0111", cluster_id="other")])
    assert [p.cluster_id for p in plans] == [CLUSTER, "other"]
    assert [len(p.found) for p in plans] == [1, 1]


def test_a_directory_without_a_log_is_in_no_plan():
    assert plan_recovery([directory("s1", "")]) == []


def test_voters_are_those_of_the_newest_list():
    found = plan(directory("s1", "011", of=3), directory("s4", "01111", logged=(4, (member("s4"), *members(4)[:3]))))
    assert [m.name for m in found.missing] == ["s2", "s3"]


def test_a_list_before_a_committed_one_does_not_count():
    """Of s1 to s3 only s1 is here, but the cluster went on to s1, s4, s5, s6: the other two of them are missing."""
    later = (member("s1"), member("s4"), member("s5"), member("s6"))
    found = plan(directory("s1", "01", of=3), directory("s4", "01111", commit=5, logged=(4, later)))
    assert [m.name for m in found.missing] == ["s5", "s6"]
    assert not found.unseen


# -- what the lost entries are about ---------------------------------------------------------------------------------


def test_lost_entries_are_told_by_key_and_never_by_value():
    commands = [SetKey("a/b", b"hush"), SetKey("a/b", b"hush again"), DeleteTree("c/"), Register(node="n")]
    packed = [encode_entry(each, cluster_id=CLUSTER, at_ms=7) for each in commands]
    found = contents_of([(b"\x00" + msgpack.packb(packed), 5, 1), (b"\x01", 6, 1), (b"\x02", 7, 1)])
    assert found.commands == 4
    assert list(found.keys) == ["a/b", "c/*"]
    assert found.kinds == {"kv.set": 2, "kv.delete-tree": 1, "catalog.register": 1}
    assert found.newest_ms == 7
    assert "hush" not in repr(found)


def test_entries_of_a_later_release_are_counted():
    found = contents_of([(b"\x00" + msgpack.packb([msgpack.packb([99])]), 5, 1), (b"\x00\xc1", 6, 1)])
    assert (found.commands, found.unreadable) == (1, 2)


def test_the_time_of_the_newest_command_is_found_behind_entries_without_one():
    found = Found("/d", "id", CLUSTER, entries=(*log("0111"), (b"\x01", 5, 2)))
    assert newest_command_ms(found) == 4000


# -- choosing --------------------------------------------------------------------------------------------------------


def test_the_change_is_one_entry_of_a_term_that_nobody_has_seen():
    found = plan(directory("s1", "0112", of=5), directory("s2", "011", of=5, term=9))
    change = choose(found, found.found[0], members_by_name(found, found.found[0], ["s1"]), [])
    assert (change.index, change.term) == (5, 10)
    assert change.members == (member("s1"),)
    assert change.emptied == ("s2", "s3", "s4", "s5")


def test_entries_of_another_directory_are_given_up_by_name_only():
    found = plan(directory("s1", "01111", of=5), directory("s2", "0122", of=5))
    keep = found.found[0]
    wanted = members_by_name(found, keep, ["s1"])
    with pytest.raises(Conflict, match=r"s2 \(/data/s2\) has 2 entries that /data/s1 does not have"):
        choose(found, keep, wanted, [])
    with pytest.raises(Conflict, match="-lose=s2"):
        choose(found, keep, wanted, ["s1"])
    assert choose(found, keep, wanted, ["s2"]).keep is keep
    assert choose(found, keep, wanted, ["/data/s2"]).keep is keep


def test_a_name_that_gives_up_nothing_known_is_an_error():
    found = plan(directory("s1", "011"))
    with pytest.raises(BadRequest, match="-lose=s9: no directory given is that server's"):
        choose(found, found.found[0], members(1), ["s9"])


def test_a_damaged_directory_cannot_be_kept():
    found = plan(directory("s1", "011", problems=("journal-00000001 is damaged at byte 700",)))
    with pytest.raises(Conflict, match="/data/s1 cannot be kept: journal-00000001 is damaged at byte 700"):
        choose(found, found.found[0], members(1), [])


def test_nothing_is_chosen_while_a_server_runs():
    found = plan(directory("s1", "011", of=5), directory("s2", "01", of=5, in_use="a process has it open"))
    with pytest.raises(Conflict, match=r"/data/s2: a process has it open\. Stop every server first"):
        choose(found, found.found[0], members(1), [])


def test_a_survivor_whose_log_is_a_part_of_the_kept_one_is_a_member_from_the_start():
    found = plan(directory("s1", "0111", of=5), directory("s2", "011", of=5))
    change = choose(found, found.found[0], members_by_name(found, found.found[0], ["s1", "s2"]), [])
    assert [f.path for f in change.followers] == ["/data/s2"]
    assert change.emptied == ("s3", "s4", "s5")


def test_a_survivor_that_gives_up_its_end_follows_unless_it_knew_that_to_be_committed():
    mine, other = directory("s1", "01122", of=5, commit=3), directory("s2", "011111", of=5, commit=3)
    found = plan(mine, other)
    change = choose(found, mine, members_by_name(found, mine, ["s1", "s2"]), ["s2"])
    assert change.remarks == ("s2 drops the entries that are given up when it hears the new leader",)
    other = directory("s2", "011111", of=5, commit=5)
    found = plan(mine, other)
    with pytest.raises(Conflict, match="s2 cannot be a member from the start: it knows entries to be committed"):
        choose(found, mine, members_by_name(found, mine, ["s1", "s2"]), ["s2"])
    assert choose(found, mine, members_by_name(found, mine, ["s1"]), ["s2"]).emptied == ("s2", "s3", "s4", "s5")


def test_a_server_whose_directory_is_not_there_cannot_be_a_member():
    found = plan(directory("s1", "0111", of=5))
    with pytest.raises(Conflict, match="s2 cannot be a member from the start: its data directory is not among those"):
        choose(found, found.found[0], members_by_name(found, found.found[0], ["s1", "s2"]), [])


def test_members_are_named_and_the_kept_one_is_among_them_and_votes():
    listed = (member("s1"), member("s2"), member("s3"), member("r1", REPLICA))
    found = plan(directory("r1", "011", of=listed))
    with pytest.raises(BadRequest, match="-members: the kept server, r1, must be in the list"):
        members_by_name(found, found.found[0], ["s1"])
    with pytest.raises(BadRequest, match="-members: no server is called 's9'; known are r1, s1, s2, s3"):
        members_by_name(found, found.found[0], ["s9"])
    assert members_by_name(found, found.found[0], ["r1"]) == (member("r1"),)


def test_a_name_is_that_of_the_server_which_has_it_now():
    """s2 was wiped and let in again: two identities of one name, and an older directory that knows the first one."""
    reborn = Member("id-new", "10.0.0.2", 8300, "key-new", "s2")
    later = (member("s1"), reborn, member("s3"))
    new = Found("/data/s2", "id-new", CLUSTER, 1, log("0111"), commit_index=4, members=later, members_index=3)
    found = plan(directory("s3", "01", of=5), new)
    assert members_by_name(found, new, ["s2"]) == (reborn,)
    assert members_by_peers_json(found, new, '["10.0.0.2:8300"]', "peers.json") == (reborn,)
    change = choose(plan(new), new, (reborn,), [])
    assert change.emptied == ("s1", "s3")


def test_without_any_list_of_members_nothing_is_called_void():
    one = Found("/data/s1", "id-s1", CLUSTER, 1, log("011"))
    found = plan(one, Found("/data/s2", "id-s2", CLUSTER, 2, log("0122")))
    assert found.unseen
    assert losses(found, "/data/s1") == {"/data/s2": (0, 2, 0, 0)}


def test_an_older_copy_is_kept_only_where_the_newer_one_is_given_up():
    found = plan(directory("s1", "01112"), directory("s1", "011", path="/backup/s1"))
    old = found.found[1]
    with pytest.raises(Conflict, match="-lose=s1"):
        choose(found, old, members_by_name(found, old, ["s1"]), [])
    assert choose(found, old, members_by_name(found, old, ["s1"]), ["s1"]).index == 4


# -- Consul's file ---------------------------------------------------------------------------------------------------


def by_peers(text: Any, *found: Found) -> tuple[Member, ...]:
    made = plan(*found)
    return members_by_peers_json(made, made.found[0], text if isinstance(text, str) else json.dumps(text), "peers.json")


def test_peers_json_lists_addresses():
    found = (directory("s1", "011", of=5), directory("s2", "01", of=5))
    assert by_peers(["10.0.0.1:8300", "10.0.0.2:8300"], *found) == (member("s1"), member("s2"))


def test_peers_json_lists_ids_with_addresses_that_count():
    found = (directory("s1", "011", of=5), directory("s2", "01", of=5))
    told = by_peers(
        [
            {"id": "id-s1", "address": "192.168.0.1:8301", "non_voter": False},
            {"id": "id-s2", "address": "[::0001]:8300", "non_voter": True},
        ],
        *found,
    )
    assert [(m.name, m.host, m.port, m.suffrage) for m in told] == [
        ("s1", "192.168.0.1", 8301, VOTER),
        ("s2", "::1", 8300, REPLICA),
    ]


def test_peers_json_finds_a_server_by_address_where_the_id_says_nothing():
    """Raft protocol 2 of Consul has the address in the place of the id."""
    assert by_peers([{"id": "10.0.0.1:8300", "address": "10.0.0.1:8300"}], directory("s1", "011")) == (member("s1"),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "peers.json: Expecting"),
        ("{}", "must be an array of servers, not empty"),
        ("[]", "must be an array of servers, not empty"),
        ([7], "a server must be"),
        ([{"id": "id-s1"}], "a server must be"),
        ([{"id": 7, "address": "10.0.0.1:8300"}], "id must be a text"),
        ([{"address": "10.0.0.1:8300", "non_voter": "no"}], "non_voter true or false"),
        (["10.0.0.1"], "'10.0.0.1' is not ip:port"),
        (["s1:8300"], "'s1:8300' is not ip:port"),
        (["10.0.0.1:99999"], "is not ip:port"),
        (["10.0.0.9:8300"], "no directory given knows a server 10.0.0.9:8300. A member needs the hash of its key"),
        (["10.0.0.1:8300", {"id": "id-s1", "address": "10.0.0.7:8300"}], "s1 is listed twice"),
        (["10.0.0.2:8300"], "the kept server, s1, must be in the list"),
        ([{"id": "id-s1", "address": "10.0.0.1:8300", "non_voter": True}], "the kept server must be a voter"),
    ],
)
def test_what_is_wrong_with_peers_json_is_said(text, problem):
    with pytest.raises(BadRequest, match=r"peers\.json") as raised:
        by_peers(text, directory("s1", "011"))
    assert problem in raised.value.message


def test_the_standing_of_lost_entries_is_told_in_words():
    found = plan(directory("s1", "011", of=5, commit=2), directory("s2", "011111", of=5, commit=5))
    choice = next(c for c in found.choices if c.keep.path == "/data/s1")
    assert standing(choice.losses[0]) == "2 known to be committed, 1 possibly acknowledged"
